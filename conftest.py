"""What holds for all tests, and the order in which processes of `make test` take files.

Long ones come early and apart, so that all end together.
"""

from itertools import groupby
from pathlib import Path

import hypothesis
import pytest

# An example that once takes long on a busy machine is no finding.
hypothesis.settings.register_profile("hive", deadline=None)
hypothesis.settings.load_profile("hive")

TESTS = Path(__file__).parent / "tests"
LONG_UNTIL = 0.85
"""Behind this part of the run none of `tests` begins: they start whole installations and take up to two minutes."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mix files that mostly wait for servers with files that mostly compute. Alone, the order stays as it is."""
    if hasattr(config, "workerinput"):
        items[:] = mixed(items)


def mixed(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the same tests, file by file: those of `tests` spread, the others by their number beside them."""
    files = [list(of_file) for _, of_file in groupby(items, lambda item: item.path)]
    long = [of_file for of_file in files if TESTS in of_file[0].path.parents]
    short = [of_file for of_file in files if TESTS not in of_file[0].path.parents]
    short.sort(key=len, reverse=True)
    placed = [(LONG_UNTIL * index / len(long), of_file) for index, of_file in enumerate(long)]
    placed += [(index / len(short), of_file) for index, of_file in enumerate(short)]
    placed.sort(key=lambda one: one[0])
    return [item for _, of_file in placed for item in of_file]
