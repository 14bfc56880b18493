"""What only the folder promises: the OCI image layout, file modes, and its manners on a bad disk."""

import asyncio
import json
import os
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hive_common.artifacts.package import MANIFEST_TYPE, Descriptor
from hive_common.artifacts.store import PARTIAL_AGE_MAX_S, REF_NAME, FolderStore
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import Internal, Unavailable


def files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


async def test_the_folder_is_an_oci_image_layout(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = await store.put(b"{}")
    await store.tag("square:1.0.0", Descriptor(media_type=MANIFEST_TYPE, digest=digest, size=2))
    assert json.loads((tmp_path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {"mediaType": MANIFEST_TYPE, "digest": digest, "size": 2, "annotations": {REF_NAME: "square:1.0.0"}}
        ],
    }
    assert (tmp_path / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes() == b"{}"


async def test_others_cannot_read_it(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "artifacts")
    await store.put(b"x")
    for path in (tmp_path / "artifacts").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


async def test_two_processes_share_it(tmp_path: Path) -> None:
    one, other = FolderStore(tmp_path), FolderStore(tmp_path)
    digest = await one.put(b"{}")
    assert await other.get(digest) == b"{}"
    entry = Descriptor(media_type=MANIFEST_TYPE, digest=digest, size=2)
    await asyncio.gather(*(store.tag(f"{id(store)}-{n}", entry) for n in range(10) for store in (one, other)))
    assert len(await one.tags()) == 20


async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    # Every write to /dev/full fails with ENOSPC (full(4)).
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    store = FolderStore(tmp_path)
    before = files_below(tmp_path)
    opened: list[int] = []

    def open_full(path: Path, *args: object, **kwargs: object) -> int:
        opened.append(real_open(device, os.O_WRONLY))
        os.close(real_open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        return opened[-1]

    real_open = os.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hive_common.artifacts.store.os.open", open_full)
        with pytest.raises(Unavailable, match=f"{tmp_path}: the disk is full"):
            await store.put(b"x")

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x"

        with pytest.raises(Unavailable, match="the disk is full"):
            await store.put_stream(digest_of(b"x"), chunks())
    assert opened
    assert files_below(tmp_path) == before
    assert await store.put(b"x")


async def test_a_partial_file_of_a_dead_process_is_swept_and_one_in_progress_is_not(tmp_path: Path) -> None:
    FolderStore(tmp_path)
    old, fresh = tmp_path / ".partial" / "old", tmp_path / ".partial" / "fresh"
    old.touch()
    fresh.touch()
    long_ago = time.time() - PARTIAL_AGE_MAX_S - 60
    os.utime(old, (long_ago, long_ago))
    FolderStore(tmp_path)
    assert not old.exists()
    assert fresh.exists()


async def test_a_blob_damaged_on_disk_is_not_handed_out(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = await store.put(b"right")
    (tmp_path / "blobs" / "sha256" / digest.removeprefix("sha256:")).write_bytes(b"wrong")
    with pytest.raises(Internal, match="damaged"):
        await store.get(digest)


def test_a_root_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="file"):
        FolderStore(tmp_path / "file" / "artifacts")
