"""A port that does what it is asked, whose answers are lost: what a caller sees of a time-out after the fact."""

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from hive_common.kernel.errors import Unavailable

Loses = Callable[[str, int], bool]


class AnswersLost:
    """Stands in for `port`.

    Args:
        port: does the work.
        loses: takes a method and how often it was called, this call included; says whether that answer is lost.

    Attributes:
        lost: how many answers of each method were lost.
    """

    def __init__(self, port: Any, loses: Loses) -> None:
        self._port = port
        self._loses = loses
        self._calls: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        return self._losing(name, method) if inspect.iscoroutinefunction(method) else method

    def _losing(self, name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            answer = await method(*args, **kwargs)
            self._calls[name] += 1
            if self._loses(name, self._calls[name]):
                self.lost[name] += 1
                if inspect.isasyncgen(answer):
                    await answer.aclose()
                raise Unavailable(f"the answer of {name} was lost")
            return answer

        return call


def every_other(name: str, count: int) -> bool:
    """Lose the first answer of each method, the third, and so on: who asks again gets through."""
    return count % 2 == 1
