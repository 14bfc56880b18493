"""Running guests inside a runner: one store per attempt, every limit set, nothing of the host granted."""

import base64
import ctypes
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import wasmtime
from hive_common.kernel.errors import PayloadTooLarge
from wasmtime import _ffi as ffi
from wasmtime import component

from hive_executor.sandbox import confine, model
from hive_executor.sandbox.attempt import Attempt, GuestLog, Interrupter, LineStream
from hive_executor.sandbox.engine import INSTANCES_MAX, MEMORIES_MAX, TABLE_ELEMENTS_MAX, TABLES_MAX
from hive_executor.sandbox.frames import Done, HostAnswer, HostCall, Run

LOG_INTERFACE: Final = "hive:agent/log@0.1.0"
HOST_INTERFACES: Final = {
    "hive:agent/model@0.1.0": ("model", ("chat", "complete", "embed")),
    "hive:agent/http@0.1.0": ("http", ("request",)),
    "hive:agent/kv@0.1.0": ("kv", ("get", "keys", "put", "delete")),
    "hive:agent/fork@0.1.0": ("fork", ("create",)),
    "hive:agent/progress@0.1.0": ("progress", ("mark",)),
}
"""What agents may import besides: the permission it takes, and its functions, each `func(request: string) ->
result<string, failure>`."""

# A guest that ends within this distance of its limit is taken to have been refused memory.
_NEAR_LIMIT_BYTES: Final = model.MEBIBYTE
_FUEL_MAX: Final = (1 << 64) - 1

_PYTHON_FAILURES: Final = {
    "agent-error": model.AGENT_ERROR,
    "invalid-output": model.INVALID_OUTPUT,
    "memory-exceeded": model.MEMORY_EXCEEDED,
}


class GuestFailed(Exception):
    """A guest ended with a code."""

    def __init__(self, code: str, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message[: model.MESSAGE_CHARS_MAX]
        self.detail = detail[-model.DETAIL_CHARS_MAX :]


class Usage:
    """What an attempt has used; filled in while it ends, however it ends."""

    fuel_used = 0
    memory_bytes: int | None = None


class Guest(Protocol):
    """A loaded module that can run attempts."""

    def run(self, request: Run, attempt: Attempt, usage: Usage) -> bytes:
        """Run once and return the output.

        Raises:
            GuestFailed: it ended in any other way.
            wasmtime.WasmtimeError, wasmtime.Trap: the engine ended it.
        """
        ...


def bundle_of(entry: str, files: dict[str, bytes], **more: Any) -> str:
    """Return the JSON text in which the sources of a Python agent enter the guest.

    Args:
        more: `compile=True` to get what belongs into `code`, `code` to have it run without compiling it again.
    """

    def content(data: bytes) -> str | dict[str, str]:
        try:
            return data.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(data).decode()}

    return json.dumps({"entry": entry, "files": {path: content(data) for path, data in files.items()}, **more})


