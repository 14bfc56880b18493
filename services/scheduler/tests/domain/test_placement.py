import random

import msgspec
from hive_common.contracts.events import Capabilities, Power
from hive_scheduler.domain.placement import Device, Fleet, Need, need_reason, score_parts, state_reason
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1 << 30


def device(
    name, *, slots=2, free=None, runtimes=("python", "command"), memory=8 * GIB, power=None, scratch=False, **more
):
    return Device(
        executor=name,
        name=name,
        owner="me",
        capabilities=Capabilities(
            os="linux",
            arch="x86_64",
            cores=4,
            memory_bytes=8 * GIB,
            slots=slots,
            runtimes=runtimes,
            power=power or Power(),
            scratch=scratch,
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
    drained=st.booleans(),
    online=st.booleans(),
)


@settings(max_examples=200)
@given(st.lists(devices, max_size=40), st.sampled_from(["python", "command"]), st.integers(0, 2 << 30))
def test_the_pick_is_exactly_the_best_that_a_full_scan_finds(changes, runtime, memory):
    pool, known = Fleet(), {}
    for change in changes:
        pool.upsert(change)
        known[change.executor] = change
    need = Need(runtime, memory)
    feasible = {
        name: sum(score_parts(one, pool.weights).values())
        for name, one in known.items()
        if runtime in one.capabilities.runtimes
        and state_reason(one, pool.weights) is None
        and need_reason(one, need) is None
    }
    picked = pool.place(need)
    if not feasible:
        assert picked is None
    else:
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
