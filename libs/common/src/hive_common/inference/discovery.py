"""What serves models at a base URL, and which ones: Ollama, llama.cpp, vLLM, LM Studio, or any other server that
speaks OpenAI's API. Each of them tells more than that API asks for, at other paths.
"""

import asyncio
import logging
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from hive_common.contracts.events import Model
from hive_common.inference.abilities import (
    COMPLETION,
    EMBEDDING,
    LLAMA_CPP,
    LM_STUDIO,
    OLLAMA,
    OPENAI,
    TOOLS,
    VLLM,
)
from hive_common.inference.http_pool import Pool
from hive_common.kernel.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT_S: Final = 2.0
"""These servers are on this device or next to it; one that answers slower than this is taken to be away."""

ANSWER_BYTES_MAX: Final = 4 << 20
MODELS_MAX: Final = 200


class _OllamaDetails(msgspec.Struct, frozen=True):
    family: str = ""
    quantization_level: str = ""


class _OllamaModel(msgspec.Struct, frozen=True):
    name: str
    size: int = 0
    digest: str = ""
    details: _OllamaDetails = _OllamaDetails()


class _OllamaModels(msgspec.Struct, frozen=True):
    models: list[_OllamaModel]


class _OllamaShown(msgspec.Struct, frozen=True):
    model_info: dict[str, Any] = {}
    capabilities: tuple[str, ...] = ()

    @property
    def context_tokens(self) -> int:
        """Of the architecture that the model names."""
        return _int(self.model_info.get(f"{self.model_info.get('general.architecture')}.context_length"))


class _LlamaMeta(msgspec.Struct, frozen=True):
    size: int = 0
    n_ctx_train: int = 0


class _OpenAiModel(msgspec.Struct, frozen=True):
    id: str
    owned_by: str = ""
    meta: _LlamaMeta | None = None
    max_model_len: int | None = None


class _OpenAiModels(msgspec.Struct, frozen=True):
    data: list[_OpenAiModel]


class _LlamaGeneration(msgspec.Struct, frozen=True):
    n_ctx: int = 0


class _LlamaProps(msgspec.Struct, frozen=True):
    default_generation_settings: _LlamaGeneration = _LlamaGeneration()
    chat_template: str | None = None
    chat_template_caps: dict[str, bool] = {}
    model_ftype: str = ""

    @property
    def takes_tools(self) -> bool:
        """Older servers do not tell; their template mentions what it renders."""
        told = self.chat_template_caps.get("supports_tools")
        return told if told is not None else "tools" in (self.chat_template or "")


class _LmStudioModel(msgspec.Struct, frozen=True):
    id: str
    type: str = ""
    arch: str = ""
    quantization: str = ""
    state: str = ""
    max_context_length: int = 0
    capabilities: tuple[str, ...] = ()


class _LmStudioModels(msgspec.Struct, frozen=True):
    data: list[_LmStudioModel]


