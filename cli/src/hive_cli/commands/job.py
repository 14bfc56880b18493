"""`hive job`: look at jobs, follow them, end them."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from hive_common.contracts.jobdocument import job_schema
from hive_common.kernel.clock import iso
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from rich.markup import escape

from hive_cli.commands.deciding import print_decision
from hive_cli.commands.drawing import Drawing, place
from hive_cli.commands.following import Left, executor_names, follow
from hive_cli.commands.past import EVENTS_MAX, task_json, tracked, tree_json
from hive_cli.commands.run import finish, traceback_of
from hive_cli.commands.spending import in_words
from hive_cli.options import HomeOption, JsonOption, LimitOption
from hive_cli.output import INTERRUPTED, clean, err, out, print_json, print_json_line, print_table, show_json
from hive_cli.session import connect

if TYPE_CHECKING:
    from hive_cli.api import Api

app = typer.Typer(no_args_is_help=True, help="Look at jobs, follow them, end them.")
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.")]
DETAILS_MAX: Final = 10
"""Tasks of a step whose attempts `hive job show` tells, those first that did not go as planned."""
_SHOWN_STATES = ("succeeded", "failed", "cancelled", "active", "ready", "blocked")


@app.command("list")
def list_jobs(
    state: Annotated[
        str | None,
        typer.Option("--state", help="Only these: running, cancelling, succeeded, failed or cancelled."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Those too with which executors are tried (hive canary).")
    ] = False,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List jobs, newest first."""
    asked = {"state": state, "all": "true" if everything else None, "limit": min(limit, 1000)}
    with connect(home) as api:
        jobs = _first(api.pages("/v1/jobs", "jobs", "after", **asked), limit)
    if as_json:
        print_json({"jobs": jobs})
        return
    rows = (
        (
            j["job_id"],
            j["name"],
            j["state"],
            f"{_ended(j['tasks'])}/{j['tasks']['total']}",
            iso(j["submitted_us"])[:19],
        )
        for j in jobs
    )
    print_table(("job", "name", "state", "tasks", "submitted"), rows)


@app.command("schema")
def schema(as_json: JsonOption = False) -> None:
    """Print the JSON Schema of job files: an editor that is given it completes and checks them."""
    print_json(job_schema())  # which is the same with --json and without


