"""Checks and compiles one module: `python -m hive_executor.sandbox.compile_child KIND MODULE OUTPUT`.

Compiling is where a hostile module can hurt most (time, memory, defects of the compiler), so it happens in a
process of its own with limits, which sees neither files nor network once it has read the module (where the system
can do that). It writes machine code to OUTPUT and one JSON line to stdout. Start it in an empty folder.
"""

import sys
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import wasmtime
from wasmtime import component

from hive_executor.sandbox import confine, model
from hive_executor.sandbox.engine import INSTANCES_MAX, MEMORIES_MAX, TABLE_ELEMENTS_MAX, TABLES_MAX, new_engine
from hive_executor.sandbox.guests import HOST_INTERFACES, LOG_INTERFACE, new_component_linker

_WASI_PREVIEW1: Final = "wasi_snapshot_preview1"
_LIMITS: Final = {
    "core": 0,
    "cpu": 120,
    "data": 2048 * model.MEBIBYTE,
    "fsize": 8 * model.MODULE_BYTES_MAX,
    "nofile": 256,
}


class Report(msgspec.Struct, frozen=True):
    """What the child found: `error` is empty when OUTPUT is good."""

    error: str = ""
    image_bytes: int = 0


class Refused(Exception):
    """The module is not one that can be run here; the text says why."""


def main(kind: str, wasm: bytes, output: BinaryIO) -> Report:
    """Compile `wasm` for `kind`."""
    engine = new_engine()
    try:
        if kind == "command":
            output.write(_compile_command(engine, wasm))
            return Report()
        compiled = component.Component(engine, wasm)
        _check_component(engine, compiled, kind)
        output.write(compiled.serialize())
        return Report(image_bytes=_image_bytes(engine, compiled) if kind == "python" else 0)
    except (wasmtime.WasmtimeError, Refused) as error:
        return Report(error=str(error)[: model.MESSAGE_CHARS_MAX])


def _compile_command(engine: wasmtime.Engine, wasm: bytes) -> bytes:
    module = wasmtime.Module(engine, wasm)
    foreign = sorted({f"{item.module}.{item.name}" for item in module.imports if item.module != _WASI_PREVIEW1})
    if foreign:
        raise Refused(f"imports {', '.join(foreign[:5])}; a command may import only {_WASI_PREVIEW1}")
    start = next((item.type for item in module.exports if item.name == "_start"), None)
    if not isinstance(start, wasmtime.FuncType) or start.params or start.results:
        raise Refused("exports no function `_start` without parameters and results, as a WASI command does")
    return bytes(module.serialize())


def _check_component(engine: wasmtime.Engine, compiled: component.Component, kind: str) -> None:
    imports = compiled.type.imports(engine)
    known = (LOG_INTERFACE, *HOST_INTERFACES)
    foreign = sorted(name for name in imports if not name.startswith("wasi:") and name not in known)
    if foreign:
        raise Refused(
            f"imports {', '.join(foreign[:5])}, which nobody grants; expected wasi:* and {', '.join(known)}"
        )
    exported = compiled.type.exports(engine).get("run")
    run = exported.ty if exported is not None else None
    if not isinstance(run, component.FuncType):
        raise Refused("exports no function `run`, as the world hive:agent/agent does")
    result = run.result
    count = 2 if kind == "python" else 1
    fits = (
        [type(kind_) for _, kind_ in run.params] == [component.String] * count
        and isinstance(result, component.ResultType)
        and isinstance(result.ok, component.String)
        and (kind == "python" or isinstance(result.err, component.String))
    )
    if not fits:
        raise Refused("`run` has another type than run: func(input: string) -> result<string, string>")


def _image_bytes(engine: wasmtime.Engine, compiled: component.Component) -> int:
    """Return the smallest limit with which the component starts, which is the size of its initial memory."""
    linker = new_component_linker(engine, lambda *_: None, lambda *_: None)
    low, high = 0, 1 << 16
    while low < high:
        pages = (low + high) // 2
        store = wasmtime.Store(engine)
        store.set_fuel(1 << 40)
        store.set_epoch_deadline(1)
        store.set_wasi(wasmtime.WasiConfig())
        store.set_limits(pages << 16, TABLE_ELEMENTS_MAX, INSTANCES_MAX, TABLES_MAX, MEMORIES_MAX)
        try:
            linker.instantiate(store, compiled)
            high = pages
        except wasmtime.WasmtimeError:
            low = pages + 1
        store.close()
    return low << 16


if __name__ == "__main__":
    layers = confine.isolate()
    confine.die_with_parent()
    confine.limit(**_LIMITS)
    module = Path(sys.argv[2]).read_bytes()
    with Path(sys.argv[3]).open("wb") as file:
        confine.close_off(layers, visible=None, mount_point=Path.cwd())
        report = main(sys.argv[1], module, file)
    print(msgspec.json.encode(report).decode())
