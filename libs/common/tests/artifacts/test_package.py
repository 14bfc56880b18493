import io
import os
import shutil
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from hive_common.artifacts import package as package_module
from hive_common.artifacts.package import SOURCE_TYPE, AgentPackage, OciManifest, inspect, pack, unpack
from hive_common.artifacts.runtimes import PYTHON_RUNTIME, PYTHON_RUNTIME_TYPE
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument, NotFound, PayloadTooLarge

from .conftest import MANIFEST, SOURCE, MakeAgent

CORE_MODULE = b"\0asm\x01\0\0\0"
COMPONENT = b"\0asm\x0d\0\x01\0"


def fetch_from(blobs: dict[str, bytes]) -> Callable[[str], Awaitable[bytes]]:
    async def fetch(digest: str) -> bytes:
        if digest not in blobs:
            raise NotFound(digest)
        return blobs[digest]

    return fetch


def test_packing_twice_gives_the_same_digest_whatever_times_modes_and_places_are(make_agent: MakeAgent) -> None:
    folder = make_agent()
    (folder / "lib").mkdir()
    (folder / "lib" / "b.py").write_text("B = 1\n")
    (folder / "lib" / "a.py").write_text("A = 1\n")
    first = pack(folder)
    copy = folder.parent / "elsewhere"
    shutil.copytree(folder, copy)
    os.utime(copy / "agent.py", (1, 1))
    (copy / "agent.py").chmod(0o755)
    assert pack(copy).digest == first.digest
    (copy / "lib" / "a.py").write_text("A = 2\n")
    assert pack(copy).digest != first.digest


def test_only_python_sources_are_packed(make_agent: MakeAgent) -> None:
    folder = make_agent()
    for name in ("README.md", ".hidden.py", "lib/x.py", "__pycache__/y.py", ".git/z.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("X = 1\n")
    assert set(pack(folder).files) == {"agent.py", "lib/x.py"}


async def test_a_package_unpacks_to_itself(make_agent: MakeAgent) -> None:
    packed = pack(make_agent())
    assert await unpack(fetch_from(packed.blobs), packed.digest) == packed
    artifact = await inspect(fetch_from(packed.blobs), packed.digest)
    assert artifact.manifest == packed.manifest
    assert artifact.size_bytes == packed.size_bytes


async def test_each_blob_is_fetched_once(make_agent: MakeAgent) -> None:
    packed = pack(make_agent())
    fetched: list[str] = []

    async def fetch(digest: str) -> bytes:
        fetched.append(digest)
        return packed.blobs[digest]

    await unpack(fetch, packed.digest)
    assert sorted(fetched) == sorted(packed.blobs)


@pytest.mark.parametrize(("runtime", "module"), [("command", CORE_MODULE), ("component", COMPONENT)])
async def test_modules_are_packed_as_they_are(make_agent: MakeAgent, runtime: str, module: bytes) -> None:
    folder = make_agent(
        MANIFEST.replace("agent.py", "agent.wasm").replace("runtime: python", f"runtime: {runtime}")
    )
    (folder / "agent.wasm").write_bytes(module)
    packed = pack(folder)
    assert packed.module == module
    assert packed.files == {}
    assert await unpack(fetch_from(packed.blobs), packed.digest) == packed


@pytest.mark.parametrize(
    ("runtime", "module"), [("command", COMPONENT), ("component", CORE_MODULE), ("command", b"")]
)
def test_a_module_of_the_other_kind_is_refused(make_agent: MakeAgent, runtime: str, module: bytes) -> None:
    folder = make_agent(
        MANIFEST.replace("agent.py", "agent.wasm").replace("runtime: python", f"runtime: {runtime}")
    )
    (folder / "agent.wasm").write_bytes(module)
    with pytest.raises(InvalidArgument, match=r"agent\.wasm: is not a WebAssembly"):
        pack(folder)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def run(input:\n", "agent.py: line 1: does not compile"),
        ("x = 1\n\nreturn 5\n", "agent.py: line 3: does not compile: 'return' outside function"),
        ("def main(input): ...\n", "agent.py: has no function `run`"),
        ("class A:\n    def run(input): ...\n", "has no function `run`"),
        ("async def run(input): ...\n", "line 1: `run` is async"),
        ("def run(): ...\n", "line 1: `run` does not take exactly one argument"),
        ("def run(a, b): ...\n", "line 1: `run` does not take exactly one argument"),
        ("def run(a, *, b): ...\n", "line 1: `run` does not take exactly one argument"),
        ("x = " + "(" * 5000 + ")" * 5000, "does not compile"),
        ("x = '\0'", "does not compile"),
    ],
)
def test_sources_that_cannot_work_are_refused_with_file_and_line(
    make_agent: MakeAgent, source: str, says: str
) -> None:
    folder = make_agent()
    (folder / "agent.py").write_text(source)
    with pytest.raises(InvalidArgument) as refused:
        pack(folder)
    assert says in refused.value.message


