"""Outcomes until the scheduler has committed them; on disk, unless that takes it no longer than a moment.

An outcome is reported from here at once. What is not answered within `WRITE_AFTER_S` is written and synced, and
what has been answered by then never costs a write. A crash leaves an outcome on disk, or committed, or, in its
first moment, nowhere: then the attempt is lost as if the crash had come before its end. At worst it is reported
twice, which the scheduler sees.

Files are segments `<number>.spool`: a magic line, then records

    kind (1 byte) · length (4, big endian) · CRC-32 of kind and body (4) · body

of kind `R` (a report, JSON) or `S` (a settled attempt, JSON). Settled records are not synced: they survive the
death of the process, and losing them to a power cut only repeats a report.
"""

import asyncio
import errno
import logging
import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from hive_common.contracts.messages import AttemptKey, AttemptReport
from hive_common.ops.files import sync_folder

from hive_executor.metrics import SPOOL_BYTES, SPOOL_QUARANTINED, SPOOL_REPORTS

log = logging.getLogger(__name__)

MAGIC: Final = b"hive-spool-1\n"
SEGMENT_BYTES_MAX: Final = 4 << 20
RECORD_BYTES_MAX: Final = 2 << 20
QUARANTINED_MAX: Final = 8
RETRY_S: Final = 1.0
_PROBE_BYTES: Final = 64 << 10
WRITE_AFTER_S: Final = 0.05
"""An outcome that is not answered by then is being written. Under load, reports gather and commits queue."""

_HEADER: Final = struct.Struct(">cII")
_REPORT: Final = b"R"
_SETTLED: Final = b"S"

_decode_report = msgspec.json.Decoder(AttemptReport).decode
_decode_key = msgspec.json.Decoder(AttemptKey).decode


class Spooled(NamedTuple):
    """An outcome that is not committed yet. `segment` is 0 until it is on disk."""

    key: AttemptKey
    session: str
    body: bytes
    segment: int


