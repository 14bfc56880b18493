"""What the readers of a job document check in the same way."""

import re
from typing import Final

import msgspec
from hive_common.artifacts.documents import refuse
from hive_common.artifacts.quantities import parse_duration
from hive_common.contracts.jobdocument import AGENT_PATTERN

_AGENT: Final = re.compile(AGENT_PATTERN)


def require(holds: object, path: str, expected: str, got: object) -> None:
    """Refuse what stands at `path` unless it `holds`."""
    if not holds:
        text = msgspec.json.encode(got).decode()
        shown = text if len(text) <= 80 else text[:77] + "..."
        refuse("", path, f"got {shown}", expected)


def require_agent(agent: str, path: str) -> str:
    """Return the `name@version` of an agent, if it is one."""
    require(_AGENT.fullmatch(agent), path, "`name@version`", agent)
    return agent


def duration_ms(value: str | None, path: str, most_ms: int) -> int | None:
    """Return a duration in milliseconds; None where none is said."""
    if value is None:
        return None
    parsed = parse_duration(value, path=path)
    require(0 <= parsed <= most_ms, path, f"at most {most_ms // 1000} s", value)
    return parsed
