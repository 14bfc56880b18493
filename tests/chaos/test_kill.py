"""`kill -9` of one process at a random moment of a running job: it ends as if nothing had happened."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
import urllib.error
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from hive_common.testing.installation import HIVE, TERMINAL, assert_exactly_once, wait_until

JOB = Path(__file__).parent / "job.yaml"
TASKS = 30
ORPHANS_S = 10
"""What is promised; it takes one or two."""
PROCESSES = ["postgres", "nats", "registry", "scheduler", "router", "audit", "gateway", "executor-1", "runner"]

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def numbers(count):
    return f"numbers={json.dumps(list(range(count)))}"


def finished(installation, job, timeout_s=100):
    try:
        out, err = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"the job hangs\n{what_hangs(installation)}\n{installation.logs()}")
    assert job.returncode == 0, f"{out}\n{err}\n{installation.logs()}"
    return json.loads(out)


def what_hangs(installation):
    """Return the events of the newest job's tasks that have not ended, and the executors as they are seen."""
    newest = installation.json("job", "list")["jobs"][0]["job_id"]
    events = installation.events(newest)
    ended = {event["stream"] for event in events if event["type"] in TERMINAL}
    lines = [json.dumps(event) for event in events if event["stream"] not in ended]
    return "\n".join([*lines, json.dumps(installation.json("status"))])


def assert_as_if_nothing_had_happened(installation, result, count=TASKS):
    assert result["state"] == "succeeded"
    assert result["output"] == list(range(count))
    counted = {state: tasks for state, tasks in result["tasks"].items() if tasks}
    assert counted == {"total": count, "succeeded": count}
    assert_exactly_once(installation.events(result["job_id"]))
    audit = installation.verify()
    assert audit["ok"], audit


@pytest.mark.parametrize("victim", PROCESSES)
def test_a_job_does_not_notice_the_death_of(victim, installation, rng):
    pids = installation.pids()
    pid = rng.choice(installation.runner_pids()) if victim == "runner" else pids[victim]
    job = installation.start_job(JOB, "--input", numbers(TASKS), "--input", "ms=80")
    time.sleep(rng.uniform(0.3, 2.0))
    installation.kill(pid)
    assert_as_if_nothing_had_happened(installation, finished(installation, job), TASKS)
    installation.wait_ready()
    if victim != "runner":
        restarted = {one["name"]: one for one in installation.json("status")["services"]}[victim]
        assert restarted["pid"] != pid
        assert restarted["restarts"] >= 1


def test_everything_is_killed_one_after_the_other_during_one_job(installation, rng):
    count = 60
    job = installation.start_job(JOB, "--input", numbers(count), "--input", "ms=150")
    victims = ["executor-2", "nats", "scheduler", "postgres", "gateway"]
    rng.shuffle(victims)
    for victim in victims:
        time.sleep(rng.uniform(0.2, 1.0))
        pid = installation.pids().get(victim)
        if pid is not None:
            installation.kill(pid)
    assert_as_if_nothing_had_happened(installation, finished(installation, job, timeout_s=240), count)


def test_what_was_acknowledged_survives_the_death_of_the_database(installation, rng):
    acknowledged = []
    for number in range(10):
        done = installation.hive(
            "run", str(JOB), "--input", numbers(1), "--input", "ms=1", "--detach", "--json", check=False
        )
        if done.returncode == 0:
            acknowledged.append(json.loads(done.stdout)["job_id"])
        if number == rng.randrange(2, 8):
            installation.kill(installation.pids()["postgres"])
    installation.wait_ready()
    assert acknowledged

    def all_ended():
        try:
            return all(installation.get(f"/v1/jobs/{job}")["state"] == "succeeded" for job in acknowledged)
        except urllib.error.URLError:
            return False  # whoever answers has just found its database gone

    wait_until(all_ended, 60, "every acknowledged job has ended")
    assert installation.verify()["ok"]


def test_an_executor_that_slept_past_its_lease_changes_nothing(installation):
    count = 8
    document = {**yaml.safe_load(JOB.read_text()), "input": {"numbers": list(range(count)), "ms": 2000}}
    pid = installation.pids()["executor-1"]
    executor = next(one["id"] for one in installation.json("status")["executors"] if one["name"] == "executor-1")
    while not caught_at_work(installation, job := installation.submit(document), executor, pid):
        pass
    result = installation.get(f"/v1/jobs/{job}")
    assert_as_if_nothing_had_happened(installation, result, count)
    before = installation.events(result["job_id"])
    assert any(event["type"] == "AttemptLost" for event in before)
    installation.wait_ready()
    time.sleep(2)
    after = installation.events(result["job_id"])
    assert after[: len(before)] == before
    late = [(event["stream"], event["data"]["attempt"]) for event in after[len(before) :]]
    assert {event["type"] for event in after[len(before) :]} <= {"AttemptLate"}
    assert len(late) == len(set(late))
    assert_exactly_once(after)


