import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import msgspec
import pytest
from hive_common.bus.authority import Authority
from hive_common.contracts.limits import INLINE_BYTES_MAX, LOG_BYTES_MAX
from hive_common.contracts.values import by_digest, digest_of
from hive_common.inference.config import BackEndConfig
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import new_id
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.scripted import text_of
from hive_executor.metrics import PULLS
from hive_executor.try_agent import run_once


def output_of(report):
    assert report.status == "succeeded", report
    return json.loads(report.output.raw)


async def until(condition, what, wait_s=20.0):
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while not condition():
        assert loop.time() < deadline, f"waited {wait_s:g} s until {what}"
        await asyncio.sleep(0.01)


async def test_an_assignment_is_run_in_the_sandbox_and_its_outcome_reported_with_its_log(home, control, agent):
    key = control.assign(agent, {"n": 7})
    async with home.running():
        report = await control.outcome(key)
    assert output_of(report) == {"n": 7, "size": 0}
    assert report.session == control.pulls[0].session
    assert report.started_us <= report.ended_us
    assert report.usage.fuel > 0
    assert [line["text"] for line in json.loads(report.log.raw)] == ["got 1 keys"]
    assert control.order[0] == "hello"
    hello = control.hellos[0]
    assert hello.capabilities.slots == 2
    assert hello.capabilities.runtimes == ("python", "component", "command")
    assert hello.capabilities.engine.startswith("wasmtime ")


async def test_many_attempts_each_end_once_and_leave_the_spool_empty(home, control, agent):
    keys = [control.assign(agent, {"n": n}) for n in range(60)]
    async with home.running() as stop:
        for n, key in enumerate(keys):
            assert output_of(await control.outcome(key))["n"] == n
        async with aiohttp.ClientSession() as session, session.get(f"{stop.ops_url}/metrics") as answer:
            assert "hive_executor_attempts_total" in await answer.text()
    assert all(len(control.outcomes(key)) == 1 for key in keys)
    assert sum(path.stat().st_size for path in home.spool_dir.iterdir()) < 100
    sequences = [pull.sequence for pull in control.pulls]
    assert sequences == sorted(set(sequences))
    assert max(pull.slots_free for pull in control.pulls) > 2, "short attempts are prefetched"
    asking = [pull for pull in control.pulls if pull.slots_free]
    assert all(pull.ahead == max(0, len(pull.held) + pull.slots_free - 2) for pull in asking)


async def test_a_slot_that_comes_free_is_said_though_a_pull_for_more_that_may_wait_lies_there(home, control, agent):
    replaced = PULLS.labels("replaced")
    async with home.running(slots=1, prefetch_ms=60_000):
        await control.outcome(control.assign(agent, {}))
        control.answer_s = 3_600
        before = replaced._value.get()
        key = control.assign(agent, {"sleep_s": 0.3})

        def lies_there(pull):
            return key in pull.held and 0 < pull.slots_free == pull.ahead

        await until(lambda: any(map(lies_there, control.pulls)), "it runs")
        await until(lambda: control.pulls[-1].slots_free > control.pulls[-1].ahead, "it says that a slot is free")
        assert replaced._value.get() > before


async def test_a_failed_guest_is_reported_with_its_code_and_traceback(home, control, agent):
    key = control.assign(agent, {"raise": "no such thing"})
    async with home.running():
        report = await control.outcome(key)
    assert (report.status, report.code) == ("failed", "agent_error")
    assert "no such thing" in report.message
    assert "agent.py" in report.detail


async def test_an_attempt_that_is_assigned_again_is_not_run_again(home, control, agent):
    async with home.running():
        key = control.assign(agent, {"sleep_s": 0.5})
        await until(lambda: any(key in pull.held for pull in control.pulls), "the attempt is held")
        control.resend(control.given(key))
        await control.outcome(key)
        control.resend(control.given(key))
        after = control.assign(agent, {"n": 1})
        await control.outcome(after)
        await asyncio.sleep(0.3)
    assert len(control.outcomes(key)) == 1


