"""Where a call may go: a line of small stages, each with a named reason, and a score for what is left.

The shape is the scheduler's: the same stages serve the choice and its explanation.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
from hive_common.contracts.events import Model, ModelCandidate, Power
from hive_common.inference.abilities import COMPLETION, lacking
from hive_common.inference.calls import PIN_ANY

from hive_router.domain.breaker import CLOSED, Breaker, allows

LOCAL: Final = "local"
POOL: Final = "pool"
CLOUD: Final = "cloud"

REASON_MODEL: Final = "model"
REASON_PIN: Final = "pin"
REASON_ORIGIN: Final = "origin"
REASON_QUEUE: Final = "queue"
REASON_CAPABILITY: Final = "capability"
REASON_CONTEXT: Final = "context"
REASON_CLOUD_OFF: Final = "cloud_off"
REASON_KEY: Final = "key"
REASON_NO_BUDGET: Final = "no_budget"

OTHERS_SHOWN_MAX: Final = 16
"""Back ends without the model that an explanation names."""

_OUTSIDE: Final = -1_000.0
"""In the score of a provider: whatever else is fit comes before it, whatever the weights."""

_LATEST: Final = ":latest"
_PROMPT_BYTES_PER_TOKEN: Final = 8
"""Tokenisers make a token of 3 to 5 bytes of ordinary text. Only what is twice too long is refused unseen; the
back end counts exactly."""


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much each part of the score counts. Parts lie between 0 and 1.

    With these a back end of the caller's own device wins unless it is loaded with calls and another one is idle
    and has the model in memory.
    """

    local: float = 2.0
    loaded: float = 0.75
    load: float = 1.0
    latency: float = 0.5
    power: float = 0.25
    battery_floor_percent: int = 20


class CloudRefusal(msgspec.Struct, frozen=True):
    """Why a call may not leave for a provider: the reason's name, and for people what is to be done."""

    reason: str
    detail: str


CORE: Final = "core"
_NOT_ASKED: Final = CloudRefusal(REASON_CLOUD_OFF, "nobody looked whether this call may")


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a call asks of a back end.

    Attributes:
        model, endpoint: of the call.
        pin: where its data may go.
        owner: whose call it is; `own-devices` are this one's.
        origin: executor that the call comes from; empty for the gateway's host.
        prompt_bytes: of the text that the model has to read; 0 where that says nothing about tokens.
        needs: abilities that the model has to have, such as `tools`.
        tried: back ends that this call has tried.
        cloud_refusal: why it may go to no provider; None: it may, by its key, permission and budget.
        metered: its tokens are counted here, so that it came here although its device may serve the model.
    """

    model: str
    endpoint: str
    pin: str
    owner: str
    origin: str = ""
    prompt_bytes: int = 0
    needs: frozenset[str] = frozenset()
    tried: frozenset[str] = frozenset()
    cloud_refusal: CloudRefusal | None = _NOT_ASKED
    metered: bool = False


class BackEnd(msgspec.Struct, kw_only=True):
    """Something that serves models, as the router sees it now.

    Attributes:
        id: unique: a base URL of the gateway's host, an executor's id, or `cloud:` and a provider's name.
        executor: id of the device.
        name: for people.
        is_host: it is on the gateway's host.
        models: by name.
        slots: calls that may run at once.
        in_flight: calls that run.
        latency_ms: moving average of the time to the first byte; 0 before the first.
        lacks: (model, need) that it has refused.
        provider: name, of one that costs money; empty for devices.
        tier: class of the device.
    """

    id: str
    executor: str
    name: str
    owner: str
    is_host: bool
    models: dict[str, Model]
    slots: int
    region: str = ""
    power: Power = Power()
    online: bool = True
    drained: bool = False
    revoked: bool = False
    in_flight: int = 0
    latency_ms: float = 0.0
    breaker: Breaker = CLOSED
    lacks: set[tuple[str, str]] = msgspec.field(default_factory=set)
    provider: str = ""
    tier: str = "worker"

    @property
    def core(self) -> bool:
        """Whether what it answers is a core call: it is a provider, or a device of tier `core`."""
        return bool(self.provider) or self.tier == CORE


class Choice(msgspec.Struct, frozen=True):
    """Outcome of a selection: what is fit, the best first, and the record of all that was looked at."""

    fit: list[BackEnd]
    candidates: list[ModelCandidate]


class Circumstances(msgspec.Struct, frozen=True):
    """What is true of all back ends at once: the time, the weights, the executors on the gateway's host, and what
    executors a kill order stops.
    """

    now_ms: int
    weights: Weights
    host_executors: frozenset[str] = frozenset()
    killed: frozenset[str] = frozenset()


_Stage = Callable[[Ask, BackEnd, Circumstances], str | CloudRefusal | None]
"""Says what stands against a back end; a refusal brings its own reason."""


def model_of(backend: BackEnd, name: str) -> Model | None:
    """Return what a back end serves under a name. Ollama's names may leave out the tag `latest`."""
    return backend.models.get(name) or next(
        (backend.models[alias] for alias in aliases(name) if alias in backend.models), None
    )


def aliases(name: str) -> tuple[str, ...]:
    """Return the other names that mean the same model."""
    if name.endswith(_LATEST):
        return (name.removesuffix(_LATEST),)
    return () if ":" in name else (name + _LATEST,)


def route_to(backend: BackEnd, ask: Ask, host_executors: frozenset[str]) -> str:
    """Return `local` for a back end on the device that the call comes from, `cloud` for a provider, else `pool`."""
    if backend.provider:
        return CLOUD
    from_host = not ask.origin or ask.origin in host_executors
    return LOCAL if (backend.is_host and from_host) or (ask.origin and backend.id == ask.origin) else POOL


