"""Starts the processes of an installation in order, keeps them running, and stops them in order."""

import asyncio
import logging
import os
import time
from collections.abc import Iterable

from hive_common.kernel.errors import HiveError
from hive_common.ops.logs import configure_logging
from hive_executor.small_model import NAME

from hive_cli.home import ExecutorEntry, Home, Settings
from hive_cli.supervisor import names, postgres, runtime
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.joined import JoinedSupervisor, checked
from hive_cli.supervisor.leftovers import end_leftovers
from hive_cli.supervisor.logs import bound_log
from hive_cli.supervisor.plan import executor_spec, nats_spec, postgres_spec, service_spec
from hive_cli.supervisor.process import Child
from hive_cli.supervisor.progress import Report, Reporter
from hive_cli.supervisor.provision import active_executors, provision, write_private
from hive_cli.supervisor.public import problem_of, url_for_others
from hive_cli.supervisor.running import Running
from hive_cli.supervisor.small_model import small_model_spec
from hive_cli.supervisor.wishes import Wishes


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
            if ended := end_leftovers(home):
                report(Report("note", f"of an earlier supervisor there still ran: {', '.join(ended)}; ended"))
            if home.is_joined():
                return asyncio.run(JoinedSupervisor(home, checked(home, wishes), report).run())
            settings = provision(
                home,
                wishes.executors,
                public=wishes.public,
                ollama_without_key=wishes.ollama_without_key,
                model_urls=wishes.model_urls,
                counts_only=wishes.counts_only,
                small_model=wishes.small_model,
                tier=wishes.tier,
                labels=wishes.labels,
            )
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


class Supervisor(Running):
    """The processes of one home.

    Args:
        home: provisioned and locked.
        settings: of this home.
        executors: how many to run, None for all.
        report: gets the lines for the user.
    """

    def __init__(self, home: Home, settings: Settings, executors: int | None, report: Reporter) -> None:
        super().__init__(home, report)
        self._settings = settings
        self._executors: tuple[ExecutorEntry, ...] = active_executors(settings, executors)
        self._cache_dir = runtime.default_cache_dir()

    async def _start(self) -> str:
        started = time.monotonic()
        home, settings = self._home, self._settings
        write_configs(home, settings, self._executors, self._cache_dir)
        database, nats = self._plan(postgres_spec(home, settings)), self._plan(nats_spec(home, settings))
        services = [self._plan(service_spec(home, settings, name)) for name in names.SERVICES]
        executors = [self._plan(executor_spec(home, one.name, settings.ports)) for one in self._executors]
        # Loading their code takes longer than anything else here, and needs none of the others.
        for child in (*executors, *services):
            child.start(held=True)
        async with asyncio.TaskGroup() as group:
            model = group.create_task(self._start_small_model())
            prepared = group.create_task(runtime.prepare(self._cache_dir, self._report))
            group.create_task(self._release_executors(executors, prepared, model))
            log_id = await self._start_servers(database, nats)
            self._report(Report("done", f"event log {log_id}"))
            for child in services:
                child.release()
                group.create_task(self._ready(child, child.spec.name))
        return self._welcome(time.monotonic() - started)

    async def _release_executors(self, executors: list[Child], *first: asyncio.Task[None]) -> None:
        """Let executors begin: not before Python is there, and models, for which they look when they start."""
        await asyncio.gather(*first)
        for child in executors:
            child.release()
        for child in executors:
            await self._ready(child, child.spec.name)

    async def _start_small_model(self) -> None:
        if self._settings.models.small:
            child = self._add(small_model_spec(self._home, self._settings.ports))
            await self._ready(child, f"model {NAME} on port {self._settings.ports[names.SMALL_MODEL]}")

    async def _start_servers(self, database: Child, nats: Child) -> str:
        """Start PostgreSQL and NATS, and return the id of the log once everybody may use both."""
        home, settings = self._home, self._settings
        nats.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ready(nats, f"NATS on port {settings.ports['nats']}"))
            if await asyncio.to_thread(postgres.ensure_cluster, home):
                self._report(Report("done", f"database made in {home.postgres_dir}"))
            database.start()
            await self._ready(database, f"PostgreSQL on port {settings.ports['postgres']}")
            # Loaded here, when everything else is under way.
            from hive_cli.supervisor.database import prepare_database

            return await prepare_database(home, settings)

    def _welcome(self, seconds: float) -> str:
        endpoints, option = self._settings.endpoints, self._option()
        return (
            f"HiveFabric is ready after {seconds:.1f} s\n"
            f"  REST   {endpoints.http}   (key in {self._home.api_key_file})\n"
            f"  gRPC   {endpoints.grpc}\n"
            f"  NATS   {endpoints.nats}\n"
            f"{self._for_others()}"
            f"next: hive status{option}   hive agent init hello   hive run JOB.yaml{option}   hive down{option}"
        )

    def _for_others(self) -> str:
        if not self._settings.public:
            return ""
        return f"  others {url_for_others(self._settings)}   (let a machine join: hive executor token)\n"

    def _stop_order(self) -> Iterable[list[str]]:
        yield [names.GATEWAY]
        yield [entry.name for entry in self._executors]
        yield list(names.PEERS)
        yield [names.SMALL_MODEL]
        yield [names.NATS]
        yield [names.POSTGRES]
