"""How each process of an installation is run."""

import os
import signal
import sys
from pathlib import Path

from hive_common.ops.embedded import nats_command

from hive_cli.home import Home, Settings
from hive_cli.supervisor import names, postgres
from hive_cli.supervisor.leash import leashed
from hive_cli.supervisor.probes import http_probe, postgres_probe
from hive_cli.supervisor.process import EXECUTOR_FINALS, READY_S, ProcessSpec

POSTGRES_SILENCE_S = 60.0
NATS_UNREADY_S = 15.0
LOST_STREAM = "could not be recovered"
"""What NATS says of a stream whose description on the disk is torn, after a power cut. It is a copy of the log: the
relay makes it anew, for which the server has to be there."""

AUDIT_READY_S = 20.0
AUDIT_BROKEN = "the log does not verify"
EXECUTOR_READY_S = 180.0
"""After an upgrade an executor builds the component that Python agents run on."""

EXECUTOR_SILENCE_S = 60.0
"""Longer than a service's: what an executor does is fenced by its lease, and a device may freeze for a while."""


def postgres_spec(home: Home, settings: Settings) -> ProcessSpec:
    """PostgreSQL. Its fast shutdown (SIGINT) does not wait for sessions."""
    return ProcessSpec(
        name=names.POSTGRES,
        command=postgres.command(home, settings),
        log_file=home.log_file(names.POSTGRES),
        probe=postgres_probe(lambda: _admin_dsn(home, settings)),
        stop_signal=signal.SIGINT,
        silence_s=POSTGRES_SILENCE_S,
        before_start=lambda: postgres.clear_leftovers(home.postgres_dir),
    )


def _admin_dsn(home: Home, settings: Settings) -> str:
    from hive_cli.supervisor.database import admin_dsn  # an `up` has other things to do before

    return admin_dsn(home, settings, "postgres")


def nats_spec(home: Home, settings: Settings) -> ProcessSpec:
    """NATS. It calls itself unhealthy while JetStream is stuck after a full disk, which only a restart ends."""
    plain = nats_command(home.nats_config_file)
    tied = nats_command(home.nats_config_file, die_with_parent=True)
    return ProcessSpec(
        name=names.NATS,
        command=tied if tied != plain else leashed("SIGTERM", plain),
        log_file=home.log_file(names.NATS),
        probe=http_probe(settings.ports["nats_monitor"], "/healthz", good_enough=LOST_STREAM),
        unready_s=NATS_UNREADY_S,
    )


def service_spec(home: Home, settings: Settings, service: str) -> ProcessSpec:
    """One service of the control plane."""
    return ProcessSpec(
        name=service,
        command=module_command(names.MODULES[service], home.config_file(service)),
        log_file=home.log_file(service),
        probe=http_probe(settings.ports[names.ops_port(service)]),
        # An auditor that has found something must not keep its owner from looking into it.
        essential=service != names.AUDIT,
        hopeless=AUDIT_BROKEN if service == names.AUDIT else "",
        ready_s=AUDIT_READY_S if service == names.AUDIT else READY_S,
    )


def executor_spec(home: Home, name: str, ports: dict[str, int]) -> ProcessSpec:
    """One executor of this machine, as a process with this name."""
    return ProcessSpec(
        name=name,
        command=module_command("hive_executor", home.config_file(name)),
        log_file=home.log_file(name),
        probe=http_probe(ports[names.ops_port(name)]),
        silence_s=EXECUTOR_SILENCE_S,
        ready_s=EXECUTOR_READY_S,
        finals=EXECUTOR_FINALS,
    )


def module_command(module: str, config_file: Path) -> list[str]:
    """Return the command of one of our own processes, which ends when this process does."""
    command = [sys.executable, "-P", "-m", module, "--config", str(config_file)]
    return [*command, "--supervised", str(os.getpid()), "--held"]
