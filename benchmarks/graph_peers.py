"""The graphs of `graphs.py` as workflows of a peer: `python benchmarks/graph_peers.py SYSTEM < graphs.json`.

Runs in the peers' environment. Standard input is a list of graphs (`graphs.plain`), each with what its calls wait
for; each is run once, after one that is not counted, and printed is one line of JSON: milliseconds from the start
of each workflow to its result. A call is one of the scripted model at `HIVE_BENCH_MODEL`. Everything is kept in
Postgres (`HIVE_BENCH_DSN`, an empty database), or in SQLite in `HIVE_BENCH_FOLDER`.
"""

import asyncio
import json
import operator
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import aiohttp
import uvloop

DSN = os.environ.get("HIVE_BENCH_DSN", "")
MODEL = os.environ.get("HIVE_BENCH_MODEL", "")
FOLDER = os.environ.get("HIVE_BENCH_FOLDER", ".")
WORKER_READY_S = 60

Run = Callable[[], Awaitable[str]]
_client: aiohttp.ClientSession | None = None


async def call(tokens: int, given: list[str]) -> str:
    """Call the model once; its answer takes as long as it has tokens."""
    global _client
    if _client is None:
        _client = aiohttp.ClientSession(raise_for_status=True)
    body = {
        "model": "scripted",
        "max_tokens": tokens,
        "messages": [{"role": "user", "content": str(len(given))}],
    }
    async with _client.post(f"{MODEL}/v1/chat/completions", json=body) as answer:
        text: str = (await answer.json())["choices"][0]["message"]["content"]
        return text


class State(TypedDict):
    """What the nodes of a LangGraph graph have found."""

    texts: Annotated[dict[str, str], operator.or_]


class LangGraph:
    """Nodes and edges, checkpointed before the next nodes start (`durability="sync"`)."""

    def __init__(self, durability: str, store: str) -> None:
        self._durability = durability
        self._store = store
        self._held = AsyncExitStack()

    async def open(self) -> None:
        """Open the checkpointer."""
        if self._store == "postgres":
            from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

            made: Any = AsyncPostgresSaver.from_conn_string(DSN)
        else:
            from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

            made = AsyncSqliteSaver.from_conn_string(str(Path(FOLDER) / "checkpoints.sqlite"))
        self._saver = await self._held.enter_async_context(made)
        await self._saver.setup()

    def prepare(self, graph: dict[str, Any]) -> Run:
        """Compile the graph; its run is measured, not this."""
        from langgraph.graph import END, START, StateGraph

        builder = StateGraph(State)
        waits: dict[str, list[str]] = graph["needs"]

        def node(name: str, tokens: int) -> Callable[[State], Awaitable[Any]]:
            async def run(state: State) -> Any:
                return {"texts": {name: await call(tokens, [state["texts"][one] for one in waits[name]])}}

            return run

        for name, tokens in graph["calls"]:
            builder.add_node(name, node(name, tokens))
        for name, before in waits.items():
            # A list waits for all of them.
            builder.add_edge(before if len(before) > 1 else before[0] if before else START, name)
        last = graph["calls"][-1][0]
        builder.add_edge(last, END)
        compiled = builder.compile(checkpointer=self._saver)

        async def run() -> str:
            config: Any = {"configurable": {"thread_id": uuid.uuid4().hex}}
            done = await compiled.ainvoke({"texts": {}}, config, durability=self._durability)
            text: str = done["texts"][last]
            return text

        return run

    async def close(self) -> None:
        """Close the checkpointer."""
        await self._held.aclose()


