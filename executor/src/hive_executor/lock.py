"""One process per state folder."""

import asyncio
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from hive_common.kernel.errors import FailedPrecondition

WAIT_S: Final = 10.0
"""A predecessor that was told to stop may still be giving its attempts back."""


class FolderLock:
    """Holds `lock` in a folder until it is released or the process ends, however it ends (flock(2))."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._handle: int | None = None

    async def acquire(self, wait_s: float = WAIT_S) -> None:
        """Take the lock.

        Raises:
            FailedPrecondition: another process holds it for longer than `wait_s`.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    holder = os.pread(handle, 32, 0).decode().strip()
                    os.close(handle)
                    raise FailedPrecondition(
                        f"{self._path}: another executor uses this folder (process {holder or 'unknown'})"
                    ) from None
                await asyncio.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Let go."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
