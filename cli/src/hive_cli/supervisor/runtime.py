"""Prepares the shared CPython component that Python agents run on, before executors need it."""

import asyncio
import os
import sys
from pathlib import Path

from hive_common.kernel.errors import FailedPrecondition

from hive_cli.supervisor.progress import Report, Reporter

MODULE = "hive_executor.sandbox.warm"


def default_cache_dir() -> Path:
    """Return where compiled modules and fetched blobs live: `$XDG_CACHE_HOME/hivefabric`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hivefabric"


def prepared(cache_dir: Path) -> list[Path]:
    """Return the components that are in the cache, of whichever version."""
    return sorted(cache_dir.glob("code/python-*.cwasm"))


async def prepare(cache_dir: Path, report: Reporter) -> None:
    """Build and compile the component unless there is one. Takes 10 s or more the first time.

    It runs in a process of its own, so that the supervisor does not carry the engine in its memory. That process
    would also tell a component of an older version from ours, but every start would wait for it: executors look
    again, and build what they need.

    Raises:
        FailedPrecondition: it could not be prepared; the message carries what was said.
    """
    if prepared(cache_dir):
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", MODULE, "--cache", str(cache_dir)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        async for raw in process.stderr:
            line = raw.decode(errors="replace").strip()
            said = [*said[-20:], line]
            if line.endswith("…"):
                report(Report("begin", f"Python runtime: {line.rstrip(' …')}"))
        code = await process.wait()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if code != 0:
        raise FailedPrecondition(f"the Python runtime for agents could not be prepared: {' / '.join(said[-5:])}")
