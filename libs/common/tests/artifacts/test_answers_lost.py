"""Every method of the artifact store may be asked again when its answer was lost: nothing is lost or doubled."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hive_common.artifacts.package import MANIFEST_TYPE, Descriptor
from hive_common.artifacts.store import ArtifactStore, FolderStore
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import NotFound, Unavailable
from hive_common.testing.answers import AnswersLost, every_other
from hive_common.testing.ports import calls_of

OLD, NEW = b"old" * 1000, b"new" * 1000
NAMED = Descriptor(media_type=MANIFEST_TYPE, digest=digest_of(OLD), size=len(OLD))


async def pieces() -> AsyncIterator[bytes]:
    for at in range(0, len(NEW), 700):
        yield NEW[at : at + 700]


async def read(store: Any) -> bytes:
    return b"".join([chunk async for chunk in await store.open_stream(NAMED.digest)])


CASES: dict[str, tuple[Callable[[Any], Awaitable[Any]], Any]] = {
    "get": (lambda store: store.get(NAMED.digest), OLD),
    "has": (lambda store: store.has(NAMED.digest), True),
    "size": (lambda store: store.size(NAMED.digest), len(OLD)),
    "put": (lambda store: store.put(NEW), digest_of(NEW)),
    "open_stream": (read, OLD),
    "put_stream": (lambda store: store.put_stream(digest_of(NEW), pieces()), len(NEW)),
    "delete": (lambda store: store.delete(NAMED.digest), None),
    "tag": (lambda store: store.tag("square:1.0.0", NAMED), None),
    "tags": (lambda store: store.tags(), {}),
}
"""A call of each method, and its answer."""


def test_every_method_has_a_case() -> None:
    assert CASES.keys() == calls_of(ArtifactStore)


def state(root: Path) -> dict[str, bytes]:
    """All files of a store but its locks."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("method", CASES)
async def test_an_answer_that_is_lost_and_asked_for_again(tmp_path: Path, method: str) -> None:
    call, answer = CASES[method]
    once, again = FolderStore(tmp_path / "once"), FolderStore(tmp_path / "again")
    for store in (once, again):
        await store.put(OLD)
    assert await call(once) == answer
    losing = AnswersLost(again, every_other)
    with pytest.raises(Unavailable):
        await call(losing)
    assert losing.lost == {method: 1}
    assert state(tmp_path / "again") == state(tmp_path / "once")  # it was done, and wholly
    assert await call(losing) == answer
    assert state(tmp_path / "again") == state(tmp_path / "once")  # and not twice
    assert not list((tmp_path / "again" / ".partial").iterdir())


async def test_what_was_deleted_is_not_found_whoever_heard_the_answer(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    await store.put(OLD)
    losing = AnswersLost(store, every_other)
    with pytest.raises(Unavailable):
        await losing.delete(NAMED.digest)
    with pytest.raises(NotFound):
        await store.get(NAMED.digest)
