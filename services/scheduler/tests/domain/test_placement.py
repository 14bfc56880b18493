import random

import msgspec
from hive_common.contracts.events import Capabilities, Power
from hive_scheduler.domain.placement import (
    Apart,
    Device,
    Fleet,
    Need,
    Where,
    need_reason,
    score_parts,
    state_reason,
    tier_part,
)
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1 << 30


def device(
    name,
    *,
    slots=2,
    free=None,
    runtimes=("python", "command"),
    memory=8 * GIB,
    power=None,
    scratch=False,
    machine="",
    tier="worker",
    labels=None,
    owner="me",
    **more,
):
    return Device(
        executor=name,
        name=name,
        owner=owner,
        capabilities=Capabilities(
            os="linux",
            arch="x86_64",
            cores=4,
            memory_bytes=8 * GIB,
            slots=slots,
            runtimes=runtimes,
            power=power or Power(),
            scratch=scratch,
            device=machine or f"machine of {name}",
            tier=tier,
            labels=labels or {},
        ),
        slots_free=slots if free is None else free,
        memory_free_bytes=memory,
        **more,
    )


def fleet(*devices):
    made = Fleet()
    for one in devices:
        made.upsert(one)
    return made


NEED = Need("python", 64 << 20)


def test_work_is_spread_and_stops_when_every_slot_is_taken():
    pool = fleet(device("a"), device("b"))
    assert sorted(pool.place(NEED).executor for _ in range(4)) == ["a", "a", "b", "b"]
    assert pool.place(NEED) is None
    assert not pool.has_room()


def test_every_rejection_has_its_name():
    pool = fleet(
        device("wasm-only", runtimes=("command",)),
        device("full", free=0),
        device("gone", online=False),
        device("draining", drained=True),
        device("out", revoked=True, online=False),
        device("small", memory=1 << 20),
        device("flat", power=Power(battery_percent=5, charging=False)),
        device("excluded"),
        device("good"),
    )
    need = Need("python", 64 << 20, frozenset({"excluded"}))
    reasons = {one.name: one.reason for one in pool.explain(need)}
    assert reasons == {
        "good": None,
        "wasm-only": "runtime_missing",
        "full": "no_free_slot",
        "gone": "offline",
        "draining": "drained",
        "out": "revoked",
        "small": "memory_short",
        "flat": "battery_low",
        "excluded": "excluded",
    }
    picked = pool.place(need)
    assert picked.executor == "good"
    assert picked.placement.considered == 9
    assert picked.placement.rejected["runtime_missing"] == 1
    assert picked.placement.rejected["drained"] == 1
    assert picked.placement.rejected["revoked"] == 1


def test_files_take_a_device_that_can_limit_them_and_count_as_memory():
    pool = fleet(device("plain"), device("small", scratch=True, memory=96 << 20), device("good", scratch=True))
    need = Need("python", 64 << 20, scratch_bytes=64 << 20)
    reasons = {one.name: one.reason for one in pool.explain(need)}
    assert reasons == {"plain": "scratch_missing", "small": "memory_short", "good": None}
    assert pool.place(need).executor == "good"


def test_what_a_job_says_about_places_and_other_attempts_has_names():
    pool = fleet(
        device("edge", tier="edge"),
        device("here", labels={"region": "us"}),
        device("unnamed", labels={"region": "eu"}),
        device("first", labels={"region": "eu"}),
        device("beside", machine="machine of first", labels={"region": "eu"}),
        device("kin", owner="you", labels={"region": "eu"}),
        device("good", labels={"region": "eu"}),
    )
    need = Need(
        "python",
        64 << 20,
        place=Where("worker", frozenset({"here", "first", "beside", "kin", "good"}), frozenset({("region", "eu")})),
        distinct_from=Apart(frozenset({"first"}), frozenset({"machine of first"}), frozenset({"you"})),
    )
    assert {one.name: one.reason for one in pool.explain(need)} == {
        "good": None,
        "edge": "tier_differs",
        "here": "label_missing",
        "unnamed": "executor_not_named",
        "first": "same_executor",
        "beside": "same_device",
        "kin": "same_owner",
    }
    picked = pool.place(need)
    assert picked.executor == "good"
    assert picked.placement.rejected["tier_differs"] == 1


def test_machines_of_others_have_to_be_known_unless_their_work_is_judged():
    pool = fleet(
        device("mine"),
        device("known", owner="you", standing="known"),
        device("new", owner="you"),
        device("bad", owner="you", standing="quarantined"),
        device("mine and bad", standing="quarantined"),
    )
    need = Need("python", 64 << 20, owner="me")
    reasons = {one.name: one.reason for one in pool.explain(need) if not one.feasible}
    assert reasons == {"new": "new_executor", "bad": "quarantined"}
    reasons = {one.name: one.reason for one in pool.explain(msgspec.structs.replace(need, low_trust=True))}
    assert {name: reason for name, reason in reasons.items() if reason} == {"bad": "quarantined"}


