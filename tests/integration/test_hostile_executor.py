"""An executor with valid credentials that means harm: nothing it tries has an effect beyond its own task."""

import asyncio
import json
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import hive_scheduler.dispatch
import msgspec
import pytest
from hive_common.bus import nats as bus
from hive_common.contracts import events, messages, values
from hive_common.contracts.messages import AttemptKey, AttemptReport, PullReply, PullRequest
from hive_common.kernel.ids import new_id
from hive_common.ops.telemetry import FENCED, REQUESTS
from hive_common.testing.identities import EVERYTHING
from nats.aio.client import Client
from nats.aio.msg import Msg

from .plane import Executor, Plane

FLOODER = Path(__file__).with_name("flooder.py")
ROUNDS = 15
JOBS_PER_ROUND = 10
"""Short, so that what else a machine does falls on rounds with the flood as on those without."""
WORK_RATIO_MAX = 2
"""The control plane takes less than twice the processor time for jobs of others while the flood goes on."""
TIME_RATIO_MAX = 2 * 4
"""Nor do the slowest of them take longer; four times that, since others who use the machine do not show as work."""
SLOWEST = 0.9
"""A part that leaves fifteen beyond it, whom one pause of the machine does not move."""


@pytest.fixture
async def trial(plane: Plane) -> AsyncIterator[Plane]:
    """A control plane with an executor that means harm and another one."""
    async with plane.running("hostile", "honest"):
        yield plane


async def watcher(plane: Plane) -> tuple[Client, list[Msg]]:
    """Return a client that hears everything, and what it has heard."""
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    client = await bus.connect(plane.nats.issuer.service(EVERYTHING, plane.folder), EVERYTHING)
    await client.subscribe(">", cb=hear)
    await client.flush()
    return client, heard


async def settled(executor: Executor, count: int) -> list[str]:
    """Return what the server refused, once there are `count` refusals."""
    await executor.client.flush()
    async with asyncio.timeout(20):
        while len(executor.refused) < count:
            await asyncio.sleep(0.01)
    return [text for text in executor.refused if "permissions violation" in text]


def attempts_of(history: list[tuple[str, events.Event]], kind: type[events.Event]) -> list[events.Event]:
    return [event for _, event in history if isinstance(event, kind)]


