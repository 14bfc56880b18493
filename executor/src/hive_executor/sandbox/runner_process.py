"""The parent's side of one runner process."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Final, cast

import msgspec
from hive_common.kernel.errors import Unavailable

from hive_executor.sandbox import frames
from hive_executor.sandbox.cache import Compiled
from hive_executor.sandbox.cgroups import Group
from hive_executor.sandbox.compiler import child_environment
from hive_executor.sandbox.model import (
    CANCELLED,
    HOST_REQUEST_BYTES_MAX,
    MEBIBYTE,
    RUNNER_BYTES,
    Limits,
    LogLine,
    Program,
    host_bytes,
)

START_S_MAX: Final = 30.0
_STDERR_TAIL_BYTES: Final = 8_192
_REAP_S: Final = 5.0
_KEEPER_S_MAX: Final = 1.0
"""A keeper that was told to end its runner has done so by then, or is killed with it."""


_leaving: set[asyncio.Task[None]] = set()
_ENDS: Final = frames.HostAnswer(code=CANCELLED, message="the attempt was cancelled", ends=True)


class RunnerGone(Exception):
    """The runner ended, or spoke nonsense and was ended; the text says what is known."""


class _Unasked(Exception):
    """The runner says what nobody asked it."""


OnCall = Callable[[frames.HostCall], Awaitable[frames.HostAnswer]]


class _Channel(asyncio.Protocol):
    """Receives the replies of one runner.

    Attributes:
        owes_reply: it was asked something, and has not answered.
        left: the call that the guest waited for when nobody waited for its end any more; it has been cancelled.
        on_lost: called once when the runner has ended.
    """

    def __init__(self) -> None:
        self._buffer = frames.ReplyBuffer()
        self._reply: asyncio.Future[frames.Reply] | None = None
        self.owes_reply = False
        self._is_left = False
        self._ended: asyncio.Future[None] | None = None
        self.left: asyncio.Task[None] | None = None
        self._on_log: Callable[[list[LogLine]], None] | None = None
        self._on_call: OnCall | None = None
        self._calling: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self.lost = False
        self.why = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for reply in self._buffer.feed(data):
                self._take(reply)
        except (frames.FrameTooLarge, msgspec.MsgspecError, _Unasked) as error:
            self.why = f"the runner broke the protocol: {error}"
            self.abort()

    def _take(self, reply: frames.Reply) -> None:
        if isinstance(reply, frames.Log):
            if self._on_log is not None:
                self._on_log(reply.lines)
        elif isinstance(reply, frames.HostCall):
            if self._is_left:
                self._end_guest()
                return
            if self._on_call is None or self._calling is not None:
                raise _Unasked("a host call of no guest, or a second one before the answer to the first")
            self._calling = asyncio.get_running_loop().create_task(self._answer(self._on_call, reply))
        elif self._calling is not None:
            raise _Unasked("the end of a guest that waits for the host")
        else:
            self.owes_reply = self._is_left = False
            if self._reply is not None and not self._reply.done():
                self._reply.set_result(reply)
            self._say_ended()

    async def _answer(self, on_call: "OnCall", call: frames.HostCall) -> None:
        answer = await on_call(call)
        # One that was cancelled and answers all the same would answer another guest.
        if self._calling is asyncio.current_task():
            self._calling = None
            if self._transport is not None:
                self._transport.write(frames.encode(answer))

    def _leave(self) -> None:
        """Nobody waits for what the runner owes. What the guest asks for, or will ask for, ends it."""
        self._is_left = True
        if (calling := self._calling) is not None:
            self._calling, self.left = None, calling
            calling.cancel()
            _leaving.add(calling)
            calling.add_done_callback(_leaving.discard)
            self._end_guest()

    def _end_guest(self) -> None:
        # After this answer an honest guest asks for nothing more.
        self._is_left = False
        if self._transport is not None:
            self._transport.write(frames.encode(_ENDS))

    def _say_ended(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(RunnerGone(self.why or "the runner ended"))
        self._say_ended()
        self.on_lost()

    async def ask(
        self,
        request: frames.Request | None,
        bytes_max: int,
        on_log: Callable[[list[LogLine]], None] | None = None,
        on_call: OnCall | None = None,
    ) -> frames.Reply:
        """Send a request and wait for its reply; log lines and host calls that come before go elsewhere."""
        if self.lost:
            raise RunnerGone(self.why or "the runner ended")
        assert self._transport is not None
        self._buffer.bytes_max = bytes_max
        self._on_log = on_log
        self._on_call = on_call
        self.owes_reply = True
        self._reply = asyncio.get_running_loop().create_future()
        if request is not None:
            self._transport.write(frames.encode(request))
        try:
            return await self._reply
        finally:
            self._reply = None
            self._on_log = None
            self._on_call = None
            if self.owes_reply:
                self._leave()

    async def ended(self, seconds: float) -> bool:
        """Say whether what nobody waits for any more ends within this time; what else is said has no effect."""
        if self.owes_reply and not self.lost:
            self._ended = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._ended}, timeout=seconds)
            self._ended = None
        return not self.owes_reply and not self.lost

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()


class RunnerProcess:
    """One runner. Use `start`; after `RunnerGone` or a timeout only `kill` may follow.

    After a `run` that was cancelled `stop` may come first, and another `run` if that says so.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: _Channel,
        stops: IO[bytes],
        stderr: IO[bytes],
        group: Group | None,
        scratch_bytes: int,
    ) -> None:
        self._process = process
        self._channel = channel
        self._stops = stops
        self._stderr = stderr
        self._group = group
        self.scratch_bytes = scratch_bytes
        self._pid = process.pid
        self._programs: set[str] = set()
        self._running = ""
        self.runs = 0
        self.said = ""
        self.layers: tuple[str, ...] = ()

    @classmethod
    async def start(
        cls,
        folder: Path,
        modules: Path,
        group: Group | None,
        on_lost: Callable[["RunnerProcess"], None],
        scratch_bytes: int = 0,
    ) -> "RunnerProcess":
        """Start a runner and wait until it is ready.

        Args:
            modules: the folder with compiled modules, the only one it can read where the system can see to that.
            folder: an empty directory for it to be in.
            group: the cgroup that it is to be in, which goes with it.
            on_lost: called once when it has ended, for whatever reason.
            scratch_bytes: of files that guests may make in it; with any, one guest only should run there.

        Raises:
            Unavailable: it did not come up; the message carries its last words.
        """
        # Without a name, so that nothing stays behind however this process ends.
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        stops = os.fdopen(writer, "wb", buffering=0)
        try:
            with theirs, os.fdopen(reader):
                process = _spawn(theirs, reader, folder, modules, group, stderr, scratch_bytes)
        except OSError as error:
            ours.close()
            stops.close()
            stderr.close()
            if group is not None:
                group.remove()
            raise Unavailable(f"cannot start a runner: {error}") from error
        channel = _Channel()
        runner = cls(process, channel, stops, stderr, group, scratch_bytes)
        try:
            ours.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
            async with asyncio.timeout(START_S_MAX):
                ready = await channel.ask(None, MEBIBYTE)
        except (RunnerGone, TimeoutError):
            await runner.kill()
            raise Unavailable(f"a runner did not come up: {runner.said or 'it said nothing'}") from None
        except BaseException:
            ours.close()
            await asyncio.shield(asyncio.create_task(runner.kill()))
            raise
        assert isinstance(ready, frames.Ready)
        runner._pid = ready.pid
        runner.layers = tuple(ready.layers)
        channel.on_lost = lambda: on_lost(runner)
        return runner

    @property
    def pid(self) -> int:
        """Return its process id; that of its keeper before it is ready."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Say whether it can take work."""
        return not self._channel.lost

    def last_words(self) -> str:
        """Return the end of what it wrote to stderr: a panic of the engine, or a defect of ours."""
        if self._stderr.closed:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(size - _STDERR_TAIL_BYTES, 0)
        return os.pread(self._stderr.fileno(), size - start, start).decode("utf-8", "replace").strip()

    async def load(self, kind: frames.Kind, compiled: Compiled) -> None:
        """Have it load a module before the first guest needs it.

        Raises:
            RunnerGone: it did not manage to.
        """
        try:
            async with asyncio.timeout(START_S_MAX):
                await self._channel.ask(frames.Load(kind, str(compiled.path), compiled.image_bytes), MEBIBYTE)
        except TimeoutError:
            self._channel.abort()
            raise RunnerGone(f"the runner did not load {compiled.path.name} in {START_S_MAX:.0f} s") from None

    async def run(
        self,
        program: Program,
        compiled: Compiled,
        input_: bytes,
        limits: Limits,
        on_log: Callable[[list[LogLine]], None],
        on_call: OnCall,
    ) -> frames.Done | frames.Stale:
        """Run a guest. There is no deadline here: whoever calls must have one, and then `kill`.

        Raises:
            RunnerGone: it ended meanwhile.
        """
        self.runs += 1
        self._running = program.digest
        self._limit_group(RUNNER_BYTES + host_bytes(limits, compiled.image_bytes) + self.scratch_bytes)
        bytes_max = max(limits.output_bytes + 2 * limits.log_bytes, HOST_REQUEST_BYTES_MAX) + MEBIBYTE
        known = program.digest in self._programs
        while True:
            request = frames.Run(
                program.runtime,
                str(compiled.path),
                compiled.image_bytes,
                program.digest,
                program.entry,
                None if known else program.files,
                input_,
                limits,
                self.runs,
            )
            reply = await self._channel.ask(request, bytes_max, on_log, on_call)
            if isinstance(reply, frames.NeedFiles) and known:
                known = False
                self._programs.discard(program.digest)
                continue
            if not isinstance(reply, frames.Done | frames.Stale):
                raise RunnerGone(f"the runner answered {type(reply).__name__} to Run")
            self._programs.add(program.digest)
            return reply

    async def stop(self, seconds: float) -> bool:
        """End the guest of a `run` that was cancelled; say whether the runner is ready for the next one in time."""
        if self._channel.owes_reply and not self._stops.closed:
            # The pipe is full when nobody reads it, and broken when the runner has gone.
            with contextlib.suppress(OSError):
                self._stops.write(frames.stop(self.runs))
        if not await self._channel.ended(seconds):
            return False
        # It has the program now, or asks for it.
        self._programs.add(self._running)
        return True

    def call_left(self) -> "asyncio.Task[None] | None":
        """Return, once, the call that the last guest left behind; it has been cancelled."""
        call, self._channel.left = self._channel.left, None
        return call

    def _limit_group(self, memory_bytes: int) -> None:
        if self._group is not None:
            # Version 1 refuses a limit below what is in use; then the one before stays.
            with contextlib.suppress(OSError):
                self._group.limit_memory(memory_bytes)

    def pause(self) -> None:
        """Have it stand still: nothing of a guest runs until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        # Its keeper reaps it, and goes too then; as long as that one is there, the id is nobody else's.
        if self.alive and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    async def kill(self) -> None:
        """End the process now, and reap it. Its last words stay in `said`."""
        # The keeper is the one that can end and reap it without a doubt about which process that is.
        if self._pid == self._process.pid and self.layers:
            self._process.kill()
        else:
            self._process.terminate()
        self._channel.abort()
        self._stops.close()
        if not await within(_KEEPER_S_MAX, self._reaped):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await within(_REAP_S, self._reaped)
        self.said = self.said or self.last_words()
        self._stderr.close()
        if self._group is not None:
            # Usually the keeper did that. Where it was killed, the runner may still be ending.
            await within(_REAP_S, self._group.clear)

    def _reaped(self) -> bool:
        return self._process.poll() is not None


async def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until something holds that the kernel brings about within microseconds, unless it is busy."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + seconds
    pause_s = 0.0005
    while not condition():
        if loop.time() >= give_up:
            return False
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    return True


def _spawn(
    channel: socket.socket,
    stops: int,
    folder: Path,
    modules: Path,
    group: Group | None,
    stderr: IO[bytes],
    scratch_bytes: int,
) -> "subprocess.Popen[bytes]":
    groups = [] if group is None else map(str, group.folders)
    arguments = (str(modules), str(scratch_bytes), str(stops), *groups)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "hive_executor.sandbox.runner", *arguments],
        pass_fds=(stops,),
        stdin=channel.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        cwd=folder,
        env=child_environment(),
        close_fds=True,
        start_new_session=True,
    )
