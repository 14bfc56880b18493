"""`/v1/values/{namespace}`: what agents keep between tasks, for its owner."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from hive_common.contracts.limits import KV_KEY_CHARACTERS_MAX
from hive_proto.values.v1 import values_pb2
from msgspec import Raw
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.documents import answers
from hive_gateway.peers import Peers
from hive_gateway.replies import After, PageLimit, reply
from hive_gateway.upstream import UpstreamDep

Namespace = Annotated[str, Path(max_length=63, description="namespace of the permission `kv`")]
Key = Annotated[str, Query(max_length=KV_KEY_CHARACTERS_MAX, description="key of a value")]
Prefix = Annotated[str, Query(max_length=KV_KEY_CHARACTERS_MAX, description="what keys begin with")]


def router(peers: Peers) -> APIRouter:
    """Return the paths of kept values."""
    api = APIRouter(prefix="/v1/values/{namespace}", tags=["values"])

    @api.get("", operation_id="getValue", responses=answers(views.KeptValue, 400, 404), response_class=Response)
    async def get(upstream: UpstreamDep, namespace: Namespace, key: Key) -> Response:
        """Return one value, as the last attempt left it that decided its task."""
        message = values_pb2.GetRequest(namespace=namespace, key=key)
        found = await upstream.ask(peers.registry, peers.values.Get, message)
        return reply(views.KeptValue(key=key, value=Raw(found.value)))

    @api.get("/keys", operation_id="listKeys", responses=answers(views.KeptKeys, 400), response_class=Response)
    async def keys(
        upstream: UpstreamDep, namespace: Namespace, prefix: Prefix = "", limit: PageLimit = 100, after: After = ""
    ) -> Response:
        """List keys, in the order of their bytes."""
        message = values_pb2.ListRequest(namespace=namespace, prefix=prefix, after=after, limit=limit)
        page = await upstream.ask(peers.registry, peers.values.List, message)
        return reply(views.KeptKeys(keys=tuple(page.keys), next=page.keys[-1] if page.more else None))

    @api.delete("", operation_id="deleteValue", responses=answers(views.Removed, 400), response_class=Response)
    async def delete(upstream: UpstreamDep, namespace: Namespace, key: Key) -> Response:
        """Remove a key, at once. One that is not there is no error."""
        message = values_pb2.DeleteRequest(namespace=namespace, key=key, caller=upstream.caller.pseudonym)
        await upstream.ask(peers.registry, peers.values.Delete, message)
        return reply(views.Removed(key=key))

    return api
