"""`hive run`: submit a job file, watch it, print its output."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import HiveError, InvalidArgument
from hive_common.kernel.ids import new_id
from rich.markup import escape

from hive_cli.commands.following import Left, follow, result_of
from hive_cli.inputs import build_input
from hive_cli.jobfile import in_file, load_job, split_input
from hive_cli.options import HomeOption, InputFileOption, InputOption, JsonOption
from hive_cli.output import FAILED, INTERRUPTED, clean, err, out, print_json, show_json
from hive_cli.session import connect

if TYPE_CHECKING:
    from hive_cli.api import Api


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file, YAML or JSON.")],
    inputs: InputOption = None,
    input_file: InputFileOption = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Submit, print the job's id, and leave.")] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Run a job and print its output.

    Ctrl-C cancels the job and waits for its end; a second one leaves it to itself. Ends with 1 when the job does
    not succeed.
    """
    document = load_job(file)
    body, blob = split_input(document, build_input(document.get("input"), inputs or [], input_file))
    with connect(home) as api:
        job_id = _submit(api, body, blob, file)
        if detach:
            _print_detached(api, job_id, as_json)
            return
        try:
            job = follow(api, job_id, str(document.get("name", "job")))
        except Left:
            err.print(f"left; the job goes on or ends by itself: hive job show {job_id}")
            raise typer.Exit(INTERRUPTED) from None
        finish(api, job, as_json)


def _submit(api: "Api", body: dict[str, Any], blob: bytes | None, file: Path) -> str:
    try:
        if blob is not None:
            api.put_blob(blob, digest_of(blob))
        # The key makes a submit that is repeated after a broken connection find the job of the first one.
        submitted = api.post("/v1/jobs", body, {"idempotency-key": new_id()})
    except InvalidArgument as error:
        raise in_file(error, file) from error
    job_id: str = submitted["job_id"]
    return job_id


def _print_detached(api: "Api", job_id: str, as_json: bool) -> None:
    if as_json:
        print_json(result_of(api, api.get(f"/v1/jobs/{job_id}")))
    else:
        out.print(job_id)
        err.print(f"[dim]follow it with: hive job watch {job_id}[/dim]")


def finish(api: "Api", job: dict[str, Any], as_json: bool) -> None:
    """Print how a job ended and leave with the exit code that says the same."""
    result = result_of(api, job)
    if as_json:
        print_json(result)
    elif job["state"] == "succeeded":
        out.print(escape(clean(show_json(result["output"]))))
    if job["state"] != "succeeded":
        _print_failure(api, job)
        raise typer.Exit(FAILED)


def _print_failure(api: "Api", job: dict[str, Any]) -> None:
    error = job.get("error") or {"code": "", "message": "", "task": None}
    parts = [f"{error['code']}: {error['message']}"] if error["code"] else []
    parts += [f"task {error['task']}"] if error.get("task") else []
    how = "was cancelled" if job["state"] == "cancelled" else job["state"]
    err.print(f"[red]the job {how}[/red]" + escape(clean(": " + ", ".join(parts) if parts else "")))
    if error.get("task") and (text := traceback_of(api, job["job_id"], error["task"])):
        err.print(escape(clean(text)), style="dim")
    err.print(f"[dim]more: hive job show {job['job_id']}   hive job logs {job['job_id']}[/dim]")


def traceback_of(api: "Api", job_id: str, task_id: str) -> str:
    """Return what the last attempt of a task left beside its message: a traceback, or nothing."""
    try:
        events = api.pages(f"/v1/jobs/{job_id}/events", "events", "from_position", limit=10_000)
        details = [
            e["data"]["detail"] for e in events if e["stream"] == task_id and (e["data"] or {}).get("detail")
        ]
    except HiveError:
        return ""  # it only adds to what was said already
    return str(details[-1]).rstrip() if details else ""
