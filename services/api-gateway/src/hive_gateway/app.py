"""The ASGI application: all routers, errors, the OpenAPI document, and around them key and metrics."""

from collections.abc import Callable

from fastapi import FastAPI
from hive_common.artifacts.store import ArtifactStore
from hive_common.inference.calls import Completer
from hive_common.ops.telemetry import Health
from starlette.types import ASGIApp

from hive_gateway import documents, problems
from hive_gateway.devices import Devices
from hive_gateway.direct import Direct
from hive_gateway.holders import Holders
from hive_gateway.intake import Intake
from hive_gateway.keys import Caller
from hive_gateway.live_logs import LiveLogs
from hive_gateway.middleware import Authenticated, Measured
from hive_gateway.peers import Peers
from hive_gateway.routes import (
    agents,
    approvals,
    audit,
    blobs,
    canaries,
    control,
    enrolment,
    executors,
    following,
    grants,
    jobs,
    keys,
    models,
    operations,
    pain,
    signers,
    spending,
    values,
)
from hive_gateway.streams import Followers
from hive_gateway.surfaces import Surfaces

DESCRIPTION = """Runs autonomous AI agents on the devices people already own.

Every path but health and joining needs `Authorization: Bearer <key>`. Errors are problem documents (RFC 9457) with
a stable `code`. Times are microseconds since the epoch; positions are those of the event log."""


def build_api(
    peers: Peers,
    intake: Intake,
    store: ArtifactStore,
    live_logs: LiveLogs,
    followers: Followers,
    health: Health,
    ca: str,
    public_url: Callable[[], str],
    forget_keys: Callable[[], None],
) -> FastAPI:
    """Return the REST interface, without the key check around it.

    `ca` is the certificate of the CA, in PEM; `public_url` says where machines that may join reach this gateway;
    `forget_keys` makes it ask anew about every key.
    """
    api = FastAPI(
        title="HiveFabric",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    problems.install(api)
    documents.install(api)
    for router in (
        jobs.router(peers, intake, store),
        following.router(peers, live_logs, followers),
        enrolment.router(peers, ca, public_url),
        executors.router(peers),
        # Before `/v1/agents/{name}/{version}`, which would take it for a version.
        grants.router(peers),
        agents.router(peers),
        signers.router(peers),
        audit.router(peers),
        control.router(peers),
        values.router(peers),
        approvals.router(peers),
        canaries.router(peers),
        pain.router(peers),
        models.router(peers),
        spending.router(peers),
        keys.router(peers, forget_keys),
        blobs.router(store),
        operations.router(health, ca),
    ):
        api.include_router(router)
    return api


def guarded(
    api: FastAPI,
    keys: Holders,
    devices: Devices,
    intake: Intake,
    store: ArtifactStore,
    completer: Completer,
    without_key: Caller | None,
) -> ASGIApp:
    """Return what the server runs: `api` behind the key check, measured; submits and model calls go past it."""
    return Measured(Authenticated(Surfaces(Direct(api, intake, store), completer), keys, devices, without_key))
