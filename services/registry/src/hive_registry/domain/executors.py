"""What a hello, a drain and its end do to an executor.

    (unknown) ── hello ──→ registered ── hello that differs ──→ registered
    registered ── drain ──→ drained ── undrain ──→ registered

Saying again what is known changes nothing and makes no event.
"""

from typing import Final

import msgspec
from hive_common.contracts.events import (
    Capabilities,
    Event,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorRegistered,
    ExecutorUndrained,
    Power,
)
from hive_common.kernel.errors import InvalidArgument, NotFound, UnknownEvent

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
    """An executor as the log has it. Version 0 is one that never said hello."""

    version: int = 0
    name: str = ""
    capabilities: Capabilities | None = None
    drained: bool = False


UNKNOWN: Final = ExecutorState()


def say_hello(state: ExecutorState, name: str, capabilities: Capabilities) -> tuple[Event, ...]:
    """Return the events of a hello. The name of the first one stays.

    Raises:
        InvalidArgument: a text, number or list beyond its bound.
    """
    _check_text("name", name, NAME_CHARACTERS_MAX)
    if not name:
        raise InvalidArgument("name: is empty; expected the executor's name", path="name")
    check_capabilities(capabilities)
    if state.capabilities is None:
        return (ExecutorRegistered(name=name, capabilities=capabilities),)
    if differs(state.capabilities, capabilities):
        return (ExecutorCapabilitiesChanged(capabilities=capabilities),)
    return ()


def drain(state: ExecutorState, reason: str) -> tuple[Event, ...]:
    """Return the events of a drain.

    Raises:
        NotFound: it never said hello.
        InvalidArgument: the reason is beyond its bound.
    """
    _check_known(state)
    _check_text("reason", reason, REASON_CHARACTERS_MAX)
    return () if state.drained else (ExecutorDrainRequested(reason=reason),)


def undrain(state: ExecutorState) -> tuple[Event, ...]:
    """Return the events of the end of a drain. Raises NotFound when it never said hello."""
    _check_known(state)
    return (ExecutorUndrained(),) if state.drained else ()


def evolve(state: ExecutorState, event: Event) -> ExecutorState:
    """Return the state after `event`. Raises UnknownEvent for one that is not about executors (law 11)."""
    version = state.version + 1
    match event:
        case ExecutorRegistered():
            return ExecutorState(version, event.name, event.capabilities)
        case ExecutorCapabilitiesChanged():
            return msgspec.structs.replace(state, version=version, capabilities=event.capabilities)
        case ExecutorDrainRequested():
            return msgspec.structs.replace(state, version=version, drained=True)
        case ExecutorUndrained():
            return msgspec.structs.replace(state, version=version, drained=False)
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
            _check_text(path, value, TEXT_CHARACTERS_MAX)
        case int():
            if not 0 <= value <= INTEGER_MAX:
                raise InvalidArgument(f"{path}: got {value}; expected 0 to {INTEGER_MAX}", path=path)
        case dict():
            _check_count(path, len(value))
            for key, child in value.items():
                _check_text(path, str(key), TEXT_CHARACTERS_MAX)
                _check_value(f"{path}.{key}", child)
        case list() | tuple():
            _check_count(path, len(value))
            for index, child in enumerate(value):
                _check_value(f"{path}[{index}]", child)


def _check_count(path: str, count: int) -> None:
    if count > ITEMS_MAX:
        raise InvalidArgument(f"{path}: {count} entries; expected at most {ITEMS_MAX}", path=path)


def _check_text(path: str, text: str, characters_max: int) -> None:
    if len(text) > characters_max or not text.isprintable():
        raise InvalidArgument(
            f"{path}: expected at most {characters_max} printable characters", path=path, limit=characters_max
        )


def _check_known(state: ExecutorState) -> None:
    if state.version == 0:
        raise NotFound("this executor never said hello")
