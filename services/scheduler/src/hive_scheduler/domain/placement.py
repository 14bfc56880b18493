"""Placement: feasible → score → pick, with a name for every rejection.

Devices are bucketed by capability class, so that a class that cannot run a task is refused once and its devices
are never looked at; inside a class a heap keyed by score gives the exact best. `explain` runs the same stages
over every device. (Shape after Nomad's scheduler: a line of small stages that serves picking and explaining.)
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Final

import msgspec
from hive_common.contracts.events import TIERS, Capabilities, Placement
from hive_common.contracts.judgement import Distinct, Producer
from hive_common.judgement.quorum import unit_of
from hive_common.judgement.reputation import Standing, refused_as

from hive_scheduler.domain.ahead import NO_SLOTS, NOTHING_AHEAD, Queue, Slots, may_wait, pace_of, waiting_max


class Apart(msgspec.Struct, frozen=True, cache_hash=True):
    """What a task has to keep away from: what made other results of a task, or with `judges` what it judges."""

    executors: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()
    judges: bool = False


class Where(msgspec.Struct, frozen=True, cache_hash=True):
    """Where a job says that a task may run. `executors` are names or ids; none: any."""

    tier: str = ""
    executors: frozenset[str] = frozenset()
    labels: frozenset[tuple[str, str]] = frozenset()


class Need(msgspec.Struct, frozen=True, cache_hash=True):
    """What a task asks of a device. Its files are in memory, too.

    Attributes:
        distinct_from: places of other results, and of those that it judges.
        place: where its job says that it may run.
        owner: whose task it is; devices of others have to have a standing. Empty: any may have it.
        low_trust: it may go to devices that nobody knows yet (`hive_common.judgement.reputation`).
        senior: the higher the device's tier, the better.
    """

    runtime: str
    memory_bytes: int
    excluded: frozenset[str] = frozenset()
    scratch_bytes: int = 0
    distinct_from: Apart | None = None
    place: Where | None = None
    owner: str = ""
    low_trust: bool = False
    senior: bool = False


class Device(msgspec.Struct, frozen=True):
    """An executor as the scheduler sees it now. `slots_free` counts what it may still be given; `standing` counts
    for tasks of other owners than its own.

    Attributes:
        ahead: how many would wait for a slot there with all of `slots_free` given.
        pace: how many of its slots come free in a millisecond (`domain/ahead.py`).
        given: whether it gets an answer with work anyway.
    """

    executor: str
    name: str
    owner: str
    capabilities: Capabilities
    slots_free: int
    memory_free_bytes: int
    running: int = 0
    drained: bool = False
    online: bool = True
    revoked: bool = False
    killed: bool = False
    standing: Standing = "new"
    ahead: int = 0
    pace: float = 0.0
    given: bool = False

    @property
    def waiting(self) -> int:
        """How many wait for a slot there; below 0: so many slots are free."""
        return self.ahead - self.slots_free


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much each part of the score counts. Parts lie between 0 and 1. `tier` is more than all others together:
    a senior agent goes to the highest tier that has room, and nobody else looks at it.
    """

    load: float = 1.0
    power: float = 0.5
    memory: float = 0.1
    tier: float = 4.0
    battery_floor_percent: int = 20


class Picked(msgspec.Struct, frozen=True):
    """The executor that was picked, and the record of why."""

    executor: str
    placement: Placement


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """One device in an explanation: rejected for `reason`, or feasible with its score and the score's parts."""

    executor: str
    name: str
    feasible: bool
    reason: str | None = None
    score: float | None = None
    parts: dict[str, float] = {}


_Class = tuple[str, str, frozenset[str], str]
_State = Callable[[Device, Weights], bool]

RUNTIME_MISSING: Final = "runtime_missing"
EXCLUDED: Final = "excluded"
MEMORY_SHORT: Final = "memory_short"
SCRATCH_MISSING: Final = "scratch_missing"
TIER_DIFFERS: Final = "tier_differs"
EXECUTOR_NOT_NAMED: Final = "executor_not_named"
LABEL_MISSING: Final = "label_missing"
NO_FREE_SLOT: Final = "no_free_slot"


def _battery_low(device: Device, weights: Weights) -> bool:
    power = device.capabilities.power
    if power.charging or power.battery_percent is None:
        return False
    return power.battery_percent < weights.battery_floor_percent


STATE_STAGES: Final[tuple[tuple[str, _State], ...]] = (
    ("revoked", lambda device, weights: device.revoked),
    ("killed", lambda device, weights: device.killed),
    ("offline", lambda device, weights: not device.online),
    ("drained", lambda device, weights: device.drained),
    ("battery_low", _battery_low),
    (NO_FREE_SLOT, lambda device, weights: device.slots_free <= 0 or device.waiting >= 0),
)
"""Rejections that hold for every task alike. A device that one of them names is in no heap; where it has no free
slot, which comes last, it may be in one of those for tasks that wait."""


