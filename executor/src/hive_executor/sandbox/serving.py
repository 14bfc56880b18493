"""The loop of a runner: it answers the requests of its parent, one guest at a time."""

import gc
import json
import os
import socket
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import wasmtime

from hive_executor.sandbox import confine, frames, model
from hive_executor.sandbox.engine import new_engine
from hive_executor.sandbox.guests import GUESTS, Guest, PythonGuest, Sandbox, bundle_of

_MODULES_MAX: Final = 16
_BUNDLE_CHARS_MAX: Final = 32 * model.MEBIBYTE

# A runner needs a handful of descriptors; the largest file it makes is the image of a module in memory.
_LIMITS: Final = {
    "core": 0,
    "nofile": 128,
    "fsize": 2 * model.MODULE_BYTES_MAX,
    "stack": 8 * model.MEBIBYTE,
    "memlock": 0,
    "msgqueue": 0,
}

_WARM_UP: Final = b"def run(input):\n    return {}\n"
_WARM_UP_LIMITS: Final = model.Limits(wall_ms=10_000, memory_bytes=64 * model.MEBIBYTE, fuel=1 << 40)


class Runner:
    """Answers requests until its parent goes."""

    def __init__(self, channel: socket.socket, stops: int, has_scratch: bool) -> None:
        self._channel = channel
        self._pid = 0
        self._sending = threading.Lock()
        self._sandbox = Sandbox(
            new_engine(),
            lambda lines: self._send(frames.Log(lines)),
            self._ask_host,
            stops,
            has_scratch=has_scratch,
        )
        self._guests: OrderedDict[str, Guest] = OrderedDict()
        self._bundles: OrderedDict[str, str] = OrderedDict()

    def serve(self, pid: int, layers: list[str]) -> None:
        """Work until the parent closes the socket."""
        self._pid = pid
        self._send(frames.Ready(pid, layers))
        while (request := frames.receive_request(self._channel)) is not None:
            if isinstance(request, frames.Load):
                self._load(request)
            else:
                self._send(self._run(request))

    def _send(self, reply: frames.Reply) -> None:
        # Log lines are sent from another thread.
        with self._sending:
            self._channel.sendall(frames.encode(reply))

    def _ask_host(self, call: frames.HostCall) -> frames.HostAnswer:
        self._send(call)
        answer = frames.receive_answer(self._channel)
        if answer is None:
            sys.exit("the executor has gone")
        return answer

    def _load(self, request: frames.Load) -> None:
        files = {"agent.py": _WARM_UP} if request.kind == "python" else {}
        reply = self._run(
            frames.Run(
                request.kind, request.path, request.image_bytes, "", "agent.py", files, b"{}", _WARM_UP_LIMITS
            )
        )
        self._bundles.pop("", None)
        if isinstance(reply, frames.Done) and reply.code:
            raise RuntimeError(f"{request.path} cannot run: {reply.message}")
        self._send(reply if isinstance(reply, frames.Stale) else frames.Ready(self._pid))

    def _run(self, request: frames.Run) -> frames.Reply:
        try:
            guest = self._guest(request.kind, request.path)
        except wasmtime.WasmtimeError as error:
            return frames.Stale(str(error))
        if isinstance(guest, PythonGuest):
            bundle = self._bundle(guest, request)
            if bundle is None:
                return frames.NeedFiles()
            guest.bundle = bundle
        return self._sandbox.run(guest, request)

    def _guest(self, kind: str, path: str) -> Guest:
        guest = self._guests.get(path)
        if guest is None:
            guest = self._guests[path] = GUESTS[kind](self._sandbox, path)
            if len(self._guests) > _MODULES_MAX:
                self._guests.popitem(last=False)
        self._guests.move_to_end(path)
        return guest

    def _bundle(self, guest: PythonGuest, request: frames.Run) -> str | None:
        if request.files is not None:
            code = self._compiled(guest, request, request.files)
            bundle = bundle_of(request.entry, request.files, code=code or {})
            if code is None:
                return bundle
            self._bundles[request.digest] = bundle
            while len(self._bundles) > 1 and sum(map(len, self._bundles.values())) > _BUNDLE_CHARS_MAX:
                self._bundles.popitem(last=False)
        elif request.digest in self._bundles:
            self._bundles.move_to_end(request.digest)
        return self._bundles.get(request.digest)

    def _compiled(self, guest: PythonGuest, request: frames.Run, files: dict[str, bytes]) -> Any:
        """Return the code of an agent, as far as it compiles within the attempt's limits; None once stopped."""
        guest.bundle = bundle_of(request.entry, files, compile=True)
        done = self._sandbox.run(guest, request)
        if done.code == model.CANCELLED:
            return None
        # What is wrong with the sources is said by the attempt itself, which then compiles them again.
        return {} if done.code else json.loads(done.output)


def serve(pid: int, layers: list[str], modules: Path, stops: int, scratch_bytes: int = 0) -> None:
    """Give up what is left to give up, and work until the parent closes the socket on descriptor 0.

    Args:
        pid: the number of this process as its parent sees it.
        layers: those that it has already.
        modules: the one folder that it can still read.
        stops: a descriptor, on which come the numbers of runs that are to end.
        scratch_bytes: what it may have in files of its own.
    """
    channel = socket.socket(fileno=os.dup(0))
    confine.exit_when_closed(channel)
    confine.limit(**_LIMITS | {"fsize": max(_LIMITS["fsize"], scratch_bytes)})
    runner = Runner(channel, stops, scratch_bytes > 0)
    # What exists now lives as long as the process; walking it again after each guest costs time and private pages.
    gc.collect()
    gc.freeze()
    found = confine.close_off(layers, visible=modules, mount_point=Path.cwd(), scratch_bytes=scratch_bytes)
    if scratch_bytes and confine.EMPTY_ROOT not in found:
        sys.exit("this system can give no guest a folder whose size is limited")
    runner.serve(pid, found)
