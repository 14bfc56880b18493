from typing import Any

import pytest
from hive_common.contracts.events import Model, Power
from hive_common.kernel.errors import BudgetExhausted, HiveError, InvalidArgument, PermissionDenied, Unavailable
from hive_router.domain.breaker import Breaker
from hive_router.domain.refusals import refusal
from hive_router.domain.selection import STAGES, Ask, BackEnd, Choice, Circumstances, CloudRefusal, Weights, select
from hypothesis import given
from hypothesis import strategies as st

AT = Circumstances(
    now_ms=1_000, weights=Weights(), host_executors=frozenset({"host-executor"}), killed=frozenset({"killed"})
)
CHAT = Model(name="m", backend="ollama", context_tokens=100)


def back_end(name: str, **changes: Any) -> BackEnd:
    values: dict[str, Any] = {
        "id": name,
        "executor": name,
        "name": name,
        "owner": "me",
        "is_host": False,
        "models": {"m": CHAT},
        "slots": 4,
        **changes,
    }
    return BackEnd(**values)


def ask(**changes: Any) -> Ask:
    fields = {"model": "m", "endpoint": "chat", "pin": "any", "owner": "me", "cloud_refusal": None}
    return Ask(**{**fields, **changes})


def chosen(wanted: Ask, *back_ends: BackEnd) -> Choice:
    return select(wanted, back_ends, [], AT)


REJECTED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("origin", {}, {"origin": "x"}, "the call comes from there"),
    ("revoked", {"revoked": True}, {}, "revoked"),
    ("killed", {"executor": "killed"}, {}, "a kill order stops it"),
    ("pin", {"owner": "other"}, {"pin": "own-devices"}, "not an own device"),
    ("pin", {"region": "us"}, {"pin": "region:eu"}, "its region is us"),
    ("pin", {}, {"pin": "region:eu"}, "not known"),
    ("offline", {"online": False}, {}, "does not pull"),
    ("drained", {"drained": True}, {}, "nothing new"),
    ("power", {"power": Power(battery_percent=19, charging=False)}, {}, "19 %"),
    (
        "capability",
        {"models": {"m": Model(name="m", backend="x", abilities=("embedding",))}},
        {"needs": frozenset({"completion"})},
        "only makes embeddings",
    ),
    (
        "capability",
        {"models": {"m": Model(name="m", backend="lm-studio", abilities=("completion",))}},
        {"endpoint": "embeddings", "needs": frozenset({"embedding"})},
        "without embedding",
    ),
    (
        "capability",
        {"lacks": {("m", "embedding")}},
        {"endpoint": "embeddings", "needs": frozenset({"embedding"})},
        "without embedding",
    ),
    (
        "capability",
        {"models": {"m": Model(name="m", backend="x", abilities=("completion",))}},
        {"needs": frozenset({"tools"})},
        "without tools",
    ),
    ("capability", {"lacks": {("m", "tools")}}, {"needs": frozenset({"tools"})}, "without tools"),
    ("context", {}, {"prompt_bytes": 808}, "101 tokens do not fit into 100"),
    ("breaker", {"breaker": Breaker(state="open", until_ms=1_001)}, {}, "again and again"),
    ("breaker", {"breaker": Breaker(state="half_open")}, {}, "again and again"),
    ("queue", {"in_flight": 4}, {}, "4 calls run there"),
    ("pin", {"provider": "acme"}, {"pin": "pool"}, "pinned to pool"),
    *(
        (reason, {"provider": "acme"}, {"cloud_refusal": CloudRefusal(reason, "said so")}, "said so")
        for reason in ("cloud_off", "key", "no_budget", "pin", "whatever")
    ),
]


@pytest.mark.parametrize(("reason", "device", "wanted", "detail"), REJECTED)
def test_each_stage_rejects_by_its_name(
    reason: str, device: dict[str, Any], wanted: dict[str, Any], detail: str
) -> None:
    choice = chosen(ask(**wanted), back_end("x", **device), back_end("y", region="eu"))
    rejected = next(one for one in choice.candidates if one.backend == "x")
    assert rejected.rejected == reason
    assert detail in rejected.detail
    # Without what stands against it, it is fit: the stage said no more than it had to.
    assert [one.id for one in chosen(ask(), back_end("x")).fit] == ["x"]


def test_what_serves_models_beside_a_stopped_executor_of_the_host_goes_on() -> None:
    assert chosen(ask(), back_end("http://host", executor="killed", is_host=True)).fit


def test_every_stage_is_tried_above() -> None:
    refusals = {"key", "no_budget", "whatever"}  # of the stage `cloud_off`, which says why by itself
    assert {reason for reason, *_ in REJECTED} - refusals == {name for name, _ in STAGES}


def test_a_call_that_nobody_looked_at_goes_to_no_provider() -> None:
    choice = chosen(Ask(model="m", endpoint="chat", pin="any", owner="me"), back_end("x", provider="acme"))
    assert (choice.fit, choice.candidates[0].rejected) == ([], "cloud_off")


