"""Sets an installation up whose processes are containers: `python -m hive_cli.supervisor.containers`.

`files` makes the home and hands each process a folder with its own configuration and the secrets it needs,
and no others: an executor never sees the administrator's password. `database` then prepares the log. Both are
idempotent; secrets, ids and the log are made once.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
from hive_common.kernel.errors import HiveError

from hive_cli.home import ExecutorEntry, Home, Settings, find_home, providers_of
from hive_cli.supervisor import names
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.database import prepare_database
from hive_cli.supervisor.identities import OPERATOR, SIGNING, credentials_name, service_identities
from hive_cli.supervisor.network import CONTAINERS
from hive_cli.supervisor.provision import (
    POSTGRES_ADMIN,
    SERVICE_KEY,
    TOKEN_KEY,
    postgres_secret,
    provision,
    write_private,
)

PROMETHEUS = "prometheus"
CACHE = "cache"
_PUBLIC_MODE = 0o644


def hand_out(home: Home, handout: Path, executors: int) -> Settings:
    """Make the home, and write `handout/<process>/` for each process, as a home that holds its part only.

    Args:
        home: at the path at which each process will find its part.
        handout: may hold folders already, such as mounted volumes.
        executors: how many.

    Raises:
        FailedPrecondition: the disk is full, or another process sets this home up at this moment.
        OSError: something cannot be written.
    """
    with home.locked():
        settings = provision(home, executors, network=CONTAINERS)
        write_configs(home, settings, settings.executors, home.root / CACHE, CONTAINERS)
        for process, files, mounts in _parts(home, settings):
            _write_part(home, handout / process, files, mounts)
    return settings


def _parts(home: Home, settings: Settings) -> Iterator[tuple[str, list[Path], list[Path]]]:
    """Name for each process its files, and the folders that volumes are mounted on."""
    secret = home.secret_file
    yield names.POSTGRES, [secret(POSTGRES_ADMIN)], []
    yield names.NATS, [home.nats_config_file], [home.nats_dir]
    yield PROMETHEUS, [home.prometheus_file], []
    for service in names.SERVICES:
        files = [secret(postgres_secret(service)), secret(SERVICE_KEY)]
        files += [secret(credentials_name(identity)) for identity in service_identities(service)]
        if service == names.REGISTRY:
            files += [secret(OPERATOR), secret(SIGNING)]
        if service == names.SCHEDULER:
            files.append(secret(TOKEN_KEY))
        if service == names.GATEWAY:
            files.append(home.api_key_file)
        if service == names.ROUTER:
            # One that lies elsewhere has to be mounted there.
            keys = (Path(one.key_file) for one in providers_of(settings, home))
            files += [key for key in keys if key.is_relative_to(home.root)]
        yield service, [home.config_file(service), *files], [home.artifacts_dir]
    for entry in settings.executors:
        yield entry.name, _executor_files(home, entry), [home.executor_dir(entry.name), home.root / CACHE]


def _executor_files(home: Home, entry: ExecutorEntry) -> list[Path]:
    return [home.config_file(entry.name), home.secret_file(credentials_name(entry.name))]


def _write_part(home: Home, part: Path, files: list[Path], mounts: list[Path]) -> None:
    part.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = part / file.relative_to(home.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_private(target, file.read_text())
        if file == home.prometheus_file:
            target.chmod(_PUBLIC_MODE)  # it holds no secret, and Prometheus runs as a user of its own
    for folder in mounts:
        (part / folder.relative_to(home.root)).mkdir(parents=True, exist_ok=True)


def main() -> int:
    """Run one step, and return the exit code."""
    parser = argparse.ArgumentParser(prog="hive_cli.supervisor.containers", description=main.__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    files = steps.add_parser("files", help="make the home, and hand out its parts")
    files.add_argument("--handout", type=Path, required=True, metavar="DIR")
    files.add_argument("--executors", type=int, default=1, metavar="N")
    steps.add_parser("database", help="log schema, roles, genesis event")
    arguments = parser.parse_args()
    home = find_home(None)
    os.umask(0o022)
    try:
        if arguments.step == "files":
            hand_out(home, arguments.handout, arguments.executors)
            print(f"configuration and secrets handed out below {arguments.handout}")
        else:
            print(f"event log {asyncio.run(prepare_database(home, home.settings(), CONTAINERS))}")
    except HiveError as error:
        return _fail(error.message)
    except psycopg.Error as error:
        return _fail(f"{names.POSTGRES}: {str(error).strip()}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
