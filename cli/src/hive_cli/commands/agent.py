"""`hive agent`: write one, try it, publish it."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.contracts.permissions import NONE
from hive_common.kernel.clock import iso
from hive_common.kernel.errors import HiveError, InvalidArgument, PermissionDenied
from rich.markup import escape

from hive_cli import author_keys
from hive_cli.commands import agent_key, grant
from hive_cli.commands.agent_share import CaOption, KeyOption, PlainHttpOption, pull_from, push_to, show_pushed
from hive_cli.commands.agent_template import write_agent
from hive_cli.commands.grant import grant_all, tell_what_is_missing
from hive_cli.home import Home, find_home
from hive_cli.inputs import build_input
from hive_cli.options import HomeOption, InputFileOption, InputOption, JsonOption, LimitOption
from hive_cli.output import FAILED, clean, err, out, print_json, print_table, show_json
from hive_cli.session import connect

if TYPE_CHECKING:
    from hive_common.artifacts.package import AgentPackage
    from hive_common.artifacts.signing import Signature
    from hive_common.contracts.events import Child
    from hive_common.inference.config import BackEndConfig
    from hive_executor.sandbox import LogLine, Outcome

    from hive_cli.api import Api

app = typer.Typer(no_args_is_help=True, help="Write an agent, try it, sign and publish it, grant what it asks for.")
app.add_typer(agent_key.app, name="key")


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

    Needs nothing that runs, but for an agent that calls models: those are the installation's. It may do what its
    manifest asks for, so read that first; values that it keeps are gone afterwards, and
    tasks that it forks are only listed.
    """
    from hive_executor.try_agent import run_once

    from hive_cli.supervisor.runtime import default_cache_dir

    data = json.dumps(build_input({}, inputs or [], input_file), ensure_ascii=False).encode()
    on_log, on_fork = (None, None) if as_json else (_print_line, _print_fork)
    gateway = _gateway(find_home(home))
    outcome = asyncio.run(run_once(folder, data, default_cache_dir(), on_log, gateway, on_fork))
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


def _print_fork(child: "Child") -> None:
    err.print(f"[dim]forks {escape(clean(child.agent))}[/dim] {escape(clean(bytes(child.input).decode()))}")


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
    key: KeyOption = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="HOST[:PORT]/REPO[:TAG]", help="Push to this OCI registry instead."),
    ] = None,
    plain_http: PlainHttpOption = False,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Sign and publish agents. A version never changes: pushing the same again is no error, pushing another is."""
    from hive_common.artifacts.package import pack
    from hive_common.artifacts.signing import sign

    signing_key = author_keys.signing_key(find_home(home), key)
    packages = [(folder, pack(folder)) for folder in folders]
    if to is not None:
        show_pushed(push_to(to, packages, signing_key, plain_http, ca_file), as_json)
        return
    versions = []
    with connect(home) as api:
        for folder, package in packages:
            signature = sign(package.digest, package.manifest.name, signing_key)
            try:
                version = publish(api, str(folder), package, signature)
            except PermissionDenied as error:
                raise _about_own_key(error, signature, key) from error
            versions.append(version)
            tell_of_published(api, version, package, grant, as_json)
    if as_json:
        print_json({"versions": versions})


@app.command("pull")
def pull(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="HOST[:PORT]/REPO:TAG or …@sha256:… of an OCI registry.")
    ],
    grant: Annotated[
        bool, typer.Option("--grant", help="Grant all that the agent asks for, after saying what that is.")
    ] = False,
    plain_http: PlainHttpOption = False,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Publish an agent here that lies in another registry, with the signature of its author."""
    with connect(home) as api:
        trusted = [signer["public_key"] for signer in api.get("/v1/signers")["keys"] if signer["trusted"]]
        package, signature = pull_from(reference, trusted, plain_http, ca_file)
        version = publish(api, reference, package, signature)
        tell_of_published(api, version, package, grant, as_json)
    if as_json:
        print_json({"versions": [version]})


@app.command("yank")
def yank(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="Of the agent.")],
    reason: Annotated[str, typer.Option("--reason", help="Why nobody should use it any more.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Refuse a version to new jobs, for ever. Jobs that use it go on; nothing is deleted."""
    name, _, version = reference.partition("@")
    if not name or not version:
        raise InvalidArgument(f"{reference}: expected NAME@VERSION, such as square@1.0.0", path="NAME@VERSION")
    with connect(home) as api:
        answer = api.post(f"/v1/agents/{name}/{version}/yank", {"reason": reason})
    if as_json:
        print_json(answer)
    else:
        out.print(f"{clean(reference)} is yanked: {clean(answer['yank_reason'])}")


def tell_of_published(
    api: "Api", version: dict[str, Any], package: "AgentPackage", grant: bool, as_json: bool
) -> None:
    """Say what was published, what it may do, and what it may not do yet."""
    if not as_json:
        out.print(
            f"[green]✓[/green] {version['name']}@{version['version']}  "
            f"[dim]{version['digest'][:19]}…  {package.size_bytes} bytes, "
            f"signed with {version['signer'][:16]}…[/dim]"
        )
    if version["yanked_us"] is not None:
        err.print(f"[yellow]it was yanked, and no new job may use it:[/yellow] {clean(version['yank_reason'])}")
    if package.manifest.asked != NONE:
        (grant_all if grant else tell_what_is_missing)(api, package.manifest, err if as_json else out)


def _about_own_key(error: PermissionDenied, signature: "Signature", name: str | None) -> PermissionDenied:
    """Return the refusal of a key of this home in terms of its name."""
    if name is None or "/" in name or error.fields.get("public_key") != signature.signer:
        return error
    said = error.message.replace(f"{signature.signer} --name WHOSE", name).replace(
        "if you know whose it is", "to trust it"
    )
    return PermissionDenied(said, **error.fields)


def publish(api: "Api", where: str, package: "AgentPackage", signature: "Signature") -> dict[str, Any]:
    """Store a signed agent and publish it. Errors say `where` it came from."""
    try:
        for digest, data in (package.blobs | signature.blobs).items():
            api.put_blob(data, digest)
        digests = {"manifest_digest": package.digest, "signature_digest": signature.digest}
        version: dict[str, Any] = api.post("/v1/agents", digests)
    except HiveError as error:
        if error.code in ("unavailable", "unauthenticated"):
            raise
        raise type(error)(f"{where}: {error.message}", **error.fields) from error
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
        signers = {} if as_json else {key["public_key"]: key for key in api.get("/v1/signers")["keys"]}
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
            _signed_by(v, signers),
            "" if v["yanked_us"] is None else f"yanked: {clean(v['yank_reason'])}",
        )
        for v in versions
    )
    print_table(("agent", "runtime", "digest", "bytes", "published", "signed by", ""), rows)


def _signed_by(version: dict[str, Any], signers: dict[str, Any]) -> str:
    signer = signers.get(version["signer"])
    if signer is None:
        return "nobody"
    return clean(signer["name"]) if signer["trusted"] else f"{clean(signer['name'])}, distrusted"


app.command("grant")(grant.grant)
app.command("grants")(grant.grants)
app.command("ungrant")(grant.ungrant)
app.command("revoke", hidden=True)(grant.ungrant)
