"""Every identity on every subject, against a real server: what the policy allows is allowed, all else is refused.

The cells are made twice: from policy.toml, and from the table below, which was written by hand. Who changes a right
changes both.
"""

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hive_common.bus.authority import Authority
from hive_common.bus.jwt import credentials_text, new_seed
from hive_common.bus.nats import respond
from hive_common.bus.policy import EXECUTOR, EXTENSION, policy
from hive_common.contracts.messages import (
    EVENTS_STREAM,
    EVENTS_SUBJECTS,
    KILL_SUBJECT,
    HelloReply,
    HelloRequest,
)
from hive_common.kernel.errors import body_of
from hive_common.kernel.ids import new_id
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.nats import EmbeddedNats
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

ONE, TWO = new_id(), new_id()
SUBJECTS_DOCUMENT = (Path(__file__).parents[2] / "proto" / "subjects.md").read_text()

COLUMNS = (
    "executor",
    "registry",
    "registry-system",
    "scheduler",
    "router",
    "audit",
    "gateway",
    "extension",
)
# p may publish, s may subscribe, b both, . neither. The executor is ONE, the extension is `one`.
# fmt: off
TABLE = """
subject                                    exec  reg  reg-sys  sched  router  audit  gateway  ext
hive.exec.ONE.hello                        p     s    .        .      .       .      .        .
hive.exec.ONE.pull                         p     .    .        s      .       .      .        .
hive.exec.ONE.report                       p     .    .        s      .       .      .        .
hive.exec.ONE.log.t-1                      p     .    .        .      .       .      s        .
hive.exec.ONE.stream.c                     p     .    .        .      s       .      .        .
hive.exec.ONE.call.model                   p     .    .        .      s       .      .        .
hive.exec.ONE.call.model-done              p     .    .        .      s       .      .        .
hive.exec.ONE.call.kv                      p     s    .        .      .       .      .        .
hive.exec.ONE.call.approve                 p     .    .        s      .       .      .        .
hive.exec.ONE.control                      b     .    .        .      .       .      .        .
hive.exec.ONE.infer                        b     .    .        .      p       .      .        .
hive.exec.TWO.hello                        .     s    .        .      .       .      .        .
hive.exec.TWO.pull                         .     .    .        s      .       .      .        .
hive.exec.TWO.report                       .     .    .        s      .       .      .        .
hive.exec.TWO.log.t-1                      .     .    .        .      .       .      s        .
hive.exec.TWO.stream.c                     .     .    .        .      s       .      .        .
hive.exec.TWO.call.model                   .     .    .        .      s       .      .        .
hive.exec.TWO.call.model-done              .     .    .        .      s       .      .        .
hive.exec.TWO.call.kv                      .     s    .        .      .       .      .        .
hive.exec.TWO.call.approve                 .     .    .        s      .       .      .        .
hive.exec.TWO.control                      .     .    .        .      .       .      .        .
hive.exec.TWO.infer                        .     .    .        .      p       .      .        .
hive.control.kill                          s     p    .        .      .       .      .        .
hive.control.leader                        s     .    .        p      .       .      .        .
hive.control.other                         .     .    .        .      .       .      .        .
hive.log.head                              .     b    .        b      b       s      .        .
hive.events.task.TaskSucceeded             .     .    .        .      .       p      .        s
hive.agents.a.inbox                        .     .    .        .      .       .      .        .
hive.agents.a.status                       .     .    .        .      .       .      .        .
hive.tasks.c                               .     .    .        .      .       .      .        .
hive.groups.g.events                       .     .    .        .      .       .      .        .
hive.broadcast                             .     .    .        .      .       .      .        .
_INBOX.ONE.x                               s     p    .        p      p       .      .        .
_INBOX.ONE.x.1                             s     p    .        p      p       .      .        .
_INBOX.TWO.x                               .     p    .        p      p       .      .        .
_SVC.registry.x                            .     s    .        .      .       .      .        .
_SVC.registry-system.x                     .     .    s        .      .       .      .        .
_SVC.scheduler.x                           .     .    .        s      .       .      .        .
_SVC.router.x                              .     .    .        .      s       .      .        .
_SVC.audit.x                               .     .    .        .      .       s      .        .
_SVC.gateway.x                             .     .    .        .      .       .      s        .
_EXT.one.x                                 .     .    .        .      .       .      .        s
_EXT.two.x                                 .     .    .        .      .       .      .        .
$SYS.REQ.CLAIMS.UPDATE                     .     .    p        .      .       .      .        .
$SYS.REQ.CLAIMS.DELETE                     .     .    .        .      .       .      .        .
$SYS.REQ.SERVER.PING                       .     .    .        .      .       .      .        .
$SYS.REQ.ACCOUNT.PING.CONNZ                .     .    .        .      .       .      .        .
$SYS.REQ.USER.INFO                         .     .    .        .      .       .      .        .
$SYS.ACCOUNT.a.CONNECT                     .     .    .        .      .       .      .        .
$JS.API.INFO                               .     .    .        .      .       p      .        p
$JS.API.STREAM.NAMES                       .     .    .        .      .       .      .        p
$JS.API.STREAM.INFO.HIVE_EVENTS            .     .    .        .      .       p      .        p
$JS.API.STREAM.CREATE.HIVE_EVENTS          .     .    .        .      .       p      .        .
$JS.API.STREAM.CREATE.OTHER                .     .    .        .      .       .      .        .
$JS.API.STREAM.UPDATE.HIVE_EVENTS          .     .    .        .      .       p      .        .
$JS.API.STREAM.PURGE.HIVE_EVENTS           .     .    .        .      .       .      .        .
$JS.API.STREAM.MSG.DELETE.HIVE_EVENTS      .     .    .        .      .       .      .        .
$JS.API.STREAM.MSG.GET.HIVE_EVENTS         .     .    .        .      .       p      .        p
$JS.API.CONSUMER.CREATE.HIVE_EVENTS        .     .    .        .      .       .      .        .
$JS.API.CONSUMER.CREATE.HIVE_EVENTS.one.x  .     .    .        .      .       .      .        p
$JS.API.CONSUMER.CREATE.HIVE_EVENTS.two.x  .     .    .        .      .       .      .        .
$JS.API.CONSUMER.MSG.NEXT.HIVE_EVENTS.one  .     .    .        .      .       .      .        p
$JS.API.CONSUMER.MSG.NEXT.HIVE_EVENTS.two  .     .    .        .      .       .      .        .
$JS.API.CONSUMER.DELETE.HIVE_EVENTS.two    .     .    .        .      .       .      .        .
$JS.API.CONSUMER.LIST.HIVE_EVENTS          .     .    .        .      .       .      .        .
$JS.ACK.HIVE_EVENTS.one.1.1.1.1.0          .     .    .        .      .       .      .        p
$JS.ACK.HIVE_EVENTS.two.1.1.1.1.0          .     .    .        .      .       .      .        .
>                                          .     .    .        .      .       .      .        .
hive.>                                     .     .    .        .      .       .      .        .
hive.events.>                              .     .    .        .      .       p      .        s
hive.exec.>                                .     .    .        .      .       .      .        .
hive.exec.ONE.>                            p     .    .        .      .       .      .        .
hive.exec.TWO.>                            .     .    .        .      .       .      .        .
hive.exec.*.pull                           .     .    .        s      .       .      .        .
hive.exec.*.infer                          .     .    .        .      p       .      .        .
hive.control.>                             .     .    .        .      .       .      .        .
_INBOX.>                                   .     .    .        .      .       .      .        .
_INBOX.*.>                                 .     p    .        p      p       .      .        .
_SVC.>                                     .     .    .        .      .       .      .        .
_EXT.>                                     .     .    .        .      .       .      .        .
$JS.>                                      .     .    .        .      .       .      .        .
$JS.API.>                                  .     .    .        .      .       .      .        .
$SYS.>                                     .     .    .        .      .       .      .        .
"""
# fmt: on


