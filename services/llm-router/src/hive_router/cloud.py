"""Whether a call may leave for a provider: by its key, its pin, its agent's permission, and a budget (law 7)."""

from typing import Final, Protocol

import msgspec
from hive_common.eventlog.log import LogReader
from hive_common.inference.calls import PIN_ANY, ModelCall
from hive_common.kernel.ids import derive_id

from hive_router.domain.budgets import subjects_of
from hive_router.domain.selection import (
    REASON_KEY,
    REASON_NO_BUDGET,
    REASON_PIN,
    CloudRefusal,
)
from hive_router.jobs import Jobs
from hive_router.ledger import Spender
from hive_router.treasury import Treasury

_LET_OWNER: Final = 'let it: `"cloud": true` under `models` in hive.json, and start again'
_MAKE_ONE: Final = "make one that may: hive key create NAME --cloud --budget usd=5/month"


class Spenders(Protocol):
    """Knows keys (`Ledger`)."""

    async def spender(self, pseudonym: str) -> Spender | None:
        """Return the key of a caller, or None."""
        ...


class Passage(msgspec.Struct, frozen=True):
    """Whether a call may go to providers, and whose budgets it counts against."""

    refusal: CloudRefusal | None
    subjects: tuple[str, ...] = ()
    key: str = ""


class Cloud:
    """Looks.

    A guest's call has its token's agent and job, its model and pin within what the agent was granted; the log says
    with which key the job was submitted, and that key has to be one that may.

    Args:
        treasury: knows budgets.
        spenders: knows keys.
        reader: of the log.
        owner: pseudonym of the installation's owner.
        ns: the namespace.
        owner_key: name of the owner's key, which is in no event.
        owner_cloud: whether jobs submitted with it may use providers.
    """

    def __init__(
        self,
        treasury: Treasury,
        spenders: Spenders,
        reader: LogReader,
        *,
        owner: str,
        ns: str,
        owner_key: str,
        owner_cloud: bool,
    ) -> None:
        self._treasury = treasury
        self._spenders = spenders
        self._jobs = Jobs(reader, ns)
        self._owner_key = derive_id("caller", owner, owner_key)
        self._owner = Spender(owner_key, owner_cloud, PIN_ANY, False)

    async def passage(self, call: ModelCall) -> Passage:
        """Look. Raises Unavailable where the log has to be asked and cannot be."""
        if call.pin != PIN_ANY:
            return Passage(CloudRefusal(REASON_PIN, f"pinned to {call.pin}"))
        found = await self._of_guest(call) if call.origin else self._of_key(call)
        if found.refusal is not None or self._treasury.has_budget(found.subjects):
            return found
        whom = f"--key {found.key}" if found.key else "--total"
        detail = f"no budget for it; set one: hive model budget set {whom} --usd 5 --per month"
        return msgspec.structs.replace(found, refusal=CloudRefusal(REASON_NO_BUDGET, detail))

    def _of_key(self, call: ModelCall) -> Passage:
        subjects = subjects_of(call.key, call.job, "")
        if not call.cloud:
            detail = f"key `{call.key}` may not use providers; {self._remedy(call.key)}"
            return Passage(CloudRefusal(REASON_KEY, detail), subjects)
        return Passage(None, subjects, call.key)

    async def _of_guest(self, call: ModelCall) -> Passage:
        if not call.agent:
            return _refused(REASON_KEY, "a program on a device shows no key; call the gateway with one")
        job = await self._jobs.of(call.job)
        if job is None:
            return _refused(REASON_KEY, "nobody knows the key with which the job was submitted")
        if job.pin != PIN_ANY:
            return _refused(REASON_PIN, f"the job is pinned to {job.pin}")
        spender = self._owner if job.caller == self._owner_key else await self._spenders.spender(job.caller)
        if spender is None or spender.revoked or not spender.cloud:
            name = "its key" if spender is None else f"key `{spender.name}`"
            said = "was revoked" if spender is not None and spender.revoked else "may not use providers"
            remedy = self._remedy("" if spender is None else spender.name)
            return _refused(REASON_KEY, f"{name}, with which the job was submitted, {said}; {remedy}")
        if spender.pin != PIN_ANY:
            return _refused(REASON_PIN, f"key `{spender.name}` is pinned to {spender.pin}")
        agent = call.agent.partition("@")[0]
        return Passage(None, subjects_of(spender.name, call.job, agent), spender.name)

    def _remedy(self, key: str) -> str:
        return _LET_OWNER if key == self._owner.name else _MAKE_ONE


def _refused(reason: str, detail: str) -> Passage:
    return Passage(CloudRefusal(reason, detail))
