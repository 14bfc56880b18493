"""An agent as an OCI artifact: one config blob (the manifest), a layer of code (sources or module), one manifest.

Formats: OCI image manifest 1.1 with `artifactType`; sources are an uncompressed ustar archive whose bytes
depend on names and contents alone, so that the same folder always has the same digest. Below the sources lies the
runtime layer, which all Python agents share (`runtimes`).
"""

import ast
import io
import os
import tarfile
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from hive_common.artifacts.documents import refuse
from hive_common.artifacts.manifest import (
    FILE_NAME,
    AgentManifest,
    check_relative_path,
    from_json,
    manifest_json,
    parse_manifest,
)
from hive_common.artifacts.runtimes import PYTHON_RUNTIME, PYTHON_RUNTIME_TYPE
from hive_common.contracts.limits import (
    AGENT_MANIFEST_BYTES_MAX,
    AGENT_MODULE_BYTES_MAX,
    AGENT_SOURCE_BYTES_MAX,
    AGENT_SOURCE_FILES_MAX,
)
from hive_common.contracts.values import digest_of, is_digest
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.hivefabric.agent.v1"
CONFIG_TYPE: Final = "application/vnd.hivefabric.agent.config.v1+json"
SOURCE_TYPE: Final = "application/vnd.hivefabric.agent.source.v1.tar"
MODULE_TYPE: Final = "application/wasm"

# The eight bytes a binary starts with: core module (WebAssembly 1.0), component (component model binary).
_MAGIC: Final = {"command": b"\0asm\x01\0\0\0", "component": b"\0asm\x0d\0\x01\0"}
_TAR_OVERHEAD_BYTES: Final = 1024
_LAYER_BYTES_MAX: Final = {
    SOURCE_TYPE: AGENT_SOURCE_BYTES_MAX + AGENT_SOURCE_FILES_MAX * _TAR_OVERHEAD_BYTES + tarfile.RECORDSIZE,
    MODULE_TYPE: AGENT_MODULE_BYTES_MAX,
}

_PYTHON_RUNTIME_DIGEST: Final = digest_of(PYTHON_RUNTIME)

Fetch = Callable[[str], Awaitable[bytes]]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """OCI content descriptor: what a blob is, its digest and its size in bytes."""

    media_type: str = msgspec.field(name="mediaType")
    digest: str
    size: int
    artifact_type: str = msgspec.field(name="artifactType", default="")
    annotations: dict[str, str] = {}


class OciManifest(msgspec.Struct, frozen=True, kw_only=True):
    """OCI image manifest, as far as an agent needs it."""

    schema_version: int = msgspec.field(name="schemaVersion")
    media_type: str = msgspec.field(name="mediaType")
    artifact_type: str = msgspec.field(name="artifactType")
    config: Descriptor
    layers: tuple[Descriptor, ...]


