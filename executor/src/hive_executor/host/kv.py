"""The permission `kv`: values that outlive a task. What an attempt writes is staged once, when it has succeeded."""

import asyncio
from bisect import insort
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

import msgspec
from hive_common.contracts.events import KvWrite
from hive_common.contracts.limits import (
    KV_KEY_CHARACTERS_MAX,
    KV_KEYS_MAX,
    KV_STAGED_BYTES_MAX,
    KV_VALUE_BYTES_MAX,
)
from hive_common.contracts.messages import KvReply, KvRequest, call_subject
from hive_common.contracts.permissions import KvPermission, Permissions
from hive_common.kernel.errors import BudgetExhausted, HiveError, InvalidArgument, PayloadTooLarge
from hive_common.permissions import check_kv
from hive_common.permissions.actions import kv_list_action, kv_read_action, kv_write_action
from hive_common.permissions.kept import is_key, is_prefix, size_of

from hive_executor.host.approval import Approvals
from hive_executor.link import Backoff, Link

SUBJECT: Final = "kv"
ASK_S: Final = 5.0
STAGE_S_MAX: Final = 30.0
"""So long the registry may be away while an attempt ends; then the attempt is given back."""

LIMIT_DEFAULT: Final = 100
_EXPECTED: Final = f"1 to {KV_KEY_CHARACTERS_MAX} letters, digits and . _ - / : @ ="


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may stand in every request; no other namespace than its own is there for an attempt."""

    namespace: str | None = None


class _Key(_Named, frozen=True, kw_only=True):
    key: str


class _Put(_Named, frozen=True, kw_only=True):
    key: str
    value: msgspec.Raw


class _Keys(_Named, frozen=True, kw_only=True):
    prefix: str = ""
    after: str = ""
    limit: int = LIMIT_DEFAULT


class _Found(msgspec.Struct, frozen=True):
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Page(msgspec.Struct, frozen=True):
    keys: list[str]
    more: bool


N = TypeVar("N", bound=_Named)


class KvStore(Protocol):
    """Where values are kept."""

    async def ask(self, request: KvRequest, within_s: float) -> KvReply:
        """Return the answer to a request.

        Raises:
            HiveError: that it carries, or why there is none within the time.
        """
        ...


class KvAccess:
    """Reads and writes for one attempt.

    Args:
        store: where values are kept.
        permission: the namespace and its quota.
        approvals: of the attempt, with its token.
    """

    def __init__(self, store: KvStore, permission: KvPermission, *, approvals: Approvals | None = None) -> None:
        self._store = store
        self._permission = permission
        self._permissions = Permissions(kv=permission)
        self._approvals = approvals or Approvals()
        self._writes: dict[str, KvWrite] = {}

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Answer one call; see `Capability`.

        Raises:
            PermissionDenied: another namespace.
            InvalidArgument: the request.
            PayloadTooLarge: a value, or all that this attempt writes.
            BudgetExhausted: this attempt alone writes more than the quota.
            HiveError: what the store raises.
        """
        match operation:
            case "get":
                return await self._get(self._read(request, _Key), left_ms)
            case "keys":
                return await self._list(self._read(request, _Keys), left_ms)
            case "put":
                put = self._read(request, _Put)
                return await self._write(KvWrite(put.key, _compact(put.value)))
            case "delete":
                return await self._write(KvWrite(self._read(request, _Key).key))
        raise InvalidArgument(f"kv.{operation} does not exist; expected get, keys, put or delete")

    async def stage(self) -> None:
        """Hand over what was written, if anything was. It counts once the attempt has decided its task.

        Raises:
            HiveError: it was not taken, or nobody says that it was.
        """
        if self._writes:
            await self._ask(STAGE_S_MAX, "stage", writes=tuple(self._writes.values()))

    def _read(self, request: bytes, kind: type[N]) -> N:
        try:
            asked = msgspec.json.decode(request, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidArgument(f"the request is not what this takes: {error}") from error
        if asked.namespace is not None:
            check_kv(self._permissions, asked.namespace)
        key = getattr(asked, "key", None)
        if key is not None and not is_key(key):
            raise InvalidArgument(f"key: got {key[:80]!r}; expected {_EXPECTED}", path="key")
        return asked

    async def _get(self, asked: _Key, left_ms: int) -> bytes:
        await self._approvals.need("kv", lambda agent: kv_read_action(agent, self._permission.namespace, asked.key))
        own = self._writes.get(asked.key)
        if own is not None:
            return msgspec.json.encode(_Found(own.value))
        reply = await self._ask(left_ms / 1000, "get", key=asked.key)
        return msgspec.json.encode(_Found(reply.value))

    async def _list(self, asked: _Keys, left_ms: int) -> bytes:
        if not is_prefix(asked.prefix) or not is_prefix(asked.after):
            raise InvalidArgument(f"prefix, after: expected {_EXPECTED}", path="prefix")
        if not 1 <= asked.limit <= KV_KEYS_MAX:
            raise InvalidArgument(f"limit: got {asked.limit}; expected 1 to {KV_KEYS_MAX}", path="limit")
        await self._approvals.need(
            "kv", lambda agent: kv_list_action(agent, self._permission.namespace, asked.prefix)
        )
        after = asked.after
        deadline_s = asyncio.get_running_loop().time() + left_ms / 1000
        while True:
            left_s = deadline_s - asyncio.get_running_loop().time()
            reply = await self._ask(left_s, "list", prefix=asked.prefix, after=after, limit=asked.limit)
            page = self._with_own(asked.prefix, after, reply)
            # A page all of whose keys this attempt has deleted says nothing about where the next one begins.
            if page or not reply.more or not reply.keys:
                return msgspec.json.encode(_Page(page, reply.more))
            after = reply.keys[-1]

    def _with_own(self, prefix: str, after: str, reply: KvReply) -> list[str]:
        last = reply.keys[-1] if reply.more and reply.keys else None
        deleted = {write.key for write in self._writes.values() if isinstance(write.value, msgspec.UnsetType)}
        page = [key for key in reply.keys if key not in deleted]
        for key in self._writes.keys() - deleted - set(page):
            if key.startswith(prefix) and key > after and (last is None or key < last):
                insort(page, key)
        return page

    async def _write(self, write: KvWrite) -> bytes:
        size = size_of(write)
        if size - len(write.key) > KV_VALUE_BYTES_MAX:
            raise PayloadTooLarge(f"the value of {write.key!r} is larger than {KV_VALUE_BYTES_MAX} bytes")
        before = self._writes.get(write.key)
        total = sum(map(size_of, self._writes.values())) + size - (0 if before is None else size_of(before))
        if total > KV_STAGED_BYTES_MAX:
            raise PayloadTooLarge(f"one attempt may write {KV_STAGED_BYTES_MAX} bytes of keys and values at most")
        if total > self._permission.quota_bytes:
            raise BudgetExhausted(
                f"{total} bytes of keys and values; the quota is {self._permission.quota_bytes} "
                "(`permissions.kv.quota`)",
                limit=self._permission.quota_bytes,
                spent=total,
            )
        if len(self._writes) >= KV_KEYS_MAX and before is None:
            raise PayloadTooLarge(f"one attempt may write {KV_KEYS_MAX} keys at most")
        await self._approvals.need("kv", lambda agent: kv_write_action(agent, self._permission.namespace, write))
        self._writes[write.key] = write
        return b"{}"

    async def _ask(self, within_s: float, op: str, **more: Any) -> KvReply:
        request = KvRequest(op=op, token=self._approvals.token, namespace=self._permission.namespace, **more)
        return await self._store.ask(request, within_s)


class RegistryKv:
    """A `KvStore` that asks the registry, again and again while it is away: all that is asked may be asked twice.

    Args:
        link: to the control plane.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subject = call_subject(link.executor_id, SUBJECT)

    async def ask(self, request: KvRequest, within_s: float) -> KvReply:
        """Ask; see `KvStore`."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        backoff = Backoff()
        while True:
            try:
                once_s = min(ASK_S, max(0.001, until_s - loop.time()))
                reply = await self._link.request(self._subject, request, KvReply, once_s)
                if reply.error is not None:
                    raise reply.error.raised()
                return reply
            except HiveError as error:
                pause_s = backoff.next_s()
                if not error.retryable or loop.time() + pause_s >= until_s:
                    raise
                await asyncio.sleep(pause_s)


class FleetingKv:
    """A `KvStore` for a try-out: it is empty, and keeps nothing.

    Args:
        told: called with what would have been kept.
    """

    def __init__(self, told: Callable[[tuple[KvWrite, ...]], None] = lambda _: None) -> None:
        self._told = told

    async def ask(self, request: KvRequest, within_s: float) -> KvReply:
        """Find nothing."""
        if request.op == "stage":
            self._told(request.writes)
        return KvReply()


def _compact(value: msgspec.Raw) -> msgspec.Raw:
    # Spaces between things are the guest's, and need not be kept.
    try:
        return msgspec.Raw(msgspec.json.format(bytes(value), indent=-1))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"value: {error}; expected JSON", path="value") from error
