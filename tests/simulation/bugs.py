"""Bugs that are planted in a copy of the tree, each of which the simulation has to find.

`python -m tests.simulation.bugs` runs seeds on each until one fails; exit code 1 where none of `SEEDS_MAX` does.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.chaos.mutations.__main__ import LEFT_OUT, misplaced, mutated
from tests.chaos.mutations.catalogue import DISPATCH, LEADERSHIP, REPORTS, SUBMISSION, TASK, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("libs/common/src", "services/scheduler/src", "services/audit/src", "proto", "tests/simulation")
SEEDS_MAX = 1_200
MEMORY_LOG = "libs/common/src/hive_common/testing/memory_log.py"
IDLE_LIMIT = '    await conn.execute(f"SET idle_session_timeout = {SESSION_IDLE_MAX_MS}")\n'
STAND_BY = """\
    while not await _try(conn):
        standing_by(True)
        await asyncio.sleep(POLL_S)
"""
DOMAIN = "services/scheduler/src/hive_scheduler/domain"
NEEDS, DECIDING, JOB = f"{DOMAIN}/needs.py", f"{DOMAIN}/deciding.py", f"{DOMAIN}/job.py"
ENGINE = "services/scheduler/src/hive_scheduler/engine.py"
HEDGES = "services/scheduler/src/hive_scheduler/hedges.py"
QUORUM = "libs/common/src/hive_common/judgement/quorum.py"
REACT_TO_END = "            case events.TaskSucceeded() | events.TaskFailed() | events.TaskCancelled():\n"
DECIDE_ALL = """\
    for task_id in list(state.undecided):
        try:
            yield from deciding.progress(job, state, job.tasks[task_id], inputs)
        except BlobsNeeded as error:
            needed.add(error)
        else:
            del state.undecided[task_id]