def class_of(device: Device) -> _Class:
    """Return the capability class: what decides over whole groups of devices at once."""
    capabilities = device.capabilities
    return capabilities.os, capabilities.arch, frozenset(capabilities.runtimes), capabilities.tier


def state_reason(device: Device, weights: Weights) -> str | None:
    """Return the name of the first state stage that rejects the device, or None."""
    return next((name for name, rejects in STATE_STAGES if rejects(device, weights)), None)


def need_reason(device: Device, need: Need) -> str | None:
    """Return the name of the first stage that rejects the device for this task, or None."""
    if device.executor in need.excluded:
        return EXCLUDED
    if need.scratch_bytes and not device.capabilities.scratch:
        return SCRATCH_MISSING
    if device.memory_free_bytes < need.memory_bytes + need.scratch_bytes:
        return MEMORY_SHORT
    if need.place is not None and (reason := place_reason(device, need.place)):
        return reason
    if need.distinct_from is not None and (reason := apart_reason(device, need.distinct_from)):
        return reason
    if need.owner and need.owner != device.owner:
        return refused_as(device.standing, device.owner, need.owner, need.low_trust) or None
    return None


def place_reason(device: Device, place: Where) -> str | None:
    """Return why a job's `place` leaves a device out, or None."""
    if place.tier and device.capabilities.tier != place.tier:
        return TIER_DIFFERS
    if place.executors and device.executor not in place.executors and device.name not in place.executors:
        return EXECUTOR_NOT_NAMED
    labels = device.capabilities.labels
    if any(labels.get(name) != value for name, value in place.labels):
        return LABEL_MISSING
    return None


def apart_reason(device: Device, apart: Apart) -> str | None:
    """Return what a device has in common with places that a task has to keep away from, or None."""
    if device.executor in apart.executors:
        return "produced_what_it_judges" if apart.judges else "same_executor"
    if device.capabilities.device in apart.devices:
        return "same_device_as_what_it_judges" if apart.judges else "same_device"
    if device.owner in apart.owners:
        return "same_owner_as_what_it_judges" if apart.judges else "same_owner"
    return None


def never_reason(device: Device, need: Need) -> str | None:
    """Return why a device will not take a task either when it is idle and there, or None.

    What a person or a reputation has shut out counts as never, what is offline, drained or busy does not.
    """
    if device.revoked or device.killed:
        return "revoked" if device.revoked else "killed"
    if need.runtime not in device.capabilities.runtimes:
        return RUNTIME_MISSING
    idle = msgspec.structs.replace(device, memory_free_bytes=device.capabilities.memory_bytes)
    return need_reason(idle, need)


def tier_part(tier: str, weights: Weights) -> float:
    """Return what a tier adds to a device's score for a senior agent."""
    rank = TIERS.index(tier) if tier in TIERS else 0
    return weights.tier * rank / (len(TIERS) - 1)


def score_parts(device: Device, weights: Weights) -> dict[str, float]:
    """Return the weighted parts of a device's score; their sum is the score, and more is better."""
    capabilities = device.capabilities
    power = capabilities.power
    on_battery = not power.charging and power.battery_percent is not None
    battery = (power.battery_percent or 0) / 100 if on_battery else 1.0
    slots = max(capabilities.slots, 1)
    # Prefetched attempts count as load beyond 1, so that a device that waits gets work before one that queues.
    load = 1.0 - min(device.running / slots, 2.0) / 2.0
    memory = min(device.memory_free_bytes / max(capabilities.memory_bytes, 1), 1.0)
    return {
        "load": round(weights.load * load, 6),
        "power": round(weights.power * battery, 6),
        "memory": round(weights.memory * memory, 6),
    }


