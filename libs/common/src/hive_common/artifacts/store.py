"""The artifact store: blobs by digest, and names for some of them.

One port. `FolderStore` keeps an OCI image layout (OCI image spec 1.1, image-layout) that several processes
of one machine may share; an S3-compatible store will be another. Every store passes the same conformance
suite (`libs/common/tests/artifacts/test_store_conformance.py`).
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, ParamSpec, Protocol, TypeVar

import msgspec

from hive_common.artifacts.package import Descriptor
from hive_common.contracts.limits import BLOB_BYTES_MAX, MIB
from hive_common.contracts.values import digest_of, is_digest
from hive_common.kernel.errors import Internal, InvalidArgument, NotFound, PayloadTooLarge, Unavailable
from hive_common.ops.files import sync_folder

P = ParamSpec("P")
T = TypeVar("T")

REF_NAME: Final = "org.opencontainers.image.ref.name"
INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
CHUNK_BYTES: Final = MIB
PARTIAL_AGE_MAX_S: Final = 24 * 3600
"""A partial file older than this was left by a process that died: no upload takes a day."""


class ArtifactStore(Protocol):
    """Where blobs are. A blob is there whole or not at all, and its bytes always hash to its digest.

    Every method raises `InvalidArgument` for what is not a digest, `NotFound` for a blob that is not there,
    and `Unavailable` where the store cannot do its work now (disk full, not reachable).
    """

    async def get(self, digest: str) -> bytes:
        """Return a blob, checked against its digest."""
        ...

    async def has(self, digest: str) -> bool:
        """Say whether the blob is there."""
        ...

    async def size(self, digest: str) -> int:
        """Return the size of a blob in bytes."""
        ...

    async def put(self, data: bytes) -> str:
        """Store bytes durably and return their digest. The same bytes again are no error."""
        ...

    async def open_stream(self, digest: str) -> AsyncIterator[bytes]:
        """Return the blob in chunks. Raises `NotFound` here, before the first chunk."""
        ...

    async def put_stream(self, digest: str, chunks: AsyncIterable[bytes], size_max: int = BLOB_BYTES_MAX) -> int:
        """Store what `chunks` bring, durably, and return its size in bytes.

        Raises:
            PayloadTooLarge: more than `size_max`; nothing is kept.
            InvalidArgument: the bytes do not hash to `digest`; nothing is kept.
        """
        ...

    async def delete(self, digest: str) -> None:
        """Remove a blob. One that is not there is no error."""
        ...

    async def tag(self, reference: str, descriptor: Descriptor) -> None:
        """Give a manifest in the store a name, such as `square:1.0.0`. The name then points there only."""
        ...

    async def tags(self) -> dict[str, Descriptor]:
        """Return all names."""
        ...


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = msgspec.field(name="schemaVersion", default=2)
    media_type: str = msgspec.field(name="mediaType", default=INDEX_TYPE)
    manifests: tuple[Descriptor, ...] = ()


class FolderStore:
    """An OCI image layout in a folder. Files are 0600; writes are atomic and survive a power cut.

    Args:
        root: made where it is not there yet. Several processes may use it at once.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self._blobs = self._root / "blobs" / "sha256"
        self._partial = self._root / ".partial"
        with self._disk():
            for folder in (self._root, self._blobs.parent, self._blobs, self._partial):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write_once(self._root / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            self._write_once(self._root / "index.json", msgspec.json.encode(_Index()))
            self._sweep()

    async def get(self, digest: str) -> bytes:
        """Return a blob, checked against its digest (ArtifactStore)."""
        return await asyncio.to_thread(self._get, digest)

    async def has(self, digest: str) -> bool:
        """Say whether the blob is there (ArtifactStore)."""
        return await asyncio.to_thread(self._path(digest).is_file)

    async def size(self, digest: str) -> int:
        """Return the size of a blob in bytes (ArtifactStore)."""
        return await asyncio.to_thread(self._size, digest)

    async def put(self, data: bytes) -> str:
        """Store bytes and return their digest (ArtifactStore)."""
        if len(data) > BLOB_BYTES_MAX:
            raise _too_large(BLOB_BYTES_MAX)
        digest = digest_of(data)
        await asyncio.to_thread(self._put, digest, data)
        return digest

    async def open_stream(self, digest: str) -> AsyncIterator[bytes]:
        """Return the blob in chunks (ArtifactStore)."""
        file = await asyncio.to_thread(self._open, digest)
        return self._chunks(file)

    async def put_stream(self, digest: str, chunks: AsyncIterable[bytes], size_max: int = BLOB_BYTES_MAX) -> int:
        """Store what `chunks` bring and return its size (ArtifactStore)."""
        target = self._path(digest)
        upload = self._begin()
        try:
            async for piece in _gathered(chunks):
                if upload.size_bytes + len(piece) > size_max:
                    raise _too_large(size_max)
                await _in_thread(self._write, upload, piece)
            got = "sha256:" + upload.hash.hexdigest()
            if got != digest:
                raise InvalidArgument(
                    f"{digest}: the bytes have the digest {got}; nothing was kept", digest=digest, got=got
                )
            await _in_thread(self._finish, upload, target)
        finally:
            upload.discard()
        return upload.size_bytes

    async def delete(self, digest: str) -> None:
        """Remove a blob (ArtifactStore)."""
        path = self._path(digest)
        await asyncio.to_thread(path.unlink, missing_ok=True)

    async def tag(self, reference: str, descriptor: Descriptor) -> None:
        """Name a manifest in `index.json` (ArtifactStore)."""
        await self.size(descriptor.digest)
        await asyncio.to_thread(self._tag, reference, descriptor)

    async def tags(self) -> dict[str, Descriptor]:
        """Return all names of `index.json` (ArtifactStore)."""
        index = await asyncio.to_thread(self._index)
        return {entry.annotations[REF_NAME]: entry for entry in index.manifests if REF_NAME in entry.annotations}

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise InvalidArgument(f"{digest!r} is not a digest; expected sha256:<64 hex digits>")
        return self._blobs / digest.removeprefix("sha256:")

    def _open(self, digest: str) -> BinaryIO:
        with self._disk():
            try:
                return self._path(digest).open("rb")
            except FileNotFoundError as error:
                raise NotFound(f"there is no blob {digest}", digest=digest) from error

    def _get(self, digest: str) -> bytes:
        with self._open(digest) as file, self._disk():
            data = file.read()
        if digest_of(data) != digest:
            raise Internal(f"the blob {digest} is damaged on disk; restore it from a backup", digest=digest)
        return data

    def _size(self, digest: str) -> int:
        with self._disk():
            try:
                return self._path(digest).stat().st_size
            except FileNotFoundError as error:
                raise NotFound(f"there is no blob {digest}", digest=digest) from error

    async def _chunks(self, file: BinaryIO) -> AsyncIterator[bytes]:
        with file:
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield data

    def _put(self, digest: str, data: bytes) -> None:
        target = self._path(digest)
        if target.is_file():
            return
        upload = self._begin()
        try:
            self._write(upload, data)
            self._finish(upload, target)
        finally:
            upload.discard()

    def _begin(self) -> "_Upload":
        with self._disk():
            return _Upload(self._partial / secrets.token_hex(16))

    def _write(self, upload: "_Upload", data: bytes) -> None:
        with self._disk():
            upload.write(data)

    def _finish(self, upload: "_Upload", target: Path) -> None:
        with self._disk():
            upload.move_to(target)

    def _index(self) -> _Index:
        with self._disk():
            data = (self._root / "index.json").read_bytes()
        try:
            return msgspec.json.decode(data, type=_Index)
        except msgspec.DecodeError as error:
            raise Internal(f"{self._root / 'index.json'}: {error}; expected an OCI image index") from error

    def _tag(self, reference: str, descriptor: Descriptor) -> None:
        named = msgspec.structs.replace(descriptor, annotations={**descriptor.annotations, REF_NAME: reference})
        with self._disk(), self._locked():
            others = (e for e in self._index().manifests if e.annotations.get(REF_NAME) != reference)
            index = _Index(manifests=(*others, named))
            self._replace(self._root / "index.json", msgspec.json.encode(index))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from rewriting the index meanwhile. The lock dies with its holder."""
        descriptor = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write_once(self, path: Path, data: bytes) -> None:
        with self._locked():
            if not path.exists():
                self._replace(path, data)

    def _replace(self, path: Path, data: bytes) -> None:
        upload = _Upload(self._partial / secrets.token_hex(16))
        try:
            upload.write(data)
            upload.move_to(path)
        finally:
            upload.discard()

    def _sweep(self) -> None:
        oldest = time.time() - PARTIAL_AGE_MAX_S
        for path in self._partial.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Unavailable(f"{self._root}: the disk is full; free some space and try again") from error
            raise Unavailable(f"{self._root}: {error.strerror or error}") from error


class _Upload:
    """A file that is not a blob yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self.hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.hash.update(data)
        self.size_bytes += len(data)

    def move_to(self, target: Path) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(target)
        sync_folder(target.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in a thread; when cancelled, wait for the thread first, so that nobody closes a file it writes to."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


async def _gathered(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Join small chunks, so that each trip to a thread carries about `CHUNK_BYTES`."""
    pending = bytearray()
    async for chunk in chunks:
        pending += chunk
        if len(pending) >= CHUNK_BYTES:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)


def _too_large(size_max: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the blob has more than {size_max} bytes; expected at most that", limit=size_max)
