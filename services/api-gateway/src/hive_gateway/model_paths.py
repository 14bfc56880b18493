"""The model paths in the OpenAPI document: they are answered before FastAPI, which knows nothing of them."""

from typing import Any, Final

_OBJECT: Final = {"application/json": {"schema": {"type": "object", "additionalProperties": True}}}
_MODEL_LIST: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/ModelList"}}}
_MODEL: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/ModelView"}}}
_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
_STREAM: Final = {"text/event-stream": {"schema": {"type": "string", "description": "one event a chunk"}}}
_ERRORS: Final = {
    "400": "The body is not JSON, has no model, or does not fit into the model's context.",
    "401": "The key is missing or wrong.",
    "402": "A budget is used up; the message has what was spent, and who may raise it with which command.",
    "403": "The key may not do this.",
    "404": "Nothing serves this model; the message has the nearest names.",
    "413": "More bytes than are taken here.",
    "429": "The model's queue is full; try again after `Retry-After`.",
    "503": "Nothing that could serve this can be reached, or may; the message has the reason.",
    "504": "The time that was given ran out.",
}
_HEADERS: Final = (
    ("X-Hive-Timeout-Ms", "milliseconds for the whole call, ten minutes without it", {"type": "integer"}),
    ("X-Hive-Pin", "own-devices, pool, region:<name> or any; narrows the key's", {"type": "string"}),
)


_OLLAMA_ERROR: Final = {
    "application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}
}
_LINES: Final = {"application/x-ndjson": {"schema": {"type": "string", "description": "one object a line"}}}
_OLLAMA: Final = {
    "/api/tags": ("get", "ollamaTags", "List the models that can be called."),
    "/api/ps": ("get", "ollamaPs", "List the models that are in memory somewhere."),
    "/api/version": ("get", "ollamaVersion", "Say which release of Ollama's API this follows."),
    "/api/show": ("post", "ollamaShow", "Show a model."),
    "/api/chat": ("post", "ollamaChat", "Let a model answer a conversation; in lines unless `stream` is false."),
    "/api/generate": ("post", "ollamaGenerate", "Let a model answer; in lines unless `stream` is false."),
    "/api/embed": ("post", "ollamaEmbed", "Turn texts into vectors."),
    "/api/embeddings": ("post", "ollamaEmbeddings", "Turn one text into a vector, in the older form."),
}


def model_paths() -> dict[str, Any]:
    """Return the path items."""
    calls = {
        "/v1/chat/completions": ("createChatCompletion", "Let a model answer a conversation.", True),
        "/v1/completions": ("createCompletion", "Let a model go on with a text.", True),
        "/v1/embeddings": ("createEmbedding", "Turn texts into vectors.", False),
    }
    found: dict[str, Any] = {path: {"post": _call(*facts)} for path, facts in calls.items()}
    found["/v1/models"] = {"get": _read("listModels", "List the models that can be called.", _MODEL_LIST)}
    model = _read("getModel", "Show a model.", _MODEL)
    model["parameters"] = [_parameter("id", "path", "name of a model", {"type": "string"}, required=True)]
    found["/v1/models/{id}"] = {"get": model}
    found |= {path: {method: _ollama(method, *facts)} for path, (method, *facts) in _OLLAMA.items()}
    return found


def _ollama(method: str, operation: str, summary: str) -> dict[str, Any]:
    streams = operation in ("ollamaChat", "ollamaGenerate")
    ok = {"200": {"description": summary, "content": _OBJECT | _LINES if streams else _OBJECT}}
    errors = {status: {"description": text, "content": _OLLAMA_ERROR} for status, text in _ERRORS.items()}
    found: dict[str, Any] = {
        "operationId": operation,
        "tags": ["ollama"],
        "summary": summary,
        "description": "Ollama's operation of this path, whatever the model is served by.",
        "responses": ok | errors,
    }
    return found if method == "get" else found | {"requestBody": {"required": True, "content": _OBJECT}}


def _call(operation: str, summary: str, streams: bool) -> dict[str, Any]:
    content = _OBJECT | _STREAM if streams else _OBJECT
    return {
        "operationId": operation,
        "tags": ["models"],
        "summary": summary,
        "description": "OpenAI's operation of this name: the body passes to the model as it is.",
        "parameters": [_parameter(name, "header", text, schema) for name, text, schema in _HEADERS],
        "requestBody": {"required": True, "content": _OBJECT},
        "responses": {"200": {"description": "What the model answers.", "content": content}, **_errors()},
    }


def _read(operation: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    answer = {"200": {"description": summary, "content": content}}
    return {
        "operationId": operation,
        "tags": ["models"],
        "summary": summary,
        "description": "OpenAI's operation of this name.",
        "responses": answer | _errors(),
    }


def _errors() -> dict[str, Any]:
    return {status: {"description": text, "content": _ERROR} for status, text in _ERRORS.items()}


def _parameter(
    name: str, place: str, text: str, schema: dict[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "description": text, "schema": schema}
