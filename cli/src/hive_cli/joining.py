"""How a machine joins an installation: the token names the CA, the CA vouches for the gateway, which admits a key.

The key is made here and never leaves this machine. Nothing is written before the installation has answered.
"""

import email.utils
import ssl
import time
from hmac import compare_digest
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
from hive_common.bus.assertion import SKEW_S_MAX, clock_sentence, private_key
from hive_common.bus.jwt import new_seed, public_nkey
from hive_common.contracts.joining import EnrolBody, JoinToken, proof_of
from hive_common.kernel.errors import (
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from hive_common.kernel.ids import is_id
from hive_common.ops.tls import fingerprint_of, is_loopback

from hive_cli.api import raise_for

CA_BYTES_MAX: Final = 64 * 1024
ENROL_TRIES: Final = 3
_TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0)
_AGAIN: Final = "ask for a new token there with: hive executor token"
T = TypeVar("T")


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What the installation gives a machine that it admits."""

    executor_id: str
    owner: str
    nats_jwt: str
    nats_url: str
    blobs_url: str
    token_public_key: str = ""
    kill_public_key: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.executor_id})"


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that was admitted: its credentials, the seed of its key, and the CA that it trusts from now on."""

    credentials: Credentials
    seed: str
    ca: str
    """In PEM; empty on a plain loopback."""

    def __repr__(self) -> str:
        return f"Admission({self.credentials!r})"


def check_address(token: JoinToken) -> None:
    """Make sure that what the token leads to is either encrypted or on this machine.

    Raises:
        InvalidArgument: it is neither.
    """
    url = urlsplit(token.url)
    encrypted = url.scheme == "https" and token.fingerprint
    here = url.scheme == "http" and not token.fingerprint and is_loopback(url.hostname or "")
    if not encrypted and not here:
        raise InvalidArgument(
            f"the token leads to {token.url} without encryption, which is only taken on one and the same machine; "
            f"start the installation with: hive up --public ADDRESS, and {_AGAIN}"
        )


def trusted_ca(token: JoinToken) -> str:
    """Return the certificate of the installation's CA in PEM, once it is the one that the token names.

    Raises:
        PermissionDenied: it is another one.
        FailedPrecondition: the installation has none, or the clocks of both machines are too far apart.
        Unavailable: the installation cannot be reached.
    """
    response, body = _fetched_ca(token.url)
    if response.status_code != 200:
        raise FailedPrecondition(
            f"{token.url} answers {response.status_code} instead of the certificate of its CA; "
            "start the installation with: hive up --public ADDRESS"
        )
    pem = body.decode("ascii", "replace")
    try:
        found = fingerprint_of(pem)
    except InvalidArgument:
        found = ""
    if not compare_digest(found.encode(), token.fingerprint.lower().encode()):
        raise PermissionDenied(
            f"{token.url} is not the installation that the token is from: its CA has another fingerprint. "
            f"Either the token is old, or somebody stands in between; {_AGAIN}"
        )
    _check_clock(response)
    return pem


def _fetched_ca(url: str) -> tuple[httpx.Response, bytes]:
    """Return the answer and the beginning of its body, which is enough to see that it is no certificate."""
    # Who answers is not known yet; what is answered is only used if its digest is the one in the token.
    with httpx.Client(verify=False, trust_env=False, timeout=_TIMEOUT) as client:  # noqa: S501
        try:
            with client.stream("GET", f"{url}/v1/ca") as response:
                return response, _beginning(response)
        except httpx.TransportError as error:
            raise _unreachable(url, error) from error


def _beginning(response: httpx.Response) -> bytes:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > CA_BYTES_MAX:
            break
    return body


def admitted(token: JoinToken, ca: str, name: str) -> Admission:
    """Make a key, and have the installation admit it.

    Args:
        token: checked.
        ca: what the installation's certificate must be signed by; empty on a plain loopback.
        name: of this machine, for people.

    Raises:
        HiveError: the installation's reason, in its own code; Unavailable where it does not answer.
        PermissionDenied: its certificate is not good.
    """
    seed = new_seed("user")
    body = EnrolBody(
        token_id=token.token_id,
        secret=token.secret,
        public_key=public_nkey(seed),
        name=name,
        proof=private_key(seed).sign(proof_of(token.token_id, name)),
    )
    with httpx.Client(verify=_context(ca), trust_env=False, timeout=_TIMEOUT) as client:
        response = _enrol(client, token.url, body)
    _check_clock(response)
    raise_for(response)
    try:
        credentials = msgspec.json.decode(response.content, type=Credentials)
    except msgspec.DecodeError as error:
        raise Unavailable(f"{token.url} does not answer as an installation does: {error}") from error
    _check(credentials, token)
    return Admission(credentials=credentials, seed=seed, ca=ca)


def _enrol(client: httpx.Client, url: str, body: EnrolBody) -> httpx.Response:
    """Send `body`, and again where the answer was lost: the installation takes the same key twice."""
    content = msgspec.json.encode(body)
    for tries_left in reversed(range(ENROL_TRIES)):
        try:
            response = client.post(
                f"{url}/v1/executors/enrol", content=content, headers={"content-type": "application/json"}
            )
        except httpx.TransportError as error:
            refused = _refused(url, error)
            if not tries_left or not refused.retryable:
                raise refused from error
        else:
            if response.status_code < 500 or not tries_left:
                return response
        time.sleep(0.5)
    raise AssertionError


def _context(ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca:
        context.load_verify_locations(cadata=ca)
    return context


def reach(url: str, ca: str) -> httpx.Response:
    """Ask a gateway whether it lives.

    Args:
        url: its base URL.
        ca: what its certificate must be signed by, in PEM; empty on a plain loopback.

    Raises:
        Unavailable: it does not answer.
        PermissionDenied: its certificate is not good.
    """
    with httpx.Client(verify=_context(ca), trust_env=False, timeout=_TIMEOUT) as client:
        try:
            return client.get(f"{url}/healthz")
        except httpx.TransportError as error:
            raise _refused(url, error) from error


def clock_ahead_s(response: httpx.Response) -> float:
    """Return by how much this machine's clock is ahead of the one that has answered; 0 where it does not say."""
    date = email.utils.parsedate_tz(response.headers.get("date", ""))
    return 0.0 if date is None else time.time() - email.utils.mktime_tz(date)


def _check_clock(response: httpx.Response) -> None:
    ahead_s = clock_ahead_s(response)
    if abs(ahead_s) > SKEW_S_MAX:
        raise FailedPrecondition(clock_sentence(ahead_s), skew_s=int(ahead_s))


def _check(credentials: Credentials, token: JoinToken) -> None:
    scheme = ("tls", "https") if token.fingerprint else ("nats", "http")
    found = urlsplit(credentials.nats_url).scheme, urlsplit(credentials.blobs_url).scheme
    if not is_id(credentials.executor_id) or found != scheme:
        raise FailedPrecondition(
            f"{token.url} sends this machine to {credentials.nats_url} and {credentials.blobs_url}; "
            f"expected addresses with {scheme[0]}:// and {scheme[1]}://"
        )


def _refused(url: str, error: httpx.TransportError) -> HiveError:
    if isinstance(_cause(error), ssl.SSLCertVerificationError):
        return PermissionDenied(
            f"{url} shows a certificate that is not good: {_reason(error)}; "
            "start the installation anew there: hive down, and hive up"
        )
    return _unreachable(url, error)


def _unreachable(url: str, error: Exception) -> HiveError:
    return Unavailable(
        f"{url} cannot be reached: {_reason(error)}; look whether the installation runs, "
        "whether this machine is in a network with it, and whether a firewall is in between"
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error
