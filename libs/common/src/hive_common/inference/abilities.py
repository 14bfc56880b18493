"""What models can do besides reading and writing, as far as what serves them tells."""

from collections.abc import Iterable
from typing import Final

from hive_common.contracts.events import Model

OLLAMA: Final = "ollama"
LLAMA_CPP: Final = "llama.cpp"
VLLM: Final = "vllm"
LM_STUDIO: Final = "lm-studio"
OPENAI: Final = "openai"
"""What serves models, by `Model.backend`."""

COMPLETION: Final = "completion"
TOOLS: Final = "tools"
EMBEDDING: Final = "embedding"
"""Abilities that a model may have; the names are Ollama's. What the back end does not tell is not known."""

_TELL_WHO_EMBEDS: Final = frozenset({LM_STUDIO})
"""Others make embeddings with models for chats too: llama.cpp and Ollama, whatever their lists say."""


def lacking(model: Model, needs: Iterable[str]) -> list[str]:
    """Return which of `needs` a model is known not to have, in order of name. What is not told, it may have."""
    return sorted(need for need in needs if model.abilities and need not in model.abilities and _tells(model, need))


def _tells(model: Model, need: str) -> bool:
    """Say whether an ability that is not in the list of a model is one that it does not have."""
    if need == EMBEDDING:
        return model.backend in _TELL_WHO_EMBEDS
    # Few tell that a model completes; only one that is told to embed instead is told not to.
    return need != COMPLETION or EMBEDDING in model.abilities
