import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.artifacts.keys import public_hex, read_private_key, read_public_key, write_key
from hive_common.artifacts.package import AgentPackage, pack
from hive_common.artifacts.signing import (
    PAYLOAD_TYPE,
    SIGNATURE,
    SIGNER,
    Signature,
    assemble,
    read_signature,
    sign,
    tag_of,
    unpack_signed,
    verify,
)
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument, NotFound, PermissionDenied
from hypothesis import given
from hypothesis import strategies as st

from .conftest import MANIFEST, SOURCE, MakeAgent

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
TRUSTED = frozenset({public_hex(KEY)})


def fetch_from(blobs: dict[str, bytes]) -> Callable[[str], Awaitable[bytes]]:
    async def fetch(digest: str) -> bytes:
        if digest not in blobs:
            raise NotFound(digest)
        return blobs[digest]

    return fetch


class Signed:
    """A signed agent; in a class, so that a failing test does not print it."""

    def __init__(self, packed: AgentPackage, signature: Signature) -> None:
        self.packed = packed
        self.signature = signature
        self.blobs = packed.blobs | signature.blobs


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    folder = tmp_path_factory.mktemp("signed")
    (folder / "manifest.yaml").write_text(MANIFEST)
    (folder / "agent.py").write_text(SOURCE)
    packed = pack(folder)
    return Signed(packed, sign(packed.digest, "square", KEY))


def unpacked(packed: AgentPackage, signature: Signature, blobs: dict[str, bytes]) -> AgentPackage:
    found, signer = asyncio.run(unpack_signed(fetch_from(blobs), packed.digest, signature.digest, TRUSTED))
    assert signer == public_hex(KEY)
    return found


# --- format --------------------------------------------------------------------------------------------------


def test_the_payload_is_what_cosign_specifies(signed: Signed) -> None:
    """cosign, specs/SIGNATURE_SPEC.md: simple signing with cosign's type, over the bytes that are stored."""
    packed, signature = signed.packed, signed.signature
    assert json.loads(signature.payload) == {
        "critical": {
            "identity": {"docker-reference": "square"},
            "image": {"docker-manifest-digest": packed.digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    KEY.public_key().verify(signature.value, signature.payload)


def test_payload_and_signature_lie_where_cosign_looks(signed: Signed) -> None:
    packed, signature = signed.packed, signed.signature
    assert tag_of(packed.digest) == f"sha256-{packed.digest[7:]}.sig"
    manifest = json.loads(signature.blobs[signature.digest])
    assert (manifest["schemaVersion"], manifest["mediaType"]) == (2, "application/vnd.oci.image.manifest.v1+json")
    (layer,) = manifest["layers"]
    assert layer == {
        "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
        "digest": digest_of(signature.payload),
        "size": len(signature.payload),
        "annotations": {
            "dev.cosignproject.cosign/signature": base64.b64encode(signature.value).decode(),
            "org.hivefabric.signer": public_hex(KEY),
        },
    }
    config = json.loads(signature.blobs[manifest["config"]["digest"]])
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert config["rootfs"] == {"type": "layers", "diff_ids": [layer["digest"]]}


def test_keys_are_pem_that_openssl_reads_and_its_verification_agrees(tmp_path: Path, signed: Signed) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    key = write_key(private, public)
    assert private.stat().st_mode & 0o777 == 0o600
    assert public_hex(read_private_key(private)) == read_public_key(public) == key
    signature = sign(signed.packed.digest, "square", read_private_key(private))
    (tmp_path / "payload").write_bytes(signature.payload)
    (tmp_path / "value").write_bytes(signature.value)
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    command += ["-in", str(tmp_path / "payload"), "-sigfile", str(tmp_path / "value")]
    assert "Verified Successfully" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = subprocess.run([openssl, "pkey", "-in", str(private), "-pubout"], capture_output=True, check=True)
    assert told.stdout == public.read_bytes()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nope", "is not such a public key; expected the PEM file"),
        (b"", "is not such a public key"),
        (
            generate_private_key(SECP256R1())
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
            "is not such a public key; expected Ed25519",
        ),
    ],
)
def test_what_is_no_key_is_refused_with_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pub").write_bytes(content)
    with pytest.raises(InvalidArgument, match=rf"x\.pub: {says}"):
        read_public_key(tmp_path / "x.pub")
    with pytest.raises(InvalidArgument, match=r"y\.pub: cannot be read"):
        read_public_key(tmp_path / "y.pub")


def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    write_key(tmp_path / "a.key", tmp_path / "a.pub")
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        read_private_key(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o600)
    (tmp_path / "a.key").write_text("nope")
    with pytest.raises(InvalidArgument, match="is not such a private key"):
        read_private_key(tmp_path / "a.key")


# --- what is taken -------------------------------------------------------------------------------------------


def test_a_signed_agent_is_taken(signed: Signed) -> None:
    packed, signature = signed.packed, signed.signature
    assert unpacked(packed, signature, signed.blobs) == packed
    assert sign(packed.digest, "square", KEY) == signature, "the same key signs alike"


async def test_an_unsigned_agent_is_refused(signed: Signed) -> None:
    packed = signed.packed
    with pytest.raises(InvalidArgument, match="is not signed"):
        await unpack_signed(fetch_from(packed.blobs), packed.digest, "", TRUSTED)


async def test_the_key_of_a_stranger_is_named_with_the_remedy(signed: Signed) -> None:
    packed = signed.packed
    foreign = sign(packed.digest, "square", OTHER)
    with pytest.raises(PermissionDenied, match=rf"hive agent key trust {public_hex(OTHER)} --name") as refused:
        await unpack_signed(fetch_from(packed.blobs | foreign.blobs), packed.digest, foreign.digest, TRUSTED)
    assert refused.value.fields == {"public_key": public_hex(OTHER)}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda s: assemble(s.payload, s.value, public_hex(OTHER)), "is not a signature of key"),
        (lambda s: assemble(s.payload, OTHER.sign(s.payload), s.signer), "is not a signature of key"),
        (lambda s: assemble(s.payload, s.value[:-1], s.signer), "is not a signature of key"),
        (lambda s: assemble(s.payload, b"", s.signer), "is not a signature of key"),
        (lambda s: assemble(s.payload, s.value, ""), "names no key"),
        (lambda s: assemble(s.payload, s.value, s.signer.upper()), "names no key"),
        (lambda s: sign("sha256:" + "0" * 64, "square", KEY), "the signature is of sha256:000"),
        (lambda s: _signed(b"{}"), "is not a payload of cosign"),
        (lambda s: _signed(b"[" * 9_999), "is not a payload of cosign"),
        (lambda s: _signed(s.payload.replace(b"cosign container", b"another")), "critical.type"),
    ],
)
def test_a_signature_that_is_not_good_is_refused(
    signed: Signed, made: Callable[[Signature], Signature], says: str
) -> None:
    packed, signature = signed.packed, signed.signature
    with pytest.raises(InvalidArgument, match=says):
        verify(made(signature), packed.digest, TRUSTED)


