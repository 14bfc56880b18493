"""`/v1/keys`: who may call, besides whoever holds the owner's key."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Request
from hive_common.contracts.keys import KEY_NAME_EXPECTED, is_key_name
from hive_common.kernel.errors import InvalidArgument, NotFound
from hive_proto.keys.v1 import keys_pb2
from hive_proto.models.v1 import models_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import money_views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import After, PageLimit, reply
from hive_gateway.routes.spending import limits_of
from hive_gateway.upstream import Upstream, UpstreamDep

KeyName = Annotated[str, Path(max_length=63, description="name of a key")]


class KeyBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A key to make. `digest` is the SHA-256, in hex, of a secret that the client has made (`hive_…`); without it
    one is made here.

    `cloud` lets its calls go to providers, within a budget; `budgets` are limits of what they may cost.
    """

    name: str
    admin: bool = False
    cloud: bool = False
    pin: str = "any"
    counts_only: bool = False
    digest: str = ""
    budgets: tuple[money_views.LimitBody, ...] = ()


class RevokeKeyBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Why the key is shut out. It is kept in the log."""

    reason: str = ""


def router(peers: Peers, forget: Callable[[], None]) -> APIRouter:
    """Return the paths of keys.

    Args:
        peers: registry and router are among them.
        forget: makes this gateway ask anew about every key.
    """
    api = APIRouter(prefix="/v1/keys", tags=["keys"])

    @api.post(
        "",
        operation_id="createApiKey",
        responses=answers(money_views.CreatedKey, 400, 409, 413, status=201),
        openapi_extra=struct_body(KeyBody),
        response_class=Response,
        status_code=201,
    )
    async def create(request: Request, upstream: UpstreamDep) -> Response:
        """Make a key. Its secret is in the answer, and nowhere else."""
        command = await read_command(request, KeyBody)
        if not is_key_name(command.name):
            raise InvalidArgument(f"name: got {command.name[:80]!r}; expected {KEY_NAME_EXPECTED}", path="name")
        await _limit(peers, upstream, command)
        message = keys_pb2.CreateRequest(
            name=command.name,
            scope="admin" if command.admin else "user",
            pin=command.pin,
            counts_only=command.counts_only,
            cloud=command.cloud,
            digest=command.digest,
            caller=upstream.caller.pseudonym,
        )
        created = await upstream.ask(peers.registry, peers.keys.Create, message)
        forget()
        return reply(money_views.CreatedKey(key=money_views.key(created.key), secret=created.secret), 201)

    @api.get(
        "", operation_id="listApiKeys", responses=answers(money_views.ApiKeyPage, 400), response_class=Response
    )
    async def list_keys(upstream: UpstreamDep, limit: PageLimit = 100, after: After = "") -> Response:
        """List keys, those that are revoked too."""
        message = keys_pb2.ListRequest(limit=limit, after=after)
        page = (await upstream.ask(peers.registry, peers.keys.List, message)).keys
        following = page[-1].name if len(page) == limit else None
        return reply(money_views.ApiKeyPage(keys=tuple(map(money_views.key, page)), next=following))

    @api.post(
        "/{name}/revoke",
        operation_id="revokeApiKey",
        responses=answers(money_views.ApiKey, 400, 404, 413),
        openapi_extra=struct_body(RevokeKeyBody, required=False),
        response_class=Response,
    )
    async def revoke(request: Request, name: KeyName, upstream: UpstreamDep) -> Response:
        """Shut a key out, for ever. Its name is never used again."""
        command = await read_command(request, RevokeKeyBody)
        message = keys_pb2.RevokeRequest(name=name, reason=command.reason, caller=upstream.caller.pseudonym)
        revoked = await upstream.ask(peers.registry, peers.keys.Revoke, message)
        forget()
        return reply(money_views.key(revoked))

    return api


async def _limit(peers: Peers, upstream: Upstream, command: KeyBody) -> None:
    """Set the budget of a key that is not there yet: it never is without. That of another key stays as it is."""
    if not command.budgets:
        return
    try:
        await upstream.ask(peers.registry, peers.keys.Get, keys_pb2.GetRequest(name=command.name))
    except NotFound:
        message = models_pb2.SetBudgetRequest(
            subject=f"key:{command.name}",
            limits=limits_of(command.budgets),
            clear=True,
            caller=upstream.caller.pseudonym,
        )
        await upstream.ask(peers.router, peers.models.SetBudget, message)