def _origin(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    if ask.metered or not ask.origin or backend.id != ask.origin:
        return None
    return "the call comes from there"


def _outside(ask: Ask, backend: BackEnd, at: Circumstances) -> CloudRefusal | None:
    return ask.cloud_refusal if backend.provider else None


def _pin(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    if backend.provider:
        return None if ask.pin == PIN_ANY else f"pinned to {ask.pin}"
    if ask.pin == "own-devices" and backend.owner != ask.owner:
        return "not an own device"
    if ask.pin.startswith("region:") and backend.region != ask.pin.removeprefix("region:"):
        return f"its region is {backend.region or 'not known'}"
    return None


def _revoked(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    return "it was revoked" if backend.revoked else None


def _killed(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    # What serves models on the gateway's host is none of the executor's there.
    return "a kill order stops it" if not backend.is_host and backend.executor in at.killed else None


def _offline(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    return None if backend.online else "it does not pull"


def _drained(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    return "it takes nothing new" if backend.drained else None


def _power(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    power, floor = backend.power, at.weights.battery_floor_percent
    if backend.is_host or power.charging or power.battery_percent is None or power.battery_percent >= floor:
        return None
    return f"battery at {power.battery_percent} %, and calls of others need {floor} %"


def _capability(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    model = model_of(backend, ask.model)
    known = [] if model is None else lacking(model, ask.needs)
    if COMPLETION in known:
        return "this model only makes embeddings"
    refused = (need for need in ask.needs if (ask.model, need) in backend.lacks)
    lacks = sorted({*known, *refused})
    return f"without {', '.join(lacks)} here" if lacks else None


def _context(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    model = model_of(backend, ask.model)
    room = 0 if model is None else model.context_tokens
    tokens = ask.prompt_bytes // _PROMPT_BYTES_PER_TOKEN
    return f"at least {tokens} tokens do not fit into {room}" if room and tokens > room else None


def _breaker(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    return None if allows(backend.breaker, at.now_ms) else "it failed again and again; it is tried again soon"


def _queue(ask: Ask, backend: BackEnd, at: Circumstances) -> str | None:
    return f"{backend.in_flight} calls run there" if backend.in_flight >= backend.slots else None


STAGES: Final[tuple[tuple[str, _Stage], ...]] = (
    (REASON_ORIGIN, _origin),
    ("revoked", _revoked),
    ("killed", _killed),
    (REASON_PIN, _pin),
    (REASON_CLOUD_OFF, _outside),
    ("offline", _offline),
    ("drained", _drained),
    ("power", _power),
    (REASON_CAPABILITY, _capability),
    (REASON_CONTEXT, _context),
    ("breaker", _breaker),
    (REASON_QUEUE, _queue),
)
"""The first that has something to say rejects. What is true for long comes before what may pass."""


def score(ask: Ask, backend: BackEnd, at: Circumstances) -> float:
    """Return how good a fit back end is; more is better."""
    weights, power, model = at.weights, backend.power, model_of(backend, ask.model)
    on_battery = not power.charging and power.battery_percent is not None
    return (
        _OUTSIDE * bool(backend.provider)
        + weights.local * (route_to(backend, ask, at.host_executors) == LOCAL)
        + weights.loaded * (model is not None and model.loaded)
        + weights.load * (1.0 - min(backend.in_flight / max(backend.slots, 1), 1.0))
        + weights.latency / (1.0 + backend.latency_ms / 1_000)
        + weights.power * ((power.battery_percent or 0) / 100 if on_battery else 1.0)
    )


def select(ask: Ask, serving: Iterable[BackEnd], others: Sequence[BackEnd], at: Circumstances) -> Choice:
    """Pass the back ends that have the model down the line.

    Args:
        ask: what is wanted.
        serving: those that have the model.
        others: those that do not; some of them are named in the record.
        at: the circumstances.
    """
    fit: list[tuple[float, str, BackEnd]] = []
    rejected: list[ModelCandidate] = []
    has_provider = False
    for backend in serving:
        has_provider |= bool(backend.provider)
        if backend.id in ask.tried:
            continue
        for reason, stage in STAGES:
            detail = stage(ask, backend, at)
            if isinstance(detail, CloudRefusal):
                reason, detail = detail.reason, detail.detail
            if detail is not None:
                rejected.append(_candidate(ask, backend, at, rejected=reason, detail=detail))
                break
        else:
            fit.append((-round(score(ask, backend, at), 6), backend.id, backend))
    fit.sort(key=lambda entry: entry[:2])
    candidates = [_candidate(ask, backend, at, score=-negative) for negative, _, backend in fit]
    candidates += rejected
    candidates += [_candidate(ask, one, at, rejected=REASON_MODEL) for one in others[:OTHERS_SHOWN_MAX]]
    if not has_provider:
        candidates.append(cloud_candidate(ask.pin))
    return Choice([backend for _, _, backend in fit], candidates)


def cloud_candidate(pin: str) -> ModelCandidate:
    """Return the record of the cloud where no provider serves the model."""
    if pin != "any":
        return ModelCandidate("", CLOUD, rejected=REASON_PIN, detail=f"pinned to {pin}")
    return ModelCandidate("", CLOUD, rejected=REASON_CLOUD_OFF, detail="no provider is set up for it")


def _candidate(
    ask: Ask, backend: BackEnd, at: Circumstances, score: float = 0.0, rejected: str = "", detail: str = ""
) -> ModelCandidate:
    route = route_to(backend, ask, at.host_executors)
    if rejected and detail:
        detail = f"{backend.name}: {detail}"
    return ModelCandidate(backend.executor, route, backend.id, score, rejected, detail)