@app.command("show")
def show(job: JobArgument, limit: LimitOption = 1000, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show a job: its steps, its tasks, what happened to them, its output or what went wrong."""
    with connect(home) as api:
        found = api.get(f"/v1/jobs/{job}")
        usage = _usage(api, job)
        tasks = _first(api.pages(f"/v1/jobs/{job}/tasks", "tasks", "after", limit=min(limit, 1000)), limit)
        if found.get("output_digest"):
            found["output"] = json.loads(api.get_blob(found["output_digest"]))
        names = executor_names(api)
        tracker, complete = tracked(api, job)
        failed_task = (found.get("error") or {}).get("task")
        traceback = "" if as_json or not failed_task else traceback_of(api, job, failed_task)
    if as_json:
        for task in tasks:
            if (known := tracker.tasks.get(task["task_id"])) is not None:
                task |= task_json(known, names)
        joins = [step.join for step in tracker.steps.values() if step.join is not None]
        more = {"tasks": tasks, "model_usage": usage, "joins": joins, "complete": complete}
        print_json({**found, "counts": found["tasks"], **more})
        return
    _print_job(found)
    if usage is not None and (words := in_words(usage)):
        out.print(words, style="dim")
    if traceback:
        out.print(escape(clean(traceback)), style="dim")
    rows = (
        (t["task_id"], _shown_at(depth, t), _state(t), str(t["attempts"]), _who(t, names), _error(t))
        for depth, t in _below_parents([task for task in tasks if task["judging"] is None])
    )
    print_table(("task", "step", "state", "attempts", "executor", "error"), rows)
    for task in (one for one in tasks if one["waits_for"]):
        out.print(f"{escape(place(task))} {escape(clean(task['waits_for']))}", highlight=False)
    if (happened := Drawing(tracker, names, DETAILS_MAX).details()) is not None:
        out.print("attempts", style="bold")
        out.print(happened)
    _say_whether(complete, job)
    if found["state"] == "succeeded":
        out.print("output", style="bold")
        out.print(escape(clean(show_json(found.get("output")))))


def _usage(api: "Api", job: str) -> dict[str, Any] | None:
    """Return what the job's model calls have used; None while nobody can say so: the rest is shown all the same."""
    try:
        found: dict[str, Any] = api.get(f"/v1/jobs/{job}/model-usage")
    except (Unavailable, DeadlineExceeded):
        return None
    return found


def _print_job(job: dict[str, Any]) -> None:
    counts = ", ".join(f"{job['tasks'][state]} {state}" for state in _SHOWN_STATES if job["tasks"][state])
    out.print(f"[bold]{escape(job['name'])}[/bold] {job['job_id']}   {job['state']}   {counts}")
    ended = f", ended {iso(job['ended_us'])}" if job["ended_us"] else f", deadline {iso(job['deadline_us'])}"
    out.print(f"submitted {iso(job['submitted_us'])}{ended}   {_attempts(job['attempts'])}", style="dim")
    if waiting := job.get("approvals_open"):
        out.print(f"{waiting} wait for your decision: hive approvals list --job {job['job_id']}")
    if job.get("error"):
        out.print(f"[red]{escape(clean(job['error']['code'] + ': ' + job['error']['message']))}[/red]")


def _state(task: dict[str, Any]) -> str:
    return f"{task['state']}, waits for a person" if task.get("approvals_open") else str(task["state"])


def _say_whether(complete: bool, job: str) -> None:
    if not complete:
        err.print(f"[dim]what the first {EVENTS_MAX} events tell; all of them: hive job events {job}[/dim]")


@app.command("tree")
def tree(
    job: JobArgument,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=10_000, help="Tasks of each step that are drawn.")
    ] = 12,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Draw what happened: steps, tasks, attempts and where they ran, scores, decisions, joins."""
    with connect(home) as api:
        found = api.get(f"/v1/jobs/{job}")
        names = executor_names(api)
        tracker, complete = tracked(api, job)
    if as_json:
        print_json({"name": found["name"], "state": found["state"], **tree_json(job, tracker, names, complete)})
        return
    out.print(Drawing(tracker, names, limit).tree(f"{clean(found['name'])} {job}   {found['state']}"))
    _say_whether(complete, job)


@app.command("decision")
def decision(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Id of a task; `hive job show` lists them.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show what was decided over a task: the rule, every candidate, who voted, who judged, and the winner."""
    with connect(home) as api:
        found = api.get(f"/v1/tasks/{task}/decision")
        executors = () if as_json else api.get("/v1/executors", limit=1000)["executors"]
    if as_json:
        print_json(found)
    else:
        print_decision(found, {one["owner"]: one["owner_name"] or "the owner" for one in executors})


