"""Models that something on this device serves, over Ollama's API or OpenAI's."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

import aiohttp
import msgspec
from hive_common.contracts.events import Model

log = logging.getLogger(__name__)

TIMEOUT: Final = aiohttp.ClientTimeout(total=2.0, connect=0.5)
"""These servers are on this device or next to it; one that answers slower than this is taken to be away."""

ANSWER_BYTES_MAX: Final = 4 << 20
MODELS_MAX: Final = 200


class _OllamaDetails(msgspec.Struct, frozen=True):
    family: str = ""
    quantization_level: str = ""


class _OllamaModel(msgspec.Struct, frozen=True):
    name: str
    size: int = 0
    details: _OllamaDetails = _OllamaDetails()


class _OllamaModels(msgspec.Struct, frozen=True):
    models: list[_OllamaModel] = []


class _OpenAiModel(msgspec.Struct, frozen=True):
    id: str
    meta: dict[str, Any] | None = None


class _OpenAiModels(msgspec.Struct, frozen=True):
    data: list[_OpenAiModel] = []


async def served_models(urls: Iterable[str]) -> tuple[Model, ...]:
    """Return the models behind base URLs, in order of name; a server that does not answer has none."""
    async with aiohttp.ClientSession(timeout=TIMEOUT, trust_env=False) as session:
        lists = await asyncio.gather(*(_models_at(session, url.rstrip("/")) for url in urls))
    found = {model.name: model for models in reversed(lists) for model in models}
    return tuple(found[name] for name in sorted(found)[:MODELS_MAX])


async def _models_at(session: aiohttp.ClientSession, url: str) -> list[Model]:
    try:
        tags = await _get(session, f"{url}/api/tags")
        if tags is not None:
            return await _ollama(session, url, tags)
        listed = await _get(session, f"{url.removesuffix('/v1')}/v1/models")
        return [] if listed is None else _open_ai(listed)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        log.debug("%s: %s", url, error)
    except msgspec.DecodeError as error:
        log.warning("%s: its list of models does not fit: %s", url, error)
    return []


async def _get(session: aiohttp.ClientSession, url: str) -> bytes | None:
    async with session.get(url, allow_redirects=False) as answer:
        if answer.status != 200 or answer.content_type != "application/json":
            return None
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > ANSWER_BYTES_MAX:
                log.warning("%s: more than %d bytes, ignored", url, ANSWER_BYTES_MAX)
                return None
        return bytes(data)


async def _ollama(session: aiohttp.ClientSession, url: str, tags: bytes) -> list[Model]:
    running = await _get(session, f"{url}/api/ps")
    loaded = set()
    if running is not None:
        loaded = {model.name for model in msgspec.json.decode(running, type=_OllamaModels).models}
    return [
        Model(
            name=model.name,
            backend="ollama",
            family=model.details.family,
            size_bytes=model.size,
            quantisation=model.details.quantization_level,
            loaded=model.name in loaded,
        )
        for model in msgspec.json.decode(tags, type=_OllamaModels).models
    ]


def _open_ai(listed: bytes) -> list[Model]:
    models = []
    for model in msgspec.json.decode(listed, type=_OpenAiModels).data:
        # llama.cpp says more than the API asks for.
        meta = model.meta or {}
        size, context = meta.get("size"), meta.get("n_ctx_train")
        models.append(
            Model(
                name=model.id,
                backend="openai",
                size_bytes=size if isinstance(size, int) else 0,
                context_tokens=context if isinstance(context, int) else 0,
                loaded=True,
            )
        )
    return models