class Discovery:
    """Looks again and again at what one base URL serves.

    Args:
        pool: connections to it.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kind = ""
        self._shown: dict[tuple[str, str], _OllamaShown] = {}

    async def models(self) -> tuple[Model, ...] | None:
        """Return its models in order of name, or None where nothing answers that serves models."""
        try:
            found = await self._look()
        except Unavailable as error:
            log.debug("%s", error.message)
            return None
        except TimeoutError:
            log.debug("%s: silent for %g s", self._pool.url, TIMEOUT_S)
            return None
        if found is None:
            return None
        by_name = {model.name: model for model in found}
        return tuple(by_name[name] for name in sorted(by_name)[:MODELS_MAX])

    async def _look(self) -> list[Model] | None:
        # What was found last is asked first: some servers complain aloud about paths that they do not have.
        if self._kind == OLLAMA and (found := await self._ollama()) is not None:
            return found
        if self._kind == LM_STUDIO and (found := await self._lm_studio()) is not None:
            return found
        listed = await self._get("/v1/models", _OpenAiModels)
        if listed is not None and any(one.meta or one.owned_by == "llamacpp" for one in listed.data):
            return await self._llama_cpp(listed)
        if listed is not None and any(one.max_model_len for one in listed.data):
            return self._vllm(listed)
        if self._kind != OPENAI:
            for other in (self._ollama, self._lm_studio):
                if (found := await other()) is not None:
                    return found
        if listed is None:
            self._kind = ""
            return None
        # An empty list is no proof: a model may be loaded later, and tell what serves it.
        self._kind = OPENAI if listed.data else ""
        return [Model(name=one.id, backend=OPENAI, loaded=True) for one in listed.data]

    async def _ollama(self) -> list[Model] | None:
        tags = await self._get("/api/tags", _OllamaModels)
        if tags is None:
            return None
        self._kind = OLLAMA
        running = await self._get("/api/ps", _OllamaModels)
        loaded = {model.name for model in running.models} if running is not None else set()
        shown = {(model.name, model.digest): await self._show(model) for model in tags.models[:MODELS_MAX]}
        self._shown = {key: value for key, value in shown.items() if value is not None}
        models = []
        for model in tags.models:
            about = shown.get((model.name, model.digest)) or _OllamaShown()
            models.append(
                Model(
                    name=model.name,
                    backend=OLLAMA,
                    family=model.details.family,
                    size_bytes=model.size,
                    quantisation=model.details.quantization_level,
                    context_tokens=about.context_tokens,
                    loaded=model.name in loaded,
                    abilities=about.capabilities,
                    digest=model.digest,
                )
            )
        return models

    async def _show(self, model: _OllamaModel) -> _OllamaShown | None:
        known = self._shown.get((model.name, model.digest))
        if known is not None:
            return known
        return await self._get("/api/show", _OllamaShown, {"model": model.name})

    async def _llama_cpp(self, listed: _OpenAiModels) -> list[Model]:
        self._kind = LLAMA_CPP
        models = []
        for one in listed.data:
            # A server of one model describes that, whatever is asked for; one of several takes the name.
            path = "/props" if len(listed.data) == 1 else f"/props?model={quote(one.id, safe='')}&autoload=false"
            props = await self._get(path, _LlamaProps)
            meta = one.meta or _LlamaMeta()
            context = props.default_generation_settings.n_ctx if props is not None else 0
            models.append(
                Model(
                    name=one.id,
                    backend=LLAMA_CPP,
                    size_bytes=meta.size,
                    quantisation=props.model_ftype if props is not None else "",
                    context_tokens=context or meta.n_ctx_train,
                    loaded=one.meta is not None,
                    abilities=() if props is None else (COMPLETION, TOOLS) if props.takes_tools else (COMPLETION,),
                )
            )
        return models

    def _vllm(self, listed: _OpenAiModels) -> list[Model]:
        self._kind = VLLM
        return [
            Model(name=one.id, backend=VLLM, context_tokens=one.max_model_len or 0, loaded=True)
            for one in listed.data
        ]

    async def _lm_studio(self) -> list[Model] | None:
        listed = await self._get("/api/v0/models", _LmStudioModels)
        if listed is None:
            return None
        self._kind = LM_STUDIO
        return [
            Model(
                name=one.id,
                backend=LM_STUDIO,
                family=one.arch,
                quantisation=one.quantization,
                context_tokens=one.max_context_length,
                loaded=one.state == "loaded",
                abilities=_lm_studio_abilities(one),
            )
            for one in listed.data
        ]

    async def _get(self, path: str, kind: type[T], body: dict[str, str] | None = None) -> T | None:
        """Return an answer, or None where it is none of this kind."""
        async with asyncio.timeout(TIMEOUT_S):
            data = await self._read(path, body)
        if data is None:
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as error:
            log.debug("%s%s: no %s: %s", self._pool.url, path, kind.__name__, error)
            return None

    async def _read(self, path: str, body: dict[str, str] | None) -> bytearray | None:
        if body is None:
            response = await self._pool.request("GET", path)
        else:
            encoded = msgspec.json.encode(body)
            headers = {"content-type": "application/json"}
            response = await self._pool.request("POST", path, encoded, headers, repeats=True)
        data = bytearray()
        try:
            # An error's text is read as well, so that the connection can be used again.
            while piece := await response.read():
                data += piece
                if len(data) > ANSWER_BYTES_MAX:
                    log.warning("%s%s: more than %d bytes, ignored", self._pool.url, path, ANSWER_BYTES_MAX)
                    return None
        finally:
            response.close()
        return data if response.status == 200 else None


def base_url(url: str) -> str:
    """Return a base URL without what people like to write behind it."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _lm_studio_abilities(model: _LmStudioModel) -> tuple[str, ...]:
    if model.type == "embeddings":
        return (EMBEDDING,)
    # Without the field the server is too old to tell.
    return (COMPLETION, TOOLS) if "tool_use" in model.capabilities else (COMPLETION,) if model.capabilities else ()


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0
