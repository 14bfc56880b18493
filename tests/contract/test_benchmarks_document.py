"""`docs/BENCHMARKS.md` says what the results say that are kept in the tree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def report(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.report", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def copy_of(tmp_path: Path) -> tuple[Path, Path, Path]:
    newest = max((ROOT / "benchmarks" / "results").glob("*.json"))
    document = tmp_path / "docs" / "BENCHMARKS.md"
    results = tmp_path / "benchmarks" / "results" / newest.name
    for source, target in (
        (ROOT / "docs" / "BENCHMARKS.md", document),
        (newest, results),
        (ROOT / "benchmarks" / "__init__.py", tmp_path / "benchmarks" / "__init__.py"),
        (ROOT / "benchmarks" / "report.py", tmp_path / "benchmarks" / "report.py"),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tmp_path, document, results


def test_the_tables_are_those_of_the_newest_results():
    checked = report("--check", cwd=ROOT)
    assert checked.returncode == 0, checked.stderr


def test_other_figures_are_noticed_and_written(tmp_path):
    tree, document, results = copy_of(tmp_path)
    figures = json.loads(results.read_text())
    figures["verify"]["verify_per_s"] = {"median": 123_456, "min": 123_455, "max": 123_457}
    results.write_text(json.dumps(figures))
    assert report("--check", cwd=tree).returncode == 1
    assert report(cwd=tree).returncode == 0
    row = next(line for line in document.read_text().splitlines() if line.startswith("| verification"))
    assert "123,456/s (123,455 to 123,457)" in row and "**missed**" in row
    assert report("--check", cwd=tree).returncode == 0


def test_a_goal_is_called_reached_only_where_the_figure_reaches_it(tmp_path):
    tree, document, results = copy_of(tmp_path)
    figures = json.loads(results.read_text())
    figures["verify"]["verify_per_s"] = {"median": 400_000, "min": 1, "max": 400_000}
    results.write_text(json.dumps(figures))
    assert report(cwd=tree).returncode == 0
    row = next(line for line in document.read_text().splitlines() if line.startswith("| verification"))
    assert "| reached |" in row


LONG = {
    "about": {
        "date": "2026-11-25T20:00:00+00:00",
        "tree": "0123456789ab",
        "load_average_before": [0.1, 0.1, 0.1],
        "load_average_after": [2.0, 1.0, 1.0],
    },
    "tasks_many": 100_000,
    "events_many": 400_003,
    "database_mb": 600,
    "few": {"tasks_per_s": {"median": 1_000, "min": 900, "max": 1_100}},
    "many": {"tasks_per_s": {"median": 900, "min": 800, "max": 1_000}},
    "rate_share": {"median": 0.9, "min": 0.8, "max": 1.0},
    "cpu_share": {"median": 1.0, "min": 0.9, "max": 1.1},
    "restart_open": {
        "open_tasks": {"median": 5_010, "min": 5_001, "max": 5_020},
        "ready_s": {"median": 1.5, "min": 1.4, "max": 1.6},
        "placed_s": {"median": 1.6, "min": 1.5, "max": 1.7},
        "cpu_s": {"median": 1.0, "min": 1.0, "max": 1.0},
    },
    "restart_ready_s": {"registry": 1.0},
    "restart_servers_s": {"nats": 1.0, "postgres": 1.0},
    "log": {"ok": True},
}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "reached"),
        ({"rate_share": {"median": 0.84, "min": 0.8, "max": 0.9}}, "**missed**"),
        ({"restart_open": LONG["restart_open"] | {"placed_s": {"median": 2, "min": 1, "max": 5.1}}}, "**missed**"),
        ({"restart_open": LONG["restart_open"] | {"ready_s": {"median": 2, "min": 1, "max": 5.1}}}, "**missed**"),
        ({"tasks_many": 99_999}, "not measured"),
        ({"log": {"ok": False}}, "not measured"),
    ],
)
def test_a_long_log_is_judged_by_rate_restart_and_a_chain_that_verifies(tmp_path, changed, verdict):
    tree, document, results = copy_of(tmp_path)
    results.write_text(json.dumps(json.loads(results.read_text()) | {"long": LONG | changed}))
    assert report(cwd=tree).returncode == 0
    row = next(line for line in document.read_text().splitlines() if line.startswith("| 10⁵ tasks in the log"))
    assert f"| {verdict} |" in row