def rows() -> dict[str, dict[str, str]]:
    """Return the table: what each identity may do, by subject."""
    found = {}
    for line in TABLE.strip().splitlines()[1:]:
        subject, *cells = line.split()
        found[named(subject)] = dict(zip(COLUMNS, cells, strict=True))
    return found


def named(subject: str) -> str:
    return subject.replace("ONE", ONE).replace("TWO", TWO)


def covers(pattern: str, subject: str) -> bool:
    """Whether every subject that `subject` stands for is one that `pattern` stands for."""
    wide, narrow = pattern.split("."), subject.split(".")
    for place, token in enumerate(wide):
        if token == ">":
            return len(narrow) > place
        if place >= len(narrow) or narrow[place] == ">":
            return False
        if token not in ("*", narrow[place]):
            return False
    return len(wide) == len(narrow)


def documented() -> set[str]:
    """Return a concrete subject for each row of the document's tables of subjects, of ONE and of TWO."""
    found = set()
    for cell in re.findall(r"^\| (`hive\.[^|]*) \|", SUBJECTS_DOCUMENT, re.MULTILINE):
        for subject in re.findall(r"`(hive\.[^`]*)`", cell):
            for executor in (ONE, TWO):
                concrete = subject.replace("hive.exec.<id>", f"hive.exec.{executor}")
                found.add(re.sub(r"<\w+>(-<\w+>)?", "x", concrete))
    return found