def _dbos() -> tuple[Any, Any, Any]:
    from dbos import DBOS

    polled: Any = {"polling_interval_sec": 0.002}
    config: Any = {"name": "bench", "system_database_url": DSN, "log_level": "WARNING", "application_version": "1"}
    DBOS(config=config)

    @DBOS.step(name="call")
    async def step(tokens: int, given: list[str]) -> str:
        return await call(tokens, given)

    @DBOS.workflow(name="one")
    async def one(tokens: int, given: list[str]) -> str:
        return await step(tokens, given)

    @DBOS.workflow(name="graph")
    async def walk(tree: Any, given: list[str], queued: bool) -> list[str]:
        return await follow(tree, given, queued)

    async def follow(tree: Any, given: list[str], queued: bool) -> list[str]:
        """Return the texts of the last calls. What runs at once starts in the graph's order, as DBOS asks for."""
        if "series" in tree:
            for part in tree["series"]:
                given = await follow(part, given, queued)
            return given
        parts = [tree] if isinstance(tree, list) else tree["parallel"]
        if not all(isinstance(part, list) for part in parts):
            # A branch with steps of its own is a workflow of its own, as its steps are numbered.
            branches = [await DBOS.start_workflow_async(walk, part, given, queued) for part in parts]
            return [text for branch in branches for text in await branch.get_result(**polled)]
        if queued:
            started = [await DBOS.enqueue_workflow_async("queue", one, part[1], given) for part in parts]
            return [await handle.get_result(**polled) for handle in started]
        return list(await asyncio.gather(*(step(part[1], given) for part in parts)))

    return DBOS, walk, one


class Dbos:
    """A workflow whose calls are steps, or with `queued` workflows on a queue that another process works off."""

    def __init__(self, *, queued: bool) -> None:
        self._queued = queued
        self._worker: asyncio.subprocess.Process | None = None

    async def open(self) -> None:
        """Launch it, and the worker."""
        self._dbos, self._walk, _ = _dbos()
        if self._queued:
            # This process enqueues and does not dequeue.
            self._dbos.listen_queues([])
            self._dbos.launch()
            command = [sys.executable, __file__, "worker"]
            self._worker = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            assert self._worker.stdout is not None
            line = await asyncio.wait_for(self._worker.stdout.readline(), WORKER_READY_S)
            if line != b"ready\n":
                raise RuntimeError(f"the worker of DBOS said {line!r} and not that it is ready")
        else:
            self._dbos.launch()

    def prepare(self, graph: dict[str, Any]) -> Run:
        """Return what starts the workflow and waits for its result."""

        async def run() -> str:
            handle = await self._dbos.start_workflow_async(self._walk, graph["tree"], [], self._queued)
            found = await handle.get_result()
            (text,) = found
            return str(text)

        return run

    async def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            with suppress(ProcessLookupError):
                self._worker.kill()
            await self._worker.wait()


async def work() -> None:
    """Be the worker of the queue."""
    dbos, _, _ = _dbos()
    dbos.launch()
    await dbos.register_queue_async("queue", polling_interval_sec=0.01)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    os._exit(0)


def system(name: str) -> LangGraph | Dbos:
    """Return the system of this name."""
    if name.startswith("langgraph"):
        _, store, durability = name.split("_")
        return LangGraph(durability, store)
    return Dbos(queued=name == "dbos_queue")


async def measure(name: str, graphs: list[dict[str, Any]]) -> list[float]:
    """Return the milliseconds of each graph."""
    one = system(name)
    await one.open()
    try:
        await one.prepare(graphs[0])()
        found = []
        for graph in graphs:
            run = one.prepare(graph)
            began = time.perf_counter()
            text = await run()
            found.append((time.perf_counter() - began) * 1e3)
            if len(text.split()) != graph["calls"][-1][1]:
                raise RuntimeError(
                    f"{name}: the last call has {graph['calls'][-1][1]} tokens, the answer is {text!r}"
                )
        return found
    finally:
        await one.close()


async def main() -> None:
    """Be the worker, or measure and end: connections go with the process."""
    if sys.argv[1] == "worker":
        await work()
    found = await measure(sys.argv[1], json.load(sys.stdin))
    print(json.dumps([round(ms, 3) for ms in found]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main())
