"""Tokens: what they say, who may use them, and that nothing appended to one gives more."""

import base64
from random import Random

import msgspec
import pytest
from biscuit_auth import Biscuit, BiscuitBuilder, BlockBuilder, KeyPair, PrivateKey, PublicKey
from hive_common.contracts.limits import CAPABILITY_TOKEN_BLOCKS_MAX, CAPABILITY_TOKEN_CHARACTERS_MAX
from hive_common.contracts.permissions import NONE, KvPermission, ModelPermission, Permissions
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.permissions import covers, meet
from hive_common.permissions.tokens import Claims, Minter, Verifier, new_key, public_key
from hive_common.testing.permission_sets import random_permissions
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = "5a" * 32
NOW = 1_000_000
PERMISSIONS = Permissions(model=ModelPermission(("small",), 100), kv=KvPermission("notes", 10))
CLAIMS = Claims(
    executor="e1", key="UKEY", job="j1", task="t1", attempt=2, permissions=PERMISSIONS, expires_us=NOW + 60
)

minter = Minter(ROOT)


@pytest.fixture
def verifier() -> Verifier:
    return Verifier(public_key(ROOT))


def denied(verifier: Verifier, token: str, *, executor: str = "e1", now_us: int = NOW, key: str = "") -> str:
    with pytest.raises(PermissionDenied) as error:
        verifier.verify(token, executor=executor, now_us=now_us, key=key)
    assert token[:20] not in error.value.message or not token
    return error.value.message


def block(token: str, source: str, **data: bytes | str) -> str:
    found = Biscuit.from_base64(token, PublicKey(f"ed25519/{public_key(ROOT)}"))
    return str(found.append(BlockBuilder(source, data)).to_base64())


def test_a_token_says_what_was_minted(verifier: Verifier) -> None:
    token = minter.mint(CLAIMS)
    for _ in range(2):
        assert verifier.verify(token, executor="e1", now_us=NOW, key="UKEY") == CLAIMS


def test_a_token_is_its_executor_s_until_it_expires(verifier: Verifier) -> None:
    token = minter.mint(CLAIMS)
    assert "another executor" in denied(verifier, token, executor="e2")
    assert "another executor" in denied(verifier, token, key="UOTHER")
    assert "expired" in denied(verifier, token, now_us=CLAIMS.expires_us)
    assert "expired" in denied(verifier, token, now_us=2**62)


def test_a_token_for_one_attempt_says_nothing_about_another(verifier: Verifier) -> None:
    other = Claims(executor="e1", key="UKEY", job="j1", task="t1", attempt=3, permissions=NONE, expires_us=NOW + 60)
    first, second = minter.mint(CLAIMS), minter.mint(other)
    assert verifier.verify(second, executor="e1", now_us=NOW).attempt == 3
    assert verifier.verify(second, executor="e1", now_us=NOW).permissions == NONE
    assert verifier.verify(first, executor="e1", now_us=NOW).attempt == 2


def test_what_was_narrowed_has_less_and_ends_sooner(verifier: Verifier) -> None:
    token = verifier.narrow(minter.mint(CLAIMS), Permissions(model=ModelPermission(("*",), 7)), NOW + 5)
    narrowed = verifier.verify(token, executor="e1", now_us=NOW)
    assert narrowed.permissions == Permissions(model=ModelPermission(("small",), 7))
    assert narrowed.expires_us == NOW + 5
    assert "expired" in denied(verifier, token, now_us=NOW + 5)


def test_narrowing_never_prolongs(verifier: Verifier) -> None:
    token = verifier.narrow(minter.mint(CLAIMS), PERMISSIONS, 2**62)
    assert verifier.verify(token, executor="e1", now_us=NOW) == CLAIMS


@settings(max_examples=150, derandomize=True)
@given(seed=st.integers(0, 2**64 - 1))
def test_chains_of_tokens_only_ever_narrow(seed: int) -> None:
    random, verifier = Random(seed), Verifier(public_key(ROOT))
    parent = msgspec.structs.replace(CLAIMS, permissions=random_permissions(random))
    token = minter.mint(parent)
    for _ in range(random.randint(1, 4)):
        wanted, until = random_permissions(random), NOW + random.randint(1, 100)
        token = verifier.narrow(token, wanted, until)
        child = verifier.verify(token, executor="e1", now_us=NOW)
        assert covers(parent.permissions, child.permissions)
        assert child.permissions == meet(parent.permissions, wanted)
        assert child.expires_us == min(parent.expires_us, until)
        assert (child.executor, child.key, child.job, child.task, child.attempt) == ("e1", "UKEY", "j1", "t1", 2)
        parent = child


def test_it_can_be_narrowed_only_so_often(verifier: Verifier) -> None:
    token = minter.mint(CLAIMS)
    for _ in range(CAPABILITY_TOKEN_BLOCKS_MAX - 1):
        token = verifier.narrow(token, PERMISSIONS, NOW + 60)
    assert verifier.verify(token, executor="e1", now_us=NOW) == CLAIMS
    with pytest.raises(PermissionDenied, match="15 times"):
        verifier.narrow(token, PERMISSIONS, NOW + 60)
    wide = msgspec.json.encode({"permissions": PERMISSIONS, "expires_us": NOW + 60})
    assert "17 blocks" in denied(verifier, block(token, "narrowed({data})", data=wide))