def test_a_provider_comes_last_whatever_the_weights() -> None:
    far = Circumstances(1_000, Weights(local=-50, load=50, latency=50))
    busy = back_end("a", in_flight=3, latency_ms=60_000)
    choice = select(ask(), [back_end("b", provider="acme"), busy], [], far)
    assert [one.id for one in choice.fit] == ["a", "b"]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("key", PermissionDenied),
        ("no_budget", BudgetExhausted),
        ("pin", Unavailable),
    ],
)
def test_a_model_that_only_providers_have_is_refused_by_the_reason(reason: str, kind: type[HiveError]) -> None:
    wanted = ask(pin="pool") if reason == "pin" else ask(cloud_refusal=CloudRefusal(reason, "because"))
    found = refusal(wanted, chosen(wanted, back_end("x", provider="acme")).candidates)
    assert type(found) is kind
    assert found.fields["reason"] == reason


def test_a_battery_of_ones_own_host_does_not_matter() -> None:
    host = back_end("http://x", is_host=True, power=Power(battery_percent=3, charging=False))
    assert chosen(ask(), host).fit == [host]


@pytest.mark.parametrize(("origin", "route"), [("", "local"), ("host-executor", "local"), ("other", "pool")])
def test_the_host_is_local_to_what_runs_on_it(origin: str, route: str) -> None:
    host = back_end("http://x", is_host=True)
    assert chosen(ask(origin=origin), host).candidates[0].route == route


def test_the_cloud_is_off_and_says_so() -> None:
    assert [one.rejected for one in chosen(ask()).candidates] == ["cloud_off"]
    assert [one.rejected for one in chosen(ask(pin="pool")).candidates] == ["pin"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"is_host": True}, {}),
        ({"models": {"m": Model(name="m", backend="x", loaded=True)}}, {}),
        ({}, {"in_flight": 3}),
        ({"latency_ms": 100.0}, {"latency_ms": 5_000.0}),
        ({}, {"power": Power(battery_percent=40, charging=False)}),
    ],
)
def test_what_makes_a_back_end_better(better: dict[str, Any], worse: dict[str, Any]) -> None:
    choice = chosen(ask(), back_end("a", **worse), back_end("b", **better))
    assert [one.id for one in choice.fit] == ["b", "a"]
    assert choice.candidates[0].score > choice.candidates[1].score


def test_a_tag_that_is_latest_need_not_be_said() -> None:
    tagged = back_end("x", models={"m:latest": named("m:latest", context_tokens=5)})
    assert chosen(ask(prompt_bytes=80), tagged).candidates[0].rejected == "context"


def named(name: str, **changes: Any) -> Model:
    return Model(name=name, backend="x", **changes)


def refused(wanted: Ask, *back_ends: BackEnd) -> Exception:
    choice = chosen(wanted, *back_ends)
    assert not choice.fit
    return refusal(wanted, choice.candidates)


def test_a_pin_that_forbids_all_is_the_reason() -> None:
    error = refused(ask(pin="own-devices"), back_end("x", owner="other"))
    assert isinstance(error, Unavailable)
    assert error.message == "own-devices: no own device serves `m`"


def test_where_the_pin_allows_somebody_that_ones_reason_counts() -> None:
    error = refused(
        ask(pin="own-devices"), back_end("x", owner="other"), back_end("laptop", online=False, owner="me")
    )
    assert isinstance(error, Unavailable)
    assert error.message == "own-devices: no device can serve `m` now: laptop: it does not pull"


def test_what_no_device_can_do_is_the_callers_to_change() -> None:
    too_long = refused(ask(prompt_bytes=10_000), back_end("x"))
    assert isinstance(too_long, InvalidArgument) and too_long.fields == {"reason": "context_length_exceeded"}
    tools = refused(ask(needs=frozenset({"tools"})), back_end("x", lacks={("m", "tools")}))
    assert isinstance(tools, InvalidArgument) and tools.fields == {"reason": "unsupported"}


back_ends = st.lists(
    st.builds(
        back_end,
        st.uuids().map(str),
        owner=st.sampled_from(["me", "other"]),
        region=st.sampled_from(["", "eu", "us"]),
        is_host=st.booleans(),
        online=st.booleans(),
        drained=st.booleans(),
        revoked=st.booleans(),
        in_flight=st.integers(0, 5),
        latency_ms=st.floats(0, 1e6),
        power=st.builds(Power, battery_percent=st.none() | st.integers(0, 100), charging=st.booleans()),
    ),
    max_size=8,
    unique_by=lambda one: one.id,
)


@given(
    back_ends,
    st.sampled_from(["any", "pool", "own-devices", "region:eu"]),
    st.sampled_from(["", "host-executor", "other"]),
)
def test_whoever_is_fit_may_have_the_data_and_everybody_is_accounted_for(
    found: list[BackEnd], pin: str, origin: str
) -> None:
    choice = chosen(ask(pin=pin, origin=origin), *found)
    for one in choice.fit:
        assert one.online and not one.revoked and not one.drained and one.in_flight < one.slots
        assert pin != "own-devices" or one.owner == "me"
        assert pin != "region:eu" or one.region == "eu"
    assert sorted(one.backend for one in choice.candidates[:-1]) == sorted(one.id for one in found)
    assert [one.backend for one in choice.candidates if not one.rejected] == [one.id for one in choice.fit]
    scores = [one.score for one in choice.candidates if not one.rejected]
    assert scores == sorted(scores, reverse=True)
    if not choice.fit:
        assert refusal(ask(pin=pin, origin=origin), choice.candidates).message
