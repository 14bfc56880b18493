"""An agent that remembers, from one job to the next, and its owner who looks at that and takes some of it away."""

from pathlib import Path

from hive_common.testing.installation import Installation

EXAMPLE = Path(__file__).parents[2] / "examples" / "changes"


def test_what_a_job_keeps_the_next_one_finds_until_the_owner_removes_it(
    hive_home: Installation, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    hive_home.hive("agent", "push", str(EXAMPLE / "notice"), str(EXAMPLE / "report"), "--grant")

    def states() -> dict[str, int]:
        files = f"files=@{tmp_path}/*.txt"
        result = hive_home.json("run", str(EXAMPLE / "job.yaml"), "--input", files)
        return {state: len(result["output"][state]) for state in ("new", "changed", "same")}

    before = set(hive_home.json("kv", "list", "changes")["keys"])
    assert states() == {"new": 2, "changed": 0, "same": 0}
    (tmp_path / "two.txt").write_text("changed")
    assert states() == {"new": 0, "changed": 1, "same": 1}
    mine = set(hive_home.json("kv", "list", "changes", "--prefix", "files/")["keys"]) - before
    assert len(mine) == 2
    values = {key: hive_home.json("kv", "get", "changes", key)["value"] for key in mine}
    assert sorted(value["seen"] for value in values.values()) == [2, 2]
    hive_home.hive("kv", "delete", "changes", min(mine))
    assert states() == {"new": 1, "changed": 0, "same": 1}
