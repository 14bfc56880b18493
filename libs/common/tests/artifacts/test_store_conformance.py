"""What every artifact store must do. Another implementation joins by a name in `STORES`."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hive_common.artifacts.package import MANIFEST_TYPE, Descriptor
from hive_common.artifacts.store import ArtifactStore, FolderStore
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument, NotFound, PayloadTooLarge

STORES: dict[str, Callable[[Path], ArtifactStore]] = {"folder": lambda path: FolderStore(path / "artifacts")}
MISSING = "sha256:" + "0" * 64


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return STORES[request.param](tmp_path)


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


async def read(store: ArtifactStore, digest: str) -> bytes:
    return b"".join([chunk async for chunk in await store.open_stream(digest)])


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 100_000])
async def test_what_is_put_comes_back(store: ArtifactStore, data: bytes) -> None:
    digest = await store.put(data)
    assert digest == digest_of(data)
    assert await store.has(digest)
    assert await store.size(digest) == len(data)
    assert await store.get(digest) == data
    assert await read(store, digest) == data


async def test_the_same_bytes_again_are_no_error(store: ArtifactStore) -> None:
    assert await store.put(b"x") == await store.put(b"x")
    assert await store.put_stream(digest_of(b"x"), pieces(b"x")) == 1


async def test_a_stream_is_kept_whole_however_it_is_cut(store: ArtifactStore) -> None:
    data = bytes(range(256)) * 20_000
    cut = [data[at : at + 70_001] for at in range(0, len(data), 70_001)]
    assert await store.put_stream(digest_of(data), pieces(*cut)) == len(data)
    assert await read(store, digest_of(data)) == data


async def test_what_is_not_there_is_not_found(store: ArtifactStore) -> None:
    assert not await store.has(MISSING)
    for attempt in (store.get, store.size, store.open_stream):
        with pytest.raises(NotFound):
            await attempt(MISSING)
    await store.delete(MISSING)


@pytest.mark.parametrize(
    "wrong",
    ["", "x", "sha256:", "sha256:../../etc/passwd", "md5:" + "0" * 32, "sha256:" + "A" * 64, MISSING + "\n"],
)
async def test_what_is_not_a_digest_is_refused(store: ArtifactStore, wrong: str) -> None:
    for attempt in (store.get, store.has, store.size, store.open_stream, store.delete):
        with pytest.raises(InvalidArgument):
            await attempt(wrong)
    with pytest.raises(InvalidArgument):
        await store.put_stream(wrong, pieces(b"x"))


async def test_bytes_of_another_digest_are_not_kept(store: ArtifactStore) -> None:
    with pytest.raises(InvalidArgument, match="the bytes have the digest"):
        await store.put_stream(digest_of(b"right"), pieces(b"wrong"))
    assert not await store.has(digest_of(b"right"))
    assert not await store.has(digest_of(b"wrong"))


async def test_more_than_the_limit_is_not_kept(store: ArtifactStore) -> None:
    with pytest.raises(PayloadTooLarge):
        await store.put_stream(digest_of(b"x" * 11), pieces(b"x" * 6, b"x" * 5), size_max=10)
    assert not await store.has(digest_of(b"x" * 11))
    assert await store.put_stream(digest_of(b"x" * 10), pieces(b"x" * 10), size_max=10) == 10


async def test_an_upload_that_breaks_off_leaves_nothing(store: ArtifactStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"begin"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await store.put_stream(digest_of(b"begin and end"), broken())
    assert not await store.has(digest_of(b"begin and end"))
    assert not await store.has(digest_of(b"begin"))


async def test_a_cancelled_upload_leaves_nothing(store: ArtifactStore) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"x" * 2_000_000
        begun.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(store.put_stream(digest_of(b"y"), endless()))
    await begun.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert not await store.has(digest_of(b"y"))


async def test_many_writers_of_the_same_blob_all_succeed(store: ArtifactStore) -> None:
    data = hashlib.sha256(b"seed").digest() * 50_000
    sizes = await asyncio.gather(*(store.put_stream(digest_of(data), pieces(data)) for _ in range(8)))
    assert set(sizes) == {len(data)}
    assert await store.get(digest_of(data)) == data


async def test_a_deleted_blob_is_gone_and_can_come_back(store: ArtifactStore) -> None:
    digest = await store.put(b"x")
    await store.delete(digest)
    assert not await store.has(digest)
    await store.put(b"x")
    assert await store.get(digest) == b"x"


def described(data: bytes) -> Descriptor:
    return Descriptor(media_type=MANIFEST_TYPE, digest=digest_of(data), size=len(data))


async def test_a_name_points_to_what_was_tagged_last(store: ArtifactStore) -> None:
    for data in (b"one", b"two"):
        await store.put(data)
        await store.tag("square:1.0.0", described(data))
    await store.tag("other:1.0.0", described(b"one"))
    tags = await store.tags()
    assert {name: entry.digest for name, entry in tags.items()} == {
        "square:1.0.0": digest_of(b"two"),
        "other:1.0.0": digest_of(b"one"),
    }


async def test_only_blobs_that_are_there_get_a_name(store: ArtifactStore) -> None:
    with pytest.raises(NotFound):
        await store.tag("square:1.0.0", described(b"missing"))
    assert await store.tags() == {}


async def test_names_given_at_the_same_time_are_all_kept(store: ArtifactStore) -> None:
    await store.put(b"x")
    await asyncio.gather(*(store.tag(f"agent-{n}:1.0.0", described(b"x")) for n in range(20)))
    assert len(await store.tags()) == 20
