import msgspec
import pytest
from hive_common.contracts.events import (
    Capabilities,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorRegistered,
    ExecutorUndrained,
    Gpu,
    JobCancelled,
    Model,
    Power,
)
from hive_common.kernel.errors import InvalidArgument, NotFound, UnknownEvent
from hive_registry.domain.executors import (
    BATTERY_BAND_PERCENT,
    UNKNOWN,
    ExecutorState,
    differs,
    drain,
    evolve,
    say_hello,
    undrain,
)
from hypothesis import given
from hypothesis import strategies as st

BASE = Capabilities(os="linux", arch="x86_64", cores=4, memory_bytes=1 << 33, slots=4, runtimes=("python",))


def after(*events: object, start: ExecutorState = UNKNOWN) -> ExecutorState:
    for event in events:
        start = evolve(start, event)  # type: ignore[arg-type]
    return start


def on_battery(percent: int | None, charging: bool = False) -> Capabilities:
    return msgspec.structs.replace(BASE, power=Power(battery_percent=percent, charging=charging))


KNOWN = after(ExecutorRegistered(name="laptop", capabilities=BASE))


def test_the_first_hello_registers() -> None:
    assert say_hello(UNKNOWN, "laptop", BASE) == (ExecutorRegistered(name="laptop", capabilities=BASE),)


def test_the_same_hello_again_is_no_event() -> None:
    assert say_hello(KNOWN, "laptop", BASE) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"cores": 8},
        {"slots": 0},
        {"memory_bytes": 1 << 34},
        {"runtimes": ("python", "component")},
        {"version": "2"},
        {"labels": {"room": "attic"}},
        {"gpus": (Gpu(name="gpu"),)},
        {"models": (Model(name="m", backend="ollama"),)},
        {"power": Power(battery_percent=50)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_hello_that_differs_is_an_event(change: dict[str, object]) -> None:
    now = msgspec.structs.replace(BASE, **change)  # type: ignore[arg-type]
    assert say_hello(KNOWN, "laptop", now) == (ExecutorCapabilitiesChanged(capabilities=now),)


def test_a_model_that_gets_loaded_is_an_event_and_another_order_of_models_is_not() -> None:
    one, two = Model(name="one", backend="ollama"), Model(name="two", backend="ollama")
    known = msgspec.structs.replace(BASE, models=(one, two))
    assert not differs(known, msgspec.structs.replace(BASE, models=(two, one)))
    loaded = msgspec.structs.replace(one, loaded=True)
    assert differs(known, msgspec.structs.replace(BASE, models=(loaded, two)))


def test_plugging_in_is_an_event() -> None:
    assert differs(on_battery(50, charging=False), on_battery(50, charging=True))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=200))
def test_a_battery_makes_few_events_and_what_is_known_is_never_off_by_a_band(levels: list[int]) -> None:
    state = after(ExecutorRegistered(name="laptop", capabilities=on_battery(levels[0])))
    for level in levels:
        state = after(*say_hello(state, "laptop", on_battery(level)), start=state)
        assert state.capabilities is not None
        known = state.capabilities.power.battery_percent
        assert known is not None
        assert abs(known - level) < BATTERY_BAND_PERCENT


def test_a_battery_that_drains_evenly_makes_ten_events() -> None:
    state = after(ExecutorRegistered(name="laptop", capabilities=on_battery(100)))
    for level in range(100, -1, -1):
        state = after(*say_hello(state, "laptop", on_battery(level)), start=state)
    assert state.version == 1 + 10


def test_the_name_of_the_first_hello_stays() -> None:
    assert say_hello(KNOWN, "other", BASE) == ()
    assert after(*say_hello(KNOWN, "other", on_battery(5)), start=KNOWN).name == "laptop"


def test_drain_and_undrain_are_events_once() -> None:
    assert drain(KNOWN, "update") == (ExecutorDrainRequested(reason="update"),)
    drained = after(*drain(KNOWN, "update"), start=KNOWN)
    assert drained.drained
    assert drain(drained, "again") == ()
    assert undrain(drained) == (ExecutorUndrained(),)
    assert undrain(after(*undrain(drained), start=drained)) == ()


def test_a_drained_executor_that_says_hello_stays_drained() -> None:
    drained = after(*drain(KNOWN, ""), start=KNOWN)
    assert after(*say_hello(drained, "laptop", on_battery(5)), start=drained).drained


def test_who_never_said_hello_cannot_be_drained() -> None:
    for decide in (lambda: drain(UNKNOWN, ""), lambda: undrain(UNKNOWN)):
        with pytest.raises(NotFound):
            decide()


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"cores": -1}, "capabilities.cores"),
        ({"memory_bytes": 2**63}, "capabilities.memory_bytes"),
        ({"os": "linux\x00"}, "capabilities.os"),
        ({"version": "1\n2"}, "capabilities.version"),
        ({"arch": "x" * 300}, "capabilities.arch"),
        ({"labels": {"a\x1b[31m": "b"}}, "capabilities.labels"),
        ({"runtimes": ("x",) * 1000}, "capabilities.runtimes"),
        ({"models": (Model(name="\x00", backend="b"),)}, "capabilities.models[0].name"),
        ({"power": Power(battery_percent=101)}, "capabilities.power.battery_percent"),
        ({"labels": {str(n): "x" * 250 for n in range(500)}}, "capabilities"),
    ],
)
def test_what_an_executor_says_is_bounded(change: dict[str, object], path: str) -> None:
    now = msgspec.structs.replace(BASE, **change)  # type: ignore[arg-type]
    for state in (UNKNOWN, KNOWN):
        with pytest.raises(InvalidArgument) as refused:
            say_hello(state, "laptop", now)
        assert refused.value.fields["path"] == path


@pytest.mark.parametrize("name", ["", "a" * 129, "a\nb", "\x00"])
def test_names_are_bounded(name: str) -> None:
    with pytest.raises(InvalidArgument):
        say_hello(UNKNOWN, name, BASE)


def test_an_event_of_another_kind_stops_the_reader() -> None:
    with pytest.raises(UnknownEvent):
        evolve(KNOWN, JobCancelled())