async def test_a_long_attempt_is_reported_as_started_and_its_log_is_streamed(home, control, agent):
    async with home.running():
        key = control.assign(agent, {"sleep_s": 1.5})
        await until(lambda: control.logs, "a line came live")
        assert control.logs[0].lines[0].text == "got 1 keys"
        assert control.logs[0].job == control.jobs_id
        assert not control.outcomes(key)
        await control.outcome(key)
    statuses = [report.status for report in control.reports if report.task == key.task]
    assert statuses == ["started", "succeeded"]


async def test_how_far_an_attempt_is_is_reported_at_once_and_told_to_a_new_leader_again(home, control, agent):
    def marks(key):
        return [r.done_permille for r in control.reports if r.task == key.task and r.done_permille]

    async with home.running():
        key = control.assign(agent, {"progress": [0.3, 0.31, 0.5], "sleep_s": 60})
        await until(lambda: marks(key) == [300, 500], "both were reported")
        assert {r.status for r in control.reports} == {"started"}
        await control.announce(epoch=2)
        await until(lambda: marks(key) == [300, 500, 500], "the new leader was told")
        control.cancel(key)
        await until(lambda: key not in control.held, "it was stopped")
        reported = len(control.reports)
        await control.announce(epoch=3)
        await control.outcome(control.assign(agent, {}))
    assert marks(key) == [300, 500, 500] and len(control.reports) > reported


async def test_a_superseded_session_stops_everything_with_code_3(home, control, agent):
    key = control.assign(agent, {"sleep_s": 60})
    async with home.process() as child:
        await until(lambda: any(key in pull.held for pull in control.pulls), "the attempt runs")
        control.superseded.add(control.pulls[-1].session)
        assert await asyncio.wait_for(child.wait(), 30) == 3
    assert "superseded" in (home.folder / "executor.log").read_text()
    assert not control.outcomes(key)


async def test_an_unknown_executor_says_hello_again_and_then_works(home, control, agent):
    async with home.running():
        await until(lambda: control.pulls, "it pulled")
        control.is_known = False
        await until(lambda: len(control.hellos) == 2, "it said hello again")
        await control.outcome(control.assign(agent, {}))


async def test_a_new_leader_makes_it_pull_again_at_once(home, control, agent):
    control.answer_s = 3600
    async with home.running():
        await until(lambda: control.pulls, "it pulled")
        pulls = len(control.pulls)
        await control.announce(epoch=2)
        await until(lambda: len(control.pulls) > pulls, "it pulled again")
        await control.outcome(control.assign(agent, {}))


async def test_an_answer_of_an_old_leader_counts_for_nothing(home, control, agent):
    async with home.running():
        await until(lambda: control.pulls, "it pulled")
        await control.announce(epoch=5)
        control.epoch = 4
        key = control.assign(agent, {})
        await until(lambda: any(key in given for given in control._given.values()), "it was assigned")
        await asyncio.sleep(0.3)
        assert not control.outcomes(key)
        control.epoch = 5
        await control.outcome(key)


async def test_a_report_is_repeated_until_it_is_committed(home, control, agent):
    control.report_mode = "refuse"
    async with home.running():
        key = control.assign(agent, {"n": 3})
        await until(lambda: len(control.report_requests) >= 3, "it was reported three times")
        await until(lambda: any(key in pull.spooled for pull in control.pulls), "the pull names it")
        assert not control.outcomes(key)
        control.report_mode = "commit"
        assert output_of(await control.outcome(key))["n"] == 3


async def test_late_and_rejected_outcomes_leave_the_spool(home, control, agent, monkeypatch):
    # The verdicts are given to every report: one on a start would end the attempt.
    monkeypatch.setattr("hive_executor.attempts.STARTED_AFTER_MS", 60_000)
    async with home.running():
        keys = [control.assign(agent, {"sleep_s": 0.2}) for _ in range(2)]
        control.verdicts = {keys[0]: "late", keys[1]: "rejected"}
        for key in keys:
            await control.outcome(key)
        await until(lambda: control.pulls and not control.held | control.spooled, "nothing is left")
    assert all(len(control.outcomes(key)) == 1 for key in keys)


