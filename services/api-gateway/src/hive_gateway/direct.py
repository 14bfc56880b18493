"""Submits on a shorter way: FastAPI takes as long to route a call and to solve its parameters as all else takes."""

from types import SimpleNamespace
from typing import Final

from hive_common.artifacts.store import ArtifactStore
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from hive_gateway.intake import Intake
from hive_gateway.middleware import CALLER
from hive_gateway.problems import answer_of
from hive_gateway.routes.jobs import IDEMPOTENCY_KEY_CHARS_MAX, submitted
from hive_gateway.upstream import Upstream

_PATH: Final = "/v1/jobs"
_ROUTE: Final = SimpleNamespace(path=_PATH)


class Direct:
    """Answers `POST /v1/jobs` as the route of that path does, which describes it; passes on everything else.

    Args:
        app: answers the rest, and what this does not understand.
        intake: takes jobs.
        store: of inputs that are large.
    """

    def __init__(self, app: ASGIApp, intake: Intake, store: ArtifactStore) -> None:
        self._app = app
        self._intake = intake
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != _PATH:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        key = request.headers.get("idempotency-key", "")
        if len(key) > IDEMPOTENCY_KEY_CHARS_MAX:
            await self._app(scope, receive, send)
            return
        # The label of its metrics.
        scope["route"] = _ROUTE
        try:
            response = await submitted(request, Upstream(scope[CALLER], receive), key, self._intake, self._store)
        except Exception as error:  # noqa: BLE001 - as in FastAPI: whatever is raised becomes an answer
            response = await answer_of(request, error)
        await response(scope, receive, send)
