import jwt
import nkeys
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.bus import assertion
from hive_common.kernel import nkey
from hive_common.kernel.errors import InvalidArgument, Unauthenticated
from hive_common.kernel.ids import new_id

SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
PUBLIC = nkeys.from_seed(bytearray(SEED.encode())).public_key.decode()
KEY = assertion.private_key(SEED)
EXECUTOR = new_id()
NOW = 1_790_000_000.5


def test_an_assertion_says_which_executor_made_it() -> None:
    token = assertion.make(KEY, EXECUTOR, NOW)
    assert assertion.executor_of(token) == EXECUTOR
    assert assertion.verify(token, nkey.public_key(PUBLIC), NOW + 1).executor == EXECUTOR


def test_what_the_key_signed_is_told_from_what_it_did_not() -> None:
    signature = nkeys.from_seed(bytearray(SEED.encode())).sign(b"text")
    assert nkey.is_signed(signature, b"text", nkey.public_key(PUBLIC))
    assert not nkey.is_signed(signature, b"other", nkey.public_key(PUBLIC))
    assert not nkey.is_signed(b"", b"text", nkey.public_key(PUBLIC))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "U" * 56,
        PUBLIC[:-1],
        PUBLIC[:-1] + ("A" if PUBLIC[-1] != "A" else "B"),
        PUBLIC.lower(),
        PUBLIC[:-1] + "=",
        PUBLIC + "A",
        "Ä" * 56,
        nkeys.from_seed(bytearray(nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_ACCOUNT))).public_key.decode(),
    ],
)
def test_what_is_not_a_users_nkey_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not the public nkey of a user"):
        nkey.public_key(text)


@pytest.mark.parametrize(
    ("off_s", "sentence"), [(3600, "3600 s ahead of"), (-3600, "3600 s behind"), (61, "ahead")]
)
def test_a_clock_that_is_off_is_named_with_how_much(off_s: int, sentence: str) -> None:
    token = assertion.make(KEY, EXECUTOR, int(NOW) + off_s)
    with pytest.raises(Unauthenticated, match=sentence) as error:
        assertion.verify(token, nkey.public_key(PUBLIC), int(NOW))
    assert error.value.fields["skew_s"] == off_s


@pytest.mark.parametrize("off_s", [-60, 0, 60])
def test_clocks_may_be_a_minute_apart(off_s: int) -> None:
    token = assertion.make(KEY, EXECUTOR, int(NOW) + off_s)
    found = assertion.verify(token, nkey.public_key(PUBLIC), int(NOW))
    assert NOW - 1 < found.expires_s <= NOW + 60


def _claims(**changes: object) -> dict[str, object]:
    return {"sub": EXECUTOR, "aud": assertion.AUDIENCE, "iat": int(NOW), "exp": int(NOW) + 60} | changes


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (jwt.encode(_claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA"), "Signature verification failed"),
        (jwt.encode(_claims(aud="elsewhere"), KEY, algorithm="EdDSA"), "Audience"),
        (jwt.encode(_claims(exp=int(NOW) + 3600), KEY, algorithm="EdDSA"), "more than 60 s"),
        (jwt.encode(_claims(exp=int(NOW) - 1), KEY, algorithm="EdDSA"), "more than 60 s"),
        (jwt.encode(_claims(iat="x"), KEY, algorithm="EdDSA"), "not an assertion"),
        (jwt.encode({"sub": EXECUTOR}, KEY, algorithm="EdDSA"), "missing"),
        (jwt.encode(_claims(), "k" * 32, algorithm="HS256"), "alg"),
        (jwt.encode(_claims(), None, algorithm="none"), "alg"),
    ],
)
def test_a_forged_assertion_is_refused(token: str, sentence: str) -> None:
    with pytest.raises(Unauthenticated, match=sentence):
        assertion.verify(token, nkey.public_key(PUBLIC), NOW)


@pytest.mark.parametrize("token", ["", "a.b.c", "x" * 5000, jwt.encode({"sub": "../x"}, KEY, algorithm="EdDSA")])
def test_what_names_no_executor_is_no_assertion(token: str) -> None:
    with pytest.raises(Unauthenticated, match="not an assertion"):
        assertion.executor_of(token)
