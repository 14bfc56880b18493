"""The graphs of LLMCompiler's table in form, with the latency of each node from a seed.

The table (S. Kim et al., An LLM Compiler for Parallel Function Calling, 2023) has a fan-out of 2, one of 8, and a
graph whose nodes depend on each other. A node here is one call of a scripted model: its answer takes as many tokens
as the seed says, at a pace that never changes. Sequential and fork-join run the very same calls. (In the paper
the sequential side, ReAct, also thinks before each call; what that costs is not claimed here.)
"""

import random
from dataclasses import dataclass
from typing import Any, Final

PACE_MS: Final = 10
"""From token to token; a search of 30 tokens takes 0.3 s."""
SEARCH_TOKENS: Final = 30
PLAN_TOKENS: Final = 15
"""The first and the last call: half of a search."""
SHORT_TOKENS: Final = 5
"""50 ms: what a system adds to a task counts most where tasks are short."""
SPREAD: Final = 0.25
"""Latencies are spread evenly over ± a quarter of these."""


@dataclass(frozen=True)
class Call:
    """One call of a model, or one wait."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Series:
    """One after the other."""

    parts: "tuple[Graph, ...]"


@dataclass(frozen=True)
class Parallel:
    """All at once."""

    parts: "tuple[Graph, ...]"


Graph = Call | Series | Parallel


def calls(graph: Graph) -> list[Call]:
    """Return all calls, in an order that respects what depends on what."""
    return [graph] if isinstance(graph, Call) else [call for part in graph.parts for call in calls(part)]


def critical_tokens(graph: Graph) -> int:
    """Return the tokens of the longest way through: no schedule is faster."""
    if isinstance(graph, Call):
        return graph.tokens
    return (sum if isinstance(graph, Series) else max)(map(critical_tokens, graph.parts))


def sequence(graph: Graph) -> Series:
    """Return the same calls, one after the other."""
    return Series(tuple(calls(graph)))


def needs(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Return which calls each call waits for, by name."""
    found: dict[str, tuple[str, ...]] = {}
    _walk(graph, (), found)
    return found


def _walk(graph: Graph, before: tuple[str, ...], found: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Note what each call waits for; return the calls at the graph's end."""
    if isinstance(graph, Call):
        found[graph.name] = before
        return (graph.name,)
    if isinstance(graph, Series):
        for part in graph.parts:
            before = _walk(part, before, found)
        return before
    return tuple(end for part in graph.parts for end in _walk(part, before, found))


def plain(graph: Graph) -> Any:
    """Return it as JSON for a peer: a call is `[name, tokens]`, the others are objects."""
    if isinstance(graph, Call):
        return [graph.name, graph.tokens]
    return {"series" if isinstance(graph, Series) else "parallel": [plain(part) for part in graph.parts]}


def _tokens(rng: random.Random, mean: int) -> int:
    return rng.randint(round(mean * (1 - SPREAD)), round(mean * (1 + SPREAD)))


def even(width: int, tokens: int) -> Graph:
    """Return a plan, so many searches at once, and an answer, all of one length."""
    plan, answer = (Call(name, tokens) for name in ("plan", "answer"))
    return Series((plan, Parallel(tuple(Call(f"search_{number}", tokens) for number in range(width))), answer))


def fan_out(width: int, seed: int) -> Graph:
    """Return a plan, so many searches at once, and an answer."""
    rng = random.Random(f"{width}/{seed}")
    plan, answer = (Call(name, _tokens(rng, PLAN_TOKENS)) for name in ("plan", "answer"))
    searches = tuple(Call(f"search_{number}", _tokens(rng, SEARCH_TOKENS)) for number in range(width))
    return Series((plan, Parallel(searches), answer))


def dependent(seed: int) -> Graph:
    """Return two branches at once, each of two searches and what compares them, between a plan and an answer."""
    rng = random.Random(f"dependent/{seed}")
    plan, answer = (Call(name, _tokens(rng, PLAN_TOKENS)) for name in ("plan", "answer"))
    branches = []
    for side in ("left", "right"):
        searches = tuple(Call(f"{side}_{number}", _tokens(rng, SEARCH_TOKENS)) for number in range(2))
        branches.append(Series((Parallel(searches), Call(f"{side}_compare", _tokens(rng, PLAN_TOKENS)))))
    return Series((plan, Parallel(tuple(branches)), answer))


def graph_of(kind: str, seed: int) -> Graph:
    """Return `fan_out_2`, `fan_out_8`, `dependent`, or `short`: eight at once, of `SHORT_TOKENS` each."""
    if kind == "short":
        return even(8, SHORT_TOKENS)
    return dependent(seed) if kind == "dependent" else fan_out(int(kind.removeprefix("fan_out_")), seed)


KINDS: Final = ("fan_out_2", "fan_out_8", "dependent", "short")


def steps_of(graph: Graph, agent: str) -> list[dict[str, Any]]:
    """Return the tasks of a job file: one for each call, which is given the outputs of those it waits for."""
    waits = needs(graph)
    return [
        {
            "id": call.name,
            "agent": agent,
            "needs": list(waits[call.name]),
            "input": {
                "tokens": call.tokens,
                "given": [f"${{tasks.{name}.output.text}}" for name in waits[call.name]],
            },
        }
        for call in calls(graph)
    ]


def forked_steps(graph: Series, agent: str) -> list[dict[str, Any]]:
    """Return plan, one task that forks over what the plan's output lists, and answer.

    Raises:
        TypeError: it is not a plan, calls at once, and an answer.
    """
    plan, middle, answer = graph.parts
    searches = middle.parts if isinstance(middle, Parallel) else ()
    items = [part.tokens for part in searches if isinstance(part, Call)]
    if not (isinstance(plan, Call) and isinstance(answer, Call) and items and len(items) == len(searches)):
        raise TypeError("expected a plan, calls at once, and an answer")
    return [
        {"id": "plan", "agent": agent, "input": {"tokens": plan.tokens, "items": items, "given": []}},
        {
            "id": "search",
            "agent": agent,
            "needs": ["plan"],
            "fork": "${tasks.plan.output.items}",
            "input": {"tokens": "${item}", "given": ["${tasks.plan.output.text}"]},
        },
        {
            "id": "answer",
            "agent": agent,
            "needs": ["search"],
            "input": {"tokens": answer.tokens, "given": "${tasks.search.output}"},
        },
    ]


def job(graph: Graph, agent: str, *, forked: bool) -> dict[str, Any]:
    """Return the job file; `forked` for one whose middle is a fork over what the plan says."""
    steps = forked_steps(graph, agent) if forked and isinstance(graph, Series) else steps_of(graph, agent)
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "graph",
        "limits": {"deadline": "10m", "fan_out": 100},
        "models": {"pin": "pool"},
        "tasks": steps,
        "output": "${tasks.answer.output.text}",
    }
