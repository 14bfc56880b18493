"""Answers in JSON, and the types of parameters that several paths share."""

from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from fastapi import Path, Query, Request
from hive_common.artifacts.store import ArtifactStore
from hive_common.kernel.ids import ID_PATTERN
from starlette.responses import Response, StreamingResponse

from hive_gateway.streams import NDJSON_TYPE

_ID = ID_PATTERN.pattern.replace(r"\Z", "$")

JobId = Annotated[str, Path(pattern=f"^{_ID}", description="id of a job")]
CallId = Annotated[str, Path(pattern=f"^{_ID}", description="id of a model call, its `x-request-id`")]
TaskId = Annotated[str, Path(pattern=f"^{_ID}", description="id of a task")]
Digest = Annotated[str, Path(pattern=r"^sha256:[0-9a-f]{64}$", description="SHA-256 digest in OCI form")]
PageLimit = Annotated[int, Query(ge=1, le=1_000, description="elements of a page")]
After = Annotated[str, Query(max_length=400, description="`next` of the page before")]
Position = Annotated[int, Query(ge=0, lt=1 << 63, description="position in the log")]


def reply(value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return `value` as JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def wants_lines(request: Request) -> bool:
    """Say whether the caller asks for JSON lines instead of a page."""
    return NDJSON_TYPE in request.headers.get("accept", "")


async def blob_response(store: ArtifactStore, digest: str, media_type: str) -> Response:
    """Return a blob as it is, in chunks. Raises NotFound where it is not there."""
    headers = {
        "Content-Length": str(await store.size(digest)),
        "ETag": f'"{digest}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    return StreamingResponse(await store.open_stream(digest), 200, headers, media_type)


async def as_line(source: AsyncGenerator[msgspec.Struct, None]) -> AsyncGenerator[bytes, None]:
    """Encode elements as JSON lines. Their raw members MUST NOT hold line breaks."""
    try:
        async for item in source:
            yield msgspec.json.encode(item) + b"\n"
    finally:
        await source.aclose()