def caught_at_work(installation, job, executor, pid):
    """Let an executor sleep from the time that it has work of a job to the job's end; say whether it held some."""
    wait_until(lambda: at_work(installation, job, executor) or ended(installation, job), 60, "somebody works")
    with asleep(pid):
        # What it sent before it fell asleep is decided in a moment.
        time.sleep(0.3)
        held = at_work(installation, job, executor)
        wait_until(lambda: ended(installation, job), 100, "the job has ended without it")
    return held


@contextlib.contextmanager
def asleep(pid):
    frozen = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)


def at_work(installation, job, executor):
    """Say whether a task of a job is with an executor and undecided, by the log."""
    events = installation.get(f"/v1/jobs/{job}/events", limit=1000)["events"]
    given = {event["stream"]: event["data"]["executor"] for event in events if event["type"] == "TaskAssigned"}
    decided = {event["stream"] for event in events if event["type"] in TERMINAL}
    return executor in {given[task] for task in given.keys() - decided}


def ended(installation, job):
    return installation.get(f"/v1/jobs/{job}")["state"] != "running"


def test_the_death_of_the_supervisor_leaves_no_orphans_and_the_next_up_goes_on(installation):
    started = installation.hive("run", str(JOB), "--input", numbers(40), "--input", "ms=200", "--detach", "--json")
    job = json.loads(started.stdout)["job_id"]
    time.sleep(1)
    runners = set(installation.runner_pids())
    tree = installation.processes_tree()
    assert runners <= {process.pid for process in tree}
    installation.kill(installation.supervisor_pid())
    _, left = psutil.wait_procs(tree, timeout=ORPHANS_S)
    assert left == [], "no process is left over"
    # One that began when the others had been counted sees it, too.
    wait_until(lambda: installation.processes() == [], ORPHANS_S, "nothing runs")

    installation.up(executors=2)
    wait_until(
        lambda: installation.json("job", "show", job, check=False).get("state") == "succeeded",
        90,
        "the job went on",
    )
    assert_exactly_once(installation.events(job))
    assert installation.verify()["ok"]


def test_a_supervisor_that_dies_again_and_again_while_it_starts_leaves_one_of_everything(installation):
    """It dies when it has its first processes, then when the servers are up, then when services are."""
    for moment in (
        lambda services: any(one["pid"] for one in services.values()),
        lambda services: services["postgres"]["state"] == services["nats"]["state"] == "ready",
        lambda services: any(services[name]["state"] == "ready" for name in ("registry", "scheduler", "audit")),
    ):
        kill_while_it_starts(installation, moment)
    installation.up(executors=2)

    def running():
        found = Counter()
        for process in installation.processes():
            # A child looks like its parent until it runs what it is for.
            with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
                found[next(argument for argument in process.cmdline() if str(installation.home) in argument)] += 1
        return found

    wait_until(lambda: set(running().values()) == {1}, 30, "there is one of everything")
    wait_until(lambda: len(running()) == len(installation.pids()) + 1, 30, "and the supervisor")
    job = installation.start_job(JOB, "--input", numbers(4), "--input", "ms=1")
    assert_as_if_nothing_had_happened(installation, finished(installation, job), 4)


def kill_while_it_starts(installation, moment):
    """Kill the supervisor, start one, and kill that as soon as `moment` holds for the processes that it lists."""
    before = supervised(installation)["supervisor_pid"]
    installation.kill(before)

    def holds():
        state = supervised(installation)
        return state["supervisor_pid"] != before and moment({one["name"]: one for one in state["services"]})

    command = [HIVE, "up", "--detach", "--executors", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=installation.environment, **quiet) as up:
        wait_until(holds, 60, "the moment comes")
        installation.kill(supervised(installation)["supervisor_pid"])
        up.wait(60)


def supervised(installation):
    return json.loads((installation.home / "run" / "state.json").read_text())


def test_deleting_the_nats_store_while_stopped_loses_nothing(installation):
    before = installation.verify()
    jobs = installation.json("job", "list")
    installation.down()
    shutil.rmtree(installation.home / "data" / "nats")
    installation.up(executors=2)
    after = installation.verify()
    assert after["ok"]
    assert after["head"] >= before["head"]
    assert installation.json("job", "list") == jobs
