"""Health and the CA's certificate without a key; metrics and the OpenAPI document with one."""

from fastapi import APIRouter
from hive_common.kernel.errors import NotFound
from hive_common.ops.telemetry import Health
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.documents import answers, raw_answers
from hive_gateway.replies import reply


def router(health: Health, ca: str) -> APIRouter:
    """Return the paths for operators. `ca` is the certificate of the CA in PEM, empty where there is none."""
    api = APIRouter(tags=["operations"])

    @api.get("/healthz", operation_id="healthz", responses=answers(views.Status), response_class=Response)
    async def live() -> Response:
        """Say that this process answers."""
        return reply(views.Status(status="ok"))

    @api.get(
        "/readyz",
        operation_id="readyz",
        responses=answers(views.Status)
        | {503: answers(views.Status)[200] | {"description": "Something that this needs is not there."}},
        response_class=Response,
    )
    async def ready() -> Response:
        """Say whether all services behind the gateway can be reached. Strangers get names, not sentences."""
        problems = tuple(sorted(health.problems()))
        if problems:
            return reply(views.Status(status="not ready", problems=problems), 503)
        return reply(views.Status(status="ok"))

    @api.get(
        "/v1/ca",
        operation_id="getCa",
        responses=raw_answers("application/x-pem-file", "Certificate of this installation's CA, in PEM.", 404),
        response_class=Response,
    )
    async def get_ca() -> Response:
        """Read the certificate that a machine which joins compares with its token's fingerprint. Needs no key."""
        if not ca:
            raise NotFound("this installation has no CA: it listens on the loopback only; see `hive up --public`")
        return Response(ca, headers={"Content-Type": "application/x-pem-file"})

    @api.get(
        "/metrics",
        operation_id="metrics",
        responses=raw_answers("text/plain", "Metrics of this process in Prometheus' text format."),
        response_class=Response,
    )
    async def metrics() -> Response:
        """Read the metrics of this process."""
        return Response(generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return api
