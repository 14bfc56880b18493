"""TCP ports for servers that are about to start.

A port that is free now may be taken when a server gets to it, seconds later, and two installations that start at
the same time do get in each other's way. So whoever is given a port has it for a minute: nobody else under the same
account is given it meanwhile. None is of those that systems give to outgoing connections (from 32768 on Linux, from
49152 elsewhere, RFC 6335): any client could have it when a server is started again.
"""

import errno
import fcntl
import json
import logging
import os
import random
import socket
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hive_common.kernel.errors import Unavailable

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
GIVEN_S: Final = 60.0
_LOWEST: Final = 10_240
_RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES: Final = 500


def is_free(port: int, host: str = HOST) -> bool:
    """Say whether `port` of an IP address is not taken now: of one that is not ours it never is."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: what is left of closed connections does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return True


def free_port(hosts: Collection[str] = (HOST,), *, but: Collection[int] = ()) -> int:
    """Return a port that is free at all of `hosts`, and that nobody else is given for a minute.

    Args:
        hosts: IP addresses.
        but: ports that are given away already, to servers that may not run now.

    Raises:
        Unavailable: no port was found.
    """
    with _given() as given:
        # Not for secrets, but of a source of its own: who seeds a test would give all of them the same ports.
        for port in random.SystemRandom().sample(range(_LOWEST, _outgoing()), _TRIES):
            if str(port) not in given and port not in but and all(is_free(port, host) for host in hosts):
                given[str(port)] = time.time() + GIVEN_S
                return port
    raise Unavailable(f"none of {_TRIES} ports between {_LOWEST} and {_outgoing()} is free")


@contextmanager
def _given() -> Iterator[dict[str, float]]:
    """Yield who was given what, until when, while nobody else looks; keep what is changed in it."""
    path = Path(tempfile.gettempdir()) / f"hivefabric-ports-{os.getuid()}.json"
    try:
        # Not followed: a link of somebody else's could lead to a file of ours.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+")
    except OSError as error:
        log.debug("%s: %s; ports are given without looking at others", path, error)
        yield {}
        return
    with file:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            log.debug("%s is somebody else's; ports are given without looking at others", path)
            yield {}
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        now_s = time.time()
        given = {port: until for port, until in _read(file.read()).items() if now_s < until <= now_s + GIVEN_S}
        yield given
        file.seek(0)
        file.truncate()
        json.dump(given, file)


def _read(text: str) -> dict[str, float]:
    try:
        found = json.loads(text or "{}")
        return {str(port): float(until) for port, until in found.items()}
    except (ValueError, TypeError, AttributeError):
        # Of a process that was killed while it wrote: what is lost is a minute's help.
        return {}


def _outgoing() -> int:
    """Return the first port that outgoing connections are given."""
    try:
        return max(int(_RANGE_FILE.read_text().split()[0]), _LOWEST + 2 * _TRIES)
    except (OSError, ValueError, IndexError):
        return 49_152