class _Bucket:
    """The devices of one class. Heap entries carry a stamp; an entry whose stamp is old counts as removed."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, str, int]] = []
        self.stamps: dict[str, int] = {}

    def put(self, device: Device, score: float, stamp: int) -> None:
        self.stamps[device.executor] = stamp
        heapq.heappush(self.heap, (-score, device.executor, stamp))
        if len(self.heap) > 2 * len(self.stamps) + 64:
            # Old entries below the best one are never popped; without this the heap would grow with every change.
            self.heap = [entry for entry in self.heap if self.stamps.get(entry[1]) == entry[2]]
            heapq.heapify(self.heap)

    def drop(self, executor: str) -> None:
        self.stamps.pop(executor, None)

    def best(self) -> tuple[float, str, int] | None:
        """Return the best live entry, which stays where it is."""
        while self.heap:
            entry = self.heap[0]
            if self.stamps.get(entry[1]) == entry[2]:
                return entry
            heapq.heappop(self.heap)
        return None

    def best_first(self) -> Iterator[tuple[float, str, int]]:
        """Pop live entries, best first. The caller pushes back what it does not take."""
        while self.heap:
            entry = heapq.heappop(self.heap)
            if self.stamps.get(entry[1]) == entry[2]:
                yield entry


class Fleet:
    """All devices that are known, indexed so that picking costs about as much as the best device is deep."""

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()
        self._devices: dict[str, Device] = {}
        self._groups: dict[str, _Class] = {}
        self._reasons: dict[str, str] = {}
        self._reason_counts: Counter[tuple[_Class, str]] = Counter()
        self._class_sizes: Counter[_Class] = Counter()
        self._revoked: set[str] = set()
        self._buckets: dict[_Class, _Bucket] = {}
        self._queues: dict[_Class, _Bucket] = {}
        self._slots: dict[str, Slots] = {}
        self._class_slots: dict[_Class, Slots] = {}
        self._stamp = 0

    def __len__(self) -> int:
        return len(self._devices)

    def get(self, executor: str) -> Device | None:
        """Return a device as it was last put in or picked."""
        return self._devices.get(executor)

    def upsert(self, device: Device) -> None:
        """Put in a device, or what is new about it."""
        executor = device.executor
        known = self._devices.get(executor)
        # Nearly always only its slots have changed.
        if known is not None and known.capabilities is device.capabilities:
            group = self._groups[executor]
        else:
            self.remove(executor)
            group = self._groups[executor] = class_of(device)
            self._class_sizes[group] += 1
        self._devices[executor] = device
        if device.revoked:
            self._revoked.add(executor)
        reason = state_reason(device, self.weights)
        self._note_reason(group, executor, reason)
        slots = device.capabilities.slots
        works = reason is None or reason == NO_FREE_SLOT
        self._note_slots(group, executor, Slots(slots, device.running) if works else NO_SLOTS)
        has_slot = reason is None
        takes_ahead = reason == NO_FREE_SLOT and device.slots_free > 0
        if has_slot or takes_ahead:
            self._stamp += 1
            score = sum(score_parts(device, self.weights).values())
            if takes_ahead:
                # Before anything else those at which the fewest wait.
                score -= device.waiting / max(slots, 1)
            into = self._buckets if has_slot else self._queues
            into.setdefault(group, _Bucket()).put(device, score, self._stamp)
        if not has_slot and group in self._buckets:
            self._buckets[group].drop(executor)
        if not takes_ahead and group in self._queues:
            self._queues[group].drop(executor)

    def _note_slots(self, group: _Class, executor: str, slots: Slots) -> None:
        before = self._slots.get(executor, NO_SLOTS)
        if slots != before:
            self._slots[executor] = slots
            self._class_slots[group] = self._class_slots.get(group, NO_SLOTS).with_one(before, slots)

    def _note_reason(self, group: _Class, executor: str, reason: str | None) -> None:
        before = self._reasons.get(executor)
        if before == reason:
            return
        if before is not None:
            self._reason_counts[group, before] -= 1
            del self._reasons[executor]
        if reason is not None:
            self._reason_counts[group, reason] += 1
            self._reasons[executor] = reason

    def remove(self, executor: str) -> None:
        """Forget a device."""
        if self._devices.pop(executor, None) is None:
            return
        self._revoked.discard(executor)
        group = self._groups.pop(executor)
        self._class_sizes[group] -= 1
        if not self._class_sizes[group]:
            del self._class_sizes[group]
        self._note_reason(group, executor, None)
        self._note_slots(group, executor, NO_SLOTS)
        self._slots.pop(executor, None)
        for buckets in (self._buckets, self._queues):
            if group in buckets:
                buckets[group].drop(executor)

    def has_room(self) -> bool:
        """Say whether any device could take any task. Cheap; lets a full pool skip the queue."""
        buckets = (*self._buckets.values(), *self._queues.values())
        return any(bucket.stamps for bucket in buckets)

    def place(self, need: Need, queue: Queue = NOTHING_AHEAD) -> Picked | None:
        """Pick the best feasible device and take one of its slots, or return None where there is none.

        Only where nobody who may have it has a slot free is a task given ahead of one, as far as `queue` allows.
        """
        rejected: Counter[str] = Counter()
        best = self._best(need, rejected)
        if best is None:
            best = self._best_ahead(need, queue)
            # As one of those without a free slot it is counted, too.
            rejected[NO_FREE_SLOT] -= 1
        if best is None:
            return None
        self._count_states(need, rejected)
        negative_score, executor = best
        device = self._devices[executor]
        self.upsert(
            msgspec.structs.replace(
                device,
                slots_free=device.slots_free - 1,
                running=device.running + 1,
                pace=device.pace + (pace_of(queue.usual_ms) if device.waiting < 0 else 0.0),
                given=True,
            )
        )
        return Picked(executor, Placement(len(self._devices), round(-negative_score, 6), dict(+rejected)))

    def _best(self, need: Need, rejected: Counter[str]) -> tuple[float, str] | None:
        best: tuple[float, str] | None = None
        for group, size in self._class_sizes.items():
            if need.runtime not in group[2]:
                rejected[RUNTIME_MISSING] += size
                continue
            if self._other_tier(need, group):
                rejected[TIER_DIFFERS] += size
                continue
            found = self._best_of(self._buckets.get(group), need, rejected)
            best = self._better(best, found, group, need)
        return best

    def _better(
        self, best: tuple[float, str] | None, found: tuple[float, str] | None, group: _Class, need: Need
    ) -> tuple[float, str] | None:
        if found is not None and need.senior:
            found = found[0] - tier_part(group[3], self.weights), found[1]
        return found if found is not None and (best is None or found < best) else best

    def _best_ahead(self, need: Need, queue: Queue) -> tuple[float, str] | None:
        """Return the best of those where the task may wait for a slot."""
        if queue.usual_ms is None:
            return None
        groups = [one for one in self._class_sizes if need.runtime in one[2] and not self._other_tier(need, one)]
        of_all = NO_SLOTS
        for group in groups:
            of_all = of_all.with_one(NO_SLOTS, self._class_slots.get(group, NO_SLOTS))
        if not may_wait(queue, of_all):
            return None

        def refuses(device: Device) -> bool:
            most = waiting_max(queue, device.capabilities.slots, device.pace, of_all)
            # As many as may wait come in one answer. One for each that ends would make a message of each.
            return device.waiting >= (most if device.given else (most + 1) // 2)

        best: tuple[float, str] | None = None
        for group in groups:
            # Each of them counts as one without a free slot already.
            found = self._best_of(self._queues.get(group), need, Counter(), refuses)
            best = self._better(best, found, group, need)
        return best

    def any_revoked(self) -> bool:
        """Say whether any device is out for good."""
        return bool(self._revoked)

    def devices(self) -> Collection[Device]:
        """Return all devices that are known."""
        return self._devices.values()

    def possible(self, need: Need, count: int = 1, distinct: Distinct = "none") -> bool:
        """Say whether so many distinct executors, devices or owners could take a task, if not now."""
        able = (device for device in self._devices.values() if never_reason(device, need) is None)
        if distinct == "none":
            return any(True for _ in able)
        found: set[str] = set()
        for one in able:
            found.add(unit_of(distinct, Producer(0, one.executor, one.capabilities.device, one.owner)))
            if len(found) >= count:
                return True
        return False

    def explain(self, need: Need) -> list[Candidate]:
        """Run every stage over every device: rejections with their reasons, the rest by falling score."""
        candidates = [self._candidate(device, need) for device in self._devices.values()]
        return sorted(candidates, key=lambda one: (not one.feasible, -(one.score or 0.0), one.executor))

    def _best_of(
        self,
        bucket: _Bucket | None,
        need: Need,
        rejected: Counter[str],
        refuses: Callable[[Device], bool] = lambda device: False,
    ) -> tuple[float, str] | None:
        if bucket is None:
            return None
        top = bucket.best()
        if top is not None and need_reason(device := self._devices[top[1]], need) is None and not refuses(device):
            return top[0], top[1]
        looked_at, found = [], None
        for entry in bucket.best_first():
            looked_at.append(entry)
            reason = need_reason(self._devices[entry[1]], need)
            if reason is not None:
                rejected[reason] += 1
            elif not refuses(self._devices[entry[1]]):
                found = entry[0], entry[1]
                break
        for entry in looked_at:
            heapq.heappush(bucket.heap, entry)
        return found

    def _count_states(self, need: Need, rejected: Counter[str]) -> None:
        for (group, reason), count in self._reason_counts.items():
            if count and need.runtime in group[2] and not self._other_tier(need, group):
                rejected[reason] += count

    @staticmethod
    def _other_tier(need: Need, group: _Class) -> bool:
        return need.place is not None and need.place.tier not in ("", group[3])

    def _candidate(self, device: Device, need: Need) -> Candidate:
        reason = RUNTIME_MISSING if need.runtime not in device.capabilities.runtimes else None
        reason = reason or state_reason(device, self.weights) or need_reason(device, need)
        if reason is not None:
            return Candidate(device.executor, device.name, feasible=False, reason=reason)
        parts = score_parts(device, self.weights)
        if need.senior:
            parts["tier"] = round(tier_part(device.capabilities.tier, self.weights), 6)
        return Candidate(device.executor, device.name, True, score=round(sum(parts.values()), 6), parts=parts)