def test_a_token_of_another_key_is_refused(verifier: Verifier) -> None:
    assert "not of this installation" in denied(verifier, Minter(new_key()).mint(CLAIMS))
    with pytest.raises(PermissionDenied):
        verifier.narrow(Minter(new_key()).mint(CLAIMS), PERMISSIONS, NOW)


def test_every_changed_bit_is_noticed(verifier: Verifier) -> None:
    token = verifier.narrow(minter.mint(CLAIMS), PERMISSIONS, NOW + 60)
    data = base64.urlsafe_b64decode(token)
    assert base64.urlsafe_b64encode(data).decode() == token
    for index in range(len(data)):
        for bit in range(8):
            changed = data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]
            denied(verifier, base64.urlsafe_b64encode(changed).decode())
    denied(verifier, token.rstrip("=") + "B" * token.count("="))


def test_a_block_that_is_cut_off_does_not_give_back_what_it_took(verifier: Verifier) -> None:
    whole = minter.mint(CLAIMS)
    narrowed = verifier.narrow(whole, NONE, NOW + 60)
    key = PublicKey(f"ed25519/{public_key(ROOT)}")
    data = bytes(Biscuit.from_base64(narrowed, key).to_bytes())
    for end in range(len(data)):
        with pytest.raises(Exception):  # noqa: B017 - whatever the library raises, it is no token
            Biscuit.from_bytes(data[:end], key)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "there is none"),
        ("x", "not of this installation"),
        ("é" * 20, "is none"),
        ("A A", "is none"),
        ("attempt(hex:00);", "is none"),
        ("A" * (CAPABILITY_TOKEN_CHARACTERS_MAX + 1), "is none"),
        ("A" * CAPABILITY_TOKEN_CHARACTERS_MAX, "not of this installation"),
    ],
)
def test_what_is_no_token_is_refused(verifier: Verifier, token: str, says: str) -> None:
    assert says in denied(verifier, token)


WIDE = msgspec.json.encode(msgspec.structs.replace(CLAIMS, executor="e2", expires_us=2**60))


@pytest.mark.parametrize(
    ("source", "data"),
    [
        ("attempt({data})", WIDE),
        ("narrowed({data})", WIDE.decode()),
        ("narrowed({data}); check if time($t), $t > 2020-01-01T00:00:00Z", WIDE),
        ("narrowed({data}); narrowed({data})", WIDE),
        ("attempt($x) <- narrowed($x)", b""),
        ("check if attempt($x)", b""),
        ("narrowed($x) <- attempt($x) trusting previous", b""),
        ("other({data})", WIDE),
        ("narrowed({data}, 1)", WIDE),
        ("narrowed({data})", b""),
        ("narrowed({data})", b"{}"),
        ("narrowed({data})", b"[" * 10_000),
        ("narrowed({data})", "x); narrowed(hex:7b7d"),
    ],
)
def test_a_block_with_anything_but_one_narrowing_fact_is_refused(
    verifier: Verifier, source: str, data: bytes | str
) -> None:
    named = {"data": data} if "{data}" in source else {}
    denied(verifier, block(minter.mint(CLAIMS), source, **named))


def test_a_first_block_that_is_no_attempt_is_refused(verifier: Verifier) -> None:
    root = PrivateKey(f"ed25519-private/{ROOT}")
    token = BiscuitBuilder("narrowed({data})", {"data": WIDE}).build(root).to_base64()
    assert "one fact" in denied(verifier, token)


def test_a_third_party_s_block_is_refused(verifier: Verifier) -> None:
    key = PublicKey(f"ed25519/{public_key(ROOT)}")
    token, third = Biscuit.from_base64(minter.mint(CLAIMS), key), KeyPair()
    data = msgspec.json.encode({"permissions": PERMISSIONS, "expires_us": NOW + 60})
    signed = token.third_party_request().create_block(
        third.private_key, BlockBuilder("narrowed({data})", {"data": data})
    )
    appended = token.append_third_party(third.public_key, signed).to_base64()
    assert "third party" in denied(verifier, appended)


def test_names_cannot_say_more_than_they_are(verifier: Verifier) -> None:
    odd = msgspec.structs.replace(CLAIMS, job='j"); narrowed(hex:7b7d); x("', task="t\n\\", key="⁣")
    assert verifier.verify(minter.mint(odd), executor="e1", now_us=NOW) == odd


@pytest.mark.parametrize("key", ["", "zz", "ab" * 31, "AB" * 32, "ed25519/" + "ab" * 32, "02" + "00" * 31])
def test_what_is_no_key_is_refused_without_being_repeated(key: str) -> None:
    for use in (Verifier, Minter) if not key.startswith("02") else (Verifier,):
        with pytest.raises(InvalidArgument) as error:
            use(key)
        assert not key or key not in error.value.message