async def test_it_cannot_pull_report_or_say_hello_for_another(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    everything, heard = await watcher(trial)
    try:
        body = PullRequest(session=new_id(), sequence=1 << 40, slots_free=100)
        others = (messages.pull_subject, messages.report_subject, messages.hello_subject)
        for subject in others:
            inbox = f"{messages.inbox_prefix(hostile.id)}.x"
            await hostile.client.publish(subject(honest.id), msgspec.json.encode(body), reply=inbox)
        assert len(await settled(hostile, len(others))) == len(others)
        await everything.flush()
        assert [message.subject for message in heard if honest.id in message.subject] == []
        # The other one is still the session that counts.
        honest.work()
        job = await trial.finished(await trial.submit(4))
        assert json.loads(job.output_json) == {"n": 8}
    finally:
        await everything.close()


async def test_it_hears_nothing_that_is_not_for_it_and_publishes_no_order(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    listening = (">", "*.>", "hive.>", "hive.exec.>", "hive.exec.*.pull", f"hive.exec.{honest.id}.control")
    listening += (
        "_INBOX.>",
        f"_INBOX.{honest.id}.>",
        "_SVC.>",
        "hive.events.>",
        "hive.log.head",
        "$SYS.>",
        "$JS.>",
    )
    for subject in listening:
        await hostile.client.subscribe(subject, cb=hear)
    orders = (
        "hive.control.kill",
        messages.LEADER_SUBJECT,
        f"hive.exec.{honest.id}.control",
        messages.infer_subject(honest.id),
        messages.stream_subject(honest.id, new_id()),
        f"_INBOX.{honest.id}.x",
        "_SVC.scheduler.x",
        "hive.events.task.TaskSucceeded",
        messages.HEAD_SUBJECT,
        "$SYS.REQ.SERVER.PING",
        "$JS.API.STREAM.DELETE.HIVE_EVENTS",
    )
    everything, seen = await watcher(trial)
    try:
        for subject in orders:
            await hostile.client.publish(subject, b"forged")
        expected = len(listening) + len(orders)
        assert len(await settled(hostile, expected)) == expected
        honest.work()
        await trial.finished(await trial.submit())
        await hostile.client.flush()
        await everything.flush()
        assert heard == []
        assert [message.subject for message in seen if message.data == b"forged"] == []
    finally:
        await everything.close()


async def test_it_cannot_have_an_answer_sent_elsewhere(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    dropped = REQUESTS.labels("pull", "foreign_reply")._value.get
    before = dropped()
    everything, heard = await watcher(trial)
    elsewhere = (
        "hive.control.kill",
        messages.LEADER_SUBJECT,
        f"_INBOX.{honest.id}.x",
        f"_INBOX.{hostile.id}",
        f"_INBOX.{hostile.id}x.y",
        "$JS.API.STREAM.DELETE.HIVE_EVENTS",
        messages.pull_subject(honest.id),
    )
    try:
        for subject in elsewhere:
            body = PullRequest(session=hostile.session, sequence=1, slots_free=0)
            await hostile.client.publish(
                messages.pull_subject(hostile.id), msgspec.json.encode(body), reply=subject
            )
        async with asyncio.timeout(20):
            while dropped() - before < len(elsewhere):
                await asyncio.sleep(0.01)
        await everything.flush()
        assert [message.subject for message in heard if message.subject in elsewhere] == []
    finally:
        await everything.close()


async def test_it_cannot_report_what_another_holds(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    job = await trial.submit(21)
    assignment = await honest.assigned()
    # Even one that knows the session and the attempt has only its own subject to say so.
    forged = hostile.outcome(assignment, {"n": -1}, session=honest.session)
    for report in (forged, hostile.outcome(assignment, {"n": -1})):
        assert await hostile.report(report) == ["rejected"]
    failure = msgspec.structs.replace(forged, status="failed", output=None, code="agent_error")
    assert await hostile.report(failure, msgspec.structs.replace(forged, status="cancelled")) == ["rejected"] * 2
    assert await honest.report(honest.outcome(assignment, {"n": 42})) == ["accepted"]
    assert json.loads((await trial.finished(job)).output_json) == {"n": 42}
    history = await trial.history(job)
    assert [event.output.raw for event in attempts_of(history, events.AttemptSucceeded)] == [b'{"n":42}']  # type: ignore[attr-defined]
    assert attempts_of(history, events.AttemptLate) == []


async def test_of_its_own_attempts_only_the_live_one_counts_and_only_once(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    job = await trial.submit(21, max_attempts=2)
    first = await hostile.assigned()
    # Success of an attempt that there is not yet.
    early = hostile.outcome(first, {"n": 1}, attempt=first.attempt + 1)
    assert await hostile.report(early) == ["rejected"]
    gone = msgspec.structs.replace(hostile.outcome(first, {}), status="failed", output=None, code="agent_error")
    assert await hostile.report(gone) == ["accepted"]
    # An old attempt, in time for the next one to be running.
    second = await honest.assigned()
    assert second.attempt == first.attempt + 1
    # What was said of an attempt first stands; that it is said again is acknowledged, and changes nothing.
    assert await hostile.report(hostile.outcome(first, {"n": 2})) == ["accepted"]
    assert await hostile.report(hostile.outcome(second, {"n": 3})) == ["rejected"]
    assert await honest.report(honest.outcome(second, {"n": 42})) == ["accepted"]
    assert json.loads((await trial.finished(job)).output_json) == {"n": 42}
    # A second outcome, after the job has ended too.
    assert await honest.report(honest.outcome(second, {"n": 4})) in (["accepted"], ["late"])
    history = await trial.history(job)
    assert len(attempts_of(history, events.AttemptFailed)) == 1
    assert len(attempts_of(history, events.AttemptSucceeded)) == 1
    assert len(attempts_of(history, events.TaskSucceeded)) == 1


async def test_a_result_outside_the_schema_fails_its_attempt_and_nothing_else(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    for output in ({"n": "many"}, [], {"n": 1.5}, {}):
        job = await trial.submit(max_attempts=1)
        assert await hostile.report(hostile.outcome(await hostile.assigned(), output)) == ["accepted"]
        done = await trial.finished(job)
        assert done.state == "failed"
        (failed,) = attempts_of(await trial.history(job), events.AttemptFailed)
        assert isinstance(failed, events.AttemptFailed)
        assert failed.code == "invalid_output"
    job = await trial.submit()
    assignment = await hostile.assigned()
    # A digest of what nobody has.
    missing = values.by_digest(b"nothing of this is stored anywhere")
    report = msgspec.structs.replace(hostile.outcome(assignment, {}), output=missing)
    assert await hostile.report(report) == ["accepted"]
    assert (await trial.finished(job)).state == "failed"
    honest.work()
    assert (await trial.finished(await trial.submit(5))).state == "succeeded"


async def test_what_it_holds_for_ever_is_given_to_another(trial: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive_scheduler.dispatch, "OVERTIME_MS", 200)
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    job = await trial.submit(21)
    assignment = await hostile.assigned()
    key = AttemptKey(assignment.task, assignment.attempt)
    # It began in the far future, says its executor, and never ends.
    began = AttemptReport(key.task, key.attempt, hostile.session, "started", started_us=1 << 62)
    assert await hostile.report(began) == ["accepted"]

    async def hold() -> None:
        while True:
            await hostile.pull(0, held=(key,))

    holding = asyncio.create_task(hold())
    try:
        honest.work()
        done = await trial.finished(job)
    finally:
        holding.cancel()
        await asyncio.wait({holding})
    assert json.loads(done.output_json) == {"n": 42}
    history = await trial.history(job)
    assert len(attempts_of(history, events.AttemptLost)) == 1
    assert await hostile.report(hostile.outcome(assignment, {"n": -1})) == ["late"]


async def test_what_no_message_should_be_is_refused(trial: Plane) -> None:
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    bodies = [b"", b"{", b"null", b"[" * 100_000, b'{"v":99}', b"\xff" * 1000, b'{"session":1}', b"x" * 900_000]
    for verb in (messages.pull_subject, messages.report_subject, messages.hello_subject):
        for body in bodies:
            answer = await hostile.client.request(verb(hostile.id), body, timeout=ANSWER_S)
            reply = msgspec.json.decode(answer.data, type=PullReply)
            assert reply.error is not None
            assert reply.error.code in ("invalid_argument", "payload_too_large"), (verb(""), body[:20], reply)
    honest.work()
    assert (await trial.finished(await trial.submit(5))).state == "succeeded"


ANSWER_S = 20.0


class Cost:
    """What jobs took: milliseconds each, and processor time of this process, the whole control plane, for all."""

    def __init__(self) -> None:
        self.took_ms: list[float] = []
        self.worked_s = 0.0

    async def of_round(self, plane: Plane) -> None:
        """Do a few jobs, one after the other."""
        began_s = time.process_time()
        for number in range(JOBS_PER_ROUND):
            started = time.perf_counter()
            done = await plane.finished(await plane.submit(number))
            self.took_ms.append((time.perf_counter() - started) * 1000)
            assert done.state == "succeeded"
        self.worked_s += time.process_time() - began_s


def percentile(values_: list[float], part: float) -> float:
    return sorted(values_)[math.ceil(len(values_) * part) - 1]


@pytest.mark.timeout(400)  # three hundred jobs, on a machine that is as busy as one likes
async def test_a_flood_takes_little_from_the_others(trial: Plane) -> None:
    """Jobs of the other one, in turns with and without a process that publishes as fast as it can."""
    hostile, honest = trial.executors["hostile"], trial.executors["honest"]
    honest.work()
    flooder = await asyncio.create_subprocess_exec(
        sys.executable,
        str(FLOODER),
        hostile.config.url,
        hostile.config.credentials_file,
        hostile.id,
        stdout=asyncio.subprocess.PIPE,
    )
    fenced = FENCED._value.get
    before = fenced()
    quiet, during = Cost(), Cost()
    try:
        assert flooder.stdout is not None
        assert await flooder.stdout.readline() == b"flooding\n"
        for _ in range(ROUNDS):
            flooder.send_signal(signal.SIGSTOP)
            # What the flood has brought before is not work of the quiet round.
            await trial.finished(await trial.submit())
            await quiet.of_round(trial)
            flooder.send_signal(signal.SIGCONT)
            await during.of_round(trial)
    finally:
        flooder.kill()
        await flooder.wait()
    shown = {
        f"p{part * 100:g}": (percentile(quiet.took_ms, part), percentile(during.took_ms, part))
        for part in (0.5, SLOWEST, 0.99)
    }
    shown["work"] = (quiet.worked_s, during.worked_s)
    if os.environ.get("HIVE_SHOW"):
        print(shown)
    assert fenced() - before >= 2, "it was too slow to be noticed on pull and report"
    assert during.worked_s < WORK_RATIO_MAX * quiet.worked_s, shown
    assert percentile(during.took_ms, SLOWEST) < TIME_RATIO_MAX * percentile(quiet.took_ms, SLOWEST), shown
