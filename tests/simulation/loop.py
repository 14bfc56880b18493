"""An event loop whose clock jumps to the next timer, and processes on it that die and stand still.

Whatever a process does runs in a context that names it, tasks, timers and callbacks alike. When it is killed
nothing of it ever runs again, not even a `finally`, as after `kill -9`; while it is stopped what it would do waits.
"""

import asyncio
import contextlib
import contextvars
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

_PROCESS: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


TURNS_MAX = 20_000
CLEAN_UPS_MAX = 20
"""How often a coroutine may wait once more when it is told to end."""


class Stuck(Exception):
    """Nothing is left that could ever happen, or it happens for ever."""


class Process:
    """Something that is killed and stopped as a whole."""

    def __init__(self, loop: "VirtualLoop", name: str) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.stopped = False
        self._waiting: deque[events.Handle] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_PROCESS.set, self)

    def __repr__(self) -> str:
        return self.name

    def spawn(self, work: Coroutine[Any, Any, Any], name: str = "") -> "asyncio.Task[Any]":
        """Run a coroutine as a task of this process."""
        return self.loop.create_task(work, name=name or self.name, context=self.context.copy())

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Call something in this process, soon."""
        self.loop.call_soon(callback, *args, context=self.context)

    def kill(self) -> None:
        """End it between two instructions."""
        self.alive = False
        # Tasks that were freed now would run their clean-up.
        self.loop.dead += asyncio.all_tasks(self.loop)
        self._waiting.clear()

    def stop(self) -> None:
        """Let it stand still."""
        self.stopped = True

    def resume(self) -> None:
        """Let it go on: what became due meanwhile is done now, in its order."""
        self.stopped = False
        self.loop.ready_again(self._waiting)
        self._waiting.clear()

    def holds_back(self, handle: events.Handle) -> bool:
        """Whether something must not run now; where the process only stands still it is kept."""
        if self.alive and self.stopped:
            self._waiting.append(handle)
        return self.stopped or not self.alive


class _Handle(events.Handle):
    __slots__ = ()

    def _run(self) -> None:
        process = self._context.get(_PROCESS)  # type: ignore[attr-defined]
        if process is None or not (process.stopped or not process.alive) or not process.holds_back(self):
            super()._run()


class _TimerHandle(events.TimerHandle):
    __slots__ = ()

    def _run(self) -> None:
        process = self._context.get(_PROCESS)  # type: ignore[attr-defined]
        if process is None or not (process.stopped or not process.alive) or not process.holds_back(self):
            super()._run()


class VirtualLoop(asyncio.BaseEventLoop):
    """No sockets, no threads, no waiting: `time` is whatever the next timer says.

    Attributes:
        failures: what nobody caught.
        world: the context of what belongs to no process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._turns = 0
        self._clock_resolution = 1e-9
        self._selector = self
        self.dead: list[object] = []
        self.failures: list[dict[str, Any]] = []
        self.world = contextvars.copy_context()
        self.set_exception_handler(lambda _, context: self.failures.append(context))
        self.set_task_factory(_task)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Move the clock instead of waiting."""
        if timeout is None:
            raise Stuck("nothing is due, and nothing ever will be")
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise Stuck(f"{TURNS_MAX} turns of the loop, and no time has passed")
        if timeout > 0:
            self._turns = 0
            self._now_s = max(self._now_s, self._scheduled[0].when()) if self._scheduled else self._now_s + timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _call_soon(self, callback: Any, args: Any, context: Any) -> events.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> events.TimerHandle:
        """Call something at a virtual time."""
        self._check_closed()
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def ready_again(self, handles: "deque[events.Handle]") -> None:
        """Run what was held back, before anything else that is ready."""
        self._ready.extendleft(reversed(handles))

    def close(self) -> None:
        """Take apart what nobody will run again: freed later, its clean-up would run in whatever runs then."""
        for task in (*asyncio.all_tasks(self), *self.dead):
            work = task.get_coro()  # type: ignore[attr-defined]
            for _ in range(CLEAN_UPS_MAX):
                with contextlib.suppress(BaseException):
                    work.close()
                    break
        super().close()

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> "asyncio.Future[Any]":
        """Do the work of a thread at once: there are none."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def _task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **options)
    # A killed process leaves its tasks as they stand.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task
