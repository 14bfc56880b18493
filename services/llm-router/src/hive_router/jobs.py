"""What the log says of jobs, as far as it matters for their model calls."""

from collections import OrderedDict
from typing import Final

import msgspec
from hive_common.contracts.budgets import JOB, SharedBudget, shared
from hive_common.contracts.events import JobSubmitted, decode
from hive_common.contracts.jobdocument import Budget
from hive_common.eventlog.log import LogReader
from hive_common.inference.calls import PIN_ANY, narrowest

REMEMBERED: Final = 1_000
"""Jobs whose facts are kept; they never change."""


class JobFacts(msgspec.Struct, frozen=True):
    """A job. `caller`: pseudonym of the key that has submitted it. `budget`: with which it was submitted."""

    caller: str
    pin: str
    budget: SharedBudget | None


class _Models(msgspec.Struct, frozen=True):
    pin: str = ""


class _Limits(msgspec.Struct, frozen=True):
    budget: Budget | None = None


class _Document(msgspec.Struct, frozen=True):
    models: _Models = _Models()
    limits: _Limits = _Limits()


class Jobs:
    """Reads.

    Args:
        reader: of the log.
        ns: the namespace.
    """

    def __init__(self, reader: LogReader, ns: str) -> None:
        self._reader = reader
        self._ns = ns
        self._jobs: OrderedDict[str, JobFacts] = OrderedDict()

    async def of(self, job: str) -> JobFacts | None:
        """Return what is known of a job, or None. Raises Unavailable where the log cannot be asked."""
        known = self._jobs.get(job)
        if known is not None:
            return known
        for stored in await self._reader.read(0, 1, streams=[job]):
            if stored.ns != self._ns or stored.type != JobSubmitted.__name__:
                return None
            event = None if stored.payload is None else decode(stored.type, stored.schema, stored.payload)
            if not isinstance(event, JobSubmitted):
                return None
            document = msgspec.json.decode(event.document, type=_Document)
            budget = document.limits.budget
            found = self._jobs[job] = JobFacts(
                event.caller,
                narrowest(document.models.pin or PIN_ANY, event.pin),
                None if budget is None else shared(f"{JOB}:{job}", budget),
            )
            if len(self._jobs) > REMEMBERED:
                self._jobs.popitem(last=False)
            return found
        return None
