"""Keys, budgets and providers on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hive_cli.commands.key import limit_of
from hive_cli.commands.spending import _day, _subject
from hive_cli.home import Home, providers_of
from hive_cli.supervisor.provision import provision
from hive_common.kernel.errors import InvalidArgument

MODEL = {"name": "big", "input_usd": 0.15, "output_usd": 0.6, "context_tokens": 8_192}


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("usd=5/month", {"per": "month", "unit": "usd", "amount": 5 * 10**9}),
        ("usd=0.10/request", {"per": "request", "unit": "usd", "amount": 10**8}),
        ("tokens=100_000/day", {"per": "day", "unit": "tokens", "amount": 100_000}),
    ],
)
def test_a_budget_is_read(text: str, limit: dict[str, Any]) -> None:
    assert limit_of(text) == limit


NO_BUDGETS = ("", "5", "usd=5", "eur=5/month", "usd=5/week", "usd=x/day", "tokens=1.5/day", "usd=-1/day")


@pytest.mark.parametrize("text", NO_BUDGETS)
def test_what_is_no_budget_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--budget"):
        limit_of(text)


def test_exactly_one_subject_is_meant() -> None:
    assert _subject(True, "", "", "", "") == "total"
    assert _subject(False, "", "", "t", "") == "task:t"
    assert _subject(False, "", "", "", "*") == "agent:*"
    for wrong in ((False, "", "", "", ""), (True, "ci", "", "", "")):
        with pytest.raises(InvalidArgument, match="--total"):
            _subject(*wrong)


def test_days_may_be_so_long_ago() -> None:
    assert _day("2026-11-26") == "2026-11-26"
    assert len(_day("7d")) == 10
    with pytest.raises(InvalidArgument, match="--since"):
        _day("yesterday")


def home_with(folder: Path, model: dict[str, Any]) -> Home:
    home = Home(folder / "home")
    provision(home, 1, preferred_ports=False)
    key = home.secret_file("acme-key")
    key.touch(mode=0o600)
    key.write_text("secret")
    acme = {"name": "acme", "base_url": "https://api.example.org/v1", "key_file": "secrets/acme-key"}
    settings = json.loads(home.settings_file.read_text()) | {"providers": [acme | {"models": [model]}]}
    home.settings_file.write_text(json.dumps(settings))
    return home


def test_providers_are_kept_and_their_keys_stand_in_the_home(tmp_path: Path) -> None:
    home = home_with(tmp_path, MODEL)
    settings = provision(home, 2, preferred_ports=False)
    assert home.settings() == settings
    (one,) = providers_of(settings, home)
    assert (one.name, one.key_file) == ("acme", str(home.secret_file("acme-key")))


def test_a_price_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    model = {name: value for name, value in MODEL.items() if name != "output_usd"}
    home = home_with(tmp_path, model)
    with pytest.raises(InvalidArgument) as caught:
        provision(home, 1, preferred_ports=False)
    assert caught.value.message.startswith(f"{home.settings_file}: providers[0].models[0].output_usd: is missing")
