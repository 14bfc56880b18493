"""Ids: derived ones are a function of what they name, and children lie beside one another."""

from uuid import UUID

from hive_common.kernel.ids import derive_child_id, derive_id, is_id, new_id


def test_a_child_id_is_a_function_of_its_parent_and_its_parts():
    parent, other = new_id(), new_id()
    ids = {derive_child_id(parent, "step", str(index)) for index in range(1_000)}
    assert ids == {derive_child_id(parent, "step", str(index)) for index in range(1_000)}
    assert len(ids | {derive_child_id(other, "step", str(index)) for index in range(1_000)}) == 2_000
    assert derive_child_id(parent, "ab", "c") != derive_child_id(parent, "a", "bc")


def test_parents_of_the_same_millisecond_share_no_child():
    first, second = new_id(1_700_000_000_000), new_id(1_700_000_000_000)
    assert first[:13] == second[:13]
    assert derive_child_id(first, "step", "0") != derive_child_id(second, "step", "0")


def test_a_child_id_is_an_id_of_version_8_that_begins_as_its_parent():
    for parent in (new_id(), derive_id("by", "idempotency key")):
        child = derive_child_id(parent, "step", "0")
        assert is_id(child) and UUID(child).version == 8
        assert child[:13] == parent[:13]


def test_children_of_a_later_job_sort_behind_those_of_an_earlier_one():
    earlier, later = new_id(1_700_000_000_000), new_id(1_700_000_000_001)
    assert max(derive_child_id(earlier, "step", str(index)) for index in range(100)) < min(
        derive_child_id(later, "step", str(index)) for index in range(100)
    )
