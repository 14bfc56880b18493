"""Compiled modules on disk. Loading one is running it, so only what this installation compiled is ever loaded."""

import asyncio
import fcntl
import hashlib
import hmac
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.files import replace_file, sync_folder

from hive_executor.sandbox.engine import fingerprint

_KEY_BYTES: Final = 32
_LOCK_POLL_S: Final = 0.05
_ABANDONED_S: Final = 3_600

# Room for a dozen versions of the CPython component (60 MB) and thousands of usual modules.
CACHE_BYTES_MAX: Final = 1 << 30


class Compiled(msgspec.Struct, frozen=True):
    """A compiled module that may be loaded.

    Args:
        path: the file with machine code.
        image_bytes: the linear memory that a fresh instance has; 0 where it does not matter.
    """

    path: Path
    image_bytes: int


class _Seal(msgspec.Struct, frozen=True):
    mac: str
    image_bytes: int


class CompiledCache:
    """A private folder with machine code, each file sealed with an HMAC under a key of this installation.

    Args:
        root: created with mode 0700 when it is missing.

    Raises:
        FailedPrecondition: the folder belongs to somebody else or others may write to it.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
        if found.st_uid != os.geteuid():
            raise FailedPrecondition(f"{root} belongs to user {found.st_uid}; expected the user of this process")
        if stat.S_IMODE(found.st_mode) & 0o077:
            root.chmod(0o700)
        self.root = root.absolute()
        # Runners see this folder and nothing else of the cache: no key, no seals, no modules to compile.
        self.code = self.root / "code"
        self.code.mkdir(mode=0o700, exist_ok=True)
        self._key = self._load_key()

    def key_of(self, module_sha256: str, kind: str) -> str:
        """Return the name under which a module is kept: its content, its kind, engine and settings."""
        return f"{kind}-{module_sha256[:40]}-{fingerprint()}"

    def find(self, key: str) -> Compiled | None:
        """Return a compiled module, or None when it is missing or its seal is broken."""
        path = self._path(key)
        try:
            seal = msgspec.json.decode(self._seal_path(key).read_bytes(), type=_Seal)
            genuine = hmac.compare_digest(seal.mac, self._mac(path, seal.image_bytes))
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        if not genuine:
            return None
        os.utime(path)  # what is used is pruned last
        return Compiled(path, seal.image_bytes)

    def scratch(self) -> Path:
        """Return a fresh path in the cache for a compiler to write to; the caller moves or removes it."""
        handle, name = tempfile.mkstemp(dir=self.root, prefix="new-")
        os.close(handle)
        return Path(name)

    def admit(self, key: str, fresh: Path, image_bytes: int) -> Compiled:
        """Seal what a compiler of this process wrote to `fresh`, and keep it under `key`."""
        path = self._path(key)
        seal = _Seal(self._mac(fresh, image_bytes), image_bytes)
        fresh.replace(path)
        draft = self.scratch()
        draft.write_bytes(msgspec.json.encode(seal))
        draft.replace(self._seal_path(key))
        self._prune(keep=path)
        return Compiled(path, image_bytes)

    def discard(self, key: str) -> None:
        """Forget a compiled module."""
        self._seal_path(key).unlink(missing_ok=True)
        self._path(key).unlink(missing_ok=True)

    @asynccontextmanager
    async def locked(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of one module against other processes of this machine, waiting as long as it takes."""
        with (self.root / f"{key}.lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_POLL_S)
            yield

    def _prune(self, keep: Path) -> None:
        """Remove the modules unused for longest while all together are too large, and what crashes left behind."""
        found = {path: facts for path in self.code.glob("*.cwasm") if (facts := _stat(path))}
        total = sum(facts.st_size for facts in found.values())
        for path, facts in sorted(found.items(), key=lambda item: item[1].st_mtime):
            if total <= CACHE_BYTES_MAX:
                break
            if path != keep:
                self.discard(path.stem)
                total -= facts.st_size
        abandoned = time.time() - _ABANDONED_S
        for path in [*self.root.glob("new-*"), *self.root.glob("build-*")]:
            left = _stat(path)
            if left is not None and left.st_mtime < abandoned:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.code / f"{key}.cwasm"

    def _seal_path(self, key: str) -> Path:
        return self.root / f"{key}.seal"

    def _mac(self, path: Path, image_bytes: int) -> str:
        keyed = hmac.new(self._key, str(image_bytes).encode() + b"\n", hashlib.sha256)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                keyed.update(chunk)
        return keyed.hexdigest()

    def _load_key(self) -> bytes:
        path = self.root / "key"
        if not path.exists():
            draft = self.scratch()  # mkstemp gives mode 0600
            replace_file(draft, secrets.token_bytes(_KEY_BYTES), mode=0o600)
            try:
                os.link(draft, path)
                sync_folder(self.root)
            except FileExistsError:
                pass  # another process was first; its key counts
            finally:
                draft.unlink()
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise FailedPrecondition(f"{path} holds {len(key)} bytes; expected {_KEY_BYTES}; remove the folder")
        return key


def _stat(path: Path) -> os.stat_result | None:
    """Return what is known of a file; None when another process has removed it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
