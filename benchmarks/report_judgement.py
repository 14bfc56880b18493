"""The rows and tables of fork-join and of judged tasks, from the JSON of `forkjoin` and `speculation`."""

from collections.abc import Iterator
from typing import Any, Final

from benchmarks.report_rows import Row, number, span, when

KINDS: Final = {
    "fan_out_2": "fan-out 2",
    "fan_out_8": "fan-out 8",
    "dependent": "dependent graph",
    "short": "fan-out 8 of 50 ms",
}
GRAINS_MS: Final = (50, 100, 200, 500)
POSTGRES: Final = "Postgres, fsync, synchronous commit"
SYSTEMS: Final = {
    "hive": (
        "HiveFabric",
        "this tree",
        f"{POSTGRES}: every assignment and result, before what follows from it",
        "Each call is an agent in a sandbox, on one of two executors with four slots; its model call goes through "
        "the router and is kept in the log. The client asks over HTTP.",
    ),
    "langgraph_postgres_sync": (
        "LangGraph, Postgres, `sync`",
        "LangGraph {langgraph}, checkpoint-postgres {langgraph-checkpoint-postgres}",
        f"{POSTGRES}: a checkpoint before the next nodes start",
        "Coroutines of one process, which calls the model itself; no queue, no placement, no sandbox. Compiled "
        "before the time starts. Nodes start together when all of the step before have ended.",
    ),
    "langgraph_postgres_async": (
        "LangGraph, Postgres, `async` (its default)",
        "LangGraph {langgraph}, checkpoint-postgres {langgraph-checkpoint-postgres}",
        f"{POSTGRES}, but written while the next nodes run: a crash may lose the last step",
        "As above.",
    ),
    "langgraph_sqlite_sync": (
        "LangGraph, SQLite, `sync`",
        "LangGraph {langgraph}, checkpoint-sqlite {langgraph-checkpoint-sqlite}",
        "SQLite, WAL, as the checkpointer sets it up",
        "As above; the database is a file of the same process.",
    ),
    "dbos_steps": (
        "DBOS, steps",
        "DBOS {dbos}",
        f"{POSTGRES}: the result of every step",
        "Coroutines of the process that starts the workflow, which calls the model itself. A branch with steps of "
        "its own is a child workflow.",
    ),
    "dbos_queue": (
        "DBOS, queue",
        "DBOS {dbos}",
        f"{POSTGRES}: every call is a workflow on a queue",
        "A second process works the queue off, looking every 10 ms; results are looked for every 2 ms. No sandbox.",
    ),
}

_GRAPH: Final = ("a graph of model calls, fan-out 8: fork-join beside one by one", "≥ 3.7 times as fast")
_BOUND: Final = (
    "the critical path's share of the time, tasks of 50 ms and more",
    "≥ 0.9 at every length",
)
_WIDE: Final = ("a fork of 1,000 tasks and what joins them: time that is not waiting", "≤ 5 s")
_SCALED: Final = ("1, 2, 4 and 8 executors, tasks that wait: efficiency", "≥ 0.9")
_COVERAGE: Final = (
    "coverage@k with a verifier, answers right with p = 0.5",
    "within 2 points of one less (1 - p)ᵏ",
)
_LOSERS: Final = ("from a decision until a loser's model call is ended", "≤ 20 ms")
_HEDGING: Final = ("hedging, 5 % stragglers at 10 times", "p99.9 cut ≥ 8 times for ≤ 6 % extra attempts")
FORKJOIN_GOALS: Final = (_GRAPH, _BOUND, _WIDE, _SCALED)
SPECULATION_GOALS: Final = (_COVERAGE, _LOSERS, _HEDGING)


