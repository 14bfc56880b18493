"""The example extension, with the credentials of one, sees every event once and in order."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive_audit.log_source import LogSource
from hive_audit.relay import Relay, RelaySettings
from hive_common.bus.authority import Authority
from hive_common.bus.jwt import credentials_text
from hive_common.bus.nats import connect
from hive_common.contracts.messages import EVENTS_STREAM
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from hive_common.testing.nats import EmbeddedNats

SCRIPT = Path(__file__).parents[2] / "examples" / "extension" / "subscribe.py"


@pytest.fixture
def server(server_dir: Path) -> Iterator[EmbeddedNats]:
    found = EmbeddedNats(server_dir, authority=Authority.new())
    found.start()
    yield found
    found.stop(signal.SIGKILL)


def access(server: EmbeddedNats, folder: Path) -> Path:
    made = server.issuer.authority.extension("watcher", int(time.time()))
    file = folder / "access.json"
    document = {
        "name": "watcher",
        "url": server.url,
        "ca_file": "",
        "inbox_prefix": "_EXT.watcher",
        "credentials": credentials_text(made),
    }
    file.write_text(json.dumps(document))
    return file


async def append(database: Database, tasks: int) -> int:
    position = 0
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        for _ in range(tasks):
            event = NewEvent(new_id(), 1, "TaskCreated", 1, b"{}", 1, "a", "o")
            position = await writer.append(Append((event,)))
    return position


async def test_the_example_sees_all_events_also_over_a_stream_that_is_deleted(
    database: Database, server: EmbeddedNats, tmp_path: Path
) -> None:
    first = await append(database, 50)
    client = await connect(server.issuer.service("audit", tmp_path), "audit")
    relay = Relay(lambda: LogSource.open(database.role_dsn("audit")), client, RelaySettings(), asyncio.Event())
    task = asyncio.create_task(relay.run())
    total = first + 50
    command = [sys.executable, str(SCRIPT), "--all", "--count", str(total)]
    command += ["--access", str(access(server, tmp_path))]
    extension = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        async with asyncio.timeout(90):
            assert extension.stdout is not None
            lines = [await asyncio.to_thread(extension.stdout.readline) for _ in range(first)]
            await client.jetstream().delete_stream(EVENTS_STREAM)
            assert await append(database, 50) == total
            lines += [await asyncio.to_thread(extension.stdout.readline) for _ in range(50)]
            assert await asyncio.to_thread(extension.wait) == 0
    finally:
        extension.kill()
        extension.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()
    async with await LogSource.open(database.role_dsn("audit")) as source:
        stored = [json.loads(envelope) for _, _, envelope in await source.envelopes(0, 1000)]
    assert [line.split() for line in lines] == [[str(e["position"]), e["type"], e["stream"]] for e in stored]