@pytest.mark.parametrize(
    "source", ["from lib import run\n", "def run(input, verbose=False): ...\n", "def run(*args): ...\n", SOURCE]
)
def test_every_way_to_have_a_run_that_takes_one_argument_is_taken(make_agent: MakeAgent, source: str) -> None:
    folder = make_agent()
    (folder / "agent.py").write_text(source)
    assert pack(folder).files["agent.py"] == source.encode()


def test_packing_does_not_run_the_sources(make_agent: MakeAgent, tmp_path: Path) -> None:
    folder = make_agent()
    trace = tmp_path / "trace"
    (folder / "agent.py").write_text(f"open({str(trace)!r}, 'w')\n{SOURCE}")
    pack(folder)
    assert not trace.exists()


def test_a_sibling_that_does_not_compile_is_refused(make_agent: MakeAgent) -> None:
    folder = make_agent()
    (folder / "sibling.py").write_text("def f(:\n")
    with pytest.raises(InvalidArgument, match=r"sibling\.py: line 1"):
        pack(folder)


def test_symbolic_links_are_refused(make_agent: MakeAgent) -> None:
    folder = make_agent()
    (folder / "secret.py").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument, match=r"secret\.py: is a symbolic link"):
        pack(folder)
    (folder / "secret.py").unlink()
    (folder / "lib").symlink_to("/usr/lib")
    with pytest.raises(InvalidArgument, match="lib: is a symbolic link"):
        pack(folder)


def test_missing_files_are_named(make_agent: MakeAgent, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"manifest\.yaml: cannot be read"):
        pack(tmp_path / "nowhere")
    folder = make_agent()
    (folder / "agent.py").unlink()
    with pytest.raises(InvalidArgument, match=r"manifest\.yaml: entry: there is no file agent\.py"):
        pack(folder)


