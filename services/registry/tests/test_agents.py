import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.manifest import manifest_json
from hive_common.artifacts.package import AgentPackage
from hive_common.artifacts.signing import sign, tag_of
from hive_common.contracts.events import AgentVersionPublished, decode
from hive_common.kernel.errors import Conflict, FailedPrecondition, HiveError, InvalidArgument, NotFound
from hive_common.kernel.ids import derive_id
from hive_common.rpc.client import call
from hive_proto.agents.v1 import agents_pb2 as pb

from .conftest import AUTHOR, Registry

Package = Callable[..., AgentPackage]


async def push(registry: Registry, digest: str) -> pb.AgentVersion:
    return await registry.push(digest)


async def test_a_pushed_version_is_in_the_log_and_can_be_fetched(registry: Registry, package: Package) -> None:
    packed = package()
    published = await push(registry, await registry.upload(packed))
    assert (published.name, published.version, published.digest) == ("square", "1.0.0", packed.digest)
    assert published.manifest_json == manifest_json(packed.manifest)
    assert published.size_bytes == packed.size_bytes
    (event,) = await registry.events()
    assert (event.stream, event.version) == (derive_id("agent", "default", "square", "1.0.0"), 1)
    assert event.position == published.position
    assert event.payload is not None
    assert decode(event.type, event.schema, event.payload) == AgentVersionPublished(
        name="square",
        version="1.0.0",
        digest=packed.digest,
        manifest=msgspec.Raw(manifest_json(packed.manifest)),
        size_bytes=packed.size_bytes,
        signer=public_hex(AUTHOR),
        signature=sign(packed.digest, "square", AUTHOR).digest,
    )
    got = await call(registry.agents.Get(pb.GetRequest(name="square", version="1.0.0"), metadata=registry.key))
    assert got == published


async def test_the_store_names_what_is_published(registry: Registry, package: Package) -> None:
    packed = package()
    await push(registry, await registry.upload(packed))
    index = json.loads((Path(registry.config.artifacts_dir) / "index.json").read_text())
    entry, signed = index["manifests"]
    assert signed["annotations"]["org.opencontainers.image.ref.name"] == tag_of(packed.digest)
    assert signed["digest"] == sign(packed.digest, "square", AUTHOR).digest
    assert entry["digest"] == packed.digest
    assert entry["size"] == len(packed.blobs[packed.digest])
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "square:1.0.0"


async def test_the_same_digest_again_gives_the_same_answer_and_no_event(
    registry: Registry, package: Package
) -> None:
    digest = await registry.upload(package())
    answers = await asyncio.gather(*(push(registry, digest) for _ in range(5)))
    assert len({answer.position for answer in answers}) == 1
    assert await push(registry, digest) == answers[0]
    assert len(await registry.events()) == 1


async def test_another_digest_under_the_same_version_is_refused(registry: Registry, package: Package) -> None:
    first, other = package(), package(source="def run(input): return {'n': 1}\n")
    await push(registry, await registry.upload(first))
    with pytest.raises(Conflict, match=r"square@1\.0\.0 .* versions are immutable; raise the version"):
        await push(registry, await registry.upload(other))
    got = await call(registry.agents.Get(pb.GetRequest(name="square", version="1.0.0"), metadata=registry.key))
    assert got.digest == first.digest
    assert len(await registry.events()) == 1


