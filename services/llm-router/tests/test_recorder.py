import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hive_common.artifacts.store import FolderStore
from hive_common.contracts.events import ModelCallFinished, decode
from hive_common.eventlog.log import Append, LogWriter
from hive_common.inference.calls import ModelCall
from hive_common.kernel.errors import HiveError, Unavailable, VersionConflict
from hive_common.kernel.ids import new_id
from hive_router.bodies import prepared
from hive_router.flight import Flight
from hive_router.recorder import Recorder
from hive_router.settings import RouterSettings
from prometheus_client import REGISTRY


class FakeWriter:
    """A log that may be away."""

    def __init__(self) -> None:
        self.error: HiveError | None = None
        self.appended: list[Append] = []
        self.tries = 0

    async def append(self, append: Append) -> int:
        self.tries += 1
        if self.error is not None:
            raise self.error
        self.appended.append(append)
        return len(self.appended)


def recorder_of(writer: FakeWriter, folder: Path, **limits: Any) -> Recorder:
    return Recorder(cast(LogWriter, writer), FolderStore(folder), RouterSettings(**limits), "default")


def ended(body: bytes = b'{"model":"m"}', **changes: Any) -> Flight:
    call = ModelCall(id=new_id(), endpoint="chat", model="m", body=body, stream=False, deadline_ms=1_000, **changes)
    flight = Flight(call, prepared(call), owner="o", subject="s", actor="a")
    flight.tally.whole(b'{"usage":{"completion_tokens":2}}')
    flight.end("")
    return flight


def dropped(reason: str) -> float:
    name = "hive_router_records_dropped_total"
    return REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0


async def written(recorder: Recorder) -> None:
    running = asyncio.create_task(recorder.run())
    await recorder.close(running)


async def test_while_the_log_is_away_records_wait_and_beyond_their_bound_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    writer = FakeWriter()
    recorder = recorder_of(writer, tmp_path, records_max=3)
    before = dropped("full")
    flights = [ended() for _ in range(5)]
    for flight in flights:
        recorder.finished(flight)
    assert dropped("full") - before == 2
    writer.error = Unavailable("the log is away")
    running = asyncio.create_task(recorder.run())
    while writer.tries < 3:
        await asyncio.sleep(0.01)
    writer.error = None
    await recorder.close(running)
    assert [one.events[0].stream for one in writer.appended] == [flight.call.id for flight in flights[:3]]


async def test_long_bodies_that_wait_are_bounded_too(tmp_path: Path) -> None:
    recorder = recorder_of(FakeWriter(), tmp_path, record_bytes_max=1_000)
    before = dropped("full")
    body = msgspec.json.encode({"model": "m", "x": "y" * 600})
    for _ in range(3):
        recorder.finished(ended(body))
    assert dropped("full") - before == 2


async def test_an_id_that_the_log_has_is_counted_and_the_others_are_written(tmp_path: Path) -> None:
    writer = FakeWriter()
    recorder = recorder_of(writer, tmp_path)
    before = dropped("same_id")
    writer.error = VersionConflict("there already")
    recorder.finished(ended())
    await written(recorder)
    assert dropped("same_id") - before == 1


async def test_what_is_remembered_is_bounded_and_holds_no_bodies(tmp_path: Path) -> None:
    writer = FakeWriter()
    recorder = recorder_of(writer, tmp_path, explained_max=2)
    flights = [ended() for _ in range(3)]
    for flight in flights:
        recorder.begun(flight)
        recorder.finished(flight)
    await written(recorder)
    assert [recorder.knows(flight.call.id) for flight in flights] == [False, True, True]
    recent = recorder.recent(flights[2].call.id)
    assert recent is not None and (recent.completion_tokens, recent.request, recent.response) == (2, None, None)
    assert flights[2].call.body == b""


@pytest.mark.parametrize("counts_only", [True, False])
async def test_bodies_are_kept_unless_only_counts_are(tmp_path: Path, counts_only: bool) -> None:
    writer = FakeWriter()
    recorder = recorder_of(writer, tmp_path)
    recorder.finished(ended(counts_only=counts_only))
    await written(recorder)
    event = writer.appended[0].events[0]
    kept = decode(event.type, event.schema, event.payload)
    assert isinstance(kept, ModelCallFinished)
    assert (kept.request is None, kept.response is None) == (counts_only, counts_only)
    assert (event.owner, event.subject, event.actor, kept.completion_tokens) == ("o", "s", "a", 2)
