"""The embedded PostgreSQL server: its cluster, and what a killed one leaves behind."""

import asyncio
import logging
import shutil
import time
from pathlib import Path

import psutil
from hive_common.ops.config import read_secret
from hive_common.ops.embedded import initdb, postgres_command, postgres_in

from hive_cli.home import Home, Settings
from hive_cli.supervisor.leash import leashed
from hive_cli.supervisor.provision import POSTGRES_ADMIN

log = logging.getLogger(__name__)

LEFTOVER_S = 10.0


def ensure_cluster(home: Home) -> bool:
    """Make the cluster where there is none, and say whether that was so. Blocks for about a second.

    It is made next to its place and moved there when it is whole: a half-made one is never started.
    """
    if (home.postgres_dir / "PG_VERSION").exists():
        return False
    draft = home.postgres_dir.with_name("postgres.new")
    for folder in (draft, home.postgres_dir):
        if folder.exists():
            shutil.rmtree(folder)
    initdb(draft, password=read_secret(home.secret_file(POSTGRES_ADMIN)))
    draft.rename(home.postgres_dir)
    return True


def command(home: Home, settings: Settings) -> list[str]:
    """Return the argv of the server, which ends when the supervisor does."""
    plain = postgres_command(home.postgres_dir, port=settings.ports["postgres"])
    tied = postgres_command(home.postgres_dir, port=settings.ports["postgres"], die_with_parent=True)
    return tied if tied != plain else leashed("SIGINT", plain)


async def clear_leftovers(data_dir: Path) -> None:
    """Wait until no process of an earlier server uses `data_dir`, and remove a misleading postmaster.pid.

    One that does not go is killed: recovery makes good for it.
    """
    until = time.monotonic() + LEFTOVER_S
    while left := await asyncio.to_thread(postgres_in, data_dir):
        if time.monotonic() > until:
            for process in left:
                log.warning("killed a process of an earlier PostgreSQL server (pid %d)", process.pid)
                process.kill()
            break
        await asyncio.sleep(0.05)
    await asyncio.to_thread(_remove_stale_pid_file, data_dir)


def _remove_stale_pid_file(data_dir: Path) -> None:
    # The pid in it may belong to something else by now, after a reboot above all, and the server would then take
    # that for a running one. No server uses the folder at this point, so that the file says nothing any more.
    pid_file = data_dir / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return
    if psutil.pid_exists(pid):
        pid_file.unlink(missing_ok=True)
