"""The way from a command to the gateway, loaded when it is taken: `hive --help` needs no HTTP client."""

from pathlib import Path
from typing import TYPE_CHECKING

from hive_cli.home import Home, find_home

if TYPE_CHECKING:
    from hive_cli.api import Api


def connect(home: Path | None) -> "Api":
    """Return a client for the home that `--home`, HIVE_HOME or the default names.

    Raises:
        Unavailable: nothing was ever started there.
    """
    return connect_to(find_home(home))


def connect_to(home: Home, patience_s: float | None = None) -> "Api":
    """Return a client for `home` that waits `patience_s` for a gateway that is away, or its usual time."""
    from hive_cli.api import Api

    return Api(home) if patience_s is None else Api(home, patience_s)
