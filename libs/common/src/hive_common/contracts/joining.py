"""What a machine needs in order to join: the token that people carry to it, and what it then says."""

import base64
import binascii
from typing import Final

import msgspec

from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import is_id

PREFIX: Final = "hivejoin1."
CHARACTERS_MAX: Final = 4096
FINGERPRINT_CHARACTERS: Final = 64


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """Admits one machine, once.

    Args:
        url: base URL of the gateway.
        fingerprint: SHA-256 of the DER of the installation's CA certificate in hex; empty on plain loopback.
        token_id: names the token.
        secret: shown once, kept nowhere.
        expires_us: microseconds since the epoch, on the installation's clock.
    """

    url: str = msgspec.field(name="u")
    fingerprint: str = msgspec.field(name="f")
    token_id: str = msgspec.field(name="i")
    secret: str = msgspec.field(name="s")
    expires_us: int = msgspec.field(name="e")

    def __repr__(self) -> str:
        # A token in a log or a traceback would be one that others can use.
        return f"JoinToken({self.token_id})"

    def text(self) -> str:
        """Return what people copy."""
        return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).rstrip(b"=").decode()


def parse_token(text: str) -> JoinToken:
    """Return what a token says.

    Raises:
        InvalidArgument: it is not one, or a part of it is missing. The message does not repeat it.
    """
    wrong = InvalidArgument(
        f"not a token for joining; expected all of what `hive executor token` printed: `{PREFIX}` and what follows"
    )
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > CHARACTERS_MAX:
        raise wrong
    body = text.removeprefix(PREFIX)
    try:
        token = msgspec.json.decode(base64.b64decode(body + "=" * (-len(body) % 4), b"-_", True), type=JoinToken)
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise wrong from error
    fits = is_id(token.token_id) and token.secret and token.url.startswith(("http://", "https://"))
    if not fits or (token.fingerprint and len(token.fingerprint) != FINGERPRINT_CHARACTERS):
        raise wrong
    return token


class EnrolBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/executors/enrol`. `proof` is `proof_of(token_id, name)` signed by the key, in base64."""

    token_id: str
    secret: str
    public_key: str
    name: str
    proof: bytes

    def __repr__(self) -> str:
        return f"EnrolBody({self.token_id})"


def proof_of(token_id: str, name: str) -> bytes:
    """Return what a joining machine signs, in order to prove that it holds the seed of its key."""
    return f"hive-enrol:{token_id}:{name}".encode()