def _signed(payload: bytes) -> Signature:
    return assemble(payload, KEY.sign(payload), public_hex(KEY))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"layers": []},
        lambda m: m | {"layers": m["layers"] * 2},
        lambda m: m | {"annotations": {"a": "b"}},
        lambda m: m | {"config": m["config"] | {"size": 1}},
        lambda m: m | {"layers": [m["layers"][0] | {"mediaType": "text/plain"}]},
        lambda m: m | {"layers": [m["layers"][0] | {"size": 1 << 30}]},
        lambda m: m | {"layers": [m["layers"][0] | {"annotations": {SIGNER: public_hex(KEY), SIGNATURE: "?"}}]},
        lambda m: {},
        lambda m: [],
    ],
)
async def test_other_forms_of_a_good_signature_are_refused(
    signed: Signed, change: Callable[[dict[str, object]], object]
) -> None:
    signature = signed.signature
    data = json.dumps(change(json.loads(signature.blobs[signature.digest]))).encode()
    with pytest.raises(InvalidArgument):
        await read_signature(fetch_from(signature.blobs | {digest_of(data): data}), digest_of(data))
    assert PAYLOAD_TYPE.startswith("application/vnd.dev.cosign")


# --- any byte ------------------------------------------------------------------------------------------------


def test_every_byte_counts(signed: Signed) -> None:
    """Each byte of manifest, layers and signature flipped where it lies: refused, whichever it is.

    The config of the signature's manifest, which tools for images want, is the only blob that nobody reads.
    """
    packed, signature = signed.packed, signed.signature
    unread = json.loads(signature.blobs[signature.digest])["config"]["digest"]
    blobs = {digest: blob for digest, blob in (signed.blobs).items() if digest != unread}

    async def taken() -> list[tuple[str, int]]:
        found = []
        for digest, blob in blobs.items():
            # Of the archive, which is zeros for the most part, every 37th byte.
            for place in range(0, len(blob), 37 if len(blob) > 4096 else 1):
                wrong = blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :]
                try:
                    await unpack_signed(
                        fetch_from({**blobs, digest: wrong}), packed.digest, signature.digest, TRUSTED
                    )
                except InvalidArgument:
                    continue
                found.append((digest, place))
        return found

    assert asyncio.run(taken()) == []


@given(data=st.data(), bit=st.integers(0, 7))
def test_whoever_may_change_bytes_and_all_digests_gets_nothing_run(
    signed: Signed, data: st.DataObject, bit: int
) -> None:
    """Somebody who has the store changes a byte and describes it honestly, up to the top; they have no key."""
    packed, signature = signed.packed, signed.signature
    whole = signed.blobs
    changed = data.draw(st.sampled_from(sorted(whole)), label="blob")
    place = data.draw(st.integers(0, len(whole[changed]) - 1), label="byte")
    blobs, renamed = dict(whole), {}
    wrong = bytearray(whole[changed])
    wrong[place] ^= 1 << bit
    pending = [(changed, bytes(wrong))]
    while pending:
        old, new = pending.pop()
        renamed[old] = digest_of(new)
        blobs[digest_of(new)] = new
        for digest, blob in whole.items():
            above = blob.replace(old.encode(), digest_of(new).encode())
            # The payload is what only the key's owner can make.
            if above != blob and digest not in renamed and digest != digest_of(signature.payload):
                pending.append((digest, above))
    top = renamed.get(packed.digest, packed.digest)
    signed_by = renamed.get(signature.digest, signature.digest)

    async def attempt() -> AgentPackage:
        found, _ = await unpack_signed(fetch_from(blobs), top, signed_by, TRUSTED)
        return found

    with pytest.raises((InvalidArgument, PermissionDenied, NotFound)):
        asyncio.run(attempt())


def test_a_folder_packs_to_what_was_signed(signed: Signed, make_agent: MakeAgent) -> None:
    assert pack(make_agent()).digest == signed.packed.digest
