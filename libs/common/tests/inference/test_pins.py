import pytest
from hive_common.inference.calls import is_pin, narrowest
from hive_common.kernel.errors import PermissionDenied


@pytest.mark.parametrize(
    ("first", "second", "narrow"),
    [
        ("", "", "any"),
        ("", "pool", "pool"),
        ("any", "region:eu", "region:eu"),
        ("pool", "own-devices", "own-devices"),
        ("pool", "region:eu", "region:eu"),
        ("own-devices", "own-devices", "own-devices"),
    ],
)
def test_of_two_pins_the_narrower_one_holds_whichever_comes_first(first: str, second: str, narrow: str) -> None:
    assert narrowest(first, second) == narrowest(second, first) == narrow


@pytest.mark.parametrize(("first", "second"), [("own-devices", "region:eu"), ("region:us", "region:eu")])
def test_pins_of_which_neither_is_narrower_allow_nothing(first: str, second: str) -> None:
    with pytest.raises(PermissionDenied, match="cannot hold together"):
        narrowest(first, second)


def test_what_a_pin_is() -> None:
    assert all(map(is_pin, ("any", "pool", "own-devices", "region:eu")))
    assert not any(map(is_pin, ("", "region:", "own", "ANY", "pool ")))
