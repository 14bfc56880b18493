"""`hive agent`: write one, try it, publish it."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.contracts.permissions import NONE
from hive_common.kernel.clock import iso
from hive_common.kernel.errors import HiveError
from rich.markup import escape

from hive_cli.commands.agent_template import write_agent
from hive_cli.commands.grant import grant_all, tell_what_is_missing
from hive_cli.home import Home, find_home
from hive_cli.inputs import build_input
from hive_cli.options import HomeOption, InputFileOption, InputOption, JsonOption, LimitOption
from hive_cli.output import FAILED, clean, err, out, print_json, print_table, show_json
from hive_cli.session import connect

if TYPE_CHECKING:
    from hive_common.artifacts.package import AgentPackage
    from hive_common.inference.config import BackEndConfig
    from hive_executor.sandbox import LogLine, Outcome

    from hive_cli.api import Api

app = typer.Typer(no_args_is_help=True, help="Write an agent, try it, publish it.")


@app.command("init")
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the agent, and of the folder that is made.")],
    as_json: JsonOption = False,
) -> None:
    """Write an agent that works: manifest, code, a job and an input for it."""
    folder, files = write_agent(Path(name).name, Path(name))
    if as_json:
        print_json({"folder": str(folder), "files": files})
        return
    out.print(f"wrote {', '.join(str(folder / file) for file in files)}")
    out.print(
        f"try it:      hive agent run {folder} --input name=Ada\n"
        f"publish it:  hive agent push {folder}\n"
        f"use it:      hive run {folder}/job.yaml --input name=Ada",
        style="dim",
    )


@app.command("run")
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with manifest.yaml.")],
    inputs: InputOption = None,
    input_file: InputFileOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Try an agent once in the sandbox of an executor, without publishing it.

    Needs nothing that runs, but for an agent that calls models: those are the installation's.
    """
    from hive_executor.try_agent import run_once

    from hive_cli.supervisor.runtime import default_cache_dir

    data = json.dumps(build_input({}, inputs or [], input_file), ensure_ascii=False).encode()
    on_log = None if as_json else _print_line
    outcome = asyncio.run(run_once(folder, data, default_cache_dir(), on_log, _gateway(find_home(home))))
    if as_json:
        print_json(_shape(outcome))
    elif outcome.output is not None:
        out.print(escape(clean(show_json(json.loads(outcome.output)))))
        err.print(f"[dim]{outcome.wall_ms} ms[/dim]")
    if outcome.status != "succeeded":
        err.print(f"[red]{outcome.code}[/red]: {escape(clean(outcome.message))}")
        if outcome.detail and not as_json:
            err.print(escape(clean(outcome.detail.rstrip())), style="dim")
        raise typer.Exit(FAILED)


def _gateway(home: Home) -> "BackEndConfig | None":
    from hive_common.inference.config import BackEndConfig

    if home.is_joined():
        port = home.ports().get("http")
        return BackEndConfig(f"http://127.0.0.1:{port}") if port else None
    if not home.exists():
        return None
    return BackEndConfig(home.settings().endpoints.http, str(home.api_key_file))


def _print_line(line: "LogLine") -> None:
    err.print(f"[dim]{iso(line.ts_us)[11:23]}[/dim] {escape(clean(line.level + ': ' + line.text))}")


def _shape(outcome: "Outcome") -> dict[str, Any]:
    return {
        "status": outcome.status,
        "output": None if outcome.output is None else json.loads(outcome.output),
        "code": outcome.code,
        "message": outcome.message,
        "detail": outcome.detail,
        "wall_ms": outcome.wall_ms,
        "fuel_used": outcome.fuel_used,
        "memory_peak_bytes": outcome.memory_peak_bytes,
        "log": [{"ts_us": line.ts_us, "level": line.level, "text": line.text} for line in outcome.log],
    }


@app.command("push")
def push(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders with manifest.yaml.")],
    grant: Annotated[
        bool, typer.Option("--grant", help="Grant all that the agents ask for, after saying what that is.")
    ] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Publish agents. A version never changes: pushing the same again is no error, pushing another is."""
    from hive_common.artifacts.package import pack

    packages = [(folder, pack(folder)) for folder in folders]
    versions = []
    with connect(home) as api:
        for folder, package in packages:
            version = _publish(api, folder, package)
            versions.append(version)
            if not as_json:
                out.print(
                    f"[green]✓[/green] {version['name']}@{version['version']}  "
                    f"[dim]{version['digest'][:19]}…  {package.size_bytes} bytes[/dim]"
                )
            if package.manifest.asked != NONE:
                (grant_all if grant else tell_what_is_missing)(api, package.manifest, err if as_json else out)
    if as_json:
        print_json({"versions": versions})


def _publish(api: "Api", folder: Path, package: "AgentPackage") -> dict[str, Any]:
    try:
        for digest, data in package.blobs.items():
            api.put_blob(data, digest)
        version: dict[str, Any] = api.post("/v1/agents", {"manifest_digest": package.digest})
    except HiveError as error:
        if error.code in ("unavailable", "unauthenticated"):
            raise
        raise type(error)(f"{folder}: {error.message}", **error.fields) from error
    return version


@app.command("list")
def list_agents(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only versions of this agent.")] = None,
    limit: LimitOption = 1000,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List published versions."""
    with connect(home) as api:
        path = f"/v1/agents/{name}" if name else "/v1/agents"
        pages = api.pages(path, "versions", "after", limit=min(limit, 1000))
        versions = [version for version, _ in zip(pages, range(limit), strict=False)]
    if as_json:
        print_json({"versions": versions})
        return
    rows = (
        (
            f"{v['name']}@{v['version']}",
            (v["manifest"] or {}).get("runtime", ""),
            v["digest"][:19] + "…",
            str(v["size_bytes"]),
            iso(v["published_us"])[:19],
        )
        for v in versions
    )
    print_table(("agent", "runtime", "digest", "bytes", "published"), rows)
