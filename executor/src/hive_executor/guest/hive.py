"""What an agent finds under `from hive import …`."""

from typing import Any

from wit_world.imports import log as _host

_LEVELS = {
    "debug": _host.Level.DEBUG,
    "info": _host.Level.INFO,
    "warning": _host.Level.WARNING,
    "error": _host.Level.ERROR,
}


class Log:
    """The log of this attempt: `log.info("read %d files", n)`, or `log("text", level="warning")`."""

    def __call__(self, message: Any, *args: Any, level: str = "info") -> None:
        """Write a line. `args` are put into `message` with `%`, as in `logging`.

        Raises:
            ValueError: `level` is not one of debug, info, warning, error.
        """
        if level not in _LEVELS:
            raise ValueError(f"level is {level!r}; expected one of {', '.join(_LEVELS)}")
        text = str(message) % args if args else str(message)
        # A lone surrogate has no UTF-8 form and would end the guest at the boundary.
        _host.write(_LEVELS[level], text.encode("utf-8", "backslashreplace").decode())

    def debug(self, message: Any, *args: Any) -> None:
        """Write a line that helps only while developing."""
        self(message, *args, level="debug")

    def info(self, message: Any, *args: Any) -> None:
        """Write a line that says what the agent does."""
        self(message, *args, level="info")

    def warning(self, message: Any, *args: Any) -> None:
        """Write a line about something unexpected that the agent got over."""
        self(message, *args, level="warning")

    def error(self, message: Any, *args: Any) -> None:
        """Write a line about something that failed."""
        self(message, *args, level="error")


log = Log()

__all__ = ["log"]
