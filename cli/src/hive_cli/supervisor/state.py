"""`run/state.json`: the processes of a home as its supervisor sees them, for `hive status`."""

import logging

import msgspec
import psutil
from hive_common.ops.config import write_config

from hive_cli.home import Home

log = logging.getLogger(__name__)


class ProcessState(msgspec.Struct, frozen=True):
    """One process.

    `state` is `starting`, `ready`, `unready` (it answers, and says that something is missing), `silent`,
    `restarting`, `stopped` or `superseded`. `created` is the start time of `pid` as psutil gives it.
    """

    name: str
    state: str
    pid: int | None
    restarts: int
    created: float = 0.0
    problem: str = ""


class InstallationState(msgspec.Struct, frozen=True):
    """Everything a supervisor watches. `state` is `starting`, `ready`, `degraded`, `stopping` or `stopped`."""

    state: str
    supervisor_pid: int
    services: tuple[ProcessState, ...]


def read_state(home: Home) -> InstallationState | None:
    """Return what the last supervisor wrote, or None where there is nothing that can be read."""
    try:
        return msgspec.json.decode(home.state_file.read_bytes(), type=InstallationState)
    except (OSError, msgspec.DecodeError):
        return None


def write_state(home: Home, state: InstallationState) -> bool:
    """Write the state, and say whether it was written.

    A full disk is logged and not fatal: the processes matter more than their list.
    """
    try:
        write_config(home.state_file, state)
    except OSError as error:
        log.warning("%s: cannot be written: %s", home.state_file, error.strerror)
        return False
    return True


def created_at(pid: int) -> float:
    """Return when a process was started, 0.0 where there is none. With the pid it names a process for ever."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
