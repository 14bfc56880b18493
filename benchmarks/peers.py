"""One durable task queue that people would pick instead, measured: `python benchmarks/peers.py SYSTEM TASKS TRIPS`.

Runs in an environment of its own (`make bench-peers`), never in HiveFabric's, and prints one line of JSON:
`tasks_per_s` of single submits with 50 in flight, from the first submit to the last commit of a result, and
`p50_ms` and `p99_ms` from submit to result of one task at a time.

The client is this process, the worker another one with the same settings; Postgres and NATS are given by
`HIVE_BENCH_DSN` (an empty database) and `HIVE_BENCH_NATS`. Settings are those that were fastest for each
system without giving up its promise; what a system does less than HiveFabric stands in `report.py`.
"""

import asyncio
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import psycopg
import uvloop

IN_FLIGHT = 50
WARM_UP = 100
WORKER_READY_S = 30
DSN = os.environ.get("HIVE_BENCH_DSN", "")
NATS = os.environ.get("HIVE_BENCH_NATS", "")

Submit = Callable[[], Awaitable[Any]]


class Peer:
    """What the measurement needs of a system."""

    # Counts finished tasks; what finished is read from where the system itself keeps it.
    done_query = ""

    async def install(self) -> None:
        """Prepare the empty database."""

    async def work(self) -> None:
        """Be the worker, until cancelled. Prints `ready` once it takes tasks."""
        raise NotImplementedError

    async def connect(self) -> None:
        """Be the client."""
        raise NotImplementedError

    async def submit(self) -> Any:
        """Submit one no-op and return a handle."""
        raise NotImplementedError

    async def result(self, handle: Any) -> None:
        """Wait until the task of `handle` is done."""
        raise NotImplementedError

    async def done(self) -> int:
        """Return how many tasks have finished so far."""
        async with await psycopg.AsyncConnection.connect(DSN, autocommit=True) as connection:
            row = await (await connection.execute(self.done_query)).fetchone()
        assert row is not None
        return int(row[0])


class PgQueuer(Peer):
    done_query = "SELECT count(DISTINCT job_id) FROM pgqueuer_log WHERE status = 'successful'"

    @asynccontextmanager
    async def _driver(self, connections: int) -> Any:
        import asyncpg
        from pgqueuer import AsyncpgPoolDriver

        async with asyncpg.create_pool(DSN, min_size=connections, max_size=connections) as pool:
            yield AsyncpgPoolDriver(pool)

    async def install(self) -> None:
        from pgqueuer import Queries

        async with self._driver(1) as driver:
            await Queries(driver).install()

    async def work(self) -> None:
        from pgqueuer import PgQueuer as Application

        async with self._driver(8) as driver:
            application = Application(driver)

            @application.entrypoint("noop")
            async def noop(job: Any) -> None:
                return

            print("ready", flush=True)
            await application.qm.run(batch_size=100)

    async def connect(self) -> None:
        from pgqueuer import Queries
        from pgqueuer.core.completion import CompletionWatcher

        self._held = self._driver(10)
        driver = await self._held.__aenter__()
        self._queries = Queries(driver)
        self._watcher = CompletionWatcher(driver, queries=self._queries, debounce=timedelta(milliseconds=2))
        await self._watcher.__aenter__()

    async def submit(self) -> Any:
        return (await self._queries.enqueue("noop", b"{}"))[0]

    async def result(self, handle: Any) -> None:
        await self._watcher.wait_for(handle)


class Procrastinate(Peer):
    done_query = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"

    def __init__(self) -> None:
        from procrastinate import App, PsycopgConnector

        self._app = App(connector=PsycopgConnector(conninfo=DSN, min_size=10, max_size=10))

        @self._app.task(name="noop")
        async def noop() -> None:
            return

        self._noop = noop

    async def install(self) -> None:
        async with self._app.open_async():
            await self._app.schema_manager.apply_schema_async()

    async def work(self) -> None:
        async with self._app.open_async():
            print("ready", flush=True)
            await self._app.run_worker_async(concurrency=IN_FLIGHT)

    async def connect(self) -> None:
        await self._app.open_async()

    async def submit(self) -> Any:
        return await self._noop.defer_async()

    async def result(self, handle: Any) -> None:
        while (await self._app.job_manager.get_job_status_async(handle)).value != "succeeded":
            await asyncio.sleep(0.001)


def _dbos() -> tuple[Any, Any]:
    from dbos import DBOS

    config: Any = {"name": "bench", "system_database_url": DSN, "log_level": "WARNING", "application_version": "1"}
    DBOS(config=config)

    @DBOS.workflow(name="noop")
    async def noop() -> None:
        return

    return DBOS, noop


