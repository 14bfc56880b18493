"""Placement: feasible → score → pick, with a name for every rejection.

Devices are bucketed by capability class, so that a class that cannot run a task is refused once and its devices
are never looked at; inside a class a heap keyed by score gives the exact best. `explain` runs the same stages
over every device. (Shape after Nomad's scheduler: a line of small stages that serves picking and explaining.)
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from hive_common.contracts.events import Capabilities, Placement


class Need(msgspec.Struct, frozen=True):
    """What a task asks of a device. Its files are in memory, too."""

    runtime: str
    memory_bytes: int
    excluded: frozenset[str] = frozenset()
    scratch_bytes: int = 0


class Device(msgspec.Struct, frozen=True):
    """An executor as the scheduler sees it now. `slots_free` counts what it may still be given."""

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


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much each part of the score counts. Parts lie between 0 and 1."""

    load: float = 1.0
    power: float = 0.5
    memory: float = 0.1
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


_Class = tuple[str, str, frozenset[str]]
_State = Callable[[Device, Weights], bool]

RUNTIME_MISSING: Final = "runtime_missing"
EXCLUDED: Final = "excluded"
MEMORY_SHORT: Final = "memory_short"
SCRATCH_MISSING: Final = "scratch_missing"


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
    ("no_free_slot", lambda device, weights: device.slots_free <= 0),
)
"""Rejections that hold for every task alike. A device that one of them names is not in a heap at all."""


def class_of(device: Device) -> _Class:
    """Return the capability class: what decides over whole groups of devices at once."""
    capabilities = device.capabilities
    return capabilities.os, capabilities.arch, frozenset(capabilities.runtimes)


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
    return None


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
        self._buckets: dict[_Class, _Bucket] = {}
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
        reason = state_reason(device, self.weights)
        self._note_reason(group, executor, reason)
        if reason is None:
            self._stamp += 1
            score = sum(score_parts(device, self.weights).values())
            self._buckets.setdefault(group, _Bucket()).put(device, score, self._stamp)
        elif group in self._buckets:
            self._buckets[group].drop(executor)

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
        group = self._groups.pop(executor)
        self._class_sizes[group] -= 1
        if not self._class_sizes[group]:
            del self._class_sizes[group]
        self._note_reason(group, executor, None)
        if group in self._buckets:
            self._buckets[group].drop(executor)

    def has_room(self) -> bool:
        """Say whether any device could take any task. Cheap; lets a full pool skip the queue."""
        return any(bucket.stamps for bucket in self._buckets.values())

    def possible(self, need: Need) -> bool:
        """Say whether any device could take it, were it idle and awake."""
        gone = ("revoked", "killed")
        return any(
            need.runtime in device.capabilities.runtimes
            and self._reasons.get(device.executor) not in gone
            and need_reason(device, need) in (None, MEMORY_SHORT)
            for device in self._devices.values()
        )

    def place(self, need: Need) -> Picked | None:
        """Pick the best feasible device and take one of its slots, or return None where there is none."""
        rejected: Counter[str] = Counter()
        best: tuple[float, str] | None = None
        for group, size in self._class_sizes.items():
            if need.runtime not in group[2]:
                rejected[RUNTIME_MISSING] += size
                continue
            found = self._best_of(group, need, rejected)
            if found is not None and (best is None or found < best):
                best = found
        if best is None:
            return None
        self._count_states(need, rejected)
        negative_score, executor = best
        device = self._devices[executor]
        self.upsert(msgspec.structs.replace(device, slots_free=device.slots_free - 1, running=device.running + 1))
        return Picked(executor, Placement(len(self._devices), round(-negative_score, 6), dict(rejected)))

    def explain(self, need: Need) -> list[Candidate]:
        """Run every stage over every device: rejections with their reasons, the rest by falling score."""
        candidates = [self._candidate(device, need) for device in self._devices.values()]
        return sorted(candidates, key=lambda one: (not one.feasible, -(one.score or 0.0), one.executor))

    def _best_of(self, group: _Class, need: Need, rejected: Counter[str]) -> tuple[float, str] | None:
        bucket = self._buckets.get(group)
        if bucket is None:
            return None
        top = bucket.best()
        if top is not None and need_reason(self._devices[top[1]], need) is None:
            return top[0], top[1]
        looked_at, found = [], None
        for entry in bucket.best_first():
            looked_at.append(entry)
            reason = need_reason(self._devices[entry[1]], need)
            if reason is None:
                found = entry[0], entry[1]
                break
            rejected[reason] += 1
        for entry in looked_at:
            heapq.heappush(bucket.heap, entry)
        return found

    def _count_states(self, need: Need, rejected: Counter[str]) -> None:
        for (group, reason), count in self._reason_counts.items():
            if count and need.runtime in group[2]:
                rejected[reason] += count

    def _candidate(self, device: Device, need: Need) -> Candidate:
        reason = RUNTIME_MISSING if need.runtime not in device.capabilities.runtimes else None
        reason = reason or state_reason(device, self.weights) or need_reason(device, need)
        if reason is not None:
            return Candidate(device.executor, device.name, feasible=False, reason=reason)
        parts = score_parts(device, self.weights)
        return Candidate(device.executor, device.name, True, score=round(sum(parts.values()), 6), parts=parts)