async def test_of_two_pushes_at_once_one_wins(registry: Registry, package: Package) -> None:
    digests = [await registry.upload(package(source=f"def run(input): return {n}\n")) for n in range(2)]
    results = await asyncio.gather(*(push(registry, digest) for digest in digests), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AgentVersion", "Conflict"]
    assert len(await registry.events()) == 1
    tags = await registry.store.tags()
    (winner,) = (result.digest for result in results if isinstance(result, pb.AgentVersion))
    assert tags["square:1.0.0"].digest == winner


async def test_a_blob_that_was_not_uploaded_is_named(registry: Registry, package: Package) -> None:
    packed = package()
    for missing in packed.blobs:
        await registry.upload(packed)
        await registry.store.delete(missing)
        with pytest.raises(FailedPrecondition, match=missing):
            await push(registry, packed.digest)
    assert await registry.events() == []


async def test_a_blob_damaged_in_the_store_is_not_published(registry: Registry, package: Package) -> None:
    packed = package()
    await registry.upload(packed)
    for digest in packed.blobs:
        path = Path(registry.config.artifacts_dir) / "blobs" / "sha256" / digest.removeprefix("sha256:")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"?")
        with pytest.raises(HiveError):
            await push(registry, packed.digest)
        path.write_bytes(content)
    assert await registry.events() == []


@pytest.mark.parametrize("digest", ["", "square", "sha256:../../etc/passwd"])
async def test_what_is_no_digest_is_refused(registry: Registry, digest: str) -> None:
    with pytest.raises(InvalidArgument, match="manifest_digest"):
        await push(registry, digest)


async def test_a_manifest_that_breaks_a_rule_is_not_published(registry: Registry, package: Package) -> None:
    packed = package()
    await registry.upload(packed)
    oci = json.loads(packed.blobs[packed.digest])
    config = packed.blobs[oci["config"]["digest"]].replace(b'"permissions":{}', b'"permissions":{"http":["*"]}')
    oci["config"] |= {"digest": await registry.store.put(config), "size": len(config)}
    digest = await registry.store.put(json.dumps(oci).encode())
    with pytest.raises(InvalidArgument, match=r"permissions\.http"):
        await push(registry, digest)
    assert await registry.events() == []


async def test_versions_are_listed_by_name_and_precedence_in_pages(registry: Registry, package: Package) -> None:
    order = [
        ("cube", "1.0.0"),
        ("square", "0.9.0"),
        ("square", "1.0.0-rc.1"),
        ("square", "1.0.0"),
        ("square", "1.10.0"),
        ("square", "10.0.0"),
    ]
    for name, version in reversed(order):
        await push(registry, await registry.upload(package(name, version)))

    async def listed(**fields: object) -> list[tuple[str, str]]:
        answer = await call(registry.agents.List(pb.ListRequest(**fields), metadata=registry.key))
        return [(entry.name, entry.version) for entry in answer.versions]

    assert await listed() == order
    assert await listed(limit=2) == order[:2]
    assert await listed(limit=3, after="square@0.9.0") == order[2:5]
    assert await listed(name="square", after="square@1.0.0") == order[4:]
    assert await listed(name="nothing") == []


@pytest.mark.parametrize(
    "request_",
    [
        pb.ListRequest(limit=5000),
        pb.ListRequest(after="square"),
        pb.ListRequest(after="square@one"),
        pb.ListRequest(name="square", after="cube@1.0.0"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(registry: Registry, request_: pb.ListRequest) -> None:
    with pytest.raises(InvalidArgument):
        await call(registry.agents.List(request_, metadata=registry.key))


async def test_an_agent_that_is_not_there_is_named_with_the_nearest(registry: Registry, package: Package) -> None:
    for version in ("1.0.0", "1.1.0"):
        await push(registry, await registry.upload(package("square", version)))
    for name, version, hint in (
        ("square", "1.0.1", "square@1.0.0"),
        ("squar", "1.0.0", "square@1.1.0"),
        ("zzz", "1.0.0", ""),
        ("\x00", "\x00", ""),
    ):
        with pytest.raises(NotFound) as error:
            await call(registry.agents.Get(pb.GetRequest(name=name, version=version), metadata=registry.key))
        assert error.value.fields["nearest"] == hint
        assert hint in error.value.message
    with pytest.raises(InvalidArgument):
        await call(registry.agents.Get(pb.GetRequest(name="square"), metadata=registry.key))
