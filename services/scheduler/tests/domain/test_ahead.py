"""Who gets tasks for which it has no free slot yet, and how many."""

import msgspec
from hive_common.contracts.events import Capabilities
from hive_scheduler.domain.ahead import AHEAD_MS, Queue, Slots, Usual, waiting_max
from hive_scheduler.domain.placement import Apart, Device, Fleet, Need, need_reason, state_reason
from hypothesis import given, settings
from hypothesis import strategies as st

NEED = Need("python", 1)
SHORT_MS = 2.0


def device(name, *, slots=4, slots_free=0, ahead=0, pace=0.0, tier="worker", **more):
    capabilities = Capabilities("linux", "x86_64", 4, 1 << 30, slots, ("python",), device=name, tier=tier)
    return Device(name, name, "me", capabilities, slots_free, 1 << 30, ahead=ahead, pace=pace, **more)


def busy(name, *, waits=0, takes=128, usual_ms=SHORT_MS, slots=4, **more):
    """Return a device with all slots taken, at which so many wait and that takes so many more."""
    running = slots + waits
    more = {"slots": slots, "slots_free": takes, "ahead": waits + takes, "running": running, **more}
    return device(name, pace=slots / usual_ms, **more)


def idle(name, *, ahead=128, slots=4, **more):
    return device(name, slots=slots, slots_free=slots + ahead, ahead=ahead, **more)


def fleet(*devices):
    made = Fleet()
    for one in devices:
        made.upsert(one)
    return made


def placed(pool, count, usual_ms):
    """Place up to so many ready tasks; return how many each device got."""
    given_out = {one.executor: 0 for one in pool.devices()}
    for ready in range(count, 0, -1):
        picked = pool.place(NEED, Queue(usual_ms, ready))
        if picked is None:
            break
        given_out[picked.executor] += 1
    return given_out


def test_usual_times_that_rise_are_believed_sooner_than_falling_ones():
    usual = Usual()
    assert usual.ms("a") is None
    usual.observe("a", 100)
    usual.observe("a", 10_000)
    risen = usual.ms("a")
    assert 2_000 < risen < 10_000
    usual.observe("a", 100)
    assert usual.ms("a") > risen * 0.8


def test_the_agent_seen_longest_ago_is_forgotten():
    usual = Usual(agents_max=2)
    for agent in ("a", "b", "a", "c"):
        usual.observe(agent, 1)
    assert (len(usual), usual.ms("b")) == (2, None)
    assert usual.ms("a") == usual.ms("c") == 1


def test_slots_of_agents_that_nobody_knows_never_come_free():
    usual = Usual()
    usual.observe("a", 4)
    assert usual.pace(["a", "a", "unknown"]) == 0.5


def test_nothing_waits_while_there_are_as_many_slots_as_ready_tasks():
    assert waiting_max(Queue(SHORT_MS, 32), 4, 2.0, Slots(32, 32)) == 0
    assert waiting_max(Queue(SHORT_MS, 64), 4, 2.0, Slots(32, 32)) == 4
    assert waiting_max(Queue(SHORT_MS, 60), 4, 2.0, Slots(32, 4)) == 0, "others have no pull here yet"
    assert waiting_max(Queue(SHORT_MS, 50), 4, 2.0, Slots(4, 4 + 6)) == 52, "what waits already counts as work"
    assert waiting_max(Queue(None, 10_000), 4, 2.0, Slots(32, 32)) == 0


def test_as_many_wait_as_start_soon_by_what_runs_and_by_what_they_are_themselves():
    assert waiting_max(Queue(10, 10_000), 4, 4 / 10, Slots(4, 4)) == AHEAD_MS * 4 / 10
    assert waiting_max(Queue(10, 10_000), 4, 4 / 10_000, Slots(4, 4)) == 0
    assert waiting_max(Queue(10_000, 10_000), 4, 4 / 10, Slots(4, 4)) == 0


def test_long_tasks_wait_for_slots_of_anybody_and_not_behind_each_other():
    """Laptop and desktop have run short tasks, and ask for many ahead."""
    pool = fleet(idle("laptop"), idle("desktop"))
    assert placed(pool, 100, 10_000) == {"laptop": 4, "desktop": 4}
    assert placed(fleet(idle("laptop"), idle("desktop")), 100, None) == {"laptop": 4, "desktop": 4}


def test_two_rounds_of_tasks_are_two_rounds():
    """Executors that come one after the other get no more than their slots, though they would take more."""
    pool, ready = Fleet(), 64
    names = [f"e{number}" for number in range(8)]
    for name in names:
        pool.upsert(device(name, slots_free=0))
    for _ in range(2):
        for name in names:
            pool.upsert(idle(name, ahead=3))
            while (picked := pool.place(NEED, Queue(250, ready))) is not None:
                assert picked.executor == name
                ready -= 1
            assert pool.get(name).running == 4
            pool.upsert(device(name, slots_free=0))
    assert ready == 0