def test_a_senior_goes_to_the_highest_tier_that_has_room_and_the_score_says_so():
    pool = fleet(
        device("edge", tier="edge"),
        device("worker"),
        device("core", tier="core", slots=1, running=1, power=Power(battery_percent=30, charging=False)),
    )
    senior = Need("python", 64 << 20, senior=True)
    best, *_ = pool.explain(senior)
    assert (best.name, best.parts["tier"]) == ("core", pool.weights.tier)
    assert [pool.place(senior).executor for _ in range(5)] == ["core", "worker", "worker", "edge", "edge"]
    pool.upsert(device("core", tier="core", power=Power(battery_percent=30, charging=False)))
    pool.upsert(device("worker"))
    assert "tier" not in pool.explain(NEED)[0].parts
    assert pool.place(NEED).executor == "worker"


def test_possible_is_what_is_neither_shut_out_nor_too_small_however_busy():
    need = Need("python", 1 * GIB, distinct_from=Apart(frozenset({"first"})))
    assert fleet(device("busy", free=0, memory=0, online=False, drained=True)).possible(need)
    for out in (
        device("first"),
        device("a", revoked=True),
        device("a", killed=True),
        device("a", runtimes=("command",)),
    ):
        assert not fleet(out).possible(need)
    assert not fleet(device("a")).possible(Need("python", 9 * GIB))


def test_a_device_that_runs_on_battery_comes_after_one_that_does_not():
    pool = fleet(device("laptop", power=Power(battery_percent=60, charging=False)), device("desktop"))
    assert pool.place(NEED).executor == "desktop"


def test_what_is_removed_is_not_picked_and_what_comes_back_is():
    pool = fleet(device("a"), device("b"))
    pool.remove("a")
    assert pool.place(NEED).executor == "b"
    pool.upsert(device("a"))
    pool.upsert(device("b", free=0))
    assert pool.place(NEED).executor == "a"


def test_the_heap_does_not_grow_with_changes():
    pool = fleet(device("a"))
    for _ in range(1_000):
        pool.upsert(device("a"))
    (bucket,) = pool._buckets.values()
    assert len(bucket.heap) < 100


devices = st.builds(
    device,
    st.sampled_from([f"d{n}" for n in range(12)]),
    slots=st.integers(1, 8),
    free=st.integers(0, 8),
    runtimes=st.sampled_from([("python",), ("command",), ("python", "command")]),
    memory=st.sampled_from([1 << 20, 1 << 30, 8 << 30]),
    power=st.builds(Power, st.none() | st.integers(0, 100), st.booleans()),
    running=st.integers(0, 4),
    machine=st.sampled_from(["m1", "m2", "m3"]),
    tier=st.sampled_from(["edge", "worker", "core"]),
    owner=st.sampled_from(["me", "you"]),
    standing=st.sampled_from(["new", "known", "quarantined"]),
    labels=st.sampled_from([{}, {"gpu": "yes"}]),
    drained=st.booleans(),
    online=st.booleans(),
)


some = st.frozensets(st.sampled_from([f"d{n}" for n in range(12)]), max_size=4)
needs = st.builds(
    Need,
    st.sampled_from(["python", "command"]),
    st.integers(0, 2 << 30),
    excluded=some,
    distinct_from=st.none()
    | st.builds(Apart, some, st.frozensets(st.sampled_from(["m1", "m2"])), judges=st.booleans()),
    place=st.none()
    | st.builds(
        Where,
        st.sampled_from(["", "edge", "core"]),
        some,
        st.sampled_from([frozenset(), frozenset({("gpu", "yes")})]),
    ),
    owner=st.sampled_from(["", "me"]),
    low_trust=st.booleans(),
    senior=st.booleans(),
)


@settings(max_examples=300)
@given(st.lists(devices, max_size=40), needs)
def test_the_pick_is_exactly_the_best_that_a_full_scan_finds(changes, need):
    pool, known = Fleet(), {}
    for change in changes:
        pool.upsert(change)
        known[change.executor] = change
    feasible = {
        name: sum(score_parts(one, pool.weights).values())
        + (tier_part(one.capabilities.tier, pool.weights) if need.senior else 0.0)
        for name, one in known.items()
        if need.runtime in one.capabilities.runtimes
        and state_reason(one, pool.weights) is None
        and need_reason(one, need) is None
    }
    explained = pool.explain(need)
    assert {one.executor for one in explained if one.feasible} == feasible.keys()
    assert pool.possible(need) or not feasible
    picked = pool.place(need)
    if not feasible:
        assert picked is None
    else:
        assert picked.placement.score == explained[0].score
        best = max(feasible.values())
        assert picked.executor == min(name for name, score in feasible.items() if score == best)
        assert sum(picked.placement.rejected.values()) <= len(known) - 1


def test_a_churn_of_many_devices_never_oversubscribes_one():
    rng = random.Random(7)
    pool, given_out = Fleet(), {}
    for number in range(500):
        pool.upsert(device(f"d{number}", slots=rng.randint(1, 4)))
    total = sum(pool.get(f"d{number}").slots_free for number in range(500))
    while (picked := pool.place(NEED)) is not None:
        given_out[picked.executor] = given_out.get(picked.executor, 0) + 1
    assert sum(given_out.values()) == total
    assert all(pool.get(name).capabilities.slots == count for name, count in given_out.items())


def test_candidates_can_be_sent_as_json():
    assert b'"reason":"no_free_slot"' in msgspec.json.encode(fleet(device("a", free=0)).explain(NEED))
