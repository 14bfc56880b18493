"""JSON Schemas of agents, compiled once per agent version, and skipped where they cannot refuse anything."""

import hashlib
from typing import Any, Final

import msgspec
from hive_common.artifacts.validation import Validator
from hive_common.contracts.events import AgentRef

_CACHE_MAX: Final = 2_000
"""Compiled schemas that are kept; an installation uses far fewer."""
_WHITESPACE: Final = b" \t\r\n"
_SAY_NOTHING: Final = frozenset({"$schema", "$id", "$comment", "title", "description", "default", "examples"})


class Check:
    """One compiled schema. `trivial` ones are decided by looking at the first byte, or not at all."""

    def __init__(self, schema: dict[str, Any]) -> None:
        constraints = {key: value for key, value in schema.items() if key not in _SAY_NOTHING}
        self._any = not constraints
        self._object_only = constraints == {"type": "object"}
        self._validator = Validator(schema)

    @property
    def trivial(self) -> bool:
        """Whether a value need not be decoded to be checked."""
        return self._any or self._object_only

    def violation(self, raw: bytes) -> str | None:
        """Return how JSON bytes break the schema, as one sentence, or None where they fit.

        `raw` MUST be valid JSON where the schema is trivial; otherwise bytes that are not are a violation.
        """
        if self._any:
            return None
        if self._object_only:
            return None if raw.lstrip(_WHITESPACE)[:1] == b"{" else "the value is not an object"
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            return f"not JSON: {error}"
        found = self._validator.violation(value, len(raw))
        if found is None:
            return None
        where, message = found
        return f"{where or 'the value'}: {message}"


class Schemas:
    """The compiled schemas of agent versions, by their digest."""

    def __init__(self) -> None:
        self._checks: dict[tuple[str, str], Check] = {}

    def input_of(self, agent: AgentRef) -> Check:
        """Return the check of what the agent takes."""
        return self._check(agent.digest, "input", agent.input_schema)

    def output_of(self, agent: AgentRef) -> Check:
        """Return the check of what the agent gives."""
        return self._check(agent.digest, "output", agent.output_schema)

    def of_results(self, schema: dict[str, Any]) -> Check:
        """Return the check of a schema that a job gives for results."""
        digest = hashlib.sha256(msgspec.json.encode(schema)).hexdigest()
        return self._check(digest, "results", schema)

    def _check(self, digest: str, side: str, schema: dict[str, Any]) -> Check:
        found = self._checks.get((digest, side))
        if found is None:
            if len(self._checks) >= _CACHE_MAX:
                self._checks.clear()
            found = self._checks[digest, side] = Check(schema)
        return found