class DbosQueue(Peer):
    done_query = "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'"

    async def work(self) -> None:
        dbos, _ = _dbos()
        dbos.launch()
        await dbos.register_queue_async("queue", polling_interval_sec=0.01)
        print("ready", flush=True)
        await asyncio.Event().wait()

    async def connect(self) -> None:
        from dbos import DBOSClient

        self._client = DBOSClient(system_database_url=DSN)

    async def submit(self) -> Any:
        return await self._client.enqueue_async(
            {"queue_name": "queue", "workflow_name": "noop", "app_version": "1"}
        )

    async def result(self, handle: Any) -> None:
        await handle.get_result(polling_interval_sec=0.002)


class DbosDirect(Peer):
    """A workflow that the submitting process runs itself: no queue, no second process."""

    done_query = DbosQueue.done_query

    async def work(self) -> None:
        print("ready", flush=True)
        await asyncio.Event().wait()

    async def connect(self) -> None:
        self._dbos, self._noop = _dbos()
        self._dbos.launch()

    async def submit(self) -> Any:
        handle = await self._dbos.start_workflow_async(self._noop)
        await handle.get_result()
        return handle

    async def result(self, handle: Any) -> None:
        return


class Taskiq(Peer):
    """On JetStream, results in a NATS object store."""

    def __init__(self) -> None:
        from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

        broker = PullBasedJetStreamBroker(NATS, pull_consume_batch=100, pull_consume_timeout=5)
        self._broker = broker.with_result_backend(NATSObjectStoreResultBackend(NATS))

        @self._broker.task(task_name="noop")
        async def noop() -> None:
            return

        self._noop = noop

    async def work(self) -> None:
        from taskiq.api import run_receiver_task

        self._broker.is_worker_process = True
        await self._broker.startup()
        print("ready", flush=True)
        await run_receiver_task(self._broker, validate_params=False, max_async_tasks=IN_FLIGHT)

    async def connect(self) -> None:
        await self._broker.startup()
        self._js = self._broker.client.jetstream()

    async def submit(self) -> Any:
        return await self._noop.kiq()

    async def result(self, handle: Any) -> None:
        await handle.wait_result(check_interval=0.002)

    async def done(self) -> int:
        # An object is two messages, a chunk and what describes it; the second completes it.
        state = (await self._js.stream_info("OBJ_taskiq_results")).state
        return int(state.messages) // 2


SYSTEMS: dict[str, type[Peer]] = {
    "pgqueuer": PgQueuer,
    "procrastinate": Procrastinate,
    "dbos_queue": DbosQueue,
    "dbos_direct": DbosDirect,
    "taskiq_lazy": Taskiq,
    "taskiq_always": Taskiq,
}


async def rate(peer: Peer, tasks: int) -> float:
    """Return tasks per second of `tasks` single submits, 50 callers at once, until all have finished."""
    before = await peer.done()
    left = iter(range(tasks))

    async def caller() -> None:
        for _ in left:
            await peer.submit()

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    while await peer.done() - before < tasks:
        await asyncio.sleep(0.02)
    return tasks / (time.perf_counter() - started)


async def round_trips(peer: Peer, trips: int) -> list[float]:
    """Return the milliseconds from submit to result, one task at a time, in ascending order."""
    found = []
    for _ in range(trips):
        started = time.perf_counter()
        await peer.result(await peer.submit())
        found.append((time.perf_counter() - started) * 1000)
    return sorted(found)


async def measure(system: str, tasks: int, trips: int) -> dict[str, float]:
    """Start a worker, be the client, stop the worker."""
    peer = SYSTEMS[system]()
    await peer.install()
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "worker",
        system,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        line = await asyncio.wait_for(worker.stdout.readline(), WORKER_READY_S)
        if line != b"ready\n":
            raise RuntimeError(f"the worker of {system} said {line!r} and not that it is ready")
        client = SYSTEMS[system]()
        await client.connect()
        await rate(client, WARM_UP)
        figure = await rate(client, tasks)
        times = await round_trips(client, trips)
    finally:
        with suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()
    return {
        "tasks_per_s": round(figure, 1),
        "p50_ms": round(statistics.median(times), 2),
        "p99_ms": round(times[max(0, len(times) * 99 // 100 - 1)], 2),
    }


async def measure_and_leave(system: str, tasks: int, trips: int) -> None:
    """Measure, print, and end: connections go with the process, some clients never finish closing theirs."""
    print(json.dumps(await measure(system, tasks, trips)), flush=True)
    os._exit(0)


def end_with_parent() -> None:
    """End this process once its standard input does, however its parent ended."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Be the worker, or measure."""
    if sys.argv[1] == "worker":
        end_with_parent()
        uvloop.run(SYSTEMS[sys.argv[2]]().work())
        return
    system, tasks, trips = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    uvloop.run(measure_and_leave(system, tasks, trips))


if __name__ == "__main__":
    main()
