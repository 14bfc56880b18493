"""`docs/BENCHMARKS.md` says what the results say that are kept in the tree."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hive_scheduler.domain.jobfile import parse_job

from benchmarks.graphs import KINDS, calls, critical_tokens, graph_of, job, needs, sequence
from benchmarks.report_judgement import WAYS, forkjoin_rows, speculation_rows
from benchmarks.speculation import tail

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
        *(
            (ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
            for name in ("__init__.py", "report.py", "report_rows.py", "report_judgement.py")
        ),
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


def figure(median, least=None, most=None):
    return {"median": median, "min": median if least is None else least, "max": median if most is None else most}


GRAPHS = {
    f"{kind}_{what}": figure(value) for kind in KINDS for what, value in (("speed_up", 4.0), ("of_bound", 0.95))
}
GRAINS = {
    f"{what}_{ms}": figure(0.95) for what in ("of_bound", "of_speed_up", "added_ms") for ms in (50, 100, 200, 500)
}
FORKJOIN = {
    "about": LONG["about"] | {"peers": {"langgraph": "1.2.24", "dbos": "9.9"}},
    "rounds": 3,
    "devices": 8,
    "slots": 4,
    "wide_tasks": 1_000,
    "possible": GRAPHS,
    "hive": GRAPHS,
    "dbos_steps": GRAPHS | {"fan_out_8_speed_up": figure(2.5)},
    "grains": GRAINS,
    "grains_command": GRAINS,
    "wide": {"wall_s": figure(2.0), "overhead_s": figure(2.0)},
    "wide_waiting": {"wall_s": figure(9.0), "overhead_s": figure(1.0)},
    "scaled": {f"{what}_{devices}": figure(0.97) for what in ("efficiency", "wall_s") for devices in (1, 2, 4, 8)},
    "least_efficiency": figure(0.97),
    "log": {"ok": True},
}
TAIL = {f"{rank}_ms": figure(100.0) for rank in ("p50", "p90", "p99", "p999")} | {"extra_percent": figure(5.0)}
SPECULATION = {
    "about": LONG["about"],
    "rounds": 3,
    "hedged": 3_000,
    "under_way": 8,
    "parted": 3_000,
    "parted_under_way": 64,
    "tasks": {"1": 4_500, "2": 3_600},
    "coverage_pooled": {
        "1": {"measured": 0.512, "expected": 0.5, "points": 1.2},
        "2": {"measured": 0.752, "expected": 0.75, "points": 0.2},
    },
    "losers": {"p50_ms": figure(9.0), "p99_ms": figure(15.0), "max_ms": figure(15.0), "counted": figure(30)},
    **dict.fromkeys(WAYS, TAIL),
    "cuts": {
        "stragglers_5_two_p999_cut": figure(3.0),
        "stragglers_5_two_p99_cut": figure(4.0),
        "parted_5_progress_p999_cut": figure(8.2),
    },
    "log": {"ok": True},
}


@pytest.mark.parametrize(
    ("changed", "row", "verdict"),
    [
        ({}, "a graph of model calls, fan-out 8", "reached"),
        (
            {"hive": GRAPHS | {"fan_out_8_speed_up": figure(3.69)}},
            "a graph of model calls, fan-out 8",
            "**missed**",
        ),
        ({}, "the critical path's share", "reached"),
        ({"grains": GRAINS | {"of_bound_50": figure(0.89)}}, "the critical path's share", "**missed**"),
        ({}, "a fork of 1,000 tasks", "reached"),
        ({"wide_tasks": 100}, "a fork of 1,000 tasks", "not measured"),
        (
            {"wide_waiting": {"wall_s": figure(13), "overhead_s": figure(5.1)}},
            "a fork of 1,000 tasks",
            "**missed**",
        ),
        ({}, "1, 2, 4 and 8 executors", "reached"),
        ({"least_efficiency": figure(0.89, 0.8, 0.95)}, "1, 2, 4 and 8 executors", "**missed**"),
    ],
)
def test_fork_join_is_judged_by_its_own_figures(changed, row, verdict):
    (line,) = (one.text() for one in forkjoin_rows(FORKJOIN | changed) if one.what.startswith(row))
    assert f"| {verdict} |" in line


@pytest.mark.parametrize(
    ("changed", "row", "verdict"),
    [
        ({}, "coverage@k", "reached"),
        (
            {"coverage_pooled": {"1": {"measured": 0.47, "expected": 0.5, "points": -2.1}}},
            "coverage@k",
            "**missed**",
        ),
        ({}, "from a decision", "reached"),
        ({"losers": SPECULATION["losers"] | {"p99_ms": figure(20.5)}}, "from a decision", "**missed**"),
        ({}, "hedging", "reached"),
        ({"cuts": SPECULATION["cuts"] | {"parted_5_progress_p999_cut": figure(7.9)}}, "hedging", "**missed**"),
        ({"parted_5_progress": TAIL | {"extra_percent": figure(6.1)}}, "hedging", "**missed**"),
        ({"parted": 64}, "hedging", "not measured"),
    ],
)
def test_judged_tasks_are_judged_by_their_own_figures(changed, row, verdict):
    (line,) = (one.text() for one in speculation_rows(SPECULATION | changed) if one.what.startswith(row))
    assert f"| {verdict} |" in line


def test_tables_name_version_and_durability_and_every_line_has_all_columns(tmp_path):
    tree, document, results = copy_of(tmp_path)
    kept = json.loads(results.read_text()) | {"forkjoin": FORKJOIN, "speculation": SPECULATION}
    results.write_text(json.dumps(kept))
    assert report(cwd=tree).returncode == 0
    lines = document.read_text().splitlines()
    (dbos,) = (line for line in lines if line.startswith("| DBOS, steps"))
    assert "DBOS 9.9" in dbos and "Postgres" in dbos and "2.5 (2.5 to 2.5)" in dbos
    assert not any(line.startswith("| LangGraph") for line in lines), "nothing is shown of what was not measured"
    for heading in ("### Graphs of model calls", "### Hedging"):
        begin = next(number for number, line in enumerate(lines) if line.startswith(heading))
        rest = itertools.dropwhile(lambda line: not line.startswith("|"), lines[begin:])
        table = list(itertools.takewhile(lambda line: line.startswith("|"), rest))
        assert len(table) > 3
        assert len({line.count("|") for line in table}) == 1


def test_a_graph_waits_for_what_it_says_and_no_longer():
    graph = graph_of("dependent", 3)
    lengths = {call.name: call.tokens for call in calls(graph)}
    waits = needs(graph)
    ended: dict[str, int] = {}
    for name, tokens in lengths.items():
        ended[name] = max((ended[before] for before in waits[name]), default=0) + tokens
    assert ended["answer"] == critical_tokens(graph) < sum(lengths.values())
    assert critical_tokens(sequence(graph)) == sum(lengths.values())
    assert set(waits["left_compare"]) == {"left_0", "left_1"}
    assert graph_of("dependent", 3) == graph and graph_of("dependent", 4) != graph


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forked", [False, True])
def test_graphs_are_jobs_that_the_scheduler_takes(kind, forked):
    graph = graph_of(kind, 0)
    if kind == "dependent" and forked:
        with pytest.raises(TypeError):
            job(graph, "caller@1.0.0", forked=True)
        return
    spec = parse_job(json.dumps(job(graph, "caller@1.0.0", forked=forked)).encode())
    assert len(spec.steps) == (3 if forked else len(calls(graph)))


def test_percentiles_are_by_nearest_rank_and_extra_attempts_are_a_share_of_tasks():
    found = tail([float(number) for number in range(1, 1_001)], 1_050)
    assert found == {"p50_ms": 500.0, "p90_ms": 900.0, "p99_ms": 990.0, "p999_ms": 999.0, "extra_percent": 5.0}
