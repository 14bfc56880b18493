"""Starts the processes of an installation in order, keeps them running, and stops them in order."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import psycopg
from hive_common.kernel.errors import DeadlineExceeded, FailedPrecondition, HiveError
from hive_common.ops.telemetry import configure_logging

from hive_cli.home import ExecutorEntry, Home, Settings
from hive_cli.supervisor import names, postgres, runtime
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.logs import bound_log, log_tail, readable
from hive_cli.supervisor.plan import executor_spec, nats_spec, postgres_spec, service_spec
from hive_cli.supervisor.process import Child, ProcessSpec, describe_exit
from hive_cli.supervisor.progress import Report, Reporter
from hive_cli.supervisor.provision import active_executors, provision, write_private
from hive_cli.supervisor.public import problem_of
from hive_cli.supervisor.state import InstallationState, end_leftovers, write_state
from hive_cli.supervisor.wishes import Wishes

log = logging.getLogger(__name__)

TRIES = 3
BAD_CONFIGURATION = 2
"""Exit code of a service that cannot read its configuration: trying again does not help."""


def supervise(home: Home, wishes: Wishes, report: Reporter) -> int:
    """Run the installation in `home` until a signal says stop. Returns the exit code.

    MUST be called on the main thread. When it returns, nothing that it started runs any more.

    Args:
        home: made if it is not there.
        wishes: of the user, for this time.
        report: gets the lines for the user; its last one is `ready` or `failed`.
    """
    try:
        with home.locked():
            _log_to(home)
            write_private(home.pid_file, f"{os.getpid()}\n")
            for name in end_leftovers(home):
                report(Report("note", f"{name} of an earlier supervisor still ran and was killed"))
            settings = provision(home, wishes.executors, public=wishes.public)
            if settings.public and (problem := problem_of(settings.public)):
                report(Report("note", f"{problem}: other machines may not get through to this one"))
            return asyncio.run(Supervisor(home, settings, wishes.executors, report).run())
    except HiveError as error:
        report(Report("failed", error.message))
    except OSError as error:
        report(Report("failed", f"{error.filename or home.root}: {error.strerror or error}"))
    return 1


def _log_to(home: Home) -> None:
    home.logs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = home.log_file(names.SUPERVISOR)
    bound_log(file)
    configure_logging("hive_supervisor")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(file.open("a"))


class Supervisor:
    """The processes of one home.

    Args:
        home: provisioned and locked.
        settings: of this home.
        executors: how many to run, None for all.
        report: gets the lines for the user.
    """

    def __init__(self, home: Home, settings: Settings, executors: int | None, report: Reporter) -> None:
        self._home = home
        self._settings = settings
        self._executors: tuple[ExecutorEntry, ...] = active_executors(settings, executors)
        self._report = report
        self._children: dict[str, Child] = {}
        self._state = "starting"
        self._stop = asyncio.Event()
        self._cache_dir = runtime.default_cache_dir()

    async def run(self) -> int:
        """Start everything, watch it, and return once everything has ended."""
        self._handle_signals()
        code = 1
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            starting = asyncio.create_task(self._start(session))
            stopping = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not starting.done():
                    self._report(Report("failed", "stopped before everything was ready"))
                elif (error := starting.exception()) is not None:
                    self._report(Report("failed", self._explain(error)))
                else:
                    self._report(Report("ready", starting.result()))
                    self._state = "ready"
                    self._save()
                    await stopping
                    code = 0
            finally:
                for task in (starting, stopping):
                    task.cancel()
                await asyncio.gather(starting, stopping, return_exceptions=True)
                await self._shut_down()
        return code

    async def _start(self, session: aiohttp.ClientSession) -> str:
        started = time.monotonic()
        home, settings = self._home, self._settings
        write_configs(home, settings, self._executors, self._cache_dir)
        if await asyncio.to_thread(postgres.ensure_cluster, home):
            self._report(Report("done", f"database made in {home.postgres_dir}"))
        async with asyncio.TaskGroup() as group:
            prepared = group.create_task(runtime.prepare(self._cache_dir, self._report))
            await self._start_servers(session)
            log_id = await postgres.prepare_database(home, settings)
            self._report(Report("done", f"event log {log_id}"))
            for name in names.SERVICES:
                child = self._add(service_spec(home, settings, name, session))
                group.create_task(self._ready(child, name))
            await prepared
            for entry in self._executors:
                child = self._add(executor_spec(home, settings, entry, session))
                group.create_task(self._ready(child, entry.name))
        return self._welcome(time.monotonic() - started)

    async def _start_servers(self, session: aiohttp.ClientSession) -> None:
        ports = self._settings.ports
        database = self._add(postgres_spec(self._home, self._settings))
        nats = self._add(nats_spec(self._home, self._settings, session))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ready(database, f"PostgreSQL on port {ports['postgres']}"))
            group.create_task(self._ready(nats, f"NATS on port {ports['nats']}"))

    def _add(self, spec: ProcessSpec) -> Child:
        child = Child(spec, self._save, self._on_restart)
        self._children[spec.name] = child
        child.start()
        return child

    def _on_restart(self, text: str) -> None:
        log.warning("%s", text)
        if self._state != "stopping":
            self._report(Report("note", text))

    async def _ready(self, child: Child, title: str) -> None:
        """Wait until a process is ready, and say so.

        Raises:
            FailedPrecondition: it ended too often, or with a code that says that trying again is useless.
            DeadlineExceeded: it took too long.
        """
        name = child.spec.name
        until = time.monotonic() + child.spec.ready_s
        while not child.is_ready.is_set():
            if len(child.exits) >= TRIES or BAD_CONFIGURATION in child.exits:
                how = describe_exit(child.exits[-1])
                raise FailedPrecondition(f"{name} does not start: {how}{self._tail(name)}")
            if time.monotonic() > until:
                problem = f"{name} is not ready after {child.spec.ready_s:g} s: {child.snapshot().problem}"
                if not child.spec.essential and child.pid is not None:
                    self._report(Report("note", problem))
                    return
                raise DeadlineExceeded(problem + self._tail(name))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await child.is_ready.wait()
        self._report(Report("done", title))

    def _explain(self, error: BaseException) -> str:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        match error:
            case HiveError():
                return error.message
            case psycopg.Error():
                return f"{names.POSTGRES}: {str(error).strip()}{self._tail(names.POSTGRES)}"
            case OSError():
                return f"{error.filename or self._home.root}: {error.strerror or error}"
        raise error

    def _tail(self, name: str) -> str:
        file = self._home.log_file(name)
        lines = readable(log_tail(file).splitlines())
        return f"\nthe end of {file}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    def _welcome(self, seconds: float) -> str:
        endpoints, root = self._settings.endpoints, self._home.root
        option = "" if os.environ.get("HIVE_HOME") == str(root) else f" --home {root}"
        if root == Path("~/.hivefabric").expanduser():
            option = ""
        return (
            f"HiveFabric is ready after {seconds:.1f} s\n"
            f"  REST   {endpoints.http}   (key in {self._home.api_key_file})\n"
            f"  gRPC   {endpoints.grpc}\n"
            f"  NATS   {endpoints.nats}\n"
            f"next: hive status{option}   hive agent init hello   hive run JOB.yaml{option}   hive down{option}"
        )

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop.is_set():
            log.info("stopping: %s", number.name)
            self._stop.set()
        elif number == signal.SIGINT:
            log.warning("second Ctrl-C: everything is killed")
            for child in self._children.values():
                child.send(signal.SIGKILL)

    async def _shut_down(self) -> None:
        """Stop in the order in which nothing is missed by what still runs: doors first, the truth last."""
        self._state = "stopping"
        self._save()
        for group in self._stop_order():
            await asyncio.gather(*(self._children[name].stop() for name in group if name in self._children))
        self._state = "stopped"
        self._save()

    def _stop_order(self) -> Iterable[list[str]]:
        yield [names.GATEWAY]
        yield [entry.name for entry in self._executors]
        yield list(names.PEERS)
        yield [names.NATS]
        yield [names.POSTGRES]

    def _save(self) -> None:
        services = tuple(child.snapshot() for child in self._children.values())
        state = self._state
        if state == "ready" and any(service.state != "ready" for service in services):
            state = "degraded"
        write_state(self._home, InstallationState(state, os.getpid(), services))
