"""The WebAssembly engine and its settings, which are part of the key of every compiled module."""

import functools
import hashlib
import platform
from typing import Final

import wasmtime

# Below this a guest can escape its preopened directories (fixed in 50.0.1, August 2026).
VERSION_FLOOR: Final = (50, 0, 1)

# Wasm frames live on the stack of the runner's main thread, which has 8 MiB. The engine aborts the process when
# this is more than its async stack size, 2 MiB.
WASM_STACK_BYTES: Final = 2 << 20

# What a store may hold. CPython as a component needs 14 instances, 2 tables, 5,700 elements and one memory.
INSTANCES_MAX: Final = 64
TABLES_MAX: Final = 16
TABLE_ELEMENTS_MAX: Final = 200_000
MEMORIES_MAX: Final = 4

# Proposals that agents do not need, or whose resources the store's limits do not count.
_OFF: Final = (
    "wasm_threads",
    "shared_memory",
    "wasm_memory64",
    "wasm_multi_memory",
    "wasm_gc",
    "wasm_function_references",
    "wasm_exceptions",
    "wasm_stack_switching",
    "wasm_relaxed_simd",
    "gc_support",
)


@functools.cache
def engine_version() -> str:
    """Return the version of the installed engine."""
    # Costs a runner megabytes at import, and runners are started by a process that has checked.
    from importlib.metadata import version

    return version("wasmtime")


def require_version() -> None:
    """Refuse to go on with an engine that has a known hole.

    Raises:
        RuntimeError: the installed wasmtime is older than `VERSION_FLOOR`.
    """
    found = tuple(int(part) for part in engine_version().split(".")[:3])
    if found < VERSION_FLOOR:
        floor = ".".join(map(str, VERSION_FLOOR))
        raise RuntimeError(f"wasmtime {engine_version()} is installed; expected {floor} or newer")


def new_engine() -> wasmtime.Engine:
    """Return an engine that meters fuel and can be interrupted; all compiled modules belong to such a one."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.consume_fuel = True
    config.max_wasm_stack = WASM_STACK_BYTES
    for name in _OFF:
        setattr(config, name, False)
    return wasmtime.Engine(config)


def fingerprint() -> str:
    """Return a short digest of everything that makes compiled code fit: version, settings, machine."""
    facts = (
        engine_version(),
        "epoch,fuel",
        str(WASM_STACK_BYTES),
        *_OFF,
        platform.system(),
        platform.machine(),
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
