"""The agent manifest: what an agent is, takes, gives, needs and asks for.

`parse_manifest` reads what its author wrote (`manifest.yaml`); `manifest_json` and `from_json` are the form
in which it travels, as the config blob of the agent's OCI artifact. Both are checked by the same rules.
"""

import re
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec

from hive_common.artifacts.documents import convert, load_yaml, refuse, refuse_validation
from hive_common.artifacts.names import is_name, is_version
from hive_common.artifacts.quantities import parse_duration, parse_quantity
from hive_common.contracts.limits import (
    AGENT_MANIFEST_BYTES_MAX,
    FUEL_DEFAULT,
    FUEL_MAX,
    KIB,
    MEMORY_DEFAULT_BYTES,
    MEMORY_MAX_BYTES,
    TIMEOUT_DEFAULT_MS,
    TIMEOUT_MAX_MS,
)
from hive_common.contracts.permissions import Permissions
from hive_common.kernel.errors import PayloadTooLarge
from hive_common.permissions import parse

FILE_NAME: Final = "manifest.yaml"
API_VERSION: Final = "hive/v1"
KIND: Final = "Agent"
RUNTIMES: Final = ("python", "component", "command")

DESCRIPTION_CHARACTERS_MAX: Final = 1_000
MEMORY_MIN_BYTES: Final = 64 * KIB
"""One page of WebAssembly memory."""

