"""Log files of processes: bounded, and their ends readable."""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

LOG_BYTES_MAX = 32 * 1024 * 1024
LINE_CHARACTERS_MAX = 600


def bound_log(path: Path) -> None:
    """Keep a log below `LOG_BYTES_MAX`: what is above goes to `<name>.1`, in place of what was there.

    Writers append (O_APPEND), so that a running one goes on at the new end. Lines written between copying and
    cutting are lost, which is why this is for logs only.
    """
    try:
        if path.stat().st_size <= LOG_BYTES_MAX:
            return
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s: cannot be cut: %s", path, error.strerror)


def log_tail(path: Path, lines: int = 8, bytes_max: int = 65_536) -> str:
    """Return the end of a log, for an error message."""
    try:
        data = path.read_bytes()[-bytes_max:]
    except OSError:
        return ""
    return "\n".join(data.decode(errors="replace").strip().splitlines()[-lines:])


def readable(lines: Iterable[str]) -> list[str]:
    """Return log lines for people: level and message of those that are JSON, others as they are."""
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
            text = f"{entry['level']}: {entry['message']}"
            if entry.get("exception"):
                text += " | " + str(entry["exception"]).strip().splitlines()[-1]
            found.append(text[:LINE_CHARACTERS_MAX])
        except (ValueError, KeyError, TypeError):
            found.append(line[:LINE_CHARACTERS_MAX])
    return found