def forkjoin_rows(found: dict[str, Any] | None) -> Iterator[Row]:
    """Return the goals of fork-join."""
    if found is None:
        for what, goal in FORKJOIN_GOALS:
            yield Row(what, goal, "", "`python -m benchmarks.forkjoin`", None, "")
        return
    hive, grains, scaled = found["hive"], found["grains"], found["scaled"]
    yield Row(
        *_GRAPH,
        f"{span(hive['fan_out_8_speed_up'])} times; {span(hive['fan_out_8_of_bound'])} of what the graph allows",
        f"possible {span(found['possible']['fan_out_8_speed_up'])} times; the peers in the table below",
        hive["fan_out_8_speed_up"]["median"] >= 3.7,
        f"{when(found)}The same calls on both sides, a scripted model with latencies from a seed.",
    )
    command = found["grains_command"]
    yield Row(
        *_BOUND,
        f"{_by_length(grains, 'of_bound')}; of the speed-up that is possible: {_by_length(grains, 'of_speed_up')}",
        f"added to the three levels: {_by_length(grains, 'added_ms', ' ms')}. The same as WASI commands: "
        f"{_by_length(command, 'of_bound')}; of the speed-up: {_by_length(command, 'of_speed_up')}",
        min(grains[f"of_bound_{ms}"]["median"] for ms in GRAINS_MS) >= 0.9,
        "Tasks of one length that wait, as Python agents: a plan, eight at once, an answer; from submit to result "
        "over HTTP, on two executors with four slots. Two cores start eight guests at once.",
    )
    wide, waiting = found["wide"], found["wide_waiting"]
    yield Row(
        *_WIDE,
        f"{span(wide['overhead_s'], ' s')} with no-ops, {span(waiting['overhead_s'], ' s')} with waits of 250 ms",
        f"in all {span(wide['wall_s'], ' s')} and {span(waiting['wall_s'], ' s')}, in "
        f"{found['devices'] * found['slots']} slots",
        max(wide["overhead_s"]["median"], waiting["overhead_s"]["median"]) <= 5
        if found["wide_tasks"] >= 1_000
        else None,
        "Python agents. Taken off are 250 ms for each time that all slots are filled; of no-ops nothing is.",
    )
    yield Row(
        *_SCALED,
        " · ".join(span(scaled[f"efficiency_{devices}"]) for devices in (2, 4, 8)),
        " · ".join(f"{devices}: {span(scaled[f'wall_s_{devices}'], ' s')}" for devices in (1, 2, 4, 8)),
        found["least_efficiency"]["median"] >= 0.9,
        f"{found['slots']} slots each, 320 waits of 250 ms; all executors are processes of one machine.",
    )


def _by_length(grains: dict[str, Any], what: str, unit: str = "") -> str:
    return " · ".join(f"{ms} ms: {span(grains[f'{what}_{ms}'], unit)}" for ms in GRAINS_MS)


def forkjoin_table(found: dict[str, Any] | None, peers: dict[str, str]) -> Iterator[str]:
    """Return the table of the graphs. `peers` has versions, where the section does not say its own."""
    if found is None:
        return
    yield "### Graphs of model calls, beside LangGraph and DBOS"
    yield ""
    yield (
        f"{when(found)}{found['rounds']} rounds. How many times faster than the system's own run of the same calls "
        "one by one; in bold the critical path's share of the time. The graphs are those of LLMCompiler's table in "
        "form (Kim et al., 2023): `benchmarks/graphs.py`."
    )
    yield ""
    yield f"| system | version | durability | {' | '.join(KINDS.values())} | unfair |"
    yield "|---|---|---|" + "---|" * len(KINDS) + "---|"
    possible = " | ".join(span(found["possible"][f"{kind}_speed_up"]) for kind in KINDS)
    yield f"| what the graphs allow | | | {possible} | |"
    versions = _Versions(found["about"]["peers"] if "about" in found else peers)
    for name, (label, version, durability, unfair) in SYSTEMS.items():
        if name in found:
            one = found[name]
            cells = [
                f"{span(one[f'{kind}_speed_up'])}; **{number(one[f'{kind}_of_bound']['median'])}**"
                for kind in KINDS
            ]
            shown = version.format_map(versions)
            yield f"| {label} | {shown} | {durability} | {' | '.join(cells)} | {unfair} |"
    yield ""


class _Versions(dict[str, str]):
    """Versions of peers; of what was not there `?`."""

    def __missing__(self, key: str) -> str:
        return "?"


