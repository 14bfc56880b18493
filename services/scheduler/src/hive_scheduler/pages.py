"""Pages of tasks: rows of the view with the outputs that they point to, as many as fit into one answer."""

from typing import Final

from hive_common.contracts.values import Value
from hive_proto.jobs.v1 import jobs_pb2

from hive_scheduler.domain.approval import ApprovalState
from hive_scheduler.queries import Row
from hive_scheduler.views import Judged, judged_of

OUTPUTS_BYTES_MAX: Final = 4 * 1024 * 1024
"""Outputs in one page of tasks; the page ends early where there are more."""
OUTPUTS_MAX: Final = 1_000
"""Outputs that are read for one page; a task that keeps all has up to a hundred."""


def output_positions(rows: list[Row]) -> tuple[list[Row], list[int]]:
    """Return the rows that one page takes, and where in the log their outputs stand."""
    shown: list[Row] = []
    positions: list[int] = []
    for row in rows:
        wanted = _positions(row, judged_of(row["judged"]))
        if shown and len(positions) + len(wanted) > OUTPUTS_MAX:
            break
        shown.append(row)
        positions += wanted
    return shown, positions


def tasks(rows: list[Row], outputs: dict[int, Value], approvals: list[ApprovalState]) -> list[jobs_pb2.Task]:
    """Return tasks with their outputs; not all of them where the outputs would not fit into one answer."""
    page: list[jobs_pb2.Task] = []
    byte_count = 0
    for row in rows:
        judged = judged_of(row["judged"])
        positions = _positions(row, judged)
        values = [outputs[position] for position in positions if position in outputs]
        byte_count += sum(len(value.raw or b"") for value in values)
        if page and byte_count > OUTPUTS_BYTES_MAX:
            return page
        task = _task(row, judged, approvals)
        if judged.kept and positions:
            _keep(task, judged, outputs)
        elif values:
            task.output_json, task.output_digest = values[0].raw or b"", values[0].digest or ""
        page.append(task)
    return page


def _positions(row: Row, judged: Judged) -> list[int]:
    if row["state"] != "succeeded":
        return []
    return judged.kept_positions or [row["output_position"]]


def _keep(task: jobs_pb2.Task, judged: Judged, outputs: dict[int, Value]) -> None:
    """Give a task the list of the outputs that are kept, or each by itself where that list cannot be shown."""
    kept = [
        (attempt, outputs[position])
        for attempt in sorted(judged.kept)
        if (position := judged.successes.get(attempt)) in outputs
    ]
    raw = [value.raw for _, value in kept]
    fits = sum(len(one or b"") for one in raw) <= OUTPUTS_BYTES_MAX
    inline = [one for one in raw if one is not None]
    if fits and len(inline) == len(judged.kept):
        task.output_json = b"[" + b",".join(inline) + b"]"
        return
    for attempt, value in kept:
        task.kept.add(
            attempt=attempt,
            output_json=(value.raw or b"") if fits else b"",
            output_digest=value.digest or "",
            size_bytes=value.size_bytes,
        )


def _task(row: Row, judged: Judged, approvals: list[ApprovalState]) -> jobs_pb2.Task:
    judging = judged.judging
    return jobs_pb2.Task(
        task_id=row["task_id"],
        job_id=row["job_id"],
        step=row["step"],
        index=row["idx"],
        state=row["state"],
        attempts=row["attempts"],
        executor=row["executor"],
        error_code=row["error_code"],
        error_message=row["error_message"],
        created_us=row["created_us"],
        ended_us=row["ended_us"],
        agent=row["agent"],
        parent=row["parent"],
        approvals_open=[one.id for one in approvals if one.task == row["task_id"]],
        replicas=judged.replicas,
        decided=judged.decision > 0,
        judging="" if judging is None else judging.kind,
        judged="" if judging is None else judging.task,
        judged_attempts=() if judging is None else judging.attempts,
    )
