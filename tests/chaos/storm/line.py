"""The one line at the end of a storm, and whether a law was broken."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tests.chaos.storm import jury
from tests.chaos.storm.clients import Record
from tests.chaos.storm.oracle import History, Job
from tests.chaos.storm.target import Strike

TOO_FEW = jury.DEVICE_CODES | {"no_quorum", "contested", "no_valid_result", "judge_failed", "too_few_results"}
"""A judged job may fail with these when devices took results from it."""
SHOWN = 20


def line_of(
    seed: int,
    records: Sequence[Record],
    history: History,
    struck: Sequence[Strike],
    audit: dict[str, Any],
    problems: Sequence[str],
    missed: Sequence[str] = (),
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the line. `ok` is false where a law is broken; `problems` then says what was seen."""
    jobs: dict[str, list[Job]] = defaultdict(list)
    for job in history.jobs.values():
        jobs[job.nonce].append(job)
    lost = [*_lost(records, history)]
    doubled = [*history.doubled, *_doubled(records, jobs)]
    judged = jury.check(history, {record.planned.nonce: record.planned for record in records})
    wrong = [*problems, *history.broken, *_wrong(records, history, judged.short)]
    ends = Counter(end.type for task in history.tasks.values() for end in task.ends)
    recovery = recoveries(records, history, struck)
    unrecovered = [strike.kind for strike, seconds in recovery if seconds is None]
    wrong += [f"{kind}: nothing was done after it" for kind in unrecovered]
    alone: list[float] = []
    others: list[float] = []
    for strike, seconds in recovery:
        if seconds is not None:
            (alone if strike.alone and killed(strike) else others).append(seconds)
    ok = not (lost or doubled or history.stale or judged.unjust or wrong) and bool(audit.get("ok"))
    return {
        "ok": ok,
        "seed": seed,
        "tasks": len(history.tasks),
        "events": history.events,
        "submitted": len(records),
        "acknowledged": sum(record.acknowledged_at is not None for record in records),
        "refused": sum(record.refused is not None for record in records),
        "unknown": sum(record.unknown for record in records),
        "unknown_in_log": sum(record.unknown and record.planned.nonce in jobs for record in records),
        "lost_answers": sum(record.lost_answers for record in records),
        "completed_once": sum(
            [end.type for end in task.ends] == ["TaskSucceeded"] and (task.replicas > 0 or task.successes == 1)
            for task in history.tasks.values()
        ),
        "failed": ends["TaskFailed"],
        "cancelled": ends["TaskCancelled"],
        "attempts": sum(len(task.attempts) for task in history.tasks.values()),
        "late": sum(sum(task.late.values()) for task in history.tasks.values()),
        "lost": len(lost),
        "duplicated": len(doubled),
        "stale_accepted": len(history.stale),
        "unjust": len(judged.unjust),
        "judged": dict(sorted(judged.counts.items())),
        "log_ok": bool(audit.get("ok")),
        "recovery_p50_s": percentile(sorted(alone), 0.5),
        "recovery_p99_s": percentile(sorted(alone), 0.99),
        "recovery_max_s": percentile(sorted(alone), 1),
        "other_faults_max_s": percentile(sorted(others), 1),
        "faults": dict(sorted(Counter(strike.kind for strike in struck).items())),
        "missed": dict(sorted(Counter(missed).items())),
        "left_out": dict(left_out or {}),
        "slowest": _slowest(recovery),
        "problems": [*lost, *doubled, *history.stale, *judged.unjust, *wrong][:SHOWN],
    }


def _lost(records: Sequence[Record], history: History) -> list[str]:
    """Name what was acknowledged and is not there or has no end, and what is there only in part."""
    found = []
    for record in records:
        for job_id in record.jobs:
            job = history.jobs.get(job_id)
            if job is None or not job.submitted:
                found.append(f"job {job_id} ({record.planned.nonce}) was acknowledged and is not in the log")
    found += [f"job {job.id} ({job.nonce}) has no end" for job in history.jobs.values() if not job.ends]
    found += [f"task {task.id} has no end" for task in history.tasks.values() if not task.ends]
    return found


