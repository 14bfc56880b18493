"""Request and reply with nats-py alone, between two processes: what a pull and a report cannot beat."""

import asyncio
import os
import sys
import time
from pathlib import Path

import nats
import uvloop
from hive_common.testing.nats import EmbeddedNats
from nats.aio.msg import Msg

from benchmarks.rounds import percentiles

IN_FLIGHT = 50
SUBJECT = "bench.echo"


async def _respond(url: str) -> None:
    client = await nats.connect(url)

    async def echo(message: Msg) -> None:
        await message.respond(message.data)

    await client.subscribe(SUBJECT, cb=echo)
    await client.flush()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def measure(folder: Path, *, requests: int = 5_000, trips: int = 500) -> dict[str, float]:
    """Return requests per second with 50 in flight, and p50 and p99 of one at a time."""
    server = EmbeddedNats(folder)
    server.start()
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.raw_nats",
        env={**os.environ, "HIVE_BENCH_NATS": server.url},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    client = await nats.connect(server.url)
    try:
        await worker.stdout.readline()
        left = iter(range(requests))

        async def caller() -> None:
            for _ in left:
                await client.request(SUBJECT, b"{}", timeout=10)

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        rate = requests / (time.perf_counter() - started)
        times = []
        for _ in range(trips):
            began = time.perf_counter()
            await client.request(SUBJECT, b"{}", timeout=10)
            times.append((time.perf_counter() - began) * 1000)
    finally:
        await client.close()
        worker.stdin.close()
        await worker.wait()
        server.stop()
    return {"requests_per_s": rate, **percentiles(times)}


if __name__ == "__main__":
    uvloop.run(_respond(os.environ["HIVE_BENCH_NATS"]))