def from_policy() -> set[str]:
    """Return concrete subjects, and the patterns themselves, of every identity by each of its names."""
    found = set()
    for identity, rights in policy().items():
        for name in {EXECUTOR: (ONE, TWO), EXTENSION: ("one", "two")}.get(identity, (identity,)):
            own = rights.named(name)
            for pattern in (*own.publish, *own.subscribe):
                concrete = re.sub(r"(?<=\.)>$", "x.y", pattern).replace("*", TWO)
                found |= {pattern, concrete, pattern.replace("*", ONE)}
    return found


ALL_SUBJECTS = sorted(set(rows()) | documented() | from_policy())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    found = EmbeddedNats(tmp_path_factory.mktemp("nats"), authority=Authority.new())
    found.start()
    yield found
    found.stop()


class Connection:
    """A client that remembers what the server refuses."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.refused: list[str] = []
        self.closed = asyncio.Event()

    async def refusals(self, kind: str, subjects: list[str]) -> set[str]:
        """Publish to subjects or subscribe to them, and return those that the server refuses."""
        self.refused.clear()
        for subject in subjects:
            if kind == "publish":
                await self.client.publish(subject, b"{}")
            else:
                await self.client.subscribe(subject)
        await settled(self.client)
        # The client gives errors in lower case.
        said = {text.rsplit('"', 2)[1] for text in self.refused if f"for {kind}" in text or "subscription" in text}
        return {subject for subject in subjects if subject.lower() in said}


async def settled(client: Client) -> None:
    """Return when the server has taken, or refused, all that was sent."""
    # The client sends a ping first and what it has gathered then: only a second ping comes behind that.
    await client.flush()
    await client.flush()


@asynccontextmanager
async def connected(server: EmbeddedNats, identity: str, name: str = "") -> AsyncIterator[Connection]:
    authority, now_s = server.issuer.authority, int(time.time())
    if identity == EXECUTOR:
        made, inbox = authority.executor(name or ONE, new_seed("user"), now_s), f"_INBOX.{name or ONE}"
    elif identity == EXTENSION:
        made, inbox = authority.extension(name or "one", now_s), f"_EXT.{name or 'one'}"
    else:
        made, inbox = authority.service(identity, now_s), f"_SVC.{identity}"
    connection = Connection(Client())

    async def on_error(error: Exception) -> None:
        connection.refused.append(str(error))

    async def on_close() -> None:
        connection.closed.set()

    await connection.client.connect(
        server.url,
        user_credentials=RawCredentials(credentials_text(made)),
        inbox_prefix=inbox,
        error_cb=on_error,
        closed_cb=on_close,
        allow_reconnect=False,
        skip_subject_validation=True,
    )
    try:
        yield connection
    finally:
        await connection.client.close()


class Watcher:
    """Somebody who hears everything."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._messages: list[Msg] = []
        self._done = asyncio.Event()

    async def start(self) -> None:
        await self._client.subscribe(">", cb=self._hear)
        await settled(self._client)

    async def heard(self) -> list[Msg]:
        """Return what has been said until now."""
        self._done.clear()
        await self._client.publish("that.is.all", b"")
        async with asyncio.timeout(10):
            await self._done.wait()
        return self._messages

    async def _hear(self, message: Msg) -> None:
        if message.subject == "that.is.all":
            self._done.set()
        else:
            self._messages.append(message)


@asynccontextmanager
async def watching(server: EmbeddedNats, folder: Path) -> AsyncIterator[Watcher]:
    config = server.issuer.service(EVERYTHING, folder)
    client = Client()
    await client.connect(config.url, user_credentials=config.credentials_file, allow_reconnect=False)
    try:
        watcher = Watcher(client)
        await watcher.start()
        yield watcher
    finally:
        await client.close()


# --- cells ---


