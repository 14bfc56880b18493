"""What an enrolment, a hello, a drain, its end and a revocation do to an executor.

    (unknown) ── enrol ──→ enrolled ── hello ──→ registered ── hello that differs ──→ registered
    registered ── drain ──→ drained ── undrain ──→ registered
    (any but unknown) ── revoke ──→ revoked, which is the end

An executor of before there were keys is registered and not enrolled: its hello is refused until it is.

Saying again what is known changes nothing and makes no event.
"""

from typing import Final

import msgspec
from hive_common.contracts.events import (
    TIERS,
    Capabilities,
    Event,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorEnrolled,
    ExecutorRegistered,
    ExecutorRevoked,
    ExecutorTrusted,
    ExecutorUndrained,
    Power,
)
from hive_common.kernel.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    UnknownEvent,
)
from hive_common.kernel.nkey import public_key

BATTERY_BAND_PERCENT: Final = 10
"""A battery that moved less than this since it was recorded is no event: it would be one every few minutes."""

NAME_CHARACTERS_MAX: Final = 128
REASON_CHARACTERS_MAX: Final = 500
TEXT_CHARACTERS_MAX: Final = 256
ITEMS_MAX: Final = 512
CAPABILITIES_BYTES_MAX: Final = 64 * 1024
"""Bounds of what an executor may say about itself. It lands in the log, in views and in replies."""

INTEGER_MAX: Final = 2**62
"""Fits the database's eight bytes, with room to add some up."""


class ExecutorState(msgspec.Struct, frozen=True):
    """An executor as the log has it. Version 0 is one of which it knows nothing.

    `capabilities` is None until its first hello; `public_key` and `owner` are empty until it is enrolled.
    """

    version: int = 0
    name: str = ""
    capabilities: Capabilities | None = None
    drained: bool = False
    public_key: str = ""
    owner: str = ""
    owner_name: str = ""
    revoked: bool = False


UNKNOWN: Final = ExecutorState()


def say_hello(state: ExecutorState, name: str, capabilities: Capabilities) -> tuple[Event, ...]:
    """Return the events of a hello. The name with which it was enrolled stays.

    Raises:
        InvalidArgument: a text, number or list beyond its bound.
        FailedPrecondition: it is not enrolled.
        PermissionDenied: it is revoked.
    """
    check_name(name)
    check_capabilities(capabilities)
    check_enrolled(state)
    if state.capabilities is None:
        return (ExecutorRegistered(name=state.name, capabilities=capabilities),)
    if differs(state.capabilities, capabilities):
        return (ExecutorCapabilitiesChanged(capabilities=capabilities),)
    return ()


def enrol_local(state: ExecutorState, name: str, key: str, owner: str) -> tuple[Event, ...]:
    """Return the events that enrol an executor of the installation's own machine, which has no token.

    What its supervisor says counts: another key than the known one takes its place.

    Args:
        state: of the executor.
        name: for people.
        key: its public nkey.
        owner: pseudonym of the installation's owner.

    Raises:
        InvalidArgument: the name or the key is none.
    """
    check_name(name)
    public_key(key)
    if state.revoked or state.public_key == key:
        return ()
    return (ExecutorEnrolled(name=state.name or name, public_key=key, owner=owner),)


def revoke(state: ExecutorState, reason: str) -> tuple[Event, ...]:
    """Return the events of a revocation.

    Raises:
        NotFound: it is not known.
        InvalidArgument: the reason is beyond its bound.
    """
    _check_known(state)
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    return () if state.revoked else (ExecutorRevoked(reason=reason),)


def check_enrolled(state: ExecutorState) -> None:
    """Check that an executor may take part.

    Raises:
        FailedPrecondition: it is not enrolled.
        PermissionDenied: it is revoked; `reason` says so to programs.
    """
    if state.revoked:
        raise PermissionDenied("this executor was revoked, for ever; to come back it joins anew", reason="revoked")
    if not state.public_key:
        raise FailedPrecondition("this executor is not enrolled here; join with: hive executor join TOKEN")


def drain(state: ExecutorState, reason: str) -> tuple[Event, ...]:
    """Return the events of a drain.

    Raises:
        NotFound: it is not known.
        InvalidArgument: the reason is beyond its bound.
    """
    _check_known(state)
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    return () if state.drained else (ExecutorDrainRequested(reason=reason),)


def undrain(state: ExecutorState) -> tuple[Event, ...]:
    """Return the events of the end of a drain. Raises NotFound when it is not known."""
    _check_known(state)
    return (ExecutorUndrained(),) if state.drained else ()


