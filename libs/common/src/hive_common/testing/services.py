"""A service of the control plane inside of a test: its real composition root on real servers."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from psycopg.conninfo import conninfo_to_dict

from hive_common.kernel.ids import derive_id
from hive_common.ops.config import PostgresConfig, ServiceConfig
from hive_common.ops.lifecycle import Stop
from hive_common.ops.ports import free_port
from hive_common.ops.startup import eventually
from hive_common.rpc.client import bearer, open_channel
from hive_common.testing.fixtures import Database, NatsServer

READY_WITHIN_S = 30.0


def service_config(
    service: str,
    database: Database,
    nats: NatsServer,
    folder: Path,
    *,
    peers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    kill_public_key: str = "",
    token_public_key: str = "",
) -> ServiceConfig:
    """Return the configuration of one service, with secrets written below `folder`."""
    postgres = conninfo_to_dict(database.role_dsn(service))
    return ServiceConfig(
        service=service,
        owner=derive_id("owner", str(folder)),  # all services of one installation have one
        postgres=PostgresConfig(
            host=str(postgres["host"]),
            port=int(str(postgres["port"])),
            user=str(postgres["user"]),
            password_file=_secret(folder, f"postgres-{service}", str(postgres["password"])),
            database=str(postgres["dbname"]),
        ),
        nats=nats.issuer.service(service, folder),
        ops_port=free_port(),
        grpc_port=free_port(),
        service_key_file=_secret(folder, "service-key", secrets.token_urlsafe(18)),
        artifacts_dir=str(folder / "artifacts"),
        peers=dict(peers or {}),
        kill_public_key=kill_public_key,
        token_public_key=token_public_key,
        extra={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in (extra or {}).items()},
    )


def key_of(config: ServiceConfig) -> tuple[tuple[str, str], ...]:
    """Return the metadata that shows the service key."""
    return bearer(Path(config.service_key_file).read_text())


@contextlib.asynccontextmanager
async def running_service(
    main: Callable[[ServiceConfig, Stop], Awaitable[None]], config: ServiceConfig
) -> AsyncIterator[Any]:
    """Run a service's `main` until the block ends; yields a gRPC channel to it, once it takes calls.

    Fails when the service fails, or ends with another exit code than 0.
    """
    stop = Stop()
    service = asyncio.ensure_future(main(config, stop))
    channel = open_channel(f"{config.grpc_host}:{config.grpc_port}")
    listening = asyncio.ensure_future(eventually(channel.channel_ready, config.service, READY_WITHIN_S))
    try:
        await asyncio.wait({service, listening}, return_when=asyncio.FIRST_COMPLETED)
        if service.done():
            await service
        await listening
        yield channel
    finally:
        listening.cancel()
        await channel.close()
        stop.set("the test is over")
        await service
        assert stop.exit_code == 0, stop.reason


def _secret(folder: Path, name: str, value: str) -> str:
    file = folder / name
    file.touch(mode=0o600)
    file.write_text(value)
    return str(file)
