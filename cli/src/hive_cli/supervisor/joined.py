"""`hive up` in a home that has joined an installation elsewhere: its executor, and nothing else."""

import asyncio
import dataclasses
import time
from collections.abc import Iterable

import msgspec
import psutil
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import NatsConfig, write_config
from hive_executor.config import ExecutorConfig
from hive_executor.small_model import NAME, require_small_model

from hive_cli.home import Home, JoinedSettings
from hive_cli.placing import with_labels
from hive_cli.supervisor import names, ports, runtime
from hive_cli.supervisor.plan import executor_spec
from hive_cli.supervisor.process import Child
from hive_cli.supervisor.progress import Reporter
from hive_cli.supervisor.running import Running
from hive_cli.supervisor.small_model import PORTS as SMALL_MODEL_PORTS
from hive_cli.supervisor.small_model import small_model_spec, with_small_model, write_small_model
from hive_cli.supervisor.wishes import Wishes

EXECUTOR = "executor"
"""Name of the process, whatever the executor is called."""

MODELS = "http"
"""Name of the port on which programs of this machine reach all models: the one of REST, so that an address which is
configured in an editor fits every machine."""

READY_S = 20.0
"""A start waits so long for the installation; a laptop that is not at home goes on without it."""


def checked(home: Home, wishes: Wishes) -> JoinedSettings:
    """Return the settings of a joined home, after what is wished for is recorded.

    Raises:
        InvalidArgument: they cannot be used, or `wishes` has what only an installation can do.
        FailedPrecondition: a recorded port is taken, or the small model is not installed.
    """
    wished = {
        "--executors": wishes.executors,
        "--public": wishes.public,
        "--ollama-without-key": wishes.ollama_without_key,
    }
    for option, value in wished.items():
        if value is not None:
            raise InvalidArgument(
                f"{option}: {home.root} is a device that has joined {home.joined().gateway}; "
                "expected an installation of its own"
            )
    settings = home.joined()
    ports.check_recorded(settings.ports, home.joined_file)
    wanted = _wanted(settings, wishes)
    if wanted.small_model:
        require_small_model()
    if wanted != settings:
        write_config(home.joined_file, wanted)
    return wanted


def _wanted(settings: JoinedSettings, wishes: Wishes) -> JoinedSettings:
    changes = {
        "model_urls": wishes.model_urls,
        "counts_only": wishes.counts_only,
        "small_model": wishes.small_model,
    }
    wanted = msgspec.structs.replace(
        settings, **{name: value for name, value in changes.items() if value is not None}
    )
    wanted = msgspec.structs.replace(
        wanted,
        executor=msgspec.structs.replace(wanted.executor, tier=wishes.tier or wanted.executor.tier),
        labels=with_labels(wanted.labels, wishes.labels),
    )
    missing = [name for name in SMALL_MODEL_PORTS if wanted.small_model and name not in settings.ports]
    return msgspec.structs.replace(wanted, ports={**settings.ports, **ports.pick(missing, settings.ports)})


def executor_config(home: Home, settings: JoinedSettings) -> ExecutorConfig:
    """Return the configuration of the executor of a joined home."""
    ca_file = str(home.ca_file) if settings.nats.startswith("tls://") else ""
    config = ExecutorConfig(
        name=settings.executor.name,
        executor_id=settings.executor.id,
        nats=NatsConfig(settings.nats, str(home.credentials_file), ca_file),
        state_dir=str(home.executor_dir(EXECUTOR)),
        cache_dir=str(runtime.default_cache_dir()),
        ops_port=settings.ports[names.ops_port(EXECUTOR)],
        blobs_url=settings.gateway,
        owner=settings.owner,
        slots=settings.slots,
        memory_bytes=psutil.virtual_memory().total // 2,
        labels={**settings.labels, **settings.executor.labels},
        tier=settings.executor.tier,
        device=settings.executor.device,
        models_port=settings.ports.get(MODELS, 0),
        token_public_key=settings.token_public_key,
        kill_public_key=settings.kill_public_key,
        models_counts_only=settings.counts_only,
    )
    urls = with_small_model(settings.model_urls, settings.ports, settings.small_model)
    return msgspec.structs.replace(config, model_urls=urls) if urls else config


class JoinedSupervisor(Running):
    """The executor of a joined home.

    Args:
        home: locked.
        settings: of this home.
        report: gets the lines for the user.
    """

    def __init__(self, home: Home, settings: JoinedSettings, report: Reporter) -> None:
        super().__init__(home, report)
        self._settings = settings

    async def _start(self) -> str:
        started = time.monotonic()
        home, settings = self._home, self._settings
        for folder in (home.config_dir, home.executor_dir(EXECUTOR)):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        await asyncio.to_thread(write_config, home.config_file(EXECUTOR), executor_config(home, settings))
        if settings.small_model:
            write_small_model(home, settings.ports)
            model = self._add(small_model_spec(home, settings.ports))
        spec = executor_spec(home, EXECUTOR, settings.ports)
        executor = self._plan(dataclasses.replace(spec, ready_s=READY_S, essential=False))
        executor.start(held=True)
        await runtime.prepare(runtime.default_cache_dir(), self._report)
        if settings.small_model:
            # An executor looks for models when it starts.
            await self._ready(model, f"model {NAME} on port {settings.ports[names.SMALL_MODEL]}")
        executor.release()
        await self._ready(executor, f"executor {settings.executor.name} ({settings.executor.id})")
        seconds = time.monotonic() - started
        return (
            f"{settings.executor.name} works for {settings.gateway}, ready after {seconds:.1f} s\n"
            f"  models  http://127.0.0.1:{settings.ports[MODELS]}/v1   for programs of this machine\n"
            f"next: hive status{self._option()}   hive down{self._option()}"
        )

    def _ended_for_good(self, child: Child) -> None:
        super()._ended_for_good(child)
        if child.spec.name != EXECUTOR:
            return
        self._failure = f"{self._settings.executor.name}: {child.snapshot().problem}"
        self._stop.set()

    def _stop_order(self) -> Iterable[list[str]]:
        yield [EXECUTOR]
        yield [names.SMALL_MODEL]