@app.command("watch")
def watch(job: JobArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Follow a job to its end, as `hive run` does. Ctrl-C cancels it, a second one leaves."""
    with connect(home) as api:
        try:
            ended = follow(api, job, api.get(f"/v1/jobs/{job}")["name"])
        except Left:
            raise typer.Exit(INTERRUPTED) from None
        finish(api, ended, as_json)


@app.command("cancel")
def cancel(
    job: JobArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept in the log.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Ask for the end of a job. What ended before stands."""
    with connect(home) as api:
        answer = api.delete(f"/v1/jobs/{job}", reason=reason or None)
    if as_json:
        print_json(answer)
    else:
        out.print(f"{job} is {answer['state']}")


@app.command("explain")
def explain(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Id of a task; `hive job show` lists them.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Say why a task was placed where it was, or why it waits."""
    with connect(home) as api:
        found = api.get(f"/v1/tasks/{task}/explain")
    if as_json:
        print_json(found)
        return
    out.print(f"[bold]{escape(found.get('task') or task)}[/bold]   {found.get('state', '')}")
    candidates = found.get("candidates") or ()
    names = {one["executor"]: one["name"] for one in candidates if one.get("executor") and one.get("name")}
    for decision in found.get("decisions") or ():
        out.print(escape(clean(_decision(decision, names))))
    out.print("as the executors are now:", style="dim")
    rows = (
        (
            str(one.get("name") or one.get("executor", "")),
            "yes" if one.get("feasible") else "no",
            _number(one.get("score")),
            str(one.get("reason") or _parts(one.get("parts"))),
        )
        for one in candidates
    )
    print_table(("executor", "feasible", "score", "why"), rows)


@app.command("events")
def events(
    job: JobArgument,
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Print the events of a job and its tasks, one a line, in the order of the log."""
    with connect(home) as api:
        found: Iterator[dict[str, Any]]
        if follow_on:
            found = (json.loads(event.data) for event in api.events(f"/v1/jobs/{job}/stream"))
        else:
            found = api.pages(f"/v1/jobs/{job}/events", "events", "from_position", limit=1000)
        for event in found:
            if as_json:
                print_json_line({name: event[name] for name in ("position", "stream", "type", "ts_us", "data")})
            else:
                _print_event(event)


def _print_event(event: dict[str, Any]) -> None:
    data = json.dumps(event["data"], ensure_ascii=False)
    short = data if len(data) <= 200 else data[:200] + "…"
    out.print(
        f"{event['position']:>7}  {iso(event['ts_us'])[11:23]}  {event['stream']}  "
        f"[bold]{event['type']}[/bold]  [dim]{escape(clean(short))}[/dim]"
    )


@app.command("logs")
def logs(
    job: JobArgument,
    task: Annotated[str | None, typer.Option("--task", help="Only this task.")] = None,
    follow_on: Annotated[
        bool, typer.Option("--follow", "-f", help="Lines as they come, until the job has ended; best effort.")
    ] = False,
    limit: LimitOption = 200,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Print what the agents of a job logged."""
    with connect(home) as api:
        if follow_on:
            _follow_logs(api, job, task, as_json)
            return
        found = api.get(f"/v1/jobs/{job}/logs", task_id=task, limit=min(limit, 1000))["logs"]
        for entry in found:
            if entry.get("log_digest"):
                entry["lines"] = json.loads(api.get_blob(entry["log_digest"]))
    if as_json:
        print_json({"logs": found})
        return
    for entry in found:
        head = f"{place(entry)} {entry['task_id']} attempt {entry['attempt']}"
        for line in entry.get("lines") or ():
            _print_line(head, line)
    if not found:
        err.print("[dim]nothing was logged[/dim]")


def _follow_logs(api: "Api", job: str, task: str | None, as_json: bool) -> None:
    for event in api.events(f"/v1/jobs/{job}/logs/stream"):
        data = json.loads(event.data)
        if event.name == "dropped":
            err.print(f"[dim]{data['batches']} batches came too fast and were dropped[/dim]")
        elif task in (None, data["task_id"]):
            for line in data["lines"]:
                if as_json:
                    print_json_line({"task_id": data["task_id"], "attempt": data["attempt"], **line})
                else:
                    _print_line(f"{data['task_id']} attempt {data['attempt']}", line)


def _print_line(head: str, line: dict[str, Any]) -> None:
    stamp = iso(line["ts_us"])[11:23]
    out.print(f"[dim]{stamp} {escape(head)}[/dim] {escape(clean(line['level'] + ': ' + line['text']))}")


def _first(items: Any, limit: int) -> list[Any]:
    return [item for item, _ in zip(items, range(limit), strict=False)]


def _ended(counts: dict[str, int]) -> int:
    return counts["succeeded"] + counts["failed"] + counts["cancelled"]


def _shown_at(depth: int, task: dict[str, Any]) -> str:
    return f"{'  ' * depth}[{task['index']}] {task['agent']}" if depth else place(task)


def _below_parents(tasks: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each task and its depth, followed by the tasks that it forked."""
    listed = {task["task_id"] for task in tasks}
    children: dict[str | None, list[dict[str, Any]]] = {}
    for task in tasks:
        parent = task.get("parent")
        children.setdefault(parent if parent in listed else None, []).append(task)
    stack = [(0, task) for task in reversed(children.get(None, []))]
    while stack:
        depth, task = stack.pop()
        yield depth, task
        stack += [(depth + 1, child) for child in reversed(children.get(task["task_id"], []))]


def _who(task: dict[str, Any], names: dict[str, str]) -> str:
    executor = task["executor"] or ""
    return names.get(executor, executor)


def _error(task: dict[str, Any]) -> str:
    error = task.get("error")
    return f"{error['code']}: {error['message']}" if error else ""


def _decision(decision: dict[str, Any], names: dict[str, str]) -> str:
    placement = decision.get("placement") or {}
    executor = str(decision.get("executor"))
    parts = [
        f"attempt {decision.get('attempt')} went to {names.get(executor, executor)} "
        f"with the score {_number(placement.get('score'))}",
        f"executors considered: {placement.get('considered', 0)}",
    ]
    parts += [f"{count} rejected: {reason}" for reason, count in (placement.get("rejected") or {}).items()]
    return "; ".join(parts)


def _attempts(count: int) -> str:
    return f"{count} {'attempt' if count == 1 else 'attempts'}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _parts(parts: Any) -> str:
    if not isinstance(parts, dict):
        return ""
    return "  ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in parts.items()
    )