def test_too_much_source_is_refused(make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_agent()
    for number in range(5):
        (folder / f"part{number}.py").write_text("X = 1\n")
    monkeypatch.setattr(package_module, "AGENT_SOURCE_FILES_MAX", 5)
    with pytest.raises(PayloadTooLarge, match="at most 5"):
        pack(folder)


async def test_a_blob_that_is_not_what_its_digest_says_is_refused(make_agent: MakeAgent) -> None:
    packed = pack(make_agent())
    for digest, blob in packed.blobs.items():
        for wrong in (blob + b" ", blob[:-1] + bytes([blob[-1] ^ 1])):
            with pytest.raises(InvalidArgument):
                await unpack(fetch_from({**packed.blobs, digest: wrong}), packed.digest)


def with_layer(packed: AgentPackage, layer: bytes) -> tuple[dict[str, bytes], str]:
    """The same agent with another layer, honestly described."""
    oci = msgspec.json.decode(packed.blobs[packed.digest], type=OciManifest)
    described = msgspec.structs.replace(oci.layers[-1], digest=digest_of(layer), size=len(layer))
    manifest = msgspec.json.encode(msgspec.structs.replace(oci, layers=(*oci.layers[:-1], described)))
    return {**packed.blobs, digest_of(layer): layer, digest_of(manifest): manifest}, digest_of(manifest)


def tar_with(name: str, content: bytes = b"", **fields: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, data in (("agent.py", SOURCE.encode()), (name, content)):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            if path == name:
                for field, value in fields.items():
                    setattr(member, field, value)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        tar_with("/etc/cron.d/x.py"),
        tar_with("../x.py"),
        tar_with("a/../../x.py"),
        tar_with("a\\x.py"),
        tar_with("./x.py"),
        tar_with(".x.py"),
        tar_with("x.so"),
        tar_with("agent.py", b"def run(x): ..."),
        tar_with("x.py", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar_with("x.py", type=tarfile.LNKTYPE, linkname="agent.py"),
        tar_with("x.py", type=tarfile.DIRTYPE),
        tar_with("x.py", type=tarfile.FIFOTYPE),
        tar_with("x.py", type=tarfile.CHRTYPE),
        tar_with("x.py", b"x" * (4 << 20)),
        tar_with("x.py", b"x" * 1024)[:2048],
        b"not a tar archive" * 100,
        b"x",
    ],
    ids=lambda data: f"{len(data)}-bytes",
)
async def test_archives_with_tricks_are_refused(make_agent: MakeAgent, archive: bytes) -> None:
    blobs, digest = with_layer(pack(make_agent()), archive)
    with pytest.raises(InvalidArgument):
        await unpack(fetch_from(blobs), digest)


async def test_an_archive_without_the_entry_is_refused(make_agent: MakeAgent) -> None:
    packed = pack(make_agent())
    blobs, digest = with_layer(packed, b"\0" * 10240)
    with pytest.raises(InvalidArgument, match=r"agent\.py"):
        await unpack(fetch_from(blobs), digest)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"nope", b"[" * 100_000])
async def test_what_is_not_an_agent_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="not an OCI image manifest"):
        await inspect(fetch_from({digest_of(data): data}), digest_of(data))


async def test_an_image_of_another_type_is_refused(make_agent: MakeAgent) -> None:
    packed = pack(make_agent())
    data = packed.blobs[packed.digest].replace(b"hivefabric.agent.v1", b"example.thing.v1")
    with pytest.raises(InvalidArgument, match="artifactType"):
        await inspect(fetch_from({**packed.blobs, digest_of(data): data}), digest_of(data))


async def test_all_python_agents_share_the_runtime_layer(make_agent: MakeAgent) -> None:
    folder = make_agent()
    first = pack(folder)
    (folder / "agent.py").write_text(SOURCE + "X = 1\n")
    second = pack(folder)
    assert digest_of(PYTHON_RUNTIME) in first.blobs.keys() & second.blobs.keys()
    oci = msgspec.json.decode(first.blobs[first.digest], type=OciManifest)
    assert [layer.media_type for layer in oci.layers] == [PYTHON_RUNTIME_TYPE, SOURCE_TYPE]


async def test_an_agent_for_another_runtime_is_refused_with_the_remedy(make_agent: MakeAgent) -> None:
    packed = pack(make_agent())
    other = PYTHON_RUNTIME.replace(b"3.", b"9.")
    oci = msgspec.json.decode(packed.blobs[packed.digest], type=OciManifest)
    described = msgspec.structs.replace(oci.layers[0], digest=digest_of(other), size=len(other))
    manifest = msgspec.json.encode(msgspec.structs.replace(oci, layers=(described, oci.layers[1])))
    blobs = {**packed.blobs, digest_of(other): other, digest_of(manifest): manifest}
    with pytest.raises(InvalidArgument, match=r"layers\[0\]\.digest: .*pack the agent anew, or update HiveFabric"):
        await unpack(fetch_from(blobs), digest_of(manifest))
