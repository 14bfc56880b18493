"""Signatures of agents, in the format that cosign stores and verifies.

What is signed is a payload that names the artifact's digest ("simple signing", containers-signature(5), with the
type that cosign gives it). Payload and signature lie in a registry as an OCI image manifest of their own, whose one
layer is the payload and whose annotation is the signature (cosign, specs/SIGNATURE_SPEC.md), tagged
`sha256-<hex>.sig`.

Every byte of what this module writes follows from payload, signature and key, and only that form is taken: whoever
changes a byte has made something else, which is refused.
"""

import base64
import binascii
from collections.abc import Container
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hive_common.artifacts.documents import refuse
from hive_common.artifacts.keys import is_public_key, public_hex
from hive_common.artifacts.package import MANIFEST_TYPE, AgentPackage, Descriptor, Fetch, fetched, unpack
from hive_common.contracts.limits import KIB
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument, PermissionDenied

PAYLOAD_TYPE: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
SIGNATURE: Final = "dev.cosignproject.cosign/signature"
SIGNER: Final = "org.hivefabric.signer"
"""Says which key to try, so that a refusal can name it. cosign ignores it."""

PAYLOAD_BYTES_MAX: Final = 16 * KIB
_TYPE: Final = "cosign container image signature"
_encode = msgspec.json.Encoder().encode


class _Identity(msgspec.Struct, frozen=True):
    docker_reference: str = msgspec.field(name="docker-reference")


class _Image(msgspec.Struct, frozen=True):
    docker_manifest_digest: str = msgspec.field(name="docker-manifest-digest")


class _Critical(msgspec.Struct, frozen=True):
    identity: _Identity
    image: _Image
    type: str


class Payload(msgspec.Struct, frozen=True):
    """What a signature says. Of `optional` nothing is believed."""

    critical: _Critical
    optional: dict[str, object] | None = None

    @property
    def digest(self) -> str:
        """Digest of the OCI manifest that is signed."""
        return self.critical.image.docker_manifest_digest


class _RootFs(msgspec.Struct, frozen=True):
    type: str
    diff_ids: tuple[str, ...]


class _Config(msgspec.Struct, frozen=True):
    architecture: str
    os: str
    config: dict[str, str]
    rootfs: _RootFs


class _Manifest(msgspec.Struct, frozen=True):
    schema_version: int = msgspec.field(name="schemaVersion")
    media_type: str = msgspec.field(name="mediaType")
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Loose(msgspec.Struct, frozen=True):
    layers: tuple[Descriptor, ...]


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """A signature with everything that is stored of it.

    Attributes:
        digest: of its OCI manifest.
        signer: the key that it claims to be of, in hex.
        payload: what is signed.
        value: the signature itself, 64 bytes.
        blobs: all of it by digest.
    """

    digest: str
    signer: str
    payload: bytes
    value: bytes
    blobs: dict[str, bytes]


def tag_of(digest: str) -> str:
    """Return the tag under which a registry has the signatures of an artifact."""
    return f"{digest.replace(':', '-')}.sig"


def sign(digest: str, reference: str, key: Ed25519PrivateKey) -> Signature:
    """Sign an artifact. The same key signs it twice alike.

    Args:
        digest: of its OCI manifest.
        reference: what its author calls it; stands in the payload, and nobody relies on it.
        key: the author's.
    """
    critical = _Critical(identity=_Identity(reference), image=_Image(digest), type=_TYPE)
    payload = _encode(Payload(critical=critical))
    return assemble(payload, key.sign(payload), public_hex(key))


def assemble(payload: bytes, value: bytes, signer: str) -> Signature:
    """Return what is stored of a signature."""
    digest = digest_of(payload)
    config = _encode(_Config(architecture="", os="", config={}, rootfs=_RootFs("layers", (digest,))))
    annotations = {SIGNATURE: base64.b64encode(value).decode(), SIGNER: signer}
    layer = Descriptor(media_type=PAYLOAD_TYPE, digest=digest, size=len(payload), annotations=annotations)
    described = Descriptor(media_type=CONFIG_TYPE, digest=digest_of(config), size=len(config))
    manifest = _encode(_Manifest(schema_version=2, media_type=MANIFEST_TYPE, config=described, layers=(layer,)))
    return Signature(
        digest=digest_of(manifest),
        signer=signer,
        payload=payload,
        value=value,
        blobs={digest_of(blob): blob for blob in (payload, config, manifest)},
    )


