"""The users of the generated configuration, tried against a real server."""

import asyncio
from collections.abc import AsyncIterator

import nats
import pytest
from hive_cli.supervisor.nats_conf import executor_user, extension_user, render, services_user
from hive_common.contracts.messages import EVENTS_STREAM, EVENTS_SUBJECTS
from hive_common.kernel.ids import new_id
from hive_common.ops.embedded import free_port, nats_command
from hive_common.testing.nats import greets
from hive_common.testing.process import ServerProcess
from nats.aio.client import Client
from nats.js.api import StreamConfig

ONE, TWO = new_id(), new_id()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("nats")
    port = free_port()
    users = [
        services_user('s"1'),
        executor_user("executor-1", ONE, "one"),
        executor_user("executor-2", TWO, "two"),
        extension_user("ext"),
    ]
    config = folder / "nats.conf"
    config.write_text(render(port=port, monitor_port=free_port(), store_dir=folder / "a store", users=users))
    process = ServerProcess(nats_command(config, die_with_parent=True), folder / "nats.log")
    process.start(lambda: greets(port))
    yield f"nats://127.0.0.1:{port}"
    process.stop()


class Connection:
    """A client that collects what the server refuses."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.client = Client()

    async def open(self, url: str, user: str, password: str, inbox: str = "_INBOX") -> None:
        async def on_error(error: Exception) -> None:
            self.refused.append(str(error))

        await self.client.connect(
            url, user=user, password=password, error_cb=on_error, inbox_prefix=inbox.encode(), allow_reconnect=False
        )

    async def settled(self) -> list[str]:
        await self.client.flush()
        await asyncio.sleep(0.05)
        return self.refused


@pytest.fixture
async def services(server: str) -> AsyncIterator[Client]:
    connection = Connection()
    await connection.open(server, "services", 's"1')
    yield connection.client
    await connection.client.close()


@pytest.fixture
async def executor(server: str) -> AsyncIterator[Connection]:
    connection = Connection()
    await connection.open(server, "executor-1", "one", f"_INBOX.{ONE}")
    yield connection
    await connection.client.close()


async def test_an_executor_asks_under_its_own_subject_and_gets_the_answer(
    services: Client, executor: Connection
) -> None:
    async def answer(message: nats.aio.msg.Msg) -> None:
        await message.respond(b"yes")

    await services.subscribe("hive.exec.*.pull", cb=answer)
    await services.flush()
    reply = await executor.client.request(f"hive.exec.{ONE}.pull", b"", timeout=5)
    assert reply.data == b"yes"
    assert await executor.settled() == []


@pytest.mark.parametrize(
    "subject",
    [
        f"hive.exec.{TWO}.pull",
        "hive.control.leader",
        "hive.control.kill",
        "hive.log.head",
        "hive.events.task.TaskSucceeded",
        f"_INBOX.{TWO}.x",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.DELETE.HIVE_EVENTS",
        "$SYS.REQ.SERVER.PING",
    ],
)
async def test_an_executor_publishes_nowhere_else(executor: Connection, subject: str) -> None:
    await executor.client.publish(subject, b"x")
    assert any("permissions violation" in text.lower() for text in await executor.settled())


@pytest.mark.parametrize(
    "subject", ["hive.exec.*.control", f"hive.exec.{TWO}.control", "_INBOX.>", "hive.events.>", ">"]
)
async def test_an_executor_listens_nowhere_else(executor: Connection, subject: str) -> None:
    await executor.client.subscribe(subject)
    assert any("permissions violation" in text.lower() for text in await executor.settled())


@pytest.mark.parametrize("subject", [f"hive.exec.{ONE}.control", f"hive.exec.{ONE}.infer", "hive.control.>"])
async def test_an_executor_hears_the_control_plane(executor: Connection, subject: str) -> None:
    await executor.client.subscribe(subject)
    assert await executor.settled() == []


async def test_a_wrong_password_is_refused(server: str) -> None:
    with pytest.raises(nats.errors.Error):
        await Connection().open(server, "executor-1", "wrong")


async def test_an_extension_replays_the_events_and_changes_nothing(server: str, services: Client) -> None:
    js = services.jetstream()
    await js.add_stream(StreamConfig(name=EVENTS_STREAM, subjects=[EVENTS_SUBJECTS]))
    for number in range(3):
        await js.publish("hive.events.task.TaskSucceeded", str(number).encode())
    extension = Connection()
    await extension.open(server, "extension", "ext", "_INBOX.extension")
    subscription = await extension.client.jetstream().subscribe(EVENTS_SUBJECTS, ordered_consumer=True)
    assert [(await subscription.next_msg(timeout=5)).data for _ in range(3)] == [b"0", b"1", b"2"]
    assert await extension.settled() == []
    for subject in ("hive.events.task.TaskSucceeded", f"$JS.API.STREAM.PURGE.{EVENTS_STREAM}", "hive.control.kill"):
        await extension.client.publish(subject, b"x")
    refused = await extension.settled()
    assert len([text for text in refused if "permissions violation" in text.lower()]) == 3
    await extension.client.close()
    assert (await js.stream_info(EVENTS_STREAM)).state.messages == 3
