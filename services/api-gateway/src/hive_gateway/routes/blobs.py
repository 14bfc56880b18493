"""`/v1/blobs/{digest}`: values and artifacts by digest."""

from fastapi import APIRouter, Request
from hive_common.artifacts.store import ArtifactStore
from hive_common.contracts.limits import BLOB_BYTES_MAX
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import declared_length
from hive_gateway.documents import BINARY_TYPE, answers, body, problems, raw_answers
from hive_gateway.replies import Digest, blob_response, reply


def router(store: ArtifactStore) -> APIRouter:
    """Return the paths of blobs."""
    api = APIRouter(prefix="/v1/blobs", tags=["blobs"])

    @api.get(
        "/{digest}",
        operation_id="getBlob",
        responses=raw_answers(BINARY_TYPE, "The blob.", 400, 404),
        response_class=Response,
    )
    async def get_blob(digest: Digest) -> Response:
        """Fetch a blob."""
        return await blob_response(store, digest, BINARY_TYPE)

    @api.head(
        "/{digest}",
        operation_id="headBlob",
        responses=problems(400, 404) | {200: {"description": "The blob is there; `Content-Length` is its size."}},
        response_class=Response,
    )
    async def head_blob(digest: Digest) -> Response:
        """Ask whether a blob is there."""
        size = await store.size(digest)
        headers = {"Content-Length": str(size), "ETag": f'"{digest}"'}
        return Response(None, 200, headers, BINARY_TYPE)

    @api.put(
        "/{digest}",
        operation_id="putBlob",
        responses=answers(views.Stored, 400, 413, status=201)
        | {200: answers(views.Stored)[200] | {"description": "It was there already."}},
        openapi_extra=body({}, media_type=BINARY_TYPE),
        response_class=Response,
        status_code=201,
    )
    async def put_blob(request: Request, digest: Digest) -> Response:
        """Store a blob. Bytes that do not hash to the digest are refused, and nothing of them is kept."""
        declared_length(request, BLOB_BYTES_MAX)
        existed = await store.has(digest)
        size = await store.put_stream(digest, request.stream(), BLOB_BYTES_MAX)
        location = f"/v1/blobs/{digest}"
        return reply(views.Stored(digest=digest, size_bytes=size), 200 if existed else 201, {"Location": location})

    return api
