"""Agents in OCI registries elsewhere: how `push --to` and `pull` take them there and back, signatures included."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.kernel.errors import Conflict, InvalidArgument
from rich.markup import escape

from hive_cli.output import out, print_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from hive_common.artifacts.package import AgentPackage, Descriptor
    from hive_common.artifacts.signing import Signature

    from hive_cli.oci import Reference, Registry

KeyOption = Annotated[
    str | None,
    typer.Option("--key", metavar="NAME", help="Sign with this key, or file; else with this home's own."),
]
PlainHttpOption = Annotated[
    bool, typer.Option("--plain-http", help="Without TLS. A registry on this machine needs no saying so.")
]
CaOption = Annotated[
    Path | None, typer.Option("--ca-file", metavar="FILE", help="Certificate of the CA of the OCI registry.")
]


def push_to(
    to: str,
    packages: Sequence[tuple[Path, "AgentPackage"]],
    key: "Ed25519PrivateKey",
    plain_http: bool,
    ca_file: Path | None,
) -> dict[str, Any]:
    """Sign an agent and push it to a registry, under its version unless a tag was named.

    Returns what was pushed, for people and programs.

    Raises:
        InvalidArgument: no reference, or several agents for one.
        Conflict: the tag is another agent's; nothing was pushed.
        Unavailable, Unauthenticated, FailedPrecondition: what the registry does.
    """
    from hive_common.artifacts.signing import sign, tag_of

    from hive_cli.oci import Registry, parse_reference

    if len(packages) != 1:
        raise InvalidArgument(
            f"--to: got {len(packages)} folders; expected one agent for one repository", path="--to"
        )
    ((folder, package),) = packages
    reference = _for_pushing(parse_reference(to), package)
    registry = Registry(reference, plain_http, ca_file)
    _refuse_other(registry, reference, package, folder)
    # The repository, as cosign says it; nobody relies on it.
    name = f"{reference.registry}/{reference.repository}"
    signature = sign(package.digest, name, key)
    manifest = package.blobs[package.digest]
    for digest, data in package.blobs.items():
        if digest != package.digest:
            registry.put_blob(data, digest)
    for digest, data in signature.blobs.items():
        if digest != signature.digest:
            registry.put_blob(data, digest)
    registry.put_manifest(manifest, reference.tag)
    before = registry.manifest_or_none(tag_of(package.digest))
    registry.put_manifest(_with_signature(before, signature), tag_of(package.digest))
    return {
        "reference": str(reference),
        "digest": package.digest,
        "signature": f"{name}:{tag_of(package.digest)}",
        "signer": signature.signer,
        "size_bytes": package.size_bytes,
    }


def show_pushed(pushed: dict[str, Any], as_json: bool) -> None:
    """Say what was pushed."""
    if as_json:
        print_json(pushed)
        return
    out.print(
        f"[green]✓[/green] {escape(pushed['reference'])}  "
        f"[dim]{pushed['digest'][:19]}…  {pushed['size_bytes']} bytes, signed with {pushed['signer'][:16]}…[/dim]"
    )


def pull_from(
    text: str, trusted: Sequence[str], plain_http: bool, ca_file: Path | None
) -> tuple["AgentPackage", "Signature"]:
    """Fetch an agent with a signature that is trusted here. Nothing of it is read before that is known.

    Args:
        text: reference of the agent.
        trusted: keys, in hex.
        plain_http: without TLS.
        ca_file: of the registry's CA.

    Raises:
        InvalidArgument: no reference, not an agent, not signed, or signed wrongly.
        PermissionDenied: nobody trusts the key.
        NotFound, Unavailable, Unauthenticated: what the registry does.
    """
    from hive_common.artifacts.package import unpack
    from hive_common.contracts.values import digest_of

    from hive_cli.oci import Registry, parse_reference

    reference = parse_reference(text)
    if not (reference.tag or reference.digest):
        raise InvalidArgument(f"{text}: names no version; expected {text}:TAG", path="REF")
    registry = Registry(reference, plain_http, ca_file)
    manifest = registry.manifest(reference.digest or reference.tag)
    digest = digest_of(manifest)
    signature = _signature(registry, reference, digest, trusted)

    async def fetch(wanted: str) -> bytes:
        return manifest if wanted == digest else await asyncio.to_thread(registry.blob, wanted)

    return asyncio.run(unpack(fetch, digest)), signature


def _for_pushing(reference: "Reference", package: "AgentPackage") -> "Reference":
    if reference.digest:
        raise InvalidArgument(
            f"{reference}: names a digest; expected a tag, or nothing for the version", path="--to"
        )
    # A tag has no `+`, in which the build of a semantic version begins.
    return reference._replace(tag=reference.tag or package.manifest.version.replace("+", "_"))


def _refuse_other(registry: "Registry", reference: "Reference", package: "AgentPackage", folder: Path) -> None:
    from hive_common.contracts.values import digest_of

    there = registry.manifest_or_none(reference.tag)
    if there is not None and digest_of(there) != package.digest:
        raise Conflict(
            f"{reference}: holds something else ({digest_of(there)}); versions are immutable; "
            f"raise the version in {folder / 'manifest.yaml'}"
        )


def _with_signature(before: bytes | None, signature: "Signature") -> bytes:
    """Return the manifest of all signatures of an agent: those that others made stay, as with cosign."""
    own = signature.blobs[signature.digest]
    if before is None:
        return own
    both, added = json.loads(before), json.loads(own)["layers"]
    both["layers"] = [layer for layer in both["layers"] if layer not in added] + added
    return before if both == json.loads(before) else json.dumps(both, separators=(",", ":")).encode()


def _signature(registry: "Registry", reference: "Reference", digest: str, trusted: Sequence[str]) -> "Signature":
    from hive_common.artifacts.signing import layers_of, tag_of, untrusted

    tag = tag_of(digest)
    manifest = registry.manifest_or_none(tag)
    if manifest is None:
        raise InvalidArgument(
            f"{reference}: is not signed: there is no tag {tag}; expected what `hive agent push --to` or "
            "`cosign sign --key` leave there",
            path="REF",
        )
    good = [
        signature
        for layer in layers_of(manifest, tag)
        if (signature := _good(registry, layer, digest, trusted)) is not None
    ]
    for signature in good:
        if signature.signer in trusted:
            return signature
    if good:
        raise untrusted(str(reference), good[0].signer)
    raise InvalidArgument(
        f"{reference}: no signature of it is good under a key that is trusted here, or that it names; "
        "expected the agent as its author pushed it, and the author's key to be trusted (hive agent key list)",
        path="REF",
    )


def _good(registry: "Registry", layer: "Descriptor", digest: str, trusted: Sequence[str]) -> "Signature | None":
    """Return the signature in a layer in the form that this installation keeps, if it is one of the artifact."""
    import base64

    from hive_common.artifacts.signing import SIGNATURE, SIGNER, assemble, check

    try:
        value = base64.b64decode(layer.annotations.get(SIGNATURE, ""), validate=True)
    except ValueError:
        return None
    payload = registry.blob(layer.digest)
    # One that cosign made does not say whose it is.
    named = layer.annotations.get(SIGNER)
    for key in trusted if named is None else (named,):
        signature = assemble(payload, value, key)
        try:
            check(signature, digest)
        except InvalidArgument:
            continue
        return signature
    return None