async def test_an_attempt_that_the_scheduler_gave_up_is_stopped_when_its_start_is_late(home, control, agent):
    async with home.running():
        key = control.assign(agent, {"sleep_s": 60})
        control.verdicts[key] = "late"
        await until(lambda: any(key in pull.held for pull in control.pulls), "it runs")
        await until(lambda: not control.held, "it was stopped")
    assert not control.outcomes(key)


async def test_a_cancel_kills_the_guest_and_frees_its_slot(home, control, agent):
    async with home.running():
        keys = [control.assign(agent, {"sleep_s": 60}) for _ in range(2)]
        await until(lambda: set(keys) <= control.held, "both run")
        for key in keys:
            control.cancel(key)
        after = control.assign(agent, {"n": 1})
        await control.outcome(after)
    assert not any(control.outcomes(key) for key in keys)


async def test_inputs_and_outputs_beyond_the_inline_limit_travel_by_digest(home, control, gateway, agent):
    text = json.dumps({"text": "y" * (2 * INLINE_BYTES_MAX)}).encode()
    gateway.keep(text)
    async with home.running():
        key = control.assign(agent, by_digest(text))
        assert output_of(await control.outcome(key))["size"] == 2 * INLINE_BYTES_MAX
        gateway.failures = 2
        report = await control.outcome(control.assign(agent, {"large": INLINE_BYTES_MAX + 1}))
    assert report.status == "succeeded"
    assert report.output.raw is None
    stored = gateway.blobs[report.output.digest]
    assert len(json.loads(stored)["text"]) == INLINE_BYTES_MAX + 1
    assert digest_of(stored) == report.output.digest
    assert report.output.size_bytes == len(stored)


async def test_a_long_log_travels_by_digest(home, control, gateway, agent):
    async with home.running():
        report = await control.outcome(control.assign(agent, {"log_lines": 1000}))
    lines = json.loads(gateway.blobs[report.log.digest])
    assert len(lines) == 1001
    assert lines[-1]["text"].startswith("line 999 ")


async def test_a_log_beyond_its_limit_keeps_to_it_as_json_too(home, control, gateway, agent):
    async with home.running():
        report = await control.outcome(control.assign(agent, {"log_lines": 5000}))
    stored = gateway.blobs[report.log.digest]
    assert len(stored) <= LOG_BYTES_MAX
    lines = json.loads(stored)
    assert "earlier lines did not fit" in lines[0]["text"]
    assert "the log was cut" in lines[-1]["text"]


async def test_a_blob_that_comes_damaged_is_fetched_again(home, control, gateway, agent):
    text = json.dumps({"text": f"{home.executor_id}"}).encode()
    gateway.corrupt.add(gateway.keep(text))
    async with home.running():
        key = control.assign(agent, by_digest(text))
        assert output_of(await control.outcome(key))["size"] == len(home.executor_id)
    assert gateway.requests.count(("GET", digest_of(text))) == 2


async def test_an_output_that_cannot_be_stored_gives_the_attempt_back(home, control, gateway, agent):
    async with home.running(blob_timeout_ms=500):
        await control.outcome(control.assign(agent, {}))
        gateway.failures = 1_000_000
        report = await control.outcome(control.assign(agent, {"large": INLINE_BYTES_MAX + 1}))
    assert report.status == "cancelled"
    assert "503" in report.message


async def test_an_agent_that_the_gateway_does_not_have_is_an_invalid_module(home, control, gateway, agent):
    missing = msgspec.structs.replace(agent, digest="sha256:" + "0" * 64)
    async with home.running():
        report = await control.outcome(control.assign(missing, {}))
    assert (report.status, report.code) == ("failed", "invalid_module")
    assert missing.digest in report.message