_PATH_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")
PATH_CHARACTERS_MAX: Final = 200


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one attempt: linear memory, wall time, and fuel (wasmtime's count of instructions)."""

    memory_bytes: int = MEMORY_DEFAULT_BYTES
    timeout_ms: int = TIMEOUT_DEFAULT_MS
    fuel: int = FUEL_DEFAULT


class AgentManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A checked manifest. `input` and `output` are JSON Schemas; an empty one takes everything."""

    api_version: str = msgspec.field(name="apiVersion", default=API_VERSION)
    kind: str = KIND
    name: str
    version: str
    runtime: str
    entry: str
    input: dict[str, Any] = {}
    output: dict[str, Any] = {}
    resources: Resources = Resources()
    permissions: dict[str, Any] = {}
    description: str = ""

    @property
    def asked(self) -> Permissions:
        """What it asks for; asking grants nothing (law 6)."""
        return parse(self.permissions, FILE_NAME)

    @property
    def reference(self) -> str:
        """How a job names this version: `name@version`."""
        return f"{self.name}@{self.version}"


class _ResourcesDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    memory: str | int = MEMORY_DEFAULT_BYTES
    timeout: str = f"{TIMEOUT_DEFAULT_MS}ms"
    fuel: int = FUEL_DEFAULT


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`manifest.yaml` as it is written."""

    api_version: str = msgspec.field(name="apiVersion")
    kind: str
    name: str
    version: str
    runtime: str
    entry: str
    input: dict[str, Any] = {}
    output: dict[str, Any] = {}
    resources: _ResourcesDocument = _ResourcesDocument()
    permissions: dict[str, Any] = {}
    description: str = ""


def parse_manifest(data: bytes, file: str = FILE_NAME) -> AgentManifest:
    """Read a `manifest.yaml`.

    Args:
        data: its bytes.
        file: its name, for errors.

    Raises:
        InvalidArgument: it breaks a rule; the message has the file, the path inside and what was expected.
        PayloadTooLarge: more than `AGENT_MANIFEST_BYTES_MAX`.
    """
    document = convert(load_yaml(data, file, bytes_max=AGENT_MANIFEST_BYTES_MAX), _Document, file)
    resources = document.resources
    manifest = AgentManifest(
        api_version=document.api_version,
        kind=document.kind,
        name=document.name,
        version=document.version,
        runtime=document.runtime,
        entry=document.entry,
        input=document.input,
        output=document.output,
        resources=Resources(
            memory_bytes=parse_quantity(resources.memory, file=file, path="resources.memory"),
            timeout_ms=parse_duration(resources.timeout, file=file, path="resources.timeout"),
            fuel=resources.fuel,
        ),
        permissions=document.permissions,
        description=document.description,
    )
    _check(manifest, file)
    return manifest


def manifest_json(manifest: AgentManifest) -> bytes:
    """Return the config blob of the agent's artifact. Equal manifests give equal bytes."""
    return msgspec.json.encode(manifest, order="sorted")


def from_json(data: bytes, file: str = "manifest") -> AgentManifest:
    """Read a manifest back from a config blob. Raises what `parse_manifest` raises."""
    if len(data) > 2 * AGENT_MANIFEST_BYTES_MAX:
        raise PayloadTooLarge(f"{file}: has {len(data)} bytes; expected {2 * AGENT_MANIFEST_BYTES_MAX} at most")
    try:
        manifest = msgspec.json.decode(data, type=AgentManifest)
    except msgspec.ValidationError as error:
        refuse_validation(error, file, AgentManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse(file, "", f"is not JSON: {error}", "an agent manifest")
    _check(manifest, file)
    return manifest


def check_relative_path(text: str, file: str, path: str) -> None:
    """Check that `text` names a file inside of an agent's folder, on every platform.

    Raises:
        InvalidArgument: absolute, with `..` or `\\`, hidden, or with characters beyond letters, digits, `_.-`.
    """
    parts = text.split("/")
    if len(text) > PATH_CHARACTERS_MAX or not all(_PATH_PART.match(part) for part in parts):
        refuse(
            file,
            path,
            f"{text!r} is not a path inside of the agent's folder",
            "a relative path of letters, digits, `_`, `-` and `.`, without `..`",
        )


def _check(manifest: AgentManifest, file: str) -> None:
    if manifest.api_version != API_VERSION:
        refuse(file, "apiVersion", f"got {manifest.api_version!r}", API_VERSION)
    if manifest.kind != KIND:
        refuse(file, "kind", f"got {manifest.kind!r}", KIND)
    if not is_name(manifest.name):
        refuse(file, "name", f"got {manifest.name!r}", "a-z, 0-9 and -, starting with a letter, at most 63")
    if not is_version(manifest.version):
        refuse(file, "version", f"got {manifest.version!r}", "a semantic version such as 1.0.0")
    if len(manifest.description) > DESCRIPTION_CHARACTERS_MAX:
        refuse(file, "description", "is too long", f"at most {DESCRIPTION_CHARACTERS_MAX} characters")
    _check_entry(manifest, file)
    # Loaded for manifests only: every service passes here, and each `up` would wait for it.
    from hive_common.artifacts.schemas import check_schema

    check_schema(manifest.input, file, "input")
    check_schema(manifest.output, file, "output")
    _check_resources(manifest.resources, file)
    parse(manifest.permissions, file)


def _check_entry(manifest: AgentManifest, file: str) -> None:
    if manifest.runtime not in RUNTIMES:
        refuse(file, "runtime", f"got {manifest.runtime!r}", "one of " + ", ".join(RUNTIMES))
    check_relative_path(manifest.entry, file, "entry")
    wanted = ".py" if manifest.runtime == "python" else ".wasm"
    if PurePosixPath(manifest.entry).suffix != wanted:
        refuse(file, "entry", f"got {manifest.entry!r}", f"a {wanted} file for the runtime {manifest.runtime}")


def _check_resources(resources: Resources, file: str) -> None:
    bounds = (
        ("memory", resources.memory_bytes, MEMORY_MIN_BYTES, MEMORY_MAX_BYTES, "bytes"),
        ("timeout", resources.timeout_ms, 1, TIMEOUT_MAX_MS, "ms"),
        ("fuel", resources.fuel, 1, FUEL_MAX, "units"),
    )
    for name, value, least, most, unit in bounds:
        if not least <= value <= most:
            refuse(file, f"resources.{name}", f"got {value} {unit}", f"{least} to {most} {unit}")
