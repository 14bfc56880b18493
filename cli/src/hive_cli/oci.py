"""An OCI registry elsewhere: what agents are pushed to and pulled from, by way of the `oras` library.

Manifests travel as the very bytes that were signed; `oras` itself would write them anew, which changes digests.
Everything that comes in is bounded and checked against the digest that was asked for. Credentials are those of
`docker login` or `oras login` (`~/.docker/config.json`).
"""

import re
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import oras.container  # type: ignore[import-untyped]
import oras.provider  # type: ignore[import-untyped]
import requests
from hive_common.artifacts.package import MANIFEST_TYPE
from hive_common.contracts.limits import AGENT_MODULE_BYTES_MAX, MIB
from hive_common.contracts.values import digest_of, is_digest
from hive_common.kernel.errors import (
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    Unauthenticated,
    Unavailable,
)
from hive_common.ops.tls import is_loopback
from requests.adapters import HTTPAdapter

MANIFEST_BYTES_MAX: Final = MIB
_TIMEOUT_S: Final = (5.0, 60.0)
"""To connect, and between two bytes."""
_CHUNK_BYTES: Final = 256 * 1024
_HOW: Final = "expected HOST[:PORT]/REPOSITORY[:TAG], such as registry.example.org/agents/square:1.0.0"
# OCI distribution specification 1.1, "Pulling manifests": <name> and <reference>.
_REFERENCE: Final = re.compile(
    r"(?P<registry>(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?)/"
    r"(?P<repository>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?\Z"
)


class Reference(NamedTuple):
    """Something in a registry; `tag` and `digest` may be empty."""

    registry: str
    repository: str
    tag: str
    digest: str

    @property
    def host(self) -> str:
        """Without its port."""
        return re.sub(r":[0-9]+\Z", "", self.registry).strip("[]")

    def __str__(self) -> str:
        """Return it as people write it."""
        tag, digest = self.tag and f":{self.tag}", self.digest and f"@{self.digest}"
        return f"{self.registry}/{self.repository}{tag}{digest}"


def parse_reference(text: str) -> Reference:
    """Read a reference. Raises InvalidArgument where it is none; a registry has to be named."""
    found = _REFERENCE.match(text)
    if found is None:
        raise InvalidArgument(f"{text[:300]!r} names nothing in an OCI registry; {_HOW}", path="REF")
    parts = found.groupdict(default="")
    if not re.search(r"[.:]|\Alocalhost\Z", parts["registry"]):
        # Other tools take such a first part for a folder of a registry of their choice.
        raise InvalidArgument(f"{text[:300]!r}: {parts['registry']!r} is no registry; {_HOW}", path="REF")
    return Reference(**parts)