def test_short_tasks_wait_where_the_fewest_do():
    got = placed(fleet(*(idle(f"e{number}") for number in range(4))), 1_000, SHORT_MS)
    assert max(got.values()) - min(got.values()) <= 1
    assert sum(got.values()) > 400


def test_the_first_that_comes_takes_no_more_than_its_share_ahead():
    pool = fleet(idle("first", ahead=1_000), *(device(f"e{number}", running=4) for number in range(3)))
    assert 20 < placed(pool, 160, 1.0)["first"] <= 160 / 4


def test_waiting_ones_come_many_at_once():
    """One for each that ends would be a message for each."""
    queue = Queue(10, 10_000)
    most = waiting_max(queue, 4, 4 / 10, Slots(4, 4))
    half = busy("half", waits=most // 2, usual_ms=10)
    assert fleet(half).place(NEED, queue) is None
    below = msgspec.structs.replace(half, ahead=half.ahead - 1)
    assert placed(fleet(below), 10_000, 10) == {"half": most - most // 2 + 1}
    assert fleet(msgspec.structs.replace(half, given=True)).place(NEED, queue) is not None


def test_a_fleet_with_nothing_but_places_to_wait_has_room_and_says_that_no_slot_is_free():
    pool = fleet(busy("a"), busy("b", waits=1), device("full"))
    assert pool.has_room()
    assert pool.place(NEED) is None
    assert {one.reason for one in pool.explain(NEED)} == {"no_free_slot"}
    picked = pool.place(NEED, Queue(SHORT_MS, 1_000))
    assert picked.executor == "a"
    assert picked.placement.rejected == {"no_free_slot": 2}
    pool.remove("a")
    assert pool.place(NEED, Queue(SHORT_MS, 1_000)).executor == "b"
    pool.upsert(device("b"))
    assert not pool.has_room()


def test_a_device_without_slots_gets_nothing_whatever_it_asks_for():
    pool = fleet(device("a", slots=0, slots_free=5, ahead=5, pace=1.0))
    assert pool.place(NEED, Queue(SHORT_MS, 1_000)) is None


def test_slots_of_drained_and_absent_devices_are_no_reason_not_to_wait():
    queue = Queue(SHORT_MS, 16)
    there = busy("a")
    assert fleet(there, device("b", slots=16, running=16)).place(NEED, queue) is None
    for away in ({"drained": True}, {"online": False}, {"revoked": True}):
        assert fleet(there, device("b", slots=16, **away)).place(NEED, queue).executor == "a"
    pool = fleet(there, device("b", slots=16, running=16))
    pool.remove("b")
    assert pool.place(NEED, queue).executor == "a"


some = st.frozensets(st.sampled_from([f"d{n}" for n in range(6)]), max_size=3)
devices = st.builds(
    device,
    st.sampled_from([f"d{n}" for n in range(6)]),
    slots=st.integers(0, 4),
    slots_free=st.integers(0, 8),
    ahead=st.integers(0, 8),
    pace=st.sampled_from([0.0, 0.1, 4.0]),
    running=st.integers(0, 8),
    tier=st.sampled_from(["edge", "core"]),
    drained=st.booleans(),
)
needs = st.builds(
    Need,
    st.just("python"),
    st.just(1),
    excluded=some,
    distinct_from=st.none() | st.builds(Apart, some),
    senior=st.booleans(),
)
queues = st.builds(Queue, st.none() | st.sampled_from([1.0, 250.0, 10_000.0]), st.integers(1, 200))


@settings(max_examples=300)
@given(st.lists(devices, max_size=12), st.lists(st.tuples(needs, queues), min_size=1, max_size=12))
def test_nobody_waits_while_another_that_may_have_the_task_has_a_free_slot(changes, tasks):
    pool = fleet(*changes)
    for need, queue in tasks:
        before = {one.executor: one for one in pool.devices()}
        free = {
            name
            for name, one in before.items()
            if state_reason(one, pool.weights) is None and need_reason(one, need) is None
        }
        picked = pool.place(need, queue)
        assert (picked is not None and picked.executor in free) == bool(free)
        if picked is None:
            continue
        was, now = before[picked.executor], pool.get(picked.executor)
        assert (now.slots_free, now.ahead) == (was.slots_free - 1, was.ahead)
        assert now.slots_free >= 0
        if picked.executor not in free:
            there = [one for one in before.values() if not one.drained]
            slots = Slots(
                sum(one.capabilities.slots for one in there),
                sum(one.running for one in there),
            )
            assert now.waiting <= waiting_max(queue, was.capabilities.slots, was.pace, slots)
            assert need_reason(was, need) is None and not was.drained
