"""Capability tokens: what an attempt may do, in a form that travels and that its holder can only narrow.

A token is a Biscuit (biscuitsec.org). Its first block is the scheduler's, signed with the root key of the
installation: executor, the executor's public key, job, task, attempt, permissions, expiry. Whoever holds the token
may append blocks that narrow permissions and expiry, without asking anybody. Each block is one fact with bytes in
it, JSON of the structs below. A block with anything else in it (rules, checks, a third party's signature) is
refused, so nothing that somebody else wrote is ever evaluated; what the blocks allow together is `meet` of them.
"""

import re
from functools import lru_cache
from typing import Final, NoReturn, TypeVar

import msgspec
from biscuit_auth import (
    Biscuit,
    BiscuitBuilder,
    BiscuitValidationError,
    BlockBuilder,
    PrivateKey,
    PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.limits import CAPABILITY_TOKEN_BLOCKS_MAX, CAPABILITY_TOKEN_CHARACTERS_MAX
from hive_common.contracts.permissions import Permissions
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.permissions.lattice import meet

KEPT_MAX: Final = 1024
"""Tokens that a verifier need not check twice; an executor shows the same one at each call of an attempt."""

_CHARACTERS: Final = re.compile(r"[A-Za-z0-9_-]+={0,2}\Z")
_FACT: Final = re.compile(r"(?P<name>attempt|narrowed)\(hex:(?P<data>(?:[0-9a-f]{2})+)\);\s*\Z")


_KEY: Final = re.compile(r"[0-9a-f]{64}\Z")

T = TypeVar("T", bound=msgspec.Struct)


class Claims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a token says, after all of its blocks.

    Attributes:
        executor: id of the executor that may use it.
        key: that executor's public nkey.
        job, task, attempt: whose token it is.
        agent: `name@version` of what runs in it.
        pin: where data of its job may go; empty: anywhere.
        counts_only: of model calls of its job no prompt and no completion are kept.
        kill_epoch: newest kill order that was known when it was made. What a later one has stopped is over, also
            when that is lifted.
        permissions: what that attempt may do.
        expires_us: from then on it says nothing.
        approved: hashes of the actions that a person approved (`hive_common.permissions.actions`).
        budgets: what its model calls share with others. Nobody narrows or widens them.
        replicated: several attempts of its task may run, so that requests may change nothing.
    """

    executor: str
    key: str
    job: str
    task: str
    attempt: int
    permissions: Permissions
    expires_us: int
    agent: str = ""
    pin: str = ""
    counts_only: bool = False
    kill_epoch: int = 0
    approved: tuple[str, ...] = ()
    budgets: tuple[SharedBudget, ...] = ()
    replicated: bool = False


class _Narrowed(msgspec.Struct, frozen=True, kw_only=True):
    permissions: Permissions
    expires_us: int


def new_key() -> str:
    """Return a new root key, in hex. Whoever has it can make tokens."""
    return Ed25519PrivateKey.generate().private_bytes_raw().hex()


def public_key(private: str) -> str:
    """Return the public part of a root key, in hex; all that is needed to verify.

    Raises:
        InvalidArgument: that is no key.
    """
    return Ed25519PrivateKey.from_private_bytes(_bytes_of(private)).public_key().public_bytes_raw().hex()


class Minter:
    """Makes tokens.

    Args:
        private: the root key, in hex.

    Raises:
        InvalidArgument: that is no key.
    """

    def __init__(self, private: str) -> None:
        self._root = PrivateKey(f"ed25519-private/{_bytes_of(private).hex()}")

    def mint(self, claims: Claims) -> str:
        """Return the token that says this."""
        fact = {"data": msgspec.json.encode(claims)}
        token: str = BiscuitBuilder("attempt({data})", fact).build(self._root).to_base64()
        return token


class Verifier:
    """Reads tokens, and narrows them.

    Args:
        public: the public root key, in hex.

    Raises:
        InvalidArgument: that is no key.
    """

    def __init__(self, public: str) -> None:
        try:
            self._root = PublicKey(f"ed25519/{_bytes_of(public).hex()}")
        except ValueError as error:
            raise InvalidArgument("the public key for capability tokens is no Ed25519 key") from error
        self._read = lru_cache(maxsize=KEPT_MAX)(self._read_whole)

    def verify(self, token: str, *, executor: str, now_us: int, key: str = "") -> Claims:
        """Return what a token says.

        Args:
            token: as it was shown.
            executor: who shows it, as the transport knows.
            now_us: the time, in µs since 1970.
            key: the public nkey of whoever shows it, where the transport knows it.

        Raises:
            PermissionDenied: there is none, it is not of this installation, was changed, has expired, belongs to
                another executor, or holds what no token of ours does.
        """
        claims = self._read(token)
        if claims.executor != executor or (key and claims.key != key):
            _refuse("is another executor's")
        if now_us >= claims.expires_us:
            _refuse("has expired")
        return claims

    def narrow(self, token: str, permissions: Permissions, expires_us: int) -> str:
        """Return a token with less in it. What `permissions` has beyond the token's own changes nothing.

        Raises:
            PermissionDenied: the token is none of ours, or was narrowed as often as is allowed.
        """
        found = self._open(token)
        if found.block_count() >= CAPABILITY_TOKEN_BLOCKS_MAX:
            _refuse(f"was narrowed {CAPABILITY_TOKEN_BLOCKS_MAX - 1} times already")
        fact = {"data": msgspec.json.encode(_Narrowed(permissions=permissions, expires_us=expires_us))}
        narrowed: str = found.append(BlockBuilder("narrowed({data})", fact)).to_base64()
        return narrowed

    def _open(self, token: str) -> Biscuit:
        if not token:
            raise PermissionDenied("this needs the capability token of an attempt, and there is none")
        if len(token) > CAPABILITY_TOKEN_CHARACTERS_MAX or not _CHARACTERS.match(token):
            _refuse("is none")
        try:
            found = Biscuit.from_base64(token, self._root)
        except BiscuitValidationError:
            _refuse("is not of this installation, or was changed")
        # A few bytes of the format mean nothing, so that another token would be as good; here there is one form.
        if found.to_base64() != token:
            _refuse("was changed")
        return found

    def _read_whole(self, token: str) -> Claims:
        found = self._open(token)
        blocks = found.block_count()
        if blocks > CAPABILITY_TOKEN_BLOCKS_MAX:
            _refuse(f"has {blocks} blocks; expected {CAPABILITY_TOKEN_BLOCKS_MAX} at most")
        claims = _decoded(_data(found, 0, "attempt"), Claims)
        for index in range(1, blocks):
            block = _decoded(_data(found, index, "narrowed"), _Narrowed)
            claims = msgspec.structs.replace(
                claims,
                permissions=meet(claims.permissions, block.permissions),
                expires_us=min(claims.expires_us, block.expires_us),
            )
        return claims


def _data(token: Biscuit, index: int, name: str) -> bytes:
    if token.block_external_key(index) is not None:
        _refuse("has a block that a third party signed")
    # Text in a block is printed as it is, quotes and all; bytes are printed in hex, so only those can be trusted.
    fact = _FACT.match(token.block_source(index))
    if fact is None or fact["name"] != name:
        _refuse("has a block that is more or less than one fact")
    return bytes.fromhex(fact["data"])


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError):
        _refuse("has a block that cannot be read")


def _bytes_of(key: str) -> bytes:
    if not _KEY.match(key):
        raise InvalidArgument("a key for capability tokens has 64 hexadecimal digits")
    return bytes.fromhex(key)


def _refuse(why: str) -> NoReturn:
    raise PermissionDenied(f"the capability token {why}")