class Sandbox:
    """The engine of a runner with its linkers. Guests are loaded from compiled modules.

    Args:
        send_log: takes the lines of a guest.
        ask_host: passes a host call on and waits for its answer.
        stops: a pipe with the numbers of runs that are to end.
        has_scratch: guests find a folder in which they can make files.
    """

    def __init__(
        self,
        engine: wasmtime.Engine,
        send_log: Callable[[list[model.LogLine]], None],
        ask_host: Callable[[HostCall], HostAnswer],
        stops: int,
        *,
        has_scratch: bool = False,
    ) -> None:
        self.engine = engine
        self._has_scratch = has_scratch
        self.interrupter = Interrupter(engine, stops)
        self._send_log = send_log
        self._ask_host = ask_host
        self._attempt: Attempt | None = None
        self.component_linker = new_component_linker(engine, self._write_log, self._call_host)
        self.command_linker = wasmtime.Linker(engine)
        self.command_linker.define_wasi()

    def _write_log(self, _store: Any, level: model.Level, message: str) -> None:
        if self._attempt is not None:
            self._attempt.log.write(level, message)

    def _call_host(self, capability: str, operation: str, _store: Any, request: str) -> Any:
        if self._attempt is None:
            raise wasmtime.WasmtimeError("nothing runs that could ask")
        self.interrupter.leave()
        answer = self._asked(HostCall(capability, operation, request))
        self.interrupter.back(answer.stood_ms / 1000)
        if answer.ends:
            self._attempt.refused = answer
            # Of all exceptions only this one ends the guest without being remembered for the next.
            raise wasmtime.WasmtimeError(answer.message)
        if not answer.code:
            return answer.answer
        failure = component.Record()
        failure.__dict__.update(code=answer.code, message=answer.message)
        return failure

    def _asked(self, call: HostCall) -> HostAnswer:
        # In UTF-8 a character takes up to four bytes; the parent counts exactly.
        if len(call.request) > model.HOST_REQUEST_BYTES_MAX:
            return HostAnswer(
                code=PayloadTooLarge.code,
                message=f"the request is larger than {model.HOST_REQUEST_BYTES_MAX} bytes",
            )
        return self._ask_host(call)

    def store(self, request: Run, memories: int, wasi: wasmtime.WasiConfig) -> wasmtime.Store:
        """Return a fresh store with all limits of `request`.

        Raises:
            GuestFailed: the attempt was stopped before it began.
        """
        if self._has_scratch:
            wasi.preopen_dir(confine.SCRATCH, confine.SCRATCH)
        store = wasmtime.Store(self.engine)
        store.set_fuel(min(request.limits.fuel, _FUEL_MAX))
        store.set_epoch_deadline(1)
        # What stopped it before this line has not been noticed by this store.
        if self._attempt is not None and self._attempt.stopped_by:
            raise _stopped(self._attempt.stopped_by, request.limits)
        store.set_limits(
            memory_size=request.image_bytes + request.limits.memory_bytes,
            table_elements=TABLE_ELEMENTS_MAX,
            instances=INSTANCES_MAX,
            tables=TABLES_MAX,
            memories=memories,
        )
        store.set_wasi(wasi)
        return store

    def run(self, guest: Guest, request: Run) -> Done:
        """Run an attempt to its end; never raises for what a guest does."""
        started = time.monotonic()
        limits = request.limits
        log = GuestLog(limits.log_bytes, self._send_log)
        attempt = Attempt(request.number, started + limits.wall_ms / 1000, log)
        usage = Usage()
        confine.allow_data_growth(model.host_bytes(limits, request.image_bytes))
        self._attempt = attempt
        self.interrupter.begin(attempt)
        failure, output = None, b""
        try:
            output = guest.run(request, attempt, usage)
        except GuestFailed as error:
            failure = error
        except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
            failure = _explain(error, usage, request)
        finally:
            self.interrupter.end()
            self._attempt = None
        log.flush()
        if attempt.refused is not None:
            failure = GuestFailed(attempt.refused.code, attempt.refused.message)
        elif attempt.stopped_by:
            failure = _stopped(attempt.stopped_by, limits)
        elif failure is None:
            failure = _judge_output(output, limits)
        return Done(
            code=failure.code if failure else "",
            message=failure.message if failure else "",
            detail=failure.detail if failure else "",
            output=b"" if failure else output,
            log_truncated=log.truncated,
            wall_us=int((time.monotonic() - started - attempt.stood_s) * 1e6),
            fuel_used=usage.fuel_used,
            memory_peak_bytes=usage.memory_bytes,
        )


def new_component_linker(
    engine: wasmtime.Engine, write_log: Callable[..., None], call_host: Callable[..., Any]
) -> component.Linker:
    """Return a linker with WASI 0.2 (whose context grants nothing), the log, and the way to ask the host.

    Args:
        call_host: takes the permission, the name of the function, the store and the request.
    """
    linker = component.Linker(engine)
    linker.add_wasip2()
    with linker.root() as root:
        with root.add_instance(LOG_INTERFACE) as log:
            log.add_func("write", write_log)
        for interface, (permission, functions) in HOST_INTERFACES.items():
            with root.add_instance(interface) as instance:
                for function in functions:
                    instance.add_func(function, partial(call_host, permission, function))
    return linker


class CommandGuest:
    """A WASI preview 1 program: JSON on stdin, JSON on stdout, log lines on stderr."""

    def __init__(self, sandbox: Sandbox, path: str) -> None:
        self._sandbox = sandbox
        self._module = wasmtime.Module.deserialize_file(sandbox.engine, path)
        self._linked: wasmtime.InstancePre | None = None

    def run(self, request: Run, attempt: Attempt, usage: Usage) -> bytes:
        """Run `_start` once."""
        sandbox = self._sandbox
        output = bytearray()
        stderr = LineStream(attempt.log, "info")
        room = request.limits.output_bytes

        def take(data: bytes) -> int:
            taken = min(len(data), room - len(output))
            output.extend(data[:taken])
            if taken < len(data):
                sandbox.interrupter.stop(model.OUTPUT_EXCEEDED)
            return taken

        wasi = wasmtime.WasiConfig()
        _set_stdin(wasi, request.input)
        wasi.stdout_custom = take
        wasi.stderr_custom = stderr.write
        store = sandbox.store(request, 1, wasi)
        exports: Any = {}
        try:
            if self._linked is None:
                self._linked = sandbox.command_linker.instantiate_pre(self._module)
            exports = self._linked.instantiate(store).exports(store)
            exports["_start"](store)
        except wasmtime.ExitTrap as exit_:
            if exit_.code != 0:
                stderr.finish()
                raise GuestFailed(
                    model.AGENT_ERROR,
                    f"the program exited with code {exit_.code}",
                    stderr.tail,
                ) from None
        finally:
            stderr.finish()
            usage.fuel_used = request.limits.fuel - store.get_fuel()
            memory = exports.get("memory") if exports else None
            if isinstance(memory, wasmtime.Memory):
                usage.memory_bytes = memory.data_len(store)
            store.close()
        return bytes(output)