"""
SETTLED = "        await self._engine.committer.settled()\n"


def _bug(name: str, law: int, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, law, file, old, new, ("tests/simulation/test_bugs.py",))


BUGS = (
    _bug(
        "fencing off: who asks for the lead has it",
        2,
        LEADERSHIP,
        "return row is not None and bool(row[0])",
        "return row is not None",
    ),
    _bug(
        "the log takes a second end",
        2,
        MEMORY_LOG,
        "        if len(set(ending)) < len(ending) or not self._ended.isdisjoint(ending):\n",
        "        if False:\n",
    ),
    _bug(
        "a report is acknowledged before it is committed",
        1,
        REPORTS,
        f"{SETTLED}        return ReportReply(results=tuple(results))",
        "        return ReportReply(results=tuple(results))",
    ),
    _bug(
        "a submit is acknowledged before it is committed",
        1,
        SUBMISSION,
        f"{SETTLED}        return Submitted(job_id, await committed, False)",
        "        return Submitted(job_id, self._engine.committer.position + 1, False)",
    ),
    _bug(
        "an attempt is given out before it is committed",
        1,
        DISPATCH,
        "        self._engine.apply(job, task.id, tasks.decide(task, command), effect=effect)",
        "        self._engine.apply(job, task.id, tasks.decide(task, command))\n        self._answer(state, pull)",
    ),
    _bug(
        "a late report is accepted",
        3,
        TASK,
        "if attempt.status in LIVE and not task.ended and not closing:",
        "if not task.ended and not closing:",
    ),
    _bug(
        "a lost attempt is not retried",
        4,
        TASK,
        "        if task.losses < LOST_ATTEMPTS_MAX:\n",
        "        if False:\n",
    ),
    _bug(
        "a report that comes twice counts twice",
        3,
        TASK,
        '        return "duplicate"\n    if attempt',
        '        return "duplicate" if task.ended else "accepted"\n    if attempt',
    ),
    _bug(
        "a lease never runs out",
        4,
        DISPATCH,
        "            if state.lease_until_ms > now_ms:\n",
        "            if True:\n",
    ),
    _bug(
        "a cancel is forgotten by the next leader",
        4,
        DISPATCH,
        "        self._cancel_after_commit(state, [key for key in held if key not in state.live])\n",
        "",
    ),
    _bug(
        "the pause before a retry is none",
        4,
        TASK,
        "    return min(policy.backoff_ms << min(failures - 1, 20), BACKOFF_MAX_MS)\n",
        "    return 0\n",
    ),
    _bug(
        "any session of an executor may report",
        3,
        TASK,
        "if attempt is None or attempt.executor != report.executor or attempt.session != report.session:",
        "if attempt is None or attempt.executor != report.executor:",
    ),
    _bug(
        "a fork may have as many tasks as it likes",
        4,
        "services/scheduler/src/hive_scheduler/domain/job.py",
        "    if job.task_total() + size + job.unexpanded() - 1 > job.spec.fan_out:\n",
        "    if False:\n",
    ),
    _bug(
        "one key, and every submit is a new job",
        1,
        SUBMISSION,
        "job_id = derive_id(self._ns, request.caller, request.idempotency_key)",
        "job_id = new_id(self._clock.now_us() // 1_000)",
    ),
    # Of judgement.
    _bug(
        "losers are not told to stop",
        4,
        ENGINE,
        f"{REACT_TO_END}                for number in live:\n",
        f"{REACT_TO_END}                for number in () if task.judged else live:\n",
    ),
    _bug(
        "a judge may sit where the result was made",
        4,
        NEEDS,
        "        apart = apart_from(words.rule.distinct, producers, judges=True)\n",
        '        apart = apart_from("none", producers, judges=True)\n',
    ),
    _bug(
        "replicas on one device",
        4,
        NEEDS,
        'devices=frozenset(one.device for one in known) if distinct == "device" else frozenset(),',
        "devices=frozenset(),",
    ),
    _bug(
        "results count as places, live attempts do not",
        4,
        NEEDS,
        'if one.status in LIVE or one.status == "succeeded")',
        'if one.status == "succeeded")',
    ),
    _bug(
        "a decision with a vote too few",
        4,
        QUORUM,
        "        if not leaders or self._counts[leaders[0]] < self._rule.k:\n",
        "        if not leaders or self._counts[leaders[0]] < self._rule.k - 1:\n",
    ),
    _bug(
        "what the test rejects counts",
        4,
        QUORUM,
        "        if rule.tested and one.passed is False:\n",
        "        if False:\n",
    ),
    _bug(
        "a replica that was lost is planned twice",
        4,
        TASK,
        '        return [TaskExtended(1, "lost", now_us)] if task.losses < LOST_ATTEMPTS_MAX else []\n',
        '        return [TaskExtended(2, "lost", now_us)] if task.losses < LOST_ATTEMPTS_MAX else []\n',
    ),
    _bug(
        "a new leader forgets the attempts that a judged task still needs",
        4,
        "services/scheduler/src/hive_scheduler/leader.py",
        "                if task.wanted:\n",
        '                if task.status == "ready":\n',
    ),
    _bug(
        "a judge that nobody needs goes on",
        4,
        DECIDING,
        "            if not one.ended:\n",
        "            if False:\n",
    ),
    _bug(
        "hedges without a budget",
        4,
        HEDGES,
        "        if not self._budget.take():\n",
        "        if False:\n",
    ),
    _bug(
        "what is undecided is forgotten when a chunk ends",
        4,
        JOB,
        DECIDE_ALL,
        "    undecided, state.undecided = state.undecided, {}\n"
        + DECIDE_ALL.replace("list(state.undecided)", "undecided").replace(
            "del state.undecided[task_id]", "state.undecided.pop(task_id, None)"
        ),
    ),
    _bug(
        "a step is read before its integrator has ended",
        4,
        JOB,
        "            return self.joined is not None and (done or not self.joined.task)\n",
        "            return self.joined is not None\n",
    ),
    _bug(
        "a failure that may be left out fails the job",
        4,
        JOB,
        ' and job.failed is None and state.step.on_failure == "fail":\n',
        " and job.failed is None:\n",
    ),
    # Defects that the simulation found, put back.
    _bug(
        "an attempt that is lost takes the pause from another one",
        4,
        TASK,
        "                task.not_before_us = next(iter(task.judged.waits), 0)\n",
        "                task.not_before_us = 0\n",
    ),
    _bug(
        "a hedge for one that has just begun, and beyond what was asked for",
        4,
        HEDGES,
        "        if not is_slow or task.judged.planned - task.judged.replaced >= words.rule.of:\n",
        "        if False:\n",
    ),
    _bug(
        "one more attempt without a machine for it",
        4,
        f"{DOMAIN}/placement.py",
        "                return True\n        return False\n",
        "                return True\n        return True\n",
    ),
    _bug(
        "the lock is taken before its session has an idle limit",
        2,
        LEADERSHIP,
        f"{IDLE_LIMIT}{STAND_BY}",
        f"{STAND_BY}{IDLE_LIMIT}",
    ),
    _bug(
        "an answer to an overtaken pull renews the lease without the cancels",
        4,
        DISPATCH,
        "        cancel = tuple(AttemptKey(*key) for key in state.cancels)\n",
        "        cancel = tuple(AttemptKey(*key) for key in state.cancels) if pull is not None else ()\n",
    ),
    _bug(
        "a cancel is forgotten while its attempt is on its way",
        4,
        DISPATCH,
        "if key in held or cancel.since_ms > since_ms",
        "if key in held",
    ),
)


def copy_tree(tree: Path) -> None:
    """Copy what a simulation needs."""
    for part in COPIED:
        shutil.copytree(ROOT / part, tree / part, ignore=LEFT_OUT)


def find(tree: Path, bug: Mutation, seed: int, seeds: int) -> tuple[int | None, str]:
    """Plant a bug and run seeds; return the one that failed, if one did, and what was said."""
    sources = [str(tree), str(tree / "proto"), *(str(path) for path in sorted(tree.glob("**/src")))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed), "--seeds", str(seeds)]
    with mutated(tree, bug):
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{bug.name}: the simulation did not run:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    failed = json.loads(lines[-1])["failed"]
    return (failed[0], lines[0]) if failed else (None, lines[-1])


def main() -> int:
    """Look for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.bugs", description=__doc__)
    parser.add_argument("--only", default="", help="only those with this in their name")
    given = parser.parse_args()
    chosen = [bug for bug in BUGS if given.only in bug.name]
    moved = [f"{bug.name}: {problem}" for bug in BUGS if (problem := misplaced(ROOT, bug))]
    if moved:
        print("\n".join(moved))
        return 1
    missed = 0
    with tempfile.TemporaryDirectory(prefix="hive-bugs-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        for bug in chosen:
            seed, said = find(tree, bug, 1, SEEDS_MAX)
            missed += seed is None
            print(f"{'MISSED ' if seed is None else 'found  '}  {bug.name}  [{said[:160]}]", flush=True)
    print(f"{len(chosen)} bugs, {missed} not found within {SEEDS_MAX} seeds")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
