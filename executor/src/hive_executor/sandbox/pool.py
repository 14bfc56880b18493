"""A warm pool of runner processes: one guest at a time in each, and a new process for each that dies."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec
from hive_common.kernel.errors import FailedPrecondition, Unavailable

from hive_executor.sandbox import frames, model
from hive_executor.sandbox.cache import Compiled
from hive_executor.sandbox.cgroups import Group, find_place
from hive_executor.sandbox.compiler import Compiler
from hive_executor.sandbox.confine import EMPTY_ROOT, LAYERS
from hive_executor.sandbox.engine import require_version
from hive_executor.sandbox.errors import InvalidModule
from hive_executor.sandbox.host import Capabilities, Host
from hive_executor.sandbox.limit import TimeLimit
from hive_executor.sandbox.model import Limits, LogLine, Outcome, Program
from hive_executor.sandbox.runner_process import RunnerGone, RunnerProcess, within

# How long after its limit a guest may still be interrupted from inside before its runner is killed, which takes
# some milliseconds more: an attempt ends within 250 ms of its limit.
KILL_SLACK_S: Final = 0.2
# How long a guest whose attempt was cancelled may take to end before its runner is killed. It ends at its next
# instruction; Python's sleep is made of short ones.
STOP_S_MAX: Final = 0.1
# How long an attempt waits for the end of its call, so that usually nothing of it outlives the attempt.
_CALL_S_MAX: Final = 0.1
# A runner is replaced after so many guests, so that no leak can grow for ever.
RUNS_PER_RUNNER_MAX: Final = 10_000
_RESTART_PAUSE_S: Final = 1.0
_SWEEP_S: Final = 1.0
NOTHING: Final[Capabilities] = MappingProxyType({})


class RunnerPool:
    """Runs programs. `start` and `close` it on the loop that uses it; all methods belong to that loop.

    Args:
        size: how many guests may run at once.
        cache_dir: where compiled modules are kept; shared with other executors of the same user.
        log_sink: takes what runners themselves have to say when they die (not the logs of guests).
    """

    def __init__(self, *, size: int, cache_dir: Path, log_sink: Callable[[str], None] | None = None) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; expected at least 1")
        require_version()
        self._size = size
        self._compiler = Compiler(cache_dir)
        self._folder = self._compiler.code_dir.with_name("empty")
        self._log_sink = log_sink or (lambda _: None)
        self._runners: set[RunnerProcess] = set()
        self._idle: list[RunnerProcess] = []
        self._waiting: asyncio.Condition = asyncio.Condition()
        self._starting: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._own_runners = asyncio.Semaphore(size)
        self._place = find_place()
        self._python: Compiled | None = None
        self._busy: set[RunnerProcess] = set()
        self._going = asyncio.Event()
        self._going.set()
        self._pauses = 0
        self._restarts = 0
        self._closed = False

    async def start(self) -> None:
        """Start the runners, warm if the CPython component is already there.

        Raises:
            Unavailable: a runner does not come up.
        """
        self._folder.mkdir(mode=0o500, exist_ok=True)
        if self._place is not None:
            await within(_SWEEP_S, self._place.sweep)
        self._python = await self._compiler.python_if_cached()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._size):
                    group.create_task(self._add_runner())
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None

    async def close(self) -> None:
        """Kill all runners and wait until they are gone. Attempts that run end as `runner_died`."""
        self._closed = True
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, *self._retiring, return_exceptions=True)
        await asyncio.gather(*(runner.kill() for runner in list(self._runners)))
        self._runners.clear()
        self._idle.clear()
        async with self._waiting:
            self._waiting.notify_all()

    def stats(self) -> dict[str, Any]:
        """Return `size`, `busy`, `restarts` (runners replaced because they ended), `pids`, and `layers`.

        The layers are those of `confine.LAYERS` that every runner has; the rest this system does not allow.
        """
        runners = list(self._runners)
        return {
            "size": self._size,
            "busy": len(self._busy),
            "restarts": self._restarts,
            "pids": sorted(runner.pid for runner in runners),
            "layers": [name for name in LAYERS if runners and all(name in one.layers for one in runners)],
        }

    def pause(self) -> None:
        """Have all guests stand still, and let none begin, until `resume`. Doing so twice is no error."""
        if self._going.is_set():
            self._going.clear()
            self._pauses += 1
            for runner in self._busy:
                runner.pause()

    def resume(self) -> None:
        """Let guests go on. Doing so twice is no error."""
        if not self._going.is_set():
            for runner in self._busy:
                runner.resume()
            self._going.set()

    async def run(
        self,
        program: Program,
        input: bytes,
        limits: Limits,
        *,
        on_log: Callable[[LogLine], None] | None = None,
        granted: Capabilities = NOTHING,
        scratch_bytes: int = 0,
        limit: TimeLimit | None = None,
        spares_runner: Callable[[], bool] = lambda: True,
    ) -> Outcome:
        """Run one attempt and say how it ended; waits for a free runner first, which no limit counts.

        When the awaiting task is cancelled, the guest is stopped before the cancellation goes on. Where it does not
        end at once (it waits in the engine), its runner is killed and replaced.

        Args:
            on_log: called with each line while the guest runs.
            granted: what the guest may ask of the host.
            scratch_bytes: what it may have in files below `/scratch`, which is empty at first and gone at its end;
                0 for no such folder. The guest then gets a runner of its own.
            limit: counts its time; for what lets it stand still.
            spares_runner: asked when it is cancelled; if not, its runner is killed without asking the guest to end.

        Raises:
            Unavailable: no runner can be started, the pool is closed, or the guest's time ran out while it was made
                to stand still, which is no fault of its own.
            FailedPrecondition: the CPython component cannot be built, or the system limits the size of no folder.
        """
        if len(input) > model.INPUT_BYTES_MAX:
            return _failed(model.AGENT_ERROR, f"an input of {len(input)} bytes; at most {model.INPUT_BYTES_MAX}")
        for _ in range(2):
            try:
                compiled = await self._compiler.compiled(program)
            except InvalidModule as error:
                return _failed(model.INVALID_MODULE, error.message)
            if program.runtime == "python":
                self._python = compiled
            outcome = await self._attempt(
                *(program, compiled, input, limits, on_log, granted, scratch_bytes, limit or TimeLimit()),
                spares_runner,
            )
            if isinstance(outcome, Outcome):
                return outcome
            self._compiler.discard(program)
        return _failed(model.INVALID_MODULE, f"the compiled module cannot be loaded: {outcome.message}")

    async def _attempt(
        self,
        program: Program,
        compiled: Compiled,
        input_: bytes,
        limits: Limits,
        on_log: Callable[[LogLine], None] | None,
        granted: Capabilities,
        scratch_bytes: int,
        limit: TimeLimit,
        spares_runner: Callable[[], bool],
    ) -> Outcome | frames.Stale:
        runner = await (self._own(scratch_bytes) if scratch_bytes else self._take_going())
        self._busy.add(runner)
        pauses = self._pauses
        lines: list[LogLine] = []

        def collect(batch: list[LogLine]) -> None:
            lines.extend(batch)
            if on_log is not None:
                for line in batch:
                    on_log(line)

        loop = asyncio.get_running_loop()
        started = loop.time()
        limit.begin(limits.wall_ms / 1000)
        stood_s = limit.stood_s
        host = Host(granted, limit)
        is_over = is_cancelled = False
        try:
            with limit.timer(KILL_SLACK_S) as timer:
                async with timer:
                    reply = await runner.run(program, compiled, input_, limits, collect, host.answer)
            is_over = True
            if isinstance(reply, frames.Stale):
                return reply
            outcome = _outcome(reply, lines, host.denied, host.exhausted)
            if outcome.code == model.TIMEOUT and self._pauses != pauses:
                raise _stood_still()
            return outcome
        except TimeoutError:
            if self._pauses != pauses:
                raise _stood_still() from None
            return _failed(
                model.TIMEOUT,
                f"still running after its limit of {limits.wall_ms} ms, and was killed",
                log=lines,
                wall_ms=int((loop.time() - started - (limit.stood_s - stood_s)) * 1000),
            )
        except RunnerGone as error:
            wall_ms = int((loop.time() - started - (limit.stood_s - stood_s)) * 1000)
            await runner.kill()  # its keeper may still be saying why
            return _failed(model.RUNNER_DIED, str(error), detail=runner.said, log=lines, wall_ms=wall_ms)
        except asyncio.CancelledError:
            is_cancelled = True
            raise
        finally:
            if is_over and self._is_fit(runner):
                self._busy.discard(runner)
                if not self._going.is_set():
                    # Its guest had ended when it was made to stand still.
                    runner.resume()
                await self._give_back(runner)
            else:
                # A guest that stands still would not notice.
                stops = is_cancelled and spares_runner() and self._going.is_set() and self._is_fit(runner)
                await asyncio.shield(_background(self._end(runner, stops=stops), self._retiring))

    def _is_fit(self, runner: RunnerProcess) -> bool:
        return runner.alive and not runner.scratch_bytes and runner.runs < RUNS_PER_RUNNER_MAX and not self._closed

    async def _end(self, runner: RunnerProcess, *, stops: bool) -> None:
        """Have the guest in a runner end, by a word or with the runner, and what it left behind."""
        call = runner.call_left()
        has_stopped = stops and await runner.stop(STOP_S_MAX)
        self._busy.discard(runner)
        if has_stopped and self._is_fit(runner):
            await self._give_back(runner)
        else:
            if runner.scratch_bytes:
                self._own_runners.release()
            await self._retire(runner)
        # The attempt ends all the same; who does not let go of a call must not keep it.
        if call is not None:
            await asyncio.wait({call}, timeout=_CALL_S_MAX)

    async def _own(self, scratch_bytes: int) -> RunnerProcess:
        """Start a runner for one guest, whose files are in a file system of just this size that ends with it."""
        if EMPTY_ROOT not in self.stats()["layers"]:
            raise FailedPrecondition(
                "the permission `scratch` takes a folder whose size is limited, which this system gives nobody: "
                f"it lacks the layer `{EMPTY_ROOT}` around runners, see `hive doctor`"
            )
        await self._own_runners.acquire()
        try:
            await self._going.wait()
            if self._closed:
                raise Unavailable("the pool of runners is closed")
            runner = await RunnerProcess.start(
                self._folder, self._compiler.code_dir, self._new_group(), self._lost, scratch_bytes
            )
        except BaseException:
            self._own_runners.release()
            raise
        self._runners.add(runner)
        if not self._going.is_set():
            runner.pause()
        return runner

    async def _take_going(self) -> RunnerProcess:
        """Return a free runner at a moment when guests may go on."""
        while True:
            await self._going.wait()
            runner = await self._take()
            if self._going.is_set():
                return runner
            await self._give_back(runner)

    async def _take(self) -> RunnerProcess:
        async with self._waiting:
            while True:
                if self._closed:
                    raise Unavailable("the pool of runners is closed")
                while self._idle:
                    # The last one used has its caches warm.
                    runner = self._idle.pop()
                    if runner.alive:
                        return runner
                await self._waiting.wait()

    async def _give_back(self, runner: RunnerProcess) -> None:
        async with self._waiting:
            self._idle.append(runner)
            self._waiting.notify()

    def _new_group(self) -> Group | None:
        if self._place is None:
            return None
        try:
            return self._place.new_group(memory_bytes=model.RUNNER_BYTES, processes=model.RUNNER_PROCESSES_MAX)
        except OSError as error:
            # Its layers then tell that it has no limits.
            self._log_sink(f"a runner gets no cgroup: {error}")
            return None

    async def _add_runner(self) -> None:
        runner = await RunnerProcess.start(self._folder, self._compiler.code_dir, self._new_group(), self._lost)
        self._runners.add(runner)
        if self._python is not None:
            with contextlib.suppress(RunnerGone):
                await runner.load("python", self._python)
        if runner.alive:
            await self._give_back(runner)
        else:
            self._lost(runner)

    def _lost(self, runner: RunnerProcess) -> None:
        """A runner ended by itself: reap it. If a guest was in it, its attempt sees to the rest."""
        if runner in self._idle:
            self._idle.remove(runner)
            _background(self._retire(runner), self._retiring)

    async def _retire(self, runner: RunnerProcess) -> None:
        if runner not in self._runners:
            return
        self._runners.discard(runner)
        await runner.kill()
        if said := runner.said:
            self._log_sink(f"runner {runner.pid} ended: {said}")
        if not self._closed and not runner.scratch_bytes:
            self._restarts += 1
            _background(self._replace(), self._starting)

    async def _replace(self) -> None:
        while not self._closed:
            try:
                await self._add_runner()
                return
            except Unavailable as error:
                self._log_sink(error.message)
                await asyncio.sleep(_RESTART_PAUSE_S)


def _stood_still() -> Unavailable:
    return Unavailable("its time ran out while this executor had no lease, and let no guest go on")


def _background(work: Coroutine[Any, Any, None], running: set["asyncio.Task[None]"]) -> "asyncio.Task[None]":
    task = asyncio.get_running_loop().create_task(work)
    running.add(task)
    task.add_done_callback(running.discard)
    return task


def _outcome(done: frames.Done, log: list[LogLine], denied: str, exhausted: str = "") -> Outcome:
    if denied and done.code != model.PERMISSION_DENIED:
        # The runner, which is not trusted, let the guest go on.
        done = msgspec.structs.replace(done, code=model.PERMISSION_DENIED, message=denied, detail="")
    elif exhausted and done.code in (model.AGENT_ERROR, model.TRAP):
        # A guest may do without, and succeed. One that could not is told apart, so that it is not tried again.
        done = msgspec.structs.replace(done, code=model.BUDGET_EXHAUSTED, message=exhausted)
    return Outcome(
        status="failed" if done.code else "succeeded",
        code=done.code or None,
        message=done.message,
        detail=done.detail,
        output=None if done.code else done.output,
        log=log,
        log_truncated=done.log_truncated,
        wall_ms=done.wall_us // 1000,
        fuel_used=done.fuel_used,
        memory_peak_bytes=done.memory_peak_bytes,
    )


def _failed(
    code: str, message: str, *, detail: str = "", log: list[LogLine] | None = None, wall_ms: int = 0
) -> Outcome:
    return Outcome("failed", code, message, detail, log=log or [], wall_ms=wall_ms)