class AgentPackage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole agent in memory.

    `files` are the Python sources by relative path (runtime `python`), `module` is the WebAssembly binary
    (the other runtimes). `blobs` holds every blob of the artifact by digest, its OCI manifest included,
    which `digest` names.
    """

    manifest: AgentManifest
    digest: str
    blobs: dict[str, bytes]
    files: dict[str, bytes] = {}
    module: bytes = b""

    @property
    def size_bytes(self) -> int:
        """All blobs together."""
        return sum(len(blob) for blob in self.blobs.values())


class AgentArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """An agent in a store, without its layer: what publishing needs to know."""

    manifest: AgentManifest
    digest: str
    config: Descriptor
    layer: Descriptor
    manifest_size_bytes: int
    runtime: Descriptor | None = None

    @property
    def size_bytes(self) -> int:
        """All blobs together."""
        below = 0 if self.runtime is None else self.runtime.size
        return self.manifest_size_bytes + self.config.size + self.layer.size + below


def pack(folder: Path) -> AgentPackage:
    """Make the artifact of an agent's folder. Packing the same folder again gives the same digest.

    Of a Python agent all `.py` files go in, save those in hidden folders and in `__pycache__`; of the other
    runtimes the entry alone. Sources are compiled to find errors, and never run. Blocks; reads files.

    Raises:
        InvalidArgument: the manifest breaks a rule, the entry is missing, a source does not compile (with
            file and line), the entry has no `def run`, a symbolic link, a name that other systems refuse.
        PayloadTooLarge: sources or module beyond their limit.
    """
    manifest = parse_manifest(_read(folder / FILE_NAME, AGENT_MANIFEST_BYTES_MAX), str(folder / FILE_NAME))
    if manifest.runtime == "python":
        files = _read_sources(folder)
        if manifest.entry not in files:
            _refuse_missing_entry(folder, manifest.entry)
        for name, source in files.items():
            _check_source(source, str(folder / name), is_entry=name == manifest.entry)
        return _build(manifest, SOURCE_TYPE, _tar(files), files=files)
    entry = folder / manifest.entry
    if not entry.is_file():
        _refuse_missing_entry(folder, manifest.entry)
    _refuse_link(folder, entry)
    module = _read(entry, AGENT_MODULE_BYTES_MAX)
    _check_module(module, manifest.runtime, str(entry))
    return _build(manifest, MODULE_TYPE, module, module=module)


async def inspect(fetch: Fetch, digest: str) -> AgentArtifact:
    """Read OCI manifest and config of an agent, both checked against digest and size. The layer is not read.

    Args:
        fetch: returns the bytes of a digest; its errors pass through.
        digest: of the OCI manifest.

    Raises:
        InvalidArgument: not an agent, or a blob that is not what its digest or size says.
    """
    data = await fetched(fetch, digest, None)
    try:
        oci = msgspec.json.decode(data, type=OciManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse(digest, "", f"is not an OCI image manifest: {error}", "the digest of a pushed agent")
    for path, got, wanted in (
        ("mediaType", oci.media_type, MANIFEST_TYPE),
        ("artifactType", oci.artifact_type, ARTIFACT_TYPE),
        ("config.mediaType", oci.config.media_type, CONFIG_TYPE),
    ):
        if got != wanted:
            refuse(digest, path, f"got {got!r}", wanted)
    manifest = from_json(await fetched(fetch, oci.config.digest, oci.config.size), f"{digest}: config")
    kinds = [PYTHON_RUNTIME_TYPE, SOURCE_TYPE] if manifest.runtime == "python" else [MODULE_TYPE]
    if (got_kinds := [layer.media_type for layer in oci.layers]) != kinds:
        refuse(digest, "layers", f"got {got_kinds}", f"exactly {' and '.join(kinds)}")
    *below, layer = oci.layers
    if below and below[0].digest != _PYTHON_RUNTIME_DIGEST:
        refuse(
            digest,
            "layers[0].digest",
            f"the agent is built on the Python runtime {below[0].digest}, which this version of HiveFabric is not",
            f"{_PYTHON_RUNTIME_DIGEST}; pack the agent anew, or update HiveFabric here",
        )
    place = f"layers[{len(below)}]"
    if not is_digest(layer.digest):
        refuse(digest, f"{place}.digest", f"got {layer.digest!r}", "sha256:<64 hex digits>")
    if not 0 < layer.size <= _LAYER_BYTES_MAX[layer.media_type]:
        refuse(digest, f"{place}.size", f"got {layer.size}", f"1 to {_LAYER_BYTES_MAX[layer.media_type]} bytes")
    return AgentArtifact(
        manifest=manifest,
        digest=digest,
        config=oci.config,
        layer=layer,
        manifest_size_bytes=len(data),
        runtime=below[0] if below else None,
    )


async def unpack(fetch: Fetch, digest: str) -> AgentPackage:
    """Fetch a whole agent; every blob is checked against its digest and size.

    Args:
        fetch: returns the bytes of a digest; its errors pass through.
        digest: of the OCI manifest.

    Raises:
        InvalidArgument: not an agent, a blob that is not what its digest or size says, an archive with
            anything but plain `.py` files inside of its folder, or without the entry.
    """
    # The blobs of the package are those that were fetched: another tool may spell the same agent differently.
    blobs: dict[str, bytes] = {}

    async def fetch_once(wanted: str) -> bytes:
        if wanted not in blobs:
            blobs[wanted] = await fetch(wanted)
        return blobs[wanted]

    artifact = await inspect(fetch_once, digest)
    if artifact.runtime is not None:
        await fetched(fetch_once, artifact.runtime.digest, artifact.runtime.size)
    layer = await fetched(fetch_once, artifact.layer.digest, artifact.layer.size)
    manifest = artifact.manifest
    if manifest.runtime != "python":
        _check_module(layer, manifest.runtime, digest)
        return AgentPackage(manifest=manifest, digest=digest, blobs=blobs, module=layer)
    files = _untar(layer, digest)
    if manifest.entry not in files:
        refuse(digest, "entry", f"the archive has no {manifest.entry}", "the entry that the manifest names")
    return AgentPackage(manifest=manifest, digest=digest, blobs=blobs, files=files)


async def fetched(fetch: Fetch, digest: str, size: int | None) -> bytes:
    """Return a blob, checked against its digest and, where it is not None, its size in bytes.

    Raises:
        InvalidArgument: it is not what its digest or size says.
    """
    if not is_digest(digest):
        refuse(digest, "", "is not a digest", "sha256:<64 hex digits>")
    data = await fetch(digest)
    if size is not None and len(data) != size:
        refuse(digest, "", f"has {len(data)} bytes", f"{size} as its descriptor says")
    if digest_of(data) != digest:
        refuse(digest, "", f"the bytes have the digest {digest_of(data)}", "bytes that hash to it")
    return data


def _build(
    manifest: AgentManifest,
    layer_type: str,
    layer: bytes,
    *,
    files: dict[str, bytes] | None = None,
    module: bytes = b"",
) -> AgentPackage:
    config = manifest_json(manifest)
    layers = {layer_type: layer}
    if layer_type == SOURCE_TYPE:
        layers = {PYTHON_RUNTIME_TYPE: PYTHON_RUNTIME, **layers}
    oci = msgspec.json.encode(
        OciManifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor(media_type=CONFIG_TYPE, digest=digest_of(config), size=len(config)),
            layers=tuple(
                Descriptor(media_type=kind, digest=digest_of(data), size=len(data)) for kind, data in layers.items()
            ),
        )
    )
    return AgentPackage(
        manifest=manifest,
        digest=digest_of(oci),
        blobs={digest_of(blob): blob for blob in (*layers.values(), config, oci)},
        files=files or {},
        module=module,
    )


# --- sources -----------------------------------------------------------------------------------------------


def _read_sources(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        check_relative_path(name, str(path), "")
        source = _read(path, AGENT_SOURCE_BYTES_MAX)
        total += len(source)
        if total > AGENT_SOURCE_BYTES_MAX or len(files) >= AGENT_SOURCE_FILES_MAX:
            raise PayloadTooLarge(
                f"{folder}: too many sources; expected at most {AGENT_SOURCE_FILES_MAX} .py files "
                f"with {AGENT_SOURCE_BYTES_MAX} bytes together",
                file=str(folder),
            )
        files[name] = source
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Return the `.py` files below `folder`, in an order that depends on their names alone."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted((*folders, *names)):
            if not name.startswith("."):
                _refuse_link(folder, Path(root, name))
        yield from (Path(root, name) for name in sorted(names) if name.endswith(".py") and name[0] != ".")


def _refuse_link(folder: Path, path: Path) -> None:
    while path != folder:
        if path.is_symlink():
            refuse(str(path), "", "is a symbolic link", "a file or folder of the agent itself")
        path = path.parent


def _check_source(source: bytes, file: str, *, is_entry: bool) -> None:
    try:
        source.decode()
        with warnings.catch_warnings():
            # What the compiler warns about is the author's business, and no reason to refuse.
            warnings.simplefilter("ignore")
            tree = ast.parse(source, file)
            compile(source, file, "exec", dont_inherit=True)
    except SyntaxError as error:
        refuse(file, f"line {error.lineno}", f"does not compile: {error.msg}", "Python that compiles")
    except UnicodeDecodeError as error:
        refuse(file, "", f"byte {error.start} is not UTF-8", "Python source in UTF-8")
    except (ValueError, RecursionError, MemoryError) as error:
        refuse(file, "", f"does not compile: {error or type(error).__name__}", "Python that compiles")
    if is_entry:
        _check_run(tree, file)


def _check_run(tree: ast.Module, file: str) -> None:
    """Require a top-level `run` that takes one argument; it may be imported from a sibling."""
    expected = "`def run(input: dict) -> dict` at the top level"
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "run":
            refuse(file, f"line {node.lineno}", "`run` is async", expected)
        if isinstance(node, ast.FunctionDef) and node.name == "run":
            arguments = node.args
            positional = len(arguments.posonlyargs) + len(arguments.args)
            required = positional - len(arguments.defaults)
            keywords = any(default is None for default in arguments.kw_defaults)
            if required > 1 or keywords or not (positional or arguments.vararg):
                refuse(file, f"line {node.lineno}", "`run` does not take exactly one argument", expected)
            return
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == "run" for a in node.names):
            return
    refuse(file, "", "has no function `run`", expected)


# --- archive -----------------------------------------------------------------------------------------------


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(files[name]))
    return buffer.getvalue()


def _untar(data: bytes, digest: str) -> dict[str, bytes]:
    """Return the files of an archive. Nothing is written to disk, and nothing but plain `.py` files is taken."""
    files: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                _check_member(member, digest)
                total += member.size
                if total > AGENT_SOURCE_BYTES_MAX or len(files) >= AGENT_SOURCE_FILES_MAX:
                    refuse(digest, member.name, "the archive is too large", "the limits of an agent's sources")
                if member.name in files:
                    refuse(digest, member.name, "stands twice in the archive", "each file once")
                reader = archive.extractfile(member)
                content = b"" if reader is None else reader.read(member.size)
                if len(content) != member.size:
                    refuse(digest, member.name, "is cut short", f"{member.size} bytes")
                files[member.name] = content
    except (tarfile.TarError, EOFError, ValueError) as error:
        refuse(digest, "", f"is not a tar archive: {error}", SOURCE_TYPE)
    return files


def _check_member(member: tarfile.TarInfo, digest: str) -> None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        refuse(digest, member.name, "is not a plain file", "plain files only")
    check_relative_path(member.name, digest, member.name)
    if not member.name.endswith(".py"):
        refuse(digest, member.name, "is not a Python source", "a .py file")


# --- files -------------------------------------------------------------------------------------------------


def _check_module(module: bytes, runtime: str, file: str) -> None:
    if not module.startswith(_MAGIC[runtime]):
        what = "WebAssembly component" if runtime == "component" else "WebAssembly core module"
        refuse(file, "", f"is not a {what}", f"a {what} for the runtime {runtime}")


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise InvalidArgument(
            f"{path}: cannot be read: {error.strerror}; expected a file", file=str(path), path=""
        ) from error
    if len(data) > bytes_max:
        raise PayloadTooLarge(f"{path}: expected at most {bytes_max} bytes", file=str(path), limit=bytes_max)
    return data


def _refuse_missing_entry(folder: Path, entry: str) -> NoReturn:
    refuse(str(folder / FILE_NAME), "entry", f"there is no file {entry}", f"a file in {folder}")
