import asyncio
import gc

from hive_common.eventlog.log import LogReader
from hive_common.ops.connection import Connection


async def test_a_connection_that_is_given_up_is_closed_at_once() -> None:
    """A server that never answers sees its end, though nothing was collected and the task is still there."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        asked.set()
        while await reader.read(1_000):
            pass
        ended.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    dsn = f"host=127.0.0.1 port={port} user=hive dbname=hive sslmode=disable"
    gc.disable()
    try:
        for open_one in (lambda: Connection.connect(dsn), lambda: LogReader(dsn).head()):
            asked.clear()
            ended.clear()
            opening = asyncio.ensure_future(open_one())
            await asked.wait()
            opening.cancel()
            await asyncio.wait([opening])
            await ended.wait()
            assert opening.cancelled()
    finally:
        gc.enable()
        server.close()
        await server.wait_closed()
