"""`docs/BENCHMARKS.md` says what the results say that are kept in the tree."""

import json
import subprocess
import sys
from pathlib import Path

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
