"""How much of a disk JetStream may take."""

from pathlib import Path

import pytest
from hive_cli.supervisor.nats_conf import STORE_BYTES_MAX, STORE_BYTES_MIN, render, store_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "stored", "expected"),
    [
        (0, 0, STORE_BYTES_MIN),
        (0, GIB, GIB // 2),
        (2 * GIB, 0, GIB),
        (3 * GIB, GIB, 2 * GIB),
        (1000 * GIB, 0, STORE_BYTES_MAX),
    ],
)
def test_half_of_the_disk_within_bounds(free: int, stored: int, expected: int) -> None:
    assert store_bytes(free, stored) == expected


@pytest.mark.parametrize(("bound", "lines"), [(None, 0), (12345, 1)])
def test_the_server_is_told_only_where_it_is_known(bound: int | None, lines: int) -> None:
    text = render(port=1, monitor_port=2, store_dir=Path("/store"), trust="", store_bytes_max=bound)
    assert text.count("max_file_store: 12345\n") == lines
    assert text.count("max_file_store") == lines
