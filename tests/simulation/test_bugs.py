"""Planted bugs are found: here some, at seeds that are known to; `make simulate-bugs` looks for all of them."""

import pytest

from .bugs import BUGS, ROOT, copy_tree, find, misplaced

SEEDS_MAX = 10
AT = {
    "fencing off": 1,
    "the log takes a second end": 3,
    "a report is acknowledged": 1,
    "a lost attempt is not retried": 1,
    "a report that comes twice": 1,
    "a judge may sit": 1,
    "a decision with a vote too few": 2,
    "hedges without a budget": 10,
}
"""Where to begin to look. A change of the scheduler changes worlds: so a few seeds more are given."""

pytestmark = pytest.mark.timeout(600)


def test_every_bug_can_still_be_planted():
    assert [(bug.name, problem) for bug in BUGS if (problem := misplaced(ROOT, bug))] == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("bugs") / "tree"
    copy_tree(tree)
    return tree


@pytest.mark.parametrize("name", AT)
def test_a_planted_bug_is_found(tree, name):
    (bug,) = [bug for bug in BUGS if bug.name.startswith(name)]
    seed, said = find(tree, bug, AT[name], SEEDS_MAX)
    assert seed is not None, said
