"""What a task waits for: machines that may be back keep it waiting, and those that were revoked do not."""

import msgspec
import pytest
from hive_common.contracts.events import Capabilities
from hive_scheduler.domain.placement import Apart, Device, Need
from hive_scheduler.domain.shortage import in_words, shortage_of

NEED = Need("python", 64 << 20, owner="me")


def machine(name, device="", owner="me", runtimes=("python",), **more):
    capabilities = Capabilities("linux", "amd64", 4, 1 << 30, 2, runtimes, device=device or name)
    return Device(name, name, owner, capabilities, **{"slots_free": 0, "memory_free_bytes": 0, **more})


def said(devices, wanted, distinct="device", held=0, need=NEED, judges=False):
    return in_words(shortage_of(need, wanted, distinct, devices, held), distinct, judges)


def without(*devices):
    return msgspec.structs.replace(NEED, distinct_from=Apart(devices=frozenset(devices)))


A, B, C = machine("a"), machine("b"), machine("c")


def test_who_is_there_and_busy_is_waited_for_without_a_word():
    assert said([A, B, C], 3) == ""
    assert said([A, B, C], 1, held=2, need=without("a", "b")) == ""
    assert said([A], 5, distinct="none") == ""


@pytest.mark.parametrize(
    ("away", "why"),
    [
        ({"online": False}, "is offline"),
        ({"drained": True}, "is drained"),
        ({"killed": True}, "is stopped by an order"),
        ({"owner": "you", "standing": "quarantined"}, "is in quarantine"),
        ({"owner": "you"}, "is not known yet"),
    ],
)
def test_who_may_be_back_is_named_and_nobody_is_gone(away, why):
    devices = [A, B, machine("c", **away)]
    assert shortage_of(NEED, 3, "device", devices).gone == 0
    expected = f"waits for a third device: 2 of 3 that may run it are there (c {why})"
    assert said(devices, 3) == expected
    assert said(devices, 1, held=2, need=without("a", "b")) == expected


def test_one_device_with_two_executors_is_one():
    assert said([A, machine("a2", "a"), B], 3) == "waits for a third device: 2 of 3 that may run it are there"
    assert said([A, machine("a2", "a"), B], 3, distinct="executor") == ""
    assert said([A, B, C], 2, distinct="owner") == "waits for a second owner: 1 of 2 that may run it is there"


def test_what_could_never_run_it_is_not_counted():
    other = machine("wasm", runtimes=("component",), revoked=True)
    assert shortage_of(NEED, 3, "device", [A, B, other]).gone == 0
    assert said([A, B, other], 3) == "waits for a third device: 2 of 3 that may run it are there"


def test_of_revoked_machines_as_many_are_gone_as_are_missed():
    out = [machine("c", revoked=True), machine("d", revoked=True, killed=True)]
    assert shortage_of(NEED, 3, "device", [A, B, *out]).gone == 1
    assert shortage_of(NEED, 2, "device", [A, B, *out]).gone == 0
    assert shortage_of(NEED, 9, "device", [A, B, *out]).gone == 2
    assert shortage_of(NEED, 1, "device", [A, *out], held=1).gone == 0
    assert shortage_of(without("a"), 1, "device", [A, *out]).gone == 1
    # It may be that of an executor which is still there, and one that is away is not gone.
    assert shortage_of(NEED, 3, "device", [A, B, machine("e", "c", online=False), *out]).gone == 0


def test_where_all_may_be_on_one_machine_nobody_is_gone_before_the_last():
    out = [machine("c", revoked=True)]
    assert shortage_of(NEED, 3, "none", [A, *out]).gone == 0
    assert shortage_of(NEED, 3, "none", [machine("a", online=False), *out]).gone == 0
    assert shortage_of(NEED, 3, "none", out).gone == 3
    assert shortage_of(NEED, 3, "none", []).gone == 0
    assert said(out, 3, distinct="none") == "waits for an executor that may run it: none is there"


def test_a_judge_says_what_it_keeps_away_from():
    assert said([A], 1, "none", need=without("a"), judges=True) == (
        "waits for an executor that made nothing of what it judges: none is there"
    )


def test_many_are_counted_and_not_named():
    away = [machine(f"m{number}", online=False) for number in range(5)]
    assert said(away, 3) == (
        "waits for a first device: none of 3 that may run it is there "
        "(m0 is offline, m1 is offline, m2 is offline, 2 more are away)"
    )
    assert said([A], 1, held=11, need=without("a")) == (
        "waits for one more device: 11 of 12 that may run it are there"
    )
