"""Providers in a configuration, and the prices of what they serve."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.inference.providers import ProviderConfig, check_providers
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.money import Price, parse_usd, pico_usd_per_token, show_usd
from hypothesis import given
from hypothesis import strategies as st

MODEL = {"name": "big", "input_usd": 0.15, "output_usd": "0.6", "context_tokens": 8_192}


def providers(folder: Path, *models: dict[str, Any], **changes: Any) -> tuple[ProviderConfig, ...]:
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text("secret")
    one = {
        "name": "acme",
        "base_url": "https://api.example.org/v1",
        "key_file": str(key),
        "models": models or (MODEL,),
    }
    return msgspec.json.decode(msgspec.json.encode([one | changes]), type=tuple[ProviderConfig, ...])


def test_prices_are_read_as_they_are_written(tmp_path: Path) -> None:
    found = providers(tmp_path)
    check_providers(found, "hive.json: providers")
    assert found[0].models[0].price == Price(150_000, 600_000)


@pytest.mark.parametrize("name", ["input_usd", "output_usd"])
def test_a_price_that_is_missing_is_refused_with_its_path_and_what_to_do(tmp_path: Path, name: str) -> None:
    model = {key: value for key, value in MODEL.items() if key != name}
    with pytest.raises(InvalidArgument) as caught:
        check_providers(providers(tmp_path, MODEL | {"name": "small"}, model), "hive.json: providers")
    assert caught.value.fields["path"] == f"hive.json: providers[0].models[1].{name}"
    assert f'such as "{name}": 0.15, and 0 where it costs nothing' in caught.value.message


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"base_url": "http://api.example.org/v1"}, "base_url"),
        ({"base_url": "https://api.example.org"}, "base_url"),
        ({"base_url": "https://me:secret@api.example.org/v1"}, "base_url"),
        ({"base_url": "ftp://api.example.org/v1"}, "base_url"),
        ({"name": "Acme Inc"}, "name"),
        ({"key_file": "/nowhere"}, "key_file"),
        ({"models": []}, "models"),
        ({"models": [MODEL, MODEL]}, "models"),
        ({"models": [MODEL, MODEL | {"name": "small", "aliases": ["big"]}]}, "models"),
        ({"models": [MODEL | {"name": ""}]}, "models[0].name"),
        ({"models": [MODEL | {"input_usd": -1}]}, "models[0].input_usd"),
        ({"models": [MODEL | {"output_usd": "0.0000001"}]}, "models[0].output_usd"),
        ({"models": [MODEL | {"context_tokens": 0}]}, "models[0].context_tokens"),
        ({"models": [MODEL | {"max_output_tokens": 9_000}]}, "models[0].max_output_tokens"),
    ],
)
def test_what_cannot_be_called_is_refused_with_its_path(tmp_path: Path, changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_providers(providers(tmp_path, **changes), "providers")
    assert caught.value.fields["path"] == f"providers[0].{path}"


def test_two_of_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="`acme` stands there twice"):
        check_providers(providers(tmp_path) * 2, "providers")


@pytest.mark.parametrize(("text", "nano"), [("5", 5 * 10**9), ("0.50", 5 * 10**8), ("$1.000000001", 10**9 + 1)])
def test_amounts_are_read(text: str, nano: int) -> None:
    assert parse_usd(text, "--usd") == nano


@pytest.mark.parametrize("text", ["", "x", "-1", "NaN", "inf", "1e30", "0.0000000001"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--usd"):
        parse_usd(text, "--usd")


def test_costs_are_rounded_up() -> None:
    assert Price(1, 0).nano_usd(1, 0) == 1
    assert Price(1_000, 0).nano_usd(1, 0) == 1
    assert Price(1_001, 0).nano_usd(1, 0) == 2
    assert Price(pico_usd_per_token(Decimal("0.15"), "x"), 0).nano_usd(1_000_000, 0) == 150_000_000


@given(st.integers(0, 10**15))
def test_what_is_shown_can_be_read_again(nano: int) -> None:
    assert parse_usd(show_usd(nano), "x") == nano
