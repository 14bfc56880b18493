"""The example extension, as the user `extension` that `hive up` makes, sees every event once and in order."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors
import pytest
from hive_audit.log_source import LogSource
from hive_audit.relay import Relay, RelaySettings
from hive_cli.supervisor.nats_conf import extension_user, render, services_user
from hive_common.bus.nats import connect
from hive_common.contracts.messages import EVENTS_STREAM
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from hive_common.ops.config import NatsConfig
from hive_common.ops.embedded import free_port, nats_command
from hive_common.testing.fixtures import Database
from hive_common.testing.process import ServerProcess

SCRIPT = Path(__file__).parents[2] / "examples" / "extension" / "subscribe.py"
PASSWORD = "extension-password"


class Nats:
    """A server with the configuration of an installation."""

    def __init__(self, folder: Path) -> None:
        port, monitor = free_port(), free_port()
        self.url = f"nats://127.0.0.1:{port}"
        self.password_file = folder / "password"
        self.password_file.write_text(PASSWORD)
        self.password_file.chmod(0o600)
        config = folder / "nats.conf"
        users = [services_user(PASSWORD), extension_user(PASSWORD)]
        config.write_text(render(port=port, monitor_port=monitor, store_dir=folder / "store", users=users))
        self._process = ServerProcess(nats_command(config, die_with_parent=True), folder / "nats.log")

    def start(self) -> None:
        self._process.start(self._answers)

    def stop(self) -> None:
        self._process.stop(signal.SIGKILL)

    def _answers(self) -> bool:
        import socket

        try:
            socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), 1).close()
        except OSError:
            return False
        return True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nats]:
    found = Nats(tmp_path)
    found.start()
    yield found
    found.stop()


async def append(database: Database, tasks: int) -> int:
    position = 0
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        for _ in range(tasks):
            event = NewEvent(new_id(), 1, "TaskCreated", 1, b"{}", 1, "a", "o")
            position = await writer.append(Append((event,)))
    return position


async def test_the_example_sees_all_events_also_over_a_stream_that_is_deleted(
    database: Database, server: Nats, tmp_path: Path
) -> None:
    first = await append(database, 50)
    client = await connect(NatsConfig(server.url, "services", str(server.password_file)), "test")
    relay = Relay(lambda: LogSource.open(database.role_dsn("audit")), client, RelaySettings(), asyncio.Event())
    task = asyncio.create_task(relay.run())
    total = first + 50
    command = [sys.executable, str(SCRIPT), "--all", "--count", str(total), "--url", server.url]
    extension = subprocess.Popen(
        [*command, "--password-file", str(server.password_file)], stdout=subprocess.PIPE, text=True
    )
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


async def test_an_extension_can_neither_publish_events_nor_touch_the_stream(server: Nats) -> None:
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    client = await nats.connect(
        server.url, user="extension", password=PASSWORD, inbox_prefix="_INBOX.extension", error_cb=note
    )
    try:
        for subject in (
            "hive.events.task.TaskSucceeded",
            f"$JS.API.STREAM.DELETE.{EVENTS_STREAM}",
            f"$JS.API.STREAM.PURGE.{EVENTS_STREAM}",
            "hive.exec.x.control",
        ):
            await client.publish(subject, b"{}")
        await client.flush()
        await asyncio.sleep(0.1)
        assert len([error for error in refused if "permissions violation" in error.lower()]) == 4
    finally:
        await client.close()