def trust(state: ExecutorState, reason: str) -> tuple[Event, ...]:
    """Return the events of a person's word that an executor's records begin anew.

    Raises:
        NotFound: it is not known.
        FailedPrecondition: it is out for ever.
        InvalidArgument: the reason is beyond its bound.
    """
    _check_known(state)
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    if state.revoked:
        raise FailedPrecondition("this executor was revoked, for ever; to come back it joins anew")
    return (ExecutorTrusted(reason=reason),)


def evolve(state: ExecutorState, event: Event) -> ExecutorState:
    """Return the state after `event`. Raises UnknownEvent for one that is not about executors (law 11)."""
    version = state.version + 1
    match event:
        case ExecutorEnrolled():
            return msgspec.structs.replace(
                state,
                version=version,
                name=event.name,
                public_key=event.public_key,
                owner=event.owner,
                owner_name=event.owner_name,
            )
        case ExecutorRevoked():
            return msgspec.structs.replace(state, version=version, revoked=True)
        case ExecutorRegistered():
            return msgspec.structs.replace(state, version=version, name=event.name, capabilities=event.capabilities)
        case ExecutorCapabilitiesChanged():
            return msgspec.structs.replace(state, version=version, capabilities=event.capabilities)
        case ExecutorDrainRequested():
            return msgspec.structs.replace(state, version=version, drained=True)
        case ExecutorUndrained():
            return msgspec.structs.replace(state, version=version, drained=False)
        case ExecutorTrusted():
            return msgspec.structs.replace(state, version=version)
    raise UnknownEvent(f"an executor's stream holds a {type(event).__name__}")


def differs(known: Capabilities, now: Capabilities) -> bool:
    """Say whether `now` is worth an event after `known`."""
    return _power_differs(known.power, now.power) or _without_power(known) != _without_power(now)


def _power_differs(known: Power, now: Power) -> bool:
    before, after = known.battery_percent, now.battery_percent
    if before is None or after is None:
        return known != now
    return known.charging != now.charging or abs(before - after) >= BATTERY_BAND_PERCENT


def _without_power(capabilities: Capabilities) -> Capabilities:
    return msgspec.structs.replace(
        capabilities,
        power=Power(),
        # Back ends list their models in any order.
        models=tuple(sorted(capabilities.models, key=lambda model: (model.name, model.backend))),
    )


def check_capabilities(capabilities: Capabilities) -> None:
    """Check what an executor says about itself.

    Raises:
        InvalidArgument: beyond a bound, a control character, a negative number; names the path.
    """
    size = len(msgspec.json.encode(capabilities))
    if size > CAPABILITIES_BYTES_MAX:
        raise InvalidArgument(
            f"capabilities: {size} bytes; expected at most {CAPABILITIES_BYTES_MAX}", path="capabilities"
        )
    _check_value("capabilities", msgspec.to_builtins(capabilities))
    if capabilities.tier not in TIERS:
        raise InvalidArgument(f"capabilities.tier: expected one of {', '.join(TIERS)}", path="capabilities.tier")
    battery = capabilities.power.battery_percent
    if battery is not None and battery > 100:
        raise InvalidArgument(
            f"capabilities.power.battery_percent: got {battery}; expected 0 to 100",
            path="capabilities.power.battery_percent",
        )


def _check_value(path: str, value: object) -> None:
    match value:
        case bool() | None:
            return
        case str():
            check_text(path, value, TEXT_CHARACTERS_MAX)
        case int():
            if not 0 <= value <= INTEGER_MAX:
                raise InvalidArgument(f"{path}: got {value}; expected 0 to {INTEGER_MAX}", path=path)
        case dict():
            _check_count(path, len(value))
            for key, child in value.items():
                check_text(path, str(key), TEXT_CHARACTERS_MAX)
                _check_value(f"{path}.{key}", child)
        case list() | tuple():
            _check_count(path, len(value))
            for index, child in enumerate(value):
                _check_value(f"{path}[{index}]", child)


def _check_count(path: str, count: int) -> None:
    if count > ITEMS_MAX:
        raise InvalidArgument(f"{path}: {count} entries; expected at most {ITEMS_MAX}", path=path)


def check_name(name: str) -> None:
    """Check an executor's name. Raises InvalidArgument where it is empty, too long or not printable."""
    check_text("name", name, NAME_CHARACTERS_MAX)
    if not name:
        raise InvalidArgument("name: is empty; expected the executor's name", path="name")


def check_text(path: str, text: str, characters_max: int) -> None:
    """Check a text that people gave. Raises InvalidArgument where it is too long or not printable."""
    if len(text) > characters_max or not text.isprintable():
        raise InvalidArgument(
            f"{path}: expected at most {characters_max} printable characters", path=path, limit=characters_max
        )


def _check_known(state: ExecutorState) -> None:
    if state.version == 0:
        raise NotFound("this executor is not known here")
