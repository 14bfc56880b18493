"""Files that are whole or not there, also after a power cut."""

import os
from pathlib import Path


def replace_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Give a file new content: whoever opens it, also after a power cut, finds all of the old or all of the new.

    Without the syncs a power cut may leave the new name with no content (rename(2) orders neither).

    Args:
        path: the folder is there.
        data: all of it.
        mode: of a new file, before the umask.

    Raises:
        OSError: the disk is full or refuses.
    """
    draft = path.with_name(path.name + ".tmp")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: a power cut may take a name though the bytes behind it are there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