class Spool:
    """The outcomes of one executor that are not committed yet.

    Args:
        folder: made when missing; this process MUST be the only one that uses it.
        reports_max: `is_full` from here on. What runs already may still be added.
        bytes_max: the same in bytes.
    """

    def __init__(self, folder: Path, *, reports_max: int, bytes_max: int) -> None:
        self._folder = folder
        self._reports_max = reports_max
        self._bytes_max = bytes_max
        self._pending: dict[AttemptKey, Spooled] = {}
        self._pending_bytes = 0
        self._segments: dict[int, int] = {}  # pending records by segment
        self._unwritten: dict[AttemptKey, Spooled] = {}
        self._due: dict[AttemptKey, Spooled] = {}  # unwritten too, and the next to be written
        self._all_written = asyncio.Event()
        self._all_written.set()
        self._active = 0
        self._active_bytes = 0
        self._file: int | None = None
        self._settled: list[AttemptKey] = []
        self._wake = asyncio.Event()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self.problem: str | None = None
        """Why outcomes cannot be written at the moment; None while all is well."""

    def open(self) -> None:
        """Read what an earlier process left, and start a fresh segment with it. Blocks.

        A damaged file is set aside as `*.damaged`; what can be read of it is kept.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = sorted(self._folder.glob("*.spool"), key=_number)
        found: dict[AttemptKey, tuple[str, bytes]] = {}
        damaged = [path for path in old if not _replay(path, found)]
        self._start_segment(_number(old[-1]) + 1 if old else 1)
        for key, (session, body) in found.items():
            self._remember(Spooled(key, session, body, self._active))
        self._write(_record(_REPORT, spooled.body) for spooled in self._pending.values())
        self._sync()
        for path in old:
            if path in damaged:
                _set_aside(path)
            else:
                path.unlink()
        self._measure()

    async def close(self) -> None:
        """Write down what was settled and let go of the files; `run` has ended. What is pending stays on disk."""
        loop = asyncio.get_running_loop()
        try:
            if self._file is not None:
                additions = [*self._due.values(), *self._unwritten.values()]
                await loop.run_in_executor(self._disk, self._flush, additions, self._settled, self._none_on_disk)
        except OSError as error:
            log.error("%s: cannot be written: %s", self._folder, error.strerror or error)
        finally:
            await loop.run_in_executor(self._disk, self._close_file)
            self._disk.shutdown()

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._pending

    @property
    def keys(self) -> tuple[AttemptKey, ...]:
        """The attempts whose outcome is here, oldest first."""
        return tuple(self._pending)

    @property
    def room(self) -> int:
        """How many more outcomes fit; 0 when full."""
        if self.problem is not None or self._pending_bytes >= self._bytes_max:
            return 0
        return max(0, self._reports_max - len(self._pending))

    def holds_other_session(self, session: str) -> bool:
        """Say whether outcomes of an earlier session are left."""
        return any(spooled.session != session for spooled in self._pending.values())

    def add(self, report: AttemptReport) -> None:
        """Keep an outcome. A disk that fails is tried again until it works."""
        key = AttemptKey(report.task, report.attempt)
        spooled = self._pending[key] = self._unwritten[key] = Spooled(
            key, report.session, msgspec.json.encode(report), 0
        )
        self._pending_bytes += len(spooled.body)
        self._all_written.clear()
        self._measure()
        self._wake.set()

    async def written(self) -> None:
        """Return when every outcome is on disk or committed."""
        await self._all_written.wait()

    def settle(self, keys: Iterable[AttemptKey]) -> None:
        """Forget outcomes that the scheduler has answered."""
        for key in keys:
            spooled = self._pending.pop(key, None)
            if spooled is None:
                continue
            self._pending_bytes -= len(spooled.body)
            if self._unwritten.pop(key, None) is None and self._due.pop(key, None) is None:
                self._settled.append(key)
                if spooled.segment:
                    self._segments[spooled.segment] -= 1
        self._measure()
        self._wake.set()

    def batch(self, bytes_max: int, count_max: int) -> list[Spooled]:
        """Return the oldest outcomes, as many as fit; at least one when there is any."""
        chosen: list[Spooled] = []
        size = 0
        for spooled in self._pending.values():
            size += len(spooled.body) + 1
            if len(chosen) == count_max or (chosen and size > bytes_max):
                break
            chosen.append(spooled)
        return chosen

    async def run(self) -> None:
        """Write what is not answered soon, one sync for all that came meanwhile. Ends only by being cancelled."""
        while True:
            await self._wake.wait()
            # Twice in `WRITE_AFTER_S`: what is there the second time has waited for half of it at least.
            await asyncio.sleep(WRITE_AFTER_S / 2)
            self._wake.clear()
            due, self._due = self._due, {}
            settled, self._settled = self._settled, []
            # A disk that failed is tried until it works, also when what it had to write was answered meanwhile.
            if due or settled or self.problem is not None:
                await self._written(due, settled)
            self._due, self._unwritten = self._due | self._unwritten, {}
            if self._due:
                self._wake.set()
            else:
                self._all_written.set()

    async def _written(self, unwritten: dict[AttemptKey, Spooled], settled: list[AttemptKey]) -> None:
        additions = list(unwritten.values())
        # Decided here: `settle` may run on this thread while the disk works.
        flushing = asyncio.get_running_loop().run_in_executor(
            self._disk, self._flush, additions, settled, self._none_on_disk, self.problem is not None
        )
        try:
            await asyncio.shield(flushing)
        except asyncio.CancelledError:
            # The disk goes on; what it wrote must be known to whoever closes this.
            await asyncio.wait({flushing})
            if flushing.exception() is None:
                self._take(additions, flushing.result())
            else:
                self._put_back(unwritten, settled)
            raise
        except OSError as error:
            self.problem = f"{self._folder}: cannot be written: {error.strerror or error}"
            log.error("%s; trying again", self.problem)
            self._put_back(unwritten, settled)
            await asyncio.sleep(RETRY_S)
            self._wake.set()
        else:
            self.problem = None
            self._take(additions, flushing.result())

    @property
    def _none_on_disk(self) -> bool:
        return not any(self._segments.values())

    def _put_back(self, unwritten: dict[AttemptKey, Spooled], settled: list[AttemptKey]) -> None:
        """Have outcomes written again that may or may not be on disk, but for those that were settled meanwhile."""
        again = {key: spooled for key, spooled in unwritten.items() if key in self._pending}
        self._due = again
        self._settled = settled + self._settled

    def _take(self, additions: list[Spooled], segment: int) -> None:
        """Count outcomes that are on disk now; those that were settled meanwhile are settled there next."""
        for spooled in additions:
            if spooled.key in self._pending:
                self._pending[spooled.key] = spooled._replace(segment=segment)
                self._segments[segment] = self._segments.get(segment, 0) + 1

    def _flush(
        self, additions: list[Spooled], settled: list[AttemptKey], is_empty: bool, has_failed: bool = False
    ) -> int:
        """Runs on the disk thread, while `run` waits for it."""
        if self._active_bytes > SEGMENT_BYTES_MAX or self._file is None:
            self._start_segment(self._active + 1)
        if is_empty:
            self._empty()
        elif settled:
            self._write(_record(_SETTLED, msgspec.json.encode(key)) for key in settled)
        if additions:
            self._write(_record(_REPORT, spooled.body) for spooled in additions)
            self._sync()
        elif has_failed:
            self._try_disk()
        return self._active

    def _try_disk(self) -> None:
        probe = self._folder / "probe"
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(handle, bytes(_PROBE_BYTES)) < _PROBE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)
            probe.unlink()

    def _empty(self) -> None:
        """Drop everything on disk: nothing is pending."""
        for number in [number for number in self._segments if number != self._active]:
            self._drop(number)
        if self._active_bytes > len(MAGIC):
            assert self._file is not None
            os.ftruncate(self._file, len(MAGIC))
            self._active_bytes = len(MAGIC)

    def _start_segment(self, number: int) -> None:
        self._close_file()
        # A leftover of this number can only be a segment that failed before it got its first record.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path(number), flags, 0o600)
        self._active, self._active_bytes = number, 0
        self._segments.setdefault(number, 0)
        self._write([MAGIC])
        sync_folder(self._folder)
        for old in [old for old, count in self._segments.items() if count == 0 and old != number]:
            self._drop(old)

    def _drop(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)
        del self._segments[number]

    def _write(self, records: Iterable[bytes]) -> None:
        assert self._file is not None
        data = b"".join(records)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            # Half a record would hide what follows it.
            os.ftruncate(self._file, self._active_bytes)
            raise
        self._active_bytes += len(data)

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file)

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.spool"

    def _remember(self, spooled: Spooled) -> None:
        self._pending[spooled.key] = spooled
        self._pending_bytes += len(spooled.body)
        self._segments[spooled.segment] = self._segments.get(spooled.segment, 0) + 1

    def _measure(self) -> None:
        SPOOL_REPORTS.set(len(self._pending))
        SPOOL_BYTES.set(self._pending_bytes)


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def _record(kind: bytes, body: bytes) -> bytes:
    return _HEADER.pack(kind, len(body), zlib.crc32(kind + body)) + body


def _replay(path: Path, found: dict[AttemptKey, tuple[str, bytes]]) -> bool:
    """Apply a segment to `found`; return whether all of it could be read."""
    data = path.read_bytes()
    if MAGIC.startswith(data):  # it was just being made
        return True
    if not data.startswith(MAGIC):
        log.error("%s: does not start as a spool file", path)
        return False
    offset = len(MAGIC)
    while offset < len(data):
        if offset + _HEADER.size > len(data):
            log.error("%s: ends inside the header of the record at byte %d", path, offset)
            return False
        kind, length, checksum = _HEADER.unpack_from(data, offset)
        body = data[offset + _HEADER.size : offset + _HEADER.size + length]
        if len(body) < length or zlib.crc32(kind + body) != checksum:
            log.error("%s: the record at byte %d is incomplete or damaged", path, offset)
            return False
        offset += _HEADER.size + length
        try:
            if kind == _SETTLED:
                found.pop(_decode_key(body), None)
            else:
                report = _decode_report(body)
                found[AttemptKey(report.task, report.attempt)] = (report.session, body)
        except msgspec.DecodeError as error:
            log.error("%s: the record before byte %d does not fit: %s", path, offset, error)
            return False
    return True


def _set_aside(path: Path) -> None:
    target = path.with_suffix(".damaged")
    path.replace(target)
    SPOOL_QUARANTINED.inc()
    log.error("%s: damaged; kept for inspection as %s, its readable outcomes go on", path, target.name)
    for old in sorted(path.parent.glob("*.damaged"))[:-QUARANTINED_MAX]:
        old.unlink()