async def test_a_full_spool_stops_pulling_and_says_so(home, control, agent):
    control.report_mode = "refuse"
    async with home.running(spool_reports_max=2) as stop:
        keys = [control.assign(agent, {"n": n}) for n in range(4)]

        async def problems():
            async with aiohttp.ClientSession() as session, session.get(f"{stop.ops_url}/readyz") as answer:
                return (await answer.json())["problems"]

        await until(lambda: control.pulls, "it pulled")
        deadline = asyncio.get_running_loop().time() + 30
        while "spool" not in await problems():
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)
        assert "full" in (await problems())["spool"]
        await asyncio.sleep(2 * control.answer_s)
        pulls = len(control.pulls)
        await asyncio.sleep(1.0)
        assert len(control.pulls) == pulls
        control.report_mode = "commit"
        for key in keys:
            await control.outcome(key)
        deadline = asyncio.get_running_loop().time() + 30
        while "spool" in await problems():
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)


async def test_a_restart_reports_what_the_last_session_left_before_it_pulls(home, control, agent):
    control.report_mode = "refuse"
    async with home.process() as child:
        keys = [control.assign(agent, {"n": n}) for n in range(5)]
        await until(lambda: home.has_on_disk(keys), "all are on disk")
        first_session = control.pulls[-1].session
        child.send_signal(signal.SIGKILL)
        await child.wait()
    control.report_mode = "commit"
    control.order.clear()
    async with home.process():
        for n, key in enumerate(keys):
            report = await control.outcome(key)
            assert output_of(report)["n"] == n
            assert report.session == first_session
        await until(lambda: "pull" in control.order, "it pulled")
        assert control.report_requests[-1].session != first_session
    assert control.order.index("report") < control.order.index("pull")
    assert all(len(control.outcomes(key)) == 1 for key in keys)


async def test_a_process_killed_in_the_middle_comes_back_as_a_new_session_and_takes_its_runners_along(
    home, control, agent
):
    async with home.process() as child:
        key = control.assign(agent, {"sleep_s": 60})
        await until(lambda: any(key in pull.held for pull in control.pulls), "the attempt runs")
        first_session = control.pulls[-1].session
        runners = _children(child.pid)
        assert runners
        child.send_signal(signal.SIGKILL)
        await child.wait()
    await until(lambda: not any(_is_alive(pid) for pid in runners), "its runners are gone")
    pulls = len(control.pulls)
    async with home.process():
        await until(lambda: len(control.pulls) > pulls, "it pulls again")
        assert control.pulls[-1].session != first_session
        assert control.pulls[-1].held == control.pulls[-1].spooled == ()
        await control.outcome(control.assign(agent, {}))
    assert not control.outcomes(key)


async def test_sigterm_gives_back_what_does_not_end_in_time(home, control, agent):
    async with home.process(slots=1, stop_grace_ms=200) as child:
        keys = [control.assign(agent, {"sleep_s": 60})]
        await until(lambda: set(keys) <= control.held, "it runs")
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 30) == 0
    assert control.pulls[-1].draining
    assert control.pulls[-1].slots_free == 0
    for key in keys:
        assert (await control.outcome(key)).status == "cancelled"


async def test_sigterm_lets_an_attempt_that_is_about_to_end_do_so(home, control, agent):
    async with home.process(stop_grace_ms=20_000) as child:
        key = control.assign(agent, {"sleep_s": 3})
        await until(lambda: control.reports, "its start was reported")
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 30) == 0
    assert (await control.outcome(key)).status == "succeeded"


async def test_a_drained_executor_offers_no_slots(home, control, agent):
    control.is_drained = True
    async with home.running():
        await until(lambda: control.pulls and control.pulls[-1].draining, "it knows")
        assert control.pulls[-1].slots_free == 0
        control.is_drained = False
        await control.outcome(control.assign(agent, {}))


async def test_without_a_lease_running_guests_are_killed_and_given_back(home, control, agent):
    async with home.running(offline_stop_ms=1_500):
        keys = [control.assign(agent, {"sleep_s": 60}) for _ in range(2)]
        await until(lambda: set(keys) <= control.held, "both run")
        control.is_pulling_answered = False
        for key in keys:
            report = await control.outcome(key)
            assert report.status == "cancelled"
            assert "lease" in report.message
        control.is_pulling_answered = True
        await control.outcome(control.assign(agent, {}))


