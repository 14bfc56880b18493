"""Runs guests in WebAssembly, each in a process that may be killed.

    pool = RunnerPool(size=2, cache_dir=cache)
    await pool.start()
    outcome = await pool.run(program, b'{"n": 3}', limits)

The names below are loaded when they are first used, because runner processes live in this package too and must not
pay for what only their parent needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hive_executor.sandbox.compiler import prepare, prepare_python_runtime
    from hive_executor.sandbox.errors import InvalidModule
    from hive_executor.sandbox.host import Capabilities, Capability
    from hive_executor.sandbox.model import Limits, LogLine, Outcome, Program, shown
    from hive_executor.sandbox.pool import RunnerPool

__all__ = [
    "Capabilities",
    "Capability",
    "InvalidModule",
    "Limits",
    "LogLine",
    "Outcome",
    "Program",
    "RunnerPool",
    "prepare",
    "prepare_python_runtime",
    "shown",
]

_HOMES = {
    "Capabilities": "host",
    "Capability": "host",
    "InvalidModule": "errors",
    "Limits": "model",
    "LogLine": "model",
    "Outcome": "model",
    "Program": "model",
    "RunnerPool": "pool",
    "prepare": "compiler",
    "prepare_python_runtime": "compiler",
    "shown": "model",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
