"""`python -m hive_executor.small_model_process --config FILE [--supervised]`: serves the small model."""

import asyncio
import logging
import os
from typing import Any, Final

import aiohttp
from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.lifecycle import Stop, run_process
from hive_common.ops.telemetry import Health, OpsServer

from hive_executor.small_model import HOST, SmallModelConfig, installed_file, model_url, require_small_model

log = logging.getLogger(__name__)

EMBED_TOKENS: Final = 512
"""Of one text to embed, which has to fit into one batch; each thousand costs 200 MB once it was used."""

THREADS_MAX: Final = 4
"""The model is too small for more to help. Threads wait for each other after every layer: with as many as there are
cores, each of those waits for whatever else runs (measured on two busy cores: 40 times slower)."""

_PROBE_S: Final = 1.0
_PROBE_TIMEOUT: Final = aiohttp.ClientTimeout(total=5.0)


def _start(config: SmallModelConfig) -> Any:
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path = config.model_file or str(installed_file())
    params.model_alias = {config.model_name}
    params.hostnames = [HOST]
    params.port = config.port
    params.n_parallel = config.calls_at_once
    params.n_ctx = config.context_tokens * config.calls_at_once
    params.cpuparams.n_threads = config.threads or max(1, min((os.cpu_count() or 1) // 2, THREADS_MAX))
    # Threads that spin while they wait for each other take the processor from everything else.
    params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    # Answers and vectors from one server.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_batch = params.n_ubatch = min(EMBED_TOKENS, config.context_tokens)
    params.cache_ram_mib = 0
    params.ui = False
    return xllamacpp.Server(params)


async def main(config: SmallModelConfig, stop: Stop) -> None:
    """Serve the model until `stop` is set.

    Raises:
        FailedPrecondition: it is not installed, or cannot be loaded.
    """
    problem: list[str | None] = ["the model is being loaded"]
    health = Health()
    health.add("model", lambda: problem[0])
    ops = OpsServer(health, config.ops_host, config.ops_port)
    await ops.start()
    try:
        require_small_model()
        try:
            server = await asyncio.to_thread(_start, config)
        except RuntimeError as error:
            raise FailedPrecondition(f"the small model cannot be served on port {config.port}: {error}") from error
        log.info("%s answers on %s", config.model_name, server.listening_address)
        watching = asyncio.create_task(_watch(config, problem), name="model watch")
        stop.guard(watching)
        await stop.wait()
        watching.cancel()
        await asyncio.wait({watching})
    finally:
        await ops.stop()


async def _watch(config: SmallModelConfig, problem: list[str | None]) -> None:
    """Ask again and again whether the model still answers."""
    url = f"{model_url(config.port)}/health"
    async with aiohttp.ClientSession(timeout=_PROBE_TIMEOUT, trust_env=False) as session:
        while True:
            try:
                async with session.get(url) as answer:
                    problem[0] = None if answer.status == 200 else f"the model says {answer.status}"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                problem[0] = f"the model does not answer: {error or type(error).__name__}"
            await asyncio.sleep(_PROBE_S if problem[0] is None else _PROBE_S / 10)


if __name__ == "__main__":
    run_process("hive_executor.small_model_process", SmallModelConfig, main)