async def test_a_damaged_spool_is_set_aside_and_what_can_be_read_is_reported(home, control, agent):
    control.report_mode = "refuse"
    async with home.process() as child:
        keys = [control.assign(agent, {"n": n}) for n in range(3)]
        await until(lambda: home.has_on_disk(keys), "all are on disk")
        killed = control.pulls[-1].session
        child.send_signal(signal.SIGKILL)
        await child.wait()
    segment = max(home.spool_dir.glob("*.spool"))
    damaged = bytearray(segment.read_bytes())
    damaged[-20] ^= 1
    segment.write_bytes(damaged)
    (home.spool_dir / "00000000.spool").write_bytes(b"\0" * 100)
    control.report_mode = "commit"
    async with home.running():
        await until(lambda: sum(len(control.outcomes(key)) for key in keys) == 2, "the readable two came")
        # Until then the pull of the process that was killed would be given what is assigned.
        await until(lambda: control.pulls[-1].session != killed, "the new session pulls")
        await control.outcome(control.assign(agent, {}))
    assert len(list(home.spool_dir.glob("*.damaged"))) == 2


async def test_a_restart_of_nats_disturbs_neither_guests_nor_outcomes(
    tmp_path, server_dir, gateway, cache_dir, package, new_home, new_control
):
    executor_id = new_id()
    nats = EmbeddedNats(server_dir, authority=Authority.new())
    nats.start()
    folder = tmp_path / "home"
    folder.mkdir()
    home = new_home(folder, nats, gateway, cache_dir, executor_id)
    control = new_control(home.executor_id, gateway)
    await control.start(home.services_nats)
    agent = gateway.publish(package)
    try:
        async with home.running():
            running = control.assign(agent, {"sleep_s": 2})
            await until(lambda: running in control.held, "it runs")
            nats.stop(signal.SIGKILL)
            await asyncio.sleep(0.5)
            nats.start()
            pulls = len(control.pulls)
            assert output_of(await control.outcome(running))["n"] == 0
            await until(lambda: len(control.pulls) > pulls, "it pulls again")
            assert control.pulls[-1].session == control.pulls[0].session
            await control.outcome(control.assign(agent, {}))
            # It is told again, as it was, where the answer did not come.
            first, *again = control.outcomes(running)
            assert all(one == first for one in again)
            pulls = len(control.pulls)
            control.answer_s = 3600
            await until(lambda: len(control.pulls) > pulls, "a pull that stays open")
            await control.announce(epoch=2)
            await until(lambda: len(control.pulls) > pulls + 1, "it heard of the new leader")
    finally:
        await control.stop()
        nats.stop()


async def test_without_a_scheduler_it_asks_again_for_ever_and_then_works(home, gateway, agent, new_control):
    async with home.running():
        await asyncio.sleep(1.0)
        control = new_control(home.executor_id, gateway)
        await control.start(home.services_nats)
        await control.outcome(control.assign(agent, {}))
        await control.stop()


async def test_a_runner_that_is_killed_costs_its_attempt_and_nothing_else(home, control, agent):
    async with home.process() as child:
        key = control.assign(agent, {"sleep_s": 60})
        await until(lambda: any(one.status == "started" for one in control.reports), "it runs")
        for pid in _children(child.pid):
            os.kill(pid, signal.SIGKILL)
        report = await control.outcome(key)
        assert (report.status, report.code) == ("failed", "runner_died")
        await control.outcome(control.assign(agent, {}))


async def test_a_folder_is_tried_in_the_same_sandbox(tmp_path, cache_dir):
    (tmp_path / "agent.py").write_text(
        "from hive import log, progress\ndef run(input):\n    log('hi')\n    progress(0.5)\n    return input\n"
    )
    (tmp_path / "manifest.yaml").write_text(
        "apiVersion: hive/v1\nkind: Agent\nname: echo\nversion: 1.0.0\nruntime: python\nentry: agent.py\n"
        "input: {type: object, required: [n]}\noutput: {type: object, properties: {n: {type: integer}}}\n"
    )
    lines = []
    outcome = await run_once(tmp_path, b'{"n": 1}', cache_dir, lines.append)
    assert (outcome.status, outcome.output) == ("succeeded", b'{"n":1}')
    assert [line.text for line in lines] == ["hi"]
    outcome = await run_once(tmp_path, b'{"n": "one"}', cache_dir)
    assert (outcome.status, outcome.code) == ("failed", "invalid_output")
    assert outcome.message.startswith("output.n: ")
    with pytest.raises(InvalidArgument, match="'n' is a required property"):
        await run_once(tmp_path, b"{}", cache_dir)


