"""Where certificates stand, for whoever has none to make."""

from dataclasses import dataclass
from pathlib import Path

from hive_cli.home import Home


@dataclass(frozen=True)
class Files:
    """Where a certificate and its key stand. `key` has mode 0600."""

    certificate: Path
    key: Path


def files(home: Home, name: str) -> Files:
    """Return the files of `ca` or of one of `SERVERS`."""
    return Files(home.tls_dir / f"{name}.pem", home.secret_file(f"{name}-tls-key"))
