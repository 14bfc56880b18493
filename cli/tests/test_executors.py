from typing import Any

from hive_cli.commands.executor import COLUMNS, rows

LAPTOP = {
    "name": "laptop",
    "executor_id": "e-1",
    "owner": "o-1",
    "owner_name": "",
    "state": "online",
    "capabilities": {
        "cores": 8,
        "memory_bytes": 16 << 30,
        "runtimes": ["python", "command"],
        "version": "0.1.0",
        "models": [{"name": "a"}, {"name": "b"}],
        "power": {"battery_percent": 80, "charging": False},
    },
    "slots": 4,
    "running": 1,
    "last_seen_us": 98_000_000,
}


def row(**changes: Any) -> dict[str, str]:
    (found,) = rows([LAPTOP | changes], 100.0, "o-1")
    return dict(zip(COLUMNS, found, strict=True))


def test_a_row_says_whose_it_is_what_it_can_do_and_when_it_was_seen() -> None:
    assert row() == {
        "name": "laptop",
        "id": "e-1",
        "owner": "you",
        "state": "online",
        "version": "0.1.0",
        "cores": "8",
        "memory": "16 GiB",
        "runtimes": "python,command",
        "slots": "4",
        "running": "1",
        "models": "a, b",
        "power": "80 %",
        "last seen": "2 s ago",
    }


def test_the_owner_of_another_machine_is_named_where_the_name_is_known() -> None:
    assert row(owner="o-2", owner_name="Grandma")["owner"] == "Grandma"
    assert row(owner="o-2")["owner"] == "o-2"


def test_who_never_said_hello_is_shown_without_what_is_not_known() -> None:
    shown = row(capabilities=None, last_seen_us=None)
    unknown = {name: shown[name] for name in ("version", "cores", "memory", "runtimes", "models", "power")}
    assert unknown == dict.fromkeys(("version", "cores", "memory", "runtimes", "power"), "?") | {"models": "-"}
    assert shown["last seen"] == "never"


def test_power_and_many_models_are_put_shortly() -> None:
    can = LAPTOP["capabilities"]
    assert isinstance(can, dict)
    assert row(capabilities=can | {"power": {}})["power"] == "mains"
    assert row(capabilities=can | {"power": {"battery_percent": 7}})["power"] == "7 %, charging"
    assert row(capabilities=can | {"models": [{"name": str(n)} for n in range(5)]})["models"] == "5"
    assert row(capabilities=can | {"models": []})["models"] == "-"
