"""What is run, within which limits, and how it ended."""

import unicodedata
from pathlib import Path
from typing import Final, Literal

import msgspec
from hive_common.contracts.limits import TASK_INPUT_BYTES_MAX

MEBIBYTE: Final = 1 << 20

# Limits that no agent may choose. Each has room for real programs and none for an attack.
PROGRAM_BYTES_MAX: Final = 8 * MEBIBYTE  # all sources of a Python agent; they are copied into each guest
PROGRAM_FILES_MAX: Final = 1_000
MODULE_BYTES_MAX: Final = 64 * MEBIBYTE  # a component that carries CPython is 20 to 40 MB
INPUT_BYTES_MAX: Final = TASK_INPUT_BYTES_MAX
# What a guest may ask the host in one call, and what it may be told.
HOST_REQUEST_BYTES_MAX: Final = 4 * MEBIBYTE
HOST_ANSWER_BYTES_MAX: Final = 8 * MEBIBYTE
LOG_LINE_BYTES_MAX: Final = 16_384
LOG_LINE_OVERHEAD_BYTES: Final = 32  # what a line costs beside its text, so that empty lines are bounded too
DETAIL_CHARS_MAX: Final = 16_384
MESSAGE_CHARS_MAX: Final = 1_024

# What a runner may hold beside what an attempt needs: itself, code, the memory images of its modules.
RUNNER_BYTES: Final = 512 * MEBIBYTE
# Its threads: its own three, and what the engine starts.
RUNNER_PROCESSES_MAX: Final = 64
# What the host itself may need while a guest runs, beside the guest's memories.
_HOST_HEADROOM_BYTES: Final = 64 * MEBIBYTE

Runtime = Literal["python", "component", "command"]
Level = Literal["debug", "info", "warning", "error"]
Status = Literal["succeeded", "failed", "cancelled"]

AGENT_ERROR: Final = "agent_error"
INVALID_OUTPUT: Final = "invalid_output"
TIMEOUT: Final = "timeout"
FUEL_EXHAUSTED: Final = "fuel_exhausted"
MEMORY_EXCEEDED: Final = "memory_exceeded"
OUTPUT_EXCEEDED: Final = "output_exceeded"
TRAP: Final = "trap"
INVALID_MODULE: Final = "invalid_module"
PERMISSION_DENIED: Final = "permission_denied"
BUDGET_EXHAUSTED: Final = "budget_exhausted"
RUNNER_DIED: Final = "runner_died"
CANCELLED: Final = "cancelled"


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one attempt.

    Args:
        wall_ms: milliseconds from handing the guest to a runner until it must have answered.
        memory_bytes: each linear memory of the guest. For Python it counts what the agent adds to the
            interpreter, whose own 35 MB are one image that all guests share.
        fuel: units of computation, roughly one per WebAssembly instruction; work of the host is not counted.
        output_bytes: what the guest may answer.
        log_bytes: log text with `LOG_LINE_OVERHEAD_BYTES` per line; what comes after is dropped.
    """

    wall_ms: int
    memory_bytes: int
    fuel: int
    output_bytes: int = 8 * MEBIBYTE
    log_bytes: int = 1 * MEBIBYTE


def host_bytes(limits: Limits, image_bytes: int) -> int:
    """Return how many bytes a runner may take for an attempt whose module starts with `image_bytes` of memory."""
    return image_bytes + 2 * limits.memory_bytes + 4 * limits.output_bytes + _HOST_HEADROOM_BYTES


class Program(msgspec.Struct, frozen=True):
    """What to run, already fetched and verified by the caller.

    Args:
        runtime: `python` for sources, `component` for the world `hive:agent/agent`, `command` for any WASI
            preview 1 program.
        digest: names the content; programs with the same digest are taken to be the same.
        entry: the path of the file that is run, such as `agent.py`.
        files: python only: contents by relative POSIX path.
        module_path: component and command only: a WebAssembly binary.
    """

    runtime: Runtime
    digest: str
    entry: str
    files: dict[str, bytes] | None = None
    module_path: Path | None = None


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """One line of a guest: valid UTF-8, otherwise as the guest wrote it. Use `shown` before displaying it."""

    ts_us: int
    level: Level
    text: str


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended.

    Args:
        code: None when it succeeded, otherwise one of the codes of this module.
        message: one line for a person.
        detail: a traceback, a backtrace or the end of stderr.
        output: the JSON text of the guest, exactly as it was given; None unless it succeeded.
        wall_ms: milliseconds in the runner.
        fuel_used: units of computation; 0 when the runner could not say.
        memory_peak_bytes: linear memory at the end, which is its peak, because it never shrinks. Exact for
            commands, within a few hundred KiB for the others, None where it cannot be told.
    """

    status: Status
    code: str | None = None
    message: str = ""
    detail: str = ""
    output: bytes | None = None
    log: list[LogLine] = []
    log_truncated: bool = False
    wall_ms: int = 0
    fuel_used: int = 0
    memory_peak_bytes: int | None = None


def shown(text: str) -> str:
    """Return `text` for a terminal or page: control and format characters (Unicode Cc, Cf) become U+FFFD."""
    return "".join(
        char if char == "\t" or unicodedata.category(char) not in {"Cc", "Cf"} else "\ufffd" for char in text
    )