@pytest.mark.parametrize("identity", COLUMNS)
async def test_every_cell_of_the_table(server: EmbeddedNats, tmp_path: Path, identity: str) -> None:
    async with watching(server, tmp_path) as watcher, connected(server, identity) as connection:
        table = {subject: cells[identity] for subject, cells in rows().items()}
        refused = await connection.refusals("publish", list(table))
        assert {subject for subject in table if subject not in refused} == {
            subject for subject, cell in table.items() if cell in "pb"
        }
        # And what is refused reaches nobody, what is allowed somebody.
        heard = {message.subject for message in await watcher.heard()}
        assert not refused & heard
        assert {one for one in table if one not in refused and one.startswith("hive.")} <= heard
        refused = await connection.refusals("subscribe", list(table))
        assert {subject for subject in table if subject not in refused} == {
            subject for subject, cell in table.items() if cell in "sb"
        }


@pytest.mark.parametrize("identity", sorted(policy()))
async def test_every_cell_of_the_policy(server: EmbeddedNats, identity: str) -> None:
    rights = policy()[identity].named({EXECUTOR: ONE, EXTENSION: "one"}.get(identity, identity))
    async with connected(server, identity) as connection:
        for kind, allowed in (("publish", rights.publish), ("subscribe", rights.subscribe)):
            expected = {one for one in ALL_SUBJECTS if not any(covers(pattern, one) for pattern in allowed)}
            assert await connection.refusals(kind, ALL_SUBJECTS) == expected, kind


def test_the_table_has_every_identity_and_every_subject_of_the_document() -> None:
    assert set(COLUMNS) == set(policy())
    patterns = set(rows()) | {re.sub(r"\.(t-1|[acg]|kv|model|task)(?=\.|$)", ".*", subject) for subject in rows()}
    missing = {subject for subject in documented() if not any(covers(pattern, subject) for pattern in patterns)}
    assert not missing


async def test_an_executor_cannot_flood_the_server_with_subscriptions(server: EmbeddedNats) -> None:
    most = policy()[EXECUTOR].subscriptions_max
    async with connected(server, EXECUTOR) as connection:
        for number in range(most + 10):
            await connection.client.subscribe(f"_INBOX.{ONE}.{number}")
        async with asyncio.timeout(10):
            await connection.closed.wait()
        assert "maximum subscriptions exceeded" in str(connection.client.last_error)


# --- replies that go elsewhere ---

ELSEWHERE: dict[str, Callable[[], str]] = {
    "where kill orders are said": lambda: KILL_SUBJECT,
    "another executor's inbox": lambda: f"_INBOX.{TWO}.x",
    "another executor's orders": lambda: f"hive.exec.{TWO}.control",
    "a service's inbox": lambda: "_SVC.scheduler.x",
    "an extension's inbox": lambda: "_EXT.one.x",
    "the published events": lambda: "hive.events.task.TaskSucceeded",
    "JetStream": lambda: f"$JS.API.STREAM.DELETE.{EVENTS_STREAM}",
}


@pytest.mark.parametrize("where", ELSEWHERE)
async def test_an_answer_cannot_be_sent_elsewhere(server: EmbeddedNats, tmp_path: Path, where: str) -> None:
    """The responder drops the request. One that forgot to could reach an executor's inbox, and the registry where
    kill orders are said, which nobody obeys without a signature; nothing else."""
    answered = asyncio.Event()

    async def handler(executor: str, body: HelloRequest) -> HelloReply:
        answered.set()
        return HelloReply(position=1)

    async def careless(message: Msg) -> None:
        await message.respond(b"careless")

    target = ELSEWHERE[where]()
    async with (
        watching(server, tmp_path) as watcher,
        connected(server, "registry") as registry,
        connected(server, EXECUTOR) as executor,
    ):
        subject = f"hive.exec.{ONE}.hello"
        answers = await respond(
            registry.client, "hive.exec.*.hello", HelloRequest, handler, lambda e: HelloReply(error=body_of(e))
        )
        await settled(registry.client)
        await executor.client.publish(subject, b'{"name":"n","session":"s"}', reply=target)
        # Requests are taken in order: once this one is answered, the other was dropped.
        await executor.client.request(subject, b"{}", timeout=10)
        assert not answered.is_set()
        await answers.unsubscribe()

        await registry.client.subscribe("hive.exec.*.hello", cb=careless)
        await settled(registry.client)
        await executor.client.publish(subject, b"{}", reply=target)
        await executor.client.request(subject, b"{}", timeout=10)
        await settled(registry.client)
        reached = {message.subject for message in await watcher.heard() if message.data == b"careless"}
        assert (target in reached) == (target.startswith("_INBOX.") or target == KILL_SUBJECT)