class ComponentGuest:
    """A component: of the world `agent`, or CPython when it is called with a bundle."""

    def __init__(self, sandbox: Sandbox, path: str) -> None:
        self._sandbox = sandbox
        self._component = component.Component.deserialize_file(sandbox.engine, path)

    def run(self, request: Run, attempt: Attempt, usage: Usage) -> bytes:
        """Call the export `run` with the input."""
        result = self._call(request, attempt, usage, _text(request.input))
        if result.tag == "err":
            raise GuestFailed(model.AGENT_ERROR, result.payload.split("\n", 1)[0], result.payload)
        return _output(result.payload)

    def _call(self, request: Run, attempt: Attempt, usage: Usage, *arguments: str) -> Any:
        sandbox = self._sandbox
        stdout, stderr = LineStream(attempt.log, "info"), LineStream(attempt.log, "warning")
        wasi = wasmtime.WasiConfig()
        wasi.stdout_custom = stdout.write
        wasi.stderr_custom = stderr.write
        store = sandbox.store(request, MEMORIES_MAX, wasi)
        before = confine.data_bytes()
        try:
            run = sandbox.component_linker.instantiate(store, self._component).get_func(store, "run")
            if run is None:
                raise GuestFailed(model.INVALID_MODULE, "the component exports no function `run`")
            return run(store, *arguments)
        except wasmtime.ExitTrap as exit_:
            raise GuestFailed(
                model.AGENT_ERROR,
                f"the agent exited with code {exit_.code} instead of returning",
                stderr.tail,
            ) from None
        finally:
            stdout.finish()
            stderr.finish()
            usage.fuel_used = request.limits.fuel - store.get_fuel()
            after = confine.data_bytes()
            if before is not None and after is not None:
                usage.memory_bytes = max(after - before - request.image_bytes, 0)
            store.close()


class PythonGuest(ComponentGuest):
    """The shared CPython component."""

    bundle = ""

    def run(self, request: Run, attempt: Attempt, usage: Usage) -> bytes:
        """Run the agent in `bundle`."""
        result = self._call(request, attempt, usage, self.bundle, _text(request.input))
        if isinstance(result, str):
            return _output(result)
        raise GuestFailed(_PYTHON_FAILURES[result.kind], result.message, result.detail)


GUESTS: Final[dict[str, Callable[[Sandbox, str], Guest]]] = {
    "command": CommandGuest,
    "component": ComponentGuest,
    "python": PythonGuest,
}


def _set_stdin(wasi: wasmtime.WasiConfig, data: bytes) -> None:
    # The public way is a file; this call of the C API takes the bytes and saves its round trip.
    vector = ffi.wasm_byte_vec_t()
    content = (ffi.wasm_byte_t * len(data)).from_buffer_copy(data)
    ffi.wasm_byte_vec_new(ctypes.byref(vector), len(data), content)
    ffi.wasi_config_set_stdin_bytes(wasi.ptr(), ctypes.byref(vector))


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise GuestFailed(model.AGENT_ERROR, f"the input is not UTF-8: {error}") from None


def _output(text: str) -> bytes:
    return text.encode()


def _judge_output(output: bytes, limits: model.Limits) -> GuestFailed | None:
    if len(output) > limits.output_bytes:
        return _stopped(model.OUTPUT_EXCEEDED, limits)
    try:
        msgspec.json.decode(output)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        start = output[:80].decode("utf-8", "replace")
        return GuestFailed(model.INVALID_OUTPUT, f"the output is not JSON ({error}); it starts with {start!r}")
    return None


def _stopped(code: str, limits: model.Limits) -> GuestFailed:
    if code == model.TIMEOUT:
        return GuestFailed(code, f"still running after its limit of {limits.wall_ms} ms")
    if code == model.CANCELLED:
        return GuestFailed(code, "it was cancelled")
    return GuestFailed(code, f"more output than its limit of {limits.output_bytes} bytes")


def _explain(error: Exception, usage: Usage, request: Run) -> GuestFailed:
    """Say which limit, if any, stands behind what the engine reports."""
    text = str(error)
    limits = request.limits
    last_line = text.strip().rpartition("\n")[2].strip()
    if usage.fuel_used >= limits.fuel or last_line.endswith("all fuel consumed by WebAssembly"):
        return GuestFailed(model.FUEL_EXHAUSTED, f"used up its fuel of {limits.fuel}", text)
    memory_message = f"needs more memory than its limit of {limits.memory_bytes} bytes"
    if "exceeds memory limits" in last_line:
        return GuestFailed(model.MEMORY_EXCEEDED, memory_message, text)
    trapped = isinstance(error, wasmtime.Trap) or "wasm trap:" in last_line
    if not trapped and usage.fuel_used == 0:
        return GuestFailed(model.INVALID_MODULE, last_line, text)
    if usage.memory_bytes is not None and usage.memory_bytes > limits.memory_bytes - _NEAR_LIMIT_BYTES:
        return GuestFailed(model.MEMORY_EXCEEDED, memory_message, text)
    return GuestFailed(model.TRAP, last_line, text)