def _doubled(records: Sequence[Record], jobs: dict[str, list[Job]]) -> list[str]:
    """Name submits that became two jobs."""
    found = [
        f"{record.planned.nonce} was told two ids: {', '.join(sorted(record.jobs))}"
        for record in records
        if len(record.jobs) > 1
    ]
    return found + [f"{nonce} is {len(there)} jobs in the log" for nonce, there in jobs.items() if len(there) > 1]


def _wrong(records: Sequence[Record], history: History, short: set[str]) -> list[str]:
    """Name answers that should not have been, and jobs that ended otherwise than they had to."""
    planned = {record.planned.nonce: record.planned for record in records}
    found = [
        f"{record.planned.nonce} ({record.planned.expected}): status {record.refused}"
        for record in records
        if (record.refused is not None) != (record.planned.expected == "refused") and not record.unknown
    ]
    for job in history.jobs.values():
        wanted = planned.get(job.nonce)
        if wanted is None or wanted.expected == "refused":
            found.append(f"job {job.id} ({job.nonce}) is in the log and nobody submitted it")
        elif len(job.ends) == 1:
            end = job.ends[0]
            if end.type == "JobSucceeded" and wanted.expected != "failed":
                if end.data["output"].get("inline") != wanted.output and job.id not in short:
                    found.append(f"job {job.id} ({job.nonce}): output {json.dumps(end.data['output'])[:200]}")
                tasks = sum(task.judging is None for task in job.tasks)
                if tasks != wanted.tasks:
                    found.append(f"job {job.id} ({job.nonce}): {tasks} tasks and not {wanted.tasks}")
            elif not _may_end(end.type, end.data, wanted.expected, job.id in short):
                said = json.dumps(end.data)[:200]
                found.append(f"job {job.id} ({job.nonce}, {wanted.expected}): {end.type} {said}")
    return found


def _may_end(kind: str, data: dict[str, Any], expected: str, short: bool) -> bool:
    if kind == "JobFailed":
        codes = TOO_FEW if short else jury.DEVICE_CODES
        return expected in ("failed", "either") or data["code"] in codes
    return kind == "JobCancelled" and expected == "either"


# --- recovery ------------------------------------------------------------------------------------------------


def killed(strike: Strike) -> bool:
    """Say whether the fault was `kill -9` of one process."""
    return strike.kind.startswith("kill ")


def recoveries(
    records: Sequence[Record], history: History, struck: Sequence[Strike]
) -> list[tuple[Strike, float | None]]:
    """Return, for each fault, the seconds until it had passed, None where it never did.

    It has passed when every process is ready again, what was killed as a new one, *and* work has been done
    since: a submit was acknowledged where the gateway was hit, a job that was submitted later was done where the
    supervisor was, a task was decided otherwise. Where an executor was hit, every attempt that it held has its end,
    too.
    """
    return [(strike, _recovery(records, history, strike)) for strike in struck]


def _recovery(records: Sequence[Record], history: History, strike: Strike) -> float | None:
    if strike.ready_at is None:
        return None
    if strike.kind == "kill gateway":
        times = [record.acknowledged_at for record in records if record.acknowledged_at is not None]
    elif strike.kind == "kill supervisor":
        times = _done(records, history, strike.at)
    else:
        times = history.decided_at
    passed = min((ts for ts in times if ts >= strike.ready_at), default=None)
    if passed is None:
        return None
    held = (
        attempt.over_at or math.inf
        for task in history.tasks.values()
        for attempt in task.attempts.values()
        if attempt.executor == strike.executor and attempt.at < strike.at < (attempt.over_at or math.inf)
    )
    return max(passed, *held, strike.at) - strike.at


def _done(records: Sequence[Record], history: History, after: float) -> list[float]:
    """Return when jobs ended that were acknowledged after some time."""
    taken = [record for record in records if (record.acknowledged_at or 0) > after]
    jobs = [history.jobs[job_id] for record in taken for job_id in record.jobs if job_id in history.jobs]
    return [job.ends[0].ts for job in jobs if job.ends]


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank percentile of sorted values, rounded to milliseconds."""
    return round(values[max(0, math.ceil(share * len(values)) - 1)], 3) if values else None


def _slowest(recovery: Sequence[tuple[Strike, float | None]]) -> dict[str, float]:
    slowest: dict[str, float] = {}
    for strike, seconds in recovery:
        if seconds is not None:
            slowest[strike.kind] = max(slowest.get(strike.kind, 0), round(seconds, 2))
    return dict(sorted(slowest.items()))