def speculation_rows(found: dict[str, Any] | None) -> Iterator[Row]:
    """Return the goals of judged tasks."""
    if found is None:
        for what, goal in SPECULATION_GOALS:
            yield Row(what, goal, "", "`python -m benchmarks.speculation`", None, "")
        return
    pooled, losers, cuts = found["coverage_pooled"], found["losers"], found["cuts"]
    yield Row(
        *_COVERAGE,
        " · ".join(f"k = {k}: {one['measured']:.1%}" for k, one in pooled.items()),
        " · ".join(f"{one['expected']:.1%}, {one['points']:+.2g} points" for one in pooled.values()),
        max(abs(one["points"]) for one in pooled.values()) <= 2,
        f"{when(found)}Generated sums and products, "
        + ", ".join(number(tasks) for tasks in found["tasks"].values())
        + " of them; chance alone moves the first by 0.7 points (one standard deviation).",
    )
    yield Row(
        *_LOSERS,
        f"p50 {span(losers['p50_ms'], ' ms')}, p99 {span(losers['p99_ms'], ' ms')}",
        f"the longest of a round {span(losers['max_ms'], ' ms')}",
        losers["p99_ms"]["median"] <= 20,
        "All of the way: the decision's timestamp, its commit, the executor told, the guest ended, its model call "
        "cancelled at the router, the back end generating no more.",
    )
    hedged, plain, cut = found["parted_5_progress"], found["parted_5"], cuts["parted_5_progress_p999_cut"]
    yield Row(
        *_HEDGING,
        f"p99.9 {span(hedged['p999_ms'], ' ms')}, {span(cut)} times less, for "
        f"{span(hedged['extra_percent'], ' %')}",
        f"without {span(plain['p999_ms'], ' ms')}; the ways of hedging in the table below",
        cut["median"] >= 8 and hedged["extra_percent"]["median"] <= 6 if found["parted"] >= 1_000 else None,
        "Tasks of 2 s that say when a twentieth is done. By durations alone it cannot be reached where every fast "
        f"task takes as long as every other: {span(cuts['stragglers_5_two_p999_cut'])} times, and see below the "
        "table.",
    )


WAYS: Final = {
    "stragglers_5": "5 % stragglers, no hedge",
    "stragglers_5_one": "one hedge after 150 ms",
    "stragglers_5_two": "a second one after as long again",
    "stragglers_2": "2 % stragglers, no hedge",
    "stragglers_2_p95": "one hedge after the p95",
    "stragglers_2_one": "one hedge after 150 ms",
    "parted_5": "tasks of 2 s, 5 % stragglers, no hedge",
    "parted_5_progress": "two hedges, each where a twentieth is not done within 170 ms",
}


def speculation_table(found: dict[str, Any] | None) -> Iterator[str]:
    """Return the table of hedging."""
    if found is None:
        return
    yield "### Hedging"
    yield ""
    yield (
        f"{when(found)}{found['rounds']} rounds of {number(found['hedged'])} tasks each, which wait 100 ms, or 1 s "
        "where they straggle; at most one extra attempt for ten tasks (the retry budget). Each is a job of its "
        f"own, {found['under_way']} under way at once, timed from its submit to its result over HTTP. In the "
        f"last two rows {number(found['parted'])} tasks a round wait 2 s, or 20 s where they straggle, "
        f"{found['parted_under_way']} under way at once; they say when a twentieth of that is over."
    )
    yield ""
    yield "| | p50 | p90 | p99 | p99.9 | p99 cut | p99.9 cut | extra attempts |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, label in WAYS.items():
        one = found[name]
        cells = [span(one[f"{rank}_ms"], " ms") for rank in ("p50", "p90", "p99", "p999")]
        for rank in ("p99", "p999"):
            cut = found["cuts"].get(f"{name}_{rank}_cut")
            cells.append(span(cut) if cut else "")
        yield f"| {label} | {' | '.join(cells)} | {span(one['extra_percent'], ' %')} |"
    yield ""