# --- JetStream ---

_numbers = itertools.count(1)


async def events(server: EmbeddedNats, count: int) -> str:
    """Publish events into the stream, as the relay does; return their subject, which is new."""
    subject = f"hive.events.task.Type{next(_numbers)}"
    async with connected(server, "audit") as audit:
        js = audit.client.jetstream()
        await js.add_stream(StreamConfig(name=EVENTS_STREAM, subjects=[EVENTS_SUBJECTS]))
        for number in range(count):
            await js.publish(subject, str(number).encode())
    return subject


def durable(name: str, subject: str) -> ConsumerConfig:
    return ConsumerConfig(
        name=name, durable_name=name, ack_policy=AckPolicy.EXPLICIT, filter_subject=subject, ack_wait=3600
    )


@pytest.mark.parametrize("forger", ["executor", "extension", "gateway", "scheduler", "audit"])
async def test_a_forged_acknowledgement_ends_nothing(server: EmbeddedNats, forger: str) -> None:
    subject, name = await events(server, 1), f"acks-{forger}"
    async with connected(server, EXTENSION, name) as one, connected(server, forger, "two") as other:
        js = one.client.jetstream()
        await js.add_consumer(EVENTS_STREAM, durable(name, subject))
        (message,) = await (await js.pull_subscribe_bind(name, EVENTS_STREAM)).fetch(1, timeout=10)
        for forged in (b"+TERM", b"+ACK", b"-NAK"):
            await other.client.publish(message.reply, forged)
        await settled(other.client)
        assert len(other.refused) == 3
        assert (await js.consumer_info(EVENTS_STREAM, name)).num_ack_pending == 1
        await message.ack_sync(timeout=10)
        assert (await js.consumer_info(EVENTS_STREAM, name)).num_ack_pending == 0


async def test_an_extension_reads_from_the_first_event_on_by_the_consumer_of_its_name(server: EmbeddedNats) -> None:
    subject = await events(server, 3)
    async with connected(server, EXTENSION, "reader") as extension:
        js = extension.client.jetstream()
        ordered = await js.subscribe(
            subject, stream=EVENTS_STREAM, ordered_consumer=True, config=ConsumerConfig(name="reader")
        )
        assert [(await ordered.next_msg(timeout=10)).data for _ in range(3)] == [b"0", b"1", b"2"]
        assert await js.delete_consumer(EVENTS_STREAM, "reader")
        await js.add_consumer(EVENTS_STREAM, durable("reader", subject))
        pulled = await (await js.pull_subscribe_bind("reader", EVENTS_STREAM)).fetch(3, timeout=10)
        assert [message.data for message in pulled] == [b"0", b"1", b"2"]
        assert extension.refused == []


async def test_an_extension_cannot_use_or_change_the_consumer_of_another(server: EmbeddedNats) -> None:
    subject = await events(server, 1)
    async with connected(server, EXTENSION, "owner") as one, connected(server, EXTENSION, "two") as two:
        js = one.client.jetstream()
        before = await js.add_consumer(EVENTS_STREAM, durable("owner", subject))
        # Under the subject of its own, the body may say what it likes: it gets a refusal, or its own.
        for name in ("name", "durable_name"):
            config = {name: "owner", "ack_policy": "explicit", "ack_wait": 10**9, "deliver_policy": "all"}
            body = json.dumps({"stream_name": EVENTS_STREAM, "config": config}).encode()
            for verb in ("CREATE", "DURABLE.CREATE"):
                to = f"$JS.API.CONSUMER.{verb}.{EVENTS_STREAM}.two"
                answer = await two.client.request(to, body, timeout=10)
                assert json.loads(answer.data).get("name") in (None, "two")
        verbs = ("CONSUMER.INFO", "CONSUMER.DELETE", "CONSUMER.MSG.NEXT", "CONSUMER.CREATE", "CONSUMER.PAUSE")
        for verb in verbs:
            await two.client.publish(f"$JS.API.{verb}.{EVENTS_STREAM}.owner", b"", reply="_EXT.two.x")
        await settled(two.client)
        assert len(two.refused) == len(verbs)
        after = await js.consumer_info(EVENTS_STREAM, "owner")
        assert (after.config, after.created) == (before.config, before.created)
