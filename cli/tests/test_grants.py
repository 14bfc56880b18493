"""How `hive agent grant` reads what is typed."""

from datetime import UTC, datetime

import pytest
from hive_cli.commands.grant import until_us
from hive_cli.main import app
from hive_common.kernel.errors import InvalidArgument
from typer.testing import CliRunner

NOW = datetime(2026, 11, 26, 4, 0, tzinfo=UTC)
NOW_US = int(NOW.timestamp()) * 1_000_000


@pytest.mark.parametrize(
    ("text", "us"),
    [
        ("90s", NOW_US + 90_000_000),
        ("12h", NOW_US + 12 * 3_600_000_000),
        ("30d", NOW_US + 30 * 86_400_000_000),
        ("2026-11-26T04:00Z", NOW_US),
        ("2026-11-26T05:00+01:00", NOW_US),
        ("2026-11-26T04:00:00", NOW_US),
        ("2026-11-27", NOW_US + 20 * 3_600_000_000),
    ],
)
def test_an_end_is_a_time_or_how_long_from_now(text: str, us: int) -> None:
    assert until_us(text, NOW) == us


@pytest.mark.parametrize("text", ["soon", "12", "5w", "-1h", "2026-13-01", "h"])
def test_an_end_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        until_us(text, NOW)
    assert "--until" in error.value.message and "expected" in error.value.message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["http", "--quota", "1Ki"], "--quota narrows `kv`, which is not among http"),
        (["kv", "--models", "a"], "--models narrows `model`"),
        (["model", "http", "--size", "1Mi"], "--size narrows `scratch`"),
        (["kv", "--max-tokens", "5"], "--max-tokens narrows `model`"),
    ],
)
def test_an_option_of_a_permission_that_is_not_named_is_refused(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["agent", "grant", "asker", *arguments])
    assert isinstance(done.exception, InvalidArgument)
    assert done.exception.message.startswith(says)
