"""The export of the CPython component: run one agent once, and say how it ended.

The state after this module was imported is what every guest starts from. Each guest is a fresh copy that
serves one call, so nothing here needs to be undone. Because the state is a copy, the seed of string hashes is the
same in all guests; `random` is seeded anew for each.
"""

import _hive_sleep
import _hive_stdlib

_hive_sleep.install()
_hive_stdlib.import_all()

import asyncio  # noqa: E402
import gc  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from inspect import isawaitable  # noqa: E402
from typing import Any  # noqa: E402

import hive  # noqa: E402
import wit_world  # noqa: E402
from _hive_bundle import Bundle, compiled  # noqa: E402
from componentize_py_types import Err  # noqa: E402
from wit_world import Failure, FailureKind  # noqa: E402

_DETAIL_CHARS_MAX = 16_384
_MESSAGE_CHARS_MAX = 1_024
_LINE_BYTES_MAX = 8_192
_PRACTICE_RUNS = 100


class _LogLines(io.RawIOBase):
    """What is printed becomes log lines."""

    def __init__(self, level: str) -> None:
        self._level = level
        self._rest = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        data = bytes(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._rest) > _LINE_BYTES_MAX:
            self.finish()
        return len(data)

    def finish(self) -> None:
        if self._rest:
            self._emit(self._rest)
            self._rest = b""

    def _emit(self, line: bytes) -> None:
        hive.log(line.decode("utf-8", "replace").rstrip("\r"), level=self._level)


def _printing_to(lines: _LogLines) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(lines), "utf-8", "backslashreplace", line_buffering=True)


# Made here and not for each guest, because all of them get a copy.
_OUTPUTS = [(_printing_to(lines), lines) for lines in (_LogLines("info"), _LogLines("warning"))]
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class _SleepSelector:
    """Stands where asyncio waits for sockets. There are none here, so waiting is sleeping."""

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("asyncio waits for something that nothing in this sandbox can bring about")
        time.sleep(timeout)
        return []

    def close(self) -> None:
        pass


class _TimerLoop(asyncio.BaseEventLoop):
    """An event loop with tasks and timers, which is all of asyncio that works without sockets."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _SleepSelector()

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class _TimerPolicy(asyncio.AbstractEventLoopPolicy):
    """Makes `asyncio.run` use `_TimerLoop`."""

    _loop: asyncio.AbstractEventLoop | None = None

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("there is no current event loop")
        return self._loop

    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _TimerLoop()


def _failed(kind: FailureKind, message: str, detail: str = "") -> Err:
    return Err(Failure(kind, _text(message)[:_MESSAGE_CHARS_MAX], _text(detail)[-_DETAIL_CHARS_MAX:]))


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _chain(error: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _traceback(error: BaseException) -> str:
    """Return the traceback without the frames of this runtime and of the import machinery."""
    shown = traceback.TracebackException.from_exception(error)
    for part in _chain(shown):
        part.stack = traceback.StackSummary.from_list(
            [frame for frame in part.stack if not _is_runtime(frame.filename)]
        )
    return "".join(shown.format())


def _is_runtime(filename: str) -> bool:
    return "_hive_" in filename or filename.startswith("<frozen importlib") or "/importlib/" in filename


def _summary(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the agent's own exceptions may fail even here
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _call(bundle_json: str, input_json: str) -> Any:
    described = json.loads(bundle_json)
    if described.get("compile"):
        return compiled(described["files"])
    bundle = Bundle(described["entry"], described["files"], described.get("code", {}))
    bundle.install()
    module = bundle.load_entry()
    run = getattr(module, "run", None)
    if not callable(run):
        raise _failed(
            FailureKind.AGENT_ERROR,
            f"{bundle.entry} defines no function `run`; expected `def run(input: dict) -> dict`",
        )
    result = run(json.loads(input_json))
    return asyncio.run(_awaited(result)) if isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _encoded(result: Any) -> str:
    if not isinstance(result, dict):
        raise _failed(
            FailureKind.INVALID_OUTPUT,
            f"run() returned {type(result).__name__}; expected a dict that can be written as JSON",
        )
    try:
        return _ENCODER.encode(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise _failed(
            FailureKind.INVALID_OUTPUT, f"what run() returned cannot be written as JSON: {_summary(error)}"
        ) from None


class WitWorld(wit_world.WitWorld):
    """Implements the world `python-runtime`."""

    def run(self, bundle: str, input: str) -> str:
        """Run an agent, or compile it; see `agent.wit`."""
        random.seed(int.from_bytes(os.urandom(16), "little"))
        try:
            return _encoded(_call(bundle, input))
        except Err:
            raise
        except MemoryError as error:
            detail = _traceback(error)
            raise _failed(
                FailureKind.MEMORY_EXCEEDED, "the agent asked for more memory than its limit", detail
            ) from None
        except BaseException as error:  # noqa: BLE001 - whatever an agent raises is its outcome
            raise _failed(FailureKind.AGENT_ERROR, _summary(error), _traceback(error)) from None
        finally:
            for stream, lines in _OUTPUTS:
                stream.flush()
                lines.finish()


def _practise() -> None:
    """Run small agents, so that the interpreter has specialised the code on the way before its state is copied.

    Otherwise each guest does that again, and writes to the pages on which this code lies.
    """
    files = {"agent.py": "def run(input):\n    return {}\n"}
    bundle = json.dumps({"entry": "agent.py", "files": files, "code": compiled(files)})
    finders = sys.meta_path.copy()
    for _ in range(_PRACTICE_RUNS):
        WitWorld.run(None, bundle, '{"n": [1, 2.5, "x", null]}')
        sys.meta_path[:] = finders
        del sys.modules["agent"]


def _settle() -> None:
    """Leave the interpreter as every guest shall find it."""
    asyncio.set_event_loop_policy(_TimerPolicy())
    sys.stdout, sys.stderr = (stream for stream, _ in _OUTPUTS)
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    sys.argv = [""]
    # There are no files: looking for them would only turn a missing module into a slow error.
    sys.path.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__name__ != "PathFinder"]
    sys.path_importer_cache.clear()
    _practise()
    gc.collect()
    # Objects that live for ever are not walked again, which keeps their pages shared between guests.
    gc.freeze()


_settle()
