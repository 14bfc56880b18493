import msgspec
import pytest
from hive_common.bus.jwt import new_seed, public_nkey
from hive_common.contracts.events import (
    Capabilities,
    ExecutorCapabilitiesChanged,
    ExecutorDrainRequested,
    ExecutorEnrolled,
    ExecutorRegistered,
    ExecutorRevoked,
    ExecutorTrusted,
    ExecutorUndrained,
    Gpu,
    JobCancelled,
    Model,
    Power,
)
from hive_common.kernel.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    UnknownEvent,
)
from hive_registry.domain.executors import (
    BATTERY_BAND_PERCENT,
    UNKNOWN,
    ExecutorState,
    differs,
    drain,
    enrol_local,
    evolve,
    revoke,
    say_hello,
    trust,
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


KEY = public_nkey(new_seed("user"))
ENROLLED = after(ExecutorEnrolled(name="laptop", public_key=KEY, owner="o"))
KNOWN = after(ExecutorRegistered(name="laptop", capabilities=BASE), start=ENROLLED)
REVOKED = after(ExecutorRevoked(), start=KNOWN)


def test_the_first_hello_registers() -> None:
    assert say_hello(ENROLLED, "laptop", BASE) == (ExecutorRegistered(name="laptop", capabilities=BASE),)


def test_the_name_of_the_enrolment_stays() -> None:
    assert say_hello(ENROLLED, "other", BASE) == (ExecutorRegistered(name="laptop", capabilities=BASE),)


def test_a_hello_of_who_is_not_enrolled_is_refused() -> None:
    before_keys = after(ExecutorRegistered(name="laptop", capabilities=BASE))
    for state in (UNKNOWN, before_keys):
        with pytest.raises(FailedPrecondition, match="not enrolled here; join with: hive executor join TOKEN"):
            say_hello(state, "laptop", BASE)


def test_a_revoked_executor_stays_so_and_its_hello_is_refused() -> None:
    assert revoke(KNOWN, "lost") == (ExecutorRevoked(reason="lost"),)
    assert revoke(REVOKED, "again") == ()
    with pytest.raises(PermissionDenied, match="revoked") as error:
        say_hello(REVOKED, "laptop", on_battery(5))
    assert error.value.fields == {"reason": "revoked"}
    assert enrol_local(REVOKED, "laptop", KEY, "o") == ()
    with pytest.raises(NotFound):
        revoke(UNKNOWN, "")
    with pytest.raises(InvalidArgument):
        revoke(KNOWN, "a" * 501)


def test_a_local_executor_is_enrolled_once_and_again_with_another_key() -> None:
    assert enrol_local(UNKNOWN, "laptop", KEY, "o") == (ExecutorEnrolled(name="laptop", public_key=KEY, owner="o"),)
    assert enrol_local(KNOWN, "laptop", KEY, "o") == ()
    old = after(ExecutorEnrolled(name="laptop", public_key="an older one", owner="o"))
    assert after(*enrol_local(old, "other", KEY, "o"), start=old).public_key == KEY
    assert after(*enrol_local(old, "other", KEY, "o"), start=old).name == "laptop"
    with pytest.raises(InvalidArgument):
        enrol_local(UNKNOWN, "laptop", "no key", "o")


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
    state = after(ExecutorRegistered(name="laptop", capabilities=on_battery(levels[0])), start=ENROLLED)
    for level in levels:
        state = after(*say_hello(state, "laptop", on_battery(level)), start=state)
        assert state.capabilities is not None
        known = state.capabilities.power.battery_percent
        assert known is not None
        assert abs(known - level) < BATTERY_BAND_PERCENT


def test_a_battery_that_drains_evenly_makes_ten_events() -> None:
    state = after(ExecutorRegistered(name="laptop", capabilities=on_battery(100)), start=ENROLLED)
    for level in range(100, -1, -1):
        state = after(*say_hello(state, "laptop", on_battery(level)), start=state)
    assert state.version == 2 + 10


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


def test_each_word_of_a_person_that_an_executor_is_trusted_begins_new_records() -> None:
    assert trust(KNOWN, "fixed") == (ExecutorTrusted(reason="fixed"),)
    trusted = after(*trust(KNOWN, "fixed"), start=KNOWN)
    assert trusted == msgspec.structs.replace(KNOWN, version=KNOWN.version + 1)
    assert trust(trusted, "again") == (ExecutorTrusted(reason="again"),)
    with pytest.raises(FailedPrecondition):
        trust(after(ExecutorRevoked(), start=KNOWN), "please")


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
        ({"tier": "moon"}, "capabilities.tier"),
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
