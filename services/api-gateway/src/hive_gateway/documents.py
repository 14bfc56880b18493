"""The OpenAPI document: what FastAPI knows of the paths, and the answers from the structs that are encoded."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from hive_common.inference.errors import OpenAIError
from hive_common.inference.openai import ModelList

from hive_gateway import approval_views, canary_views, decision_views, money_views, pain_views, views
from hive_gateway.middleware import OPEN_PATHS
from hive_gateway.model_paths import model_paths
from hive_gateway.problems import PROBLEM_TYPE, Problem
from hive_gateway.streams import NDJSON_TYPE, SSE_TYPE

JSON_TYPE = "application/json"
BINARY_TYPE = "application/octet-stream"

Responses = dict[int | str, dict[str, Any]]

_REFS = "#/components/schemas/{name}"
_DESCRIPTIONS = {
    400: "What was sent can never be accepted.",
    401: "The key is missing or wrong.",
    403: "The key may not do this.",
    404: "There is nothing under this name or id.",
    409: "It exists with other content, or is not in the state this needs.",
    413: "More bytes than are taken here.",
    429: "Too much at once; try again after `Retry-After`.",
    503: "Something that this needs cannot be reached; try again after `Retry-After`.",
    504: "A service behind the gateway did not answer in time.",
}
_EVERYWHERE = (401, 403, 503, 504)
SCHEME = "apiKey"


def answers(view: type[msgspec.Struct], *errors: int, status: int = 200, ndjson: bool = False) -> Responses:
    """Return the documented answers of an operation: `view` as JSON, and problems.

    Args:
        view: what the body is encoded from.
        errors: statuses besides those that every operation may give.
        status: of success.
        ndjson: the elements also come as JSON lines, where `Accept` asks for them.
    """
    content: dict[str, Any] = {JSON_TYPE: {"schema": _ref(view)}}
    if ndjson:
        content[NDJSON_TYPE] = {"schema": {"type": "string", "description": "one element a line"}}
    description = (view.__doc__ or "").split("\n")[0]
    return {status: {"description": description, "content": content}, **problems(*errors)}


def raw_answers(media_type: str, description: str, *errors: int, status: int = 200) -> Responses:
    """Return the documented answers of an operation whose body is no JSON object of ours."""
    schema: dict[str, Any] = {"type": "string"} if media_type in (SSE_TYPE, NDJSON_TYPE) else {}
    content = {media_type: {"schema": schema}}
    return {status: {"description": description, "content": content}, **problems(*errors)}


def problems(*errors: int) -> Responses:
    """Return the documented errors of an operation."""
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {PROBLEM_TYPE: {"schema": _ref(Problem)}}}
        for status in sorted({*errors, *_EVERYWHERE})
    }


def body(schema: Mapping[str, Any], *, required: bool = True, media_type: str = JSON_TYPE) -> dict[str, Any]:
    """Return `openapi_extra` for a body that the operation reads itself."""
    return {"requestBody": {"required": required, "content": {media_type: {"schema": schema}}}}


def struct_body(kind: type[msgspec.Struct], *, required: bool = True) -> dict[str, Any]:
    """Return `openapi_extra` for a body that is decoded as `kind`."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template=_REFS)
    return body(components[kind.__name__] if "$ref" in schema else schema, required=required)


def install(app: FastAPI) -> None:
    """Make `app` describe itself with the schemas of the structs, its security, and its real errors."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        openapi_version="3.1.0",
    )
    modules = (views, money_views, approval_views, canary_views, decision_views, pain_views)
    structs = [kind for module in modules for kind in vars(module).values() if _is_view(kind)]
    _, schemas = msgspec.json.schema_components([*structs, Problem, OpenAIError, ModelList], ref_template=_REFS)
    schemas["Problem"]["additionalProperties"] = True
    document["components"] = {
        "schemas": schemas,
        "securitySchemes": {SCHEME: {"type": "http", "scheme": "bearer", "description": "an API key"}},
    }
    document["security"] = [{SCHEME: []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _correct(path, operation)
    document["paths"] |= model_paths()
    return document


def _correct(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    # FastAPI announces 422 with a shape of its own; here such input is a 400 with a problem.
    if responses.pop("422", None) is not None:
        responses.setdefault("400", problems(400)[400])
    if path in OPEN_PATHS:
        operation["security"] = []
        for status in _EVERYWHERE:
            if path != "/readyz" or status != 503:
                responses.pop(str(status), None)


def _is_view(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, views.View) and kind is not views.View


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": _REFS.format(name=kind.__name__)}