async def test_a_folder_that_forks_is_tried_and_what_it_forks_is_told(tmp_path, cache_dir):
    (tmp_path / "agent.py").write_text(
        "from hive import fork\n"
        "def run(input):\n"
        "    fork('square', [{'n': n} for n in input['all']])\n"
        "    return {'n': 1 // input['n']}\n"
    )
    (tmp_path / "manifest.yaml").write_text(
        "apiVersion: hive/v1\nkind: Agent\nname: plan\nversion: 1.0.0\nruntime: python\nentry: agent.py\n"
        "permissions: {fork: {agents: [square], max: 2}}\n"
    )
    told = []
    outcome = await run_once(tmp_path, b'{"all": [1, 2], "n": 1}', cache_dir, on_fork=told.append)
    assert outcome.status == "succeeded", outcome
    assert [(child.agent, bytes(child.input)) for child in told] == [("square", b'{"n":1}'), ("square", b'{"n":2}')]
    failed = await run_once(tmp_path, b'{"all": [1], "n": 0}', cache_dir, on_fork=told.append)
    more = await run_once(tmp_path, b'{"all": [1, 2, 3], "n": 1}', cache_dir, on_fork=told.append)
    assert (failed.code, more.code, len(told)) == ("agent_error", "permission_denied", 2)


async def test_a_folder_that_calls_models_is_tried_with_those_of_an_installation(tmp_path, cache_dir, scripted):
    (tmp_path / "agent.py").write_text(
        "from hive import ModelError, model\n"
        "def run(input):\n"
        "    try:\n"
        "        return {'text': model.chat('x').text}\n"
        "    except ModelError as error:\n"
        "        return {'failed': error.message}\n"
    )
    (tmp_path / "manifest.yaml").write_text(
        "apiVersion: hive/v1\nkind: Agent\nname: ask\nversion: 1.0.0\nruntime: python\nentry: agent.py\n"
        "permissions: {model: {names: ['*'], max_tokens: 4}}\n"
    )
    outcome = await run_once(tmp_path, b"{}", cache_dir, gateway=BackEndConfig(scripted.url))
    assert json.loads(outcome.output) == {"text": text_of(4)}, outcome
    outcome = await run_once(tmp_path, b"{}", cache_dir, gateway=BackEndConfig("http://127.0.0.1:1"))
    assert "hive up" in json.loads(outcome.output)["failed"]
    outcome = await run_once(tmp_path, b"{}", cache_dir)
    assert "hive up --with-model" in json.loads(outcome.output)["failed"]


def _children(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_children(int(child))]
    return found


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_restart_with_a_full_spool_pulls_nothing_until_there_is_room(home, control, agent):
    control.report_mode = "refuse"
    async with home.process(spool_reports_max=2) as child:
        first = [control.assign(agent, {"n": n}) for n in range(2)]

        await until(lambda: home.has_on_disk(first), "both outcomes are on disk")
        first_session = control.pulls[-1].session
        child.send_signal(signal.SIGKILL)
        await child.wait()
    later = [control.assign(agent, {"n": n}) for n in range(10, 13)]
    pulls, requests = len(control.pulls), len(control.report_requests)
    async with home.process(spool_reports_max=2):
        await until(lambda: len(control.report_requests) >= requests + 3, "it tries to get rid of them")
        assert len(control.pulls) == pulls
        control.report_mode = "commit"
        for key in (*first, *later):
            await control.outcome(key)
        await until(lambda: not control.spooled, "the spool is empty")
    assert [control.outcomes(key)[0].session for key in first] == [first_session] * 2
    assert all(control.outcomes(key)[0].session != first_session for key in later)
    assert all(len(control.outcomes(key)) == 1 for key in (*first, *later))