async def read_signature(fetch: Fetch, digest: str) -> Signature:
    """Fetch a signature as `assemble` makes it. Whether it is good is for `verify`.

    Args:
        fetch: returns the bytes of a digest; its errors pass through.
        digest: of its OCI manifest.

    Raises:
        InvalidArgument: a blob that is not what its digest says, or anything but such a signature.
    """
    manifest = await fetched(fetch, digest, None)
    layer = layers_of(manifest, digest)[0]
    payload = await fetched(fetch, layer.digest, layer.size)
    found = assemble(payload, _value_of(layer, digest), layer.annotations.get(SIGNER, ""))
    if found.digest != digest:
        refuse(digest, "", "is not a signature as HiveFabric writes it", "what `hive agent push` stores")
    return found


def layers_of(manifest: bytes, file: str) -> tuple[Descriptor, ...]:
    """Return the signatures in an OCI manifest, of which cosign may have put several there; there is at least one.

    Raises:
        InvalidArgument: it is none, or one of them is too large.
    """
    try:
        layers = msgspec.json.decode(manifest, type=_Loose).layers
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse(file, "", f"is not the OCI manifest of a signature: {error}", "what `hive agent push` stores")
    if not layers:
        refuse(file, "layers", "there are none", f"one of type {PAYLOAD_TYPE}")
    for number, layer in enumerate(layers):
        if layer.media_type != PAYLOAD_TYPE or not 0 < layer.size <= PAYLOAD_BYTES_MAX:
            refuse(
                file,
                f"layers[{number}]",
                f"got {layer.size} bytes of {layer.media_type!r}",
                f"{PAYLOAD_TYPE} of at most {PAYLOAD_BYTES_MAX} bytes",
            )
    return layers


def verify(signature: Signature, digest: str, trusted: Container[str]) -> str:
    """Return the key under which `signature` is good for an artifact.

    Args:
        signature: as it was read.
        digest: of the artifact's OCI manifest.
        trusted: keys, in hex.

    Raises:
        InvalidArgument: it is of another artifact, or not what this key would have signed.
        PermissionDenied: nobody trusts the key. `fields`: `public_key`.
    """
    check(signature, digest)
    if signature.signer not in trusted:
        raise untrusted(digest, signature.signer)
    return signature.signer


async def unpack_signed(
    fetch: Fetch, digest: str, signature_digest: str, trusted: Container[str]
) -> tuple[AgentPackage, str]:
    """Fetch a whole agent whose signature is good, and return it with the key; nothing of it is read before.

    Args:
        fetch: returns the bytes of a digest; its errors pass through.
        digest: of its OCI manifest.
        signature_digest: of the OCI manifest of its signature; empty where it has none.
        trusted: keys, in hex.

    Raises:
        InvalidArgument: it is not signed, the signature is not good, or a blob is not what it should be.
        PermissionDenied: nobody trusts the key.
    """
    if not signature_digest:
        refuse(digest, "", "is not signed", "an agent that `hive agent push` published")
    signer = verify(await read_signature(fetch, signature_digest), digest, trusted)
    return await unpack(fetch, digest), signer


def check(signature: Signature, digest: str) -> None:
    """Require a signature to be what the key that it names signed for an artifact, whoever trusts that key.

    Raises:
        InvalidArgument: it is of another artifact, or not what this key would have signed.
    """
    file = signature.digest
    if not is_public_key(signature.signer):
        refuse(file, f"layers[0].annotations.{SIGNER}", "names no key", "an Ed25519 public key of 64 hex digits")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.signer)).verify(
            signature.value, signature.payload
        )
    except InvalidSignature:
        refuse(
            file,
            f"layers[0].annotations.{SIGNATURE}",
            f"is not a signature of key {signature.signer[:16]}… over the payload",
            "an agent that nobody has changed; have its author push it again",
        )
    try:
        payload = msgspec.json.decode(signature.payload, type=Payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse(file, "layers[0]", f"is not a payload of cosign: {error}", PAYLOAD_TYPE)
    if payload.critical.type != _TYPE:
        refuse(file, "layers[0]: critical.type", f"got {payload.critical.type!r}", _TYPE)
    if payload.digest != digest:
        path = "layers[0]: critical.image.docker-manifest-digest"
        refuse(file, path, f"the signature is of {payload.digest}", f"one of {digest}")


def untrusted(what: str, public_key: str) -> PermissionDenied:
    """Return the error for what a key signed that is not trusted here, with what would change that."""
    return PermissionDenied(
        f"{what}: signed by the key {public_key}, which is not trusted here; "
        f"if you know whose it is: hive agent key trust {public_key} --name WHOSE",
        public_key=public_key,
    )


def _value_of(layer: Descriptor, file: str) -> bytes:
    try:
        return base64.b64decode(layer.annotations.get(SIGNATURE, ""), validate=True)
    except (binascii.Error, ValueError) as error:
        path = f"layers[0].annotations.{SIGNATURE}"
        raise InvalidArgument(f"{file}: {path}: is not base64: {error}", file=file, path=path) from error
