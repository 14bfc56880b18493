from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_packaged_world_is_the_published_one() -> None:
    packaged = (resources.files("hive_executor.guest") / "agent.wit").read_text()
    assert packaged == (ROOT / "proto/wit/agent.wit").read_text()
