"""The model lists of the back ends that a scripted one imitates, as they answer them."""

from typing import Any

from hive_common.testing.scripted.script import Script, ScriptedModel

CREATED = 1_760_000_000
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_TOOL_TEMPLATE = "{% if tools %}{{ tools }}{% endif %}" + _TEMPLATE


def listing(script: Script, path: str, body: dict[str, Any]) -> Any | None:
    """Return the answer of a path that is not a model call, or None where there is none."""
    if path == "/v1/models":
        return {"object": "list", "data": [_open_ai(script, model) for model in script.models]}
    if path.startswith("/v1/models/"):
        model = script.model(path.removeprefix("/v1/models/"))
        return None if model is None else _open_ai(script, model)
    if script.flavour == "ollama":
        return _ollama(script, path, body)
    if script.flavour == "llama.cpp" and path == "/props":
        model = script.models[0]
        return {
            "default_generation_settings": {"n_ctx": model.context_tokens},
            "total_slots": 1,
            "model_path": f"/models/{model.name}.gguf",
            "chat_template": _TOOL_TEMPLATE if model.tools else _TEMPLATE,
        }
    if script.flavour == "lm-studio" and path == "/api/v0/models":
        return {"object": "list", "data": [_lm_studio(model) for model in script.models]}
    return None


def _open_ai(script: Script, model: ScriptedModel) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": model.name, "object": "model", "created": CREATED, "owned_by": script.flavour}
    if script.flavour == "llama.cpp":
        entry["meta"] = {
            "vocab_type": 2,
            "n_vocab": 49_152,
            "n_ctx_train": 2 * model.context_tokens,
            "n_embd": 576,
            "n_params": 134_515_008,
            "size": model.size_bytes,
        }
    if script.flavour == "vllm":
        entry["max_model_len"] = model.context_tokens
    return entry


def _ollama(script: Script, path: str, body: dict[str, Any]) -> Any | None:
    if path == "/api/version":
        return {"version": "0.12.0"}
    if path == "/api/tags":
        return {"models": [_ollama_entry(model) for model in script.models]}
    if path == "/api/ps":
        return {
            "models": [
                {**_ollama_entry(model), "context_length": model.context_tokens}
                for model in script.models
                if model.loaded
            ]
        }
    if path == "/api/show":
        name = str(body.get("model", ""))
        model = script.model(name) or script.model(f"{name}:latest")
        if model is None:
            return None
        able = ["embedding"] if model.embeds else ["completion", *(["tools"] if model.tools else [])]
        return {
            "details": _ollama_entry(model)["details"],
            "model_info": {
                "general.architecture": model.family,
                f"{model.family}.context_length": model.context_tokens,
            },
            "capabilities": able,
        }
    return None


def _ollama_entry(model: ScriptedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "size": model.size_bytes,
        "digest": "0" * 64,
        "details": {"format": "gguf", "family": model.family, "quantization_level": model.quantisation},
    }


def _lm_studio(model: ScriptedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "type": "embeddings" if model.embeds else "llm",
        "arch": model.family,
        "quantization": model.quantisation,
        "state": "loaded" if model.loaded else "not-loaded",
        "max_context_length": model.context_tokens,
        **({"capabilities": ["tool_use"]} if model.tools else {}),
    }