class Registry:
    """One repository of a registry.

    Args:
        reference: names both.
        plain_http: without TLS. Only said, or where the registry is on this machine and has no certificate.
        ca_file: PEM of the CA that signed the registry's certificate; None for those of the system.

    Raises:
        InvalidArgument: the file is not there.
    """

    def __init__(self, reference: Reference, plain_http: bool, ca_file: Path | None) -> None:
        if ca_file is not None and not ca_file.is_file():
            raise InvalidArgument(
                f"{ca_file}: there is no such file; expected a CA's certificate", path="--ca-file"
            )
        plain = plain_http or (ca_file is None and is_loopback(reference.host))
        self._reference = reference
        self._scheme = "http" if plain else "https"
        verify = True if ca_file is None else str(ca_file)
        self._client = _Client(reference.registry, insecure=plain, tls_verify=verify)
        self._container = oras.container.Container(f"{reference.registry}/{reference.repository}")
        session = self._client.session
        session.trust_env = not is_loopback(reference.host)
        for scheme in ("http://", "https://"):
            session.mount(scheme, _Bounded())
        self._client.auth.load_configs(self._container)

    def put_blob(self, data: bytes, digest: str) -> None:
        """Store a blob unless it is there. Raises what the class's calls raise: see `_answer`."""
        with tempfile.TemporaryDirectory(prefix="hive-push-") as folder:
            file = Path(folder, "blob")
            file.write_bytes(data)
            layer = {"digest": digest, "size": len(data), "mediaType": "application/octet-stream"}
            self._answer(lambda: self._client.upload_blob(str(file), self._container, layer))

    def put_manifest(self, data: bytes, tag: str) -> None:
        """Store a manifest, byte for byte, and give it a name."""
        headers = {"Content-Type": MANIFEST_TYPE}
        self._answer(lambda: self._client.do_request(self._manifest_url(tag), "PUT", data=data, headers=headers))

    def manifest(self, tag_or_digest: str) -> bytes:
        """Return a manifest; one that is named by its digest is checked.

        Raises:
            NotFound: there is none of that name.
        """
        headers = {"Accept": MANIFEST_TYPE}
        data = self._bytes(self._manifest_url(tag_or_digest), headers, MANIFEST_BYTES_MAX)
        return _checked(data, tag_or_digest) if is_digest(tag_or_digest) else data

    def manifest_or_none(self, tag: str) -> bytes | None:
        """Return a manifest, or None where there is none of that name."""
        try:
            return self.manifest(tag)
        except NotFound:
            return None

    def blob(self, digest: str) -> bytes:
        """Return a blob, checked against its digest."""
        url = f"{self._scheme}://{self._container.get_blob_url(digest)}"
        return _checked(self._bytes(url, {}, AGENT_MODULE_BYTES_MAX), digest)

    def _manifest_url(self, tag_or_digest: str) -> str:
        return f"{self._scheme}://{self._container.manifest_url(tag_or_digest)}"

    def _bytes(self, url: str, headers: dict[str, str], bytes_max: int) -> bytes:
        with self._answer(lambda: self._client.do_request(url, "GET", headers=headers, stream=True)) as response:
            data = bytearray()
            try:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    data += chunk
                    if len(data) > bytes_max:
                        raise PayloadTooLarge(f"{self._reference}: {url} has more than {bytes_max} bytes")
            except requests.RequestException as error:
                raise self._unreachable(error) from error
        return bytes(data)

    def _answer(self, call: Any) -> requests.Response:
        """Make a call, and return its answer where it is a good one.

        Raises:
            Unavailable: the registry cannot be reached, or has no certificate that is trusted.
            Unauthenticated: it wants other credentials.
            NotFound: it does not have that.
            FailedPrecondition: it refuses; its own words are in the message.
        """
        try:
            response: requests.Response = call()
        except (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema) as error:
            # Without credentials oras takes the name of what asks for a password for an address.
            raise self._unauthenticated() from error
        except requests.RequestException as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            if "authentication" in str(error):
                # What oras says where it has nothing to answer a 401 with.
                raise self._unauthenticated() from error
            raise FailedPrecondition(f"{self._reference}: the registry takes no uploads: {error}") from error
        if response.status_code < 300:
            return response
        said = response.raw.read(500, decode_content=True) if response.raw is not None else b""
        response.close()
        if response.status_code in (401, 403):
            raise self._unauthenticated()
        text = (said or response.content[:500]).decode("utf-8", "replace").strip()
        kind: type[HiveError] = NotFound if response.status_code == 404 else FailedPrecondition
        if response.status_code >= 500:
            kind = Unavailable
        raise kind(f"{self._reference}: the registry answers {response.status_code}: {text or response.reason}")

    def _unreachable(self, error: requests.RequestException) -> Unavailable:
        registry = f"{self._scheme}://{self._reference.registry}"
        if isinstance(error, requests.exceptions.SSLError):
            return Unavailable(
                f"{registry}: no certificate that is trusted here; expected one of a public CA, or say which with "
                "--ca-file FILE (a registry without TLS: --plain-http)"
            )
        return Unavailable(f"{registry} cannot be reached: {_reason(error)}; expected an OCI registry there")

    def _unauthenticated(self) -> Unauthenticated:
        return Unauthenticated(
            f"{self._reference}: the registry wants credentials; log in with: docker login "
            f"{self._reference.registry} (or oras login, skopeo login --authfile ~/.docker/config.json)"
        )


class _Client(oras.provider.Registry):  # type: ignore[misc]
    """Without the library's pauses of 80 s together before it says that something was refused: pushes and pulls may
    be said again.
    """

    do_request = getattr(oras.provider.Registry.do_request, "__wrapped__", oras.provider.Registry.do_request)


class _Bounded(HTTPAdapter):
    """Waits for no registry for ever."""

    def send(self, request: Any, **options: Any) -> Any:  # type: ignore[override]
        options["timeout"] = options.get("timeout") or _TIMEOUT_S
        return super().send(request, **options)


def _checked(data: bytes, digest: str) -> bytes:
    if digest_of(data) != digest:
        raise InvalidArgument(f"{digest}: the registry has bytes with the digest {digest_of(data)}", digest=digest)
    return data


def _reason(error: BaseException) -> str:
    inner: BaseException = error
    while inner.__cause__ is not None or inner.__context__ is not None:
        inner = inner.__cause__ or inner.__context__ or inner
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
