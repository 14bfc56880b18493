"""The words `speculate`, `verify`, `join`, `on_failure` and `minimum` of made-up tasks, and what judges answer."""

import random
from typing import Any, NamedTuple

MAKERS = ("guess", "guess", "shaky")
"""Agents whose results are judged: what they give depends on their input alone, unless their executor lies."""
JUDGES = ("critic", "check", "same", "senior", "integrator")
LIE = 1_000
"""Honest answers are below it; each lie is another number far above it, so that lies are never equal."""
EQUAL: dict[str, Any] = {
    "exact": "exact",
    "json": "json",
    "numeric": {"numeric": {"absolute": 1.0}},
    "critic": {"critic": {"agent": "same@1.0.0"}},
}


class Fleet(NamedTuple):
    """How many executors there are, on how many devices."""

    executors: int
    devices: int

    def units(self, distinct: str) -> int:
        """Return how many could make results that are distinct; without `distinct` as many as one wants."""
        return {"executor": self.executors, "device": self.devices}.get(distinct, 100)


def speculation(rng: random.Random, fleet: Fleet) -> tuple[str, dict[str, Any]]:
    """Draw how the results of a task are judged: how honest answers may differ, and the words."""
    distinct = rng.choice(("none", "executor", "device", "device"))
    if fleet.units(distinct) < 2 and rng.random() < 0.9:
        distinct = "none"
    # Now and then more than there are: a job that has to be refused.
    most = min(fleet.units(distinct) + (rng.random() < 0.05), 4)
    of = rng.randint(min(2, most), most)
    speculate: dict[str, Any] = {"distinct": distinct, "replicas": of}
    verify: dict[str, Any] = {}
    kind = rng.choice(
        ("first", "hedge", "hedge", "quorum", "quorum", "quorum", "quorum", "keep", "filter", "filter")
    )
    by = "exact"
    if kind == "quorum" and of > 1:
        by = rng.choice(("exact", "json", "json", "numeric", "critic"))
        verify["quorum"] = _quorum(rng, of, by)
        if verify["quorum"]["on_none"] == "escalate":
            verify["senior"] = {"agent": "senior@1.0.0"}
    if kind == "hedge" and of > 1:
        speculate["hedge_after"] = rng.choice(("50ms", "1s", "p95", {"progress": 0.1, "within": "100ms"}))
    if kind == "keep" and of > 1:
        speculate["keep"] = "all"
    if kind == "filter" or rng.random() < 0.2:
        if rng.random() < 0.5:
            verify["critic"] = {"agent": "critic@1.0.0", "min_score": 0.5}
        else:
            verify["test"] = {"agent": "check@1.0.0"}
        if kind == "filter" and rng.random() < 0.3:
            speculate["replicas"] = 1
            verify["quorum"] = {"k": 1, "of": 1, "extend_to": of}
    words: dict[str, Any] = {"speculate": speculate}
    if verify:
        words["verify"] = verify
    return by, words


def _quorum(rng: random.Random, of: int, by: str) -> dict[str, Any]:
    quorum = {"k": rng.randint(2, of), "of": of, "equal": EQUAL[by]}
    quorum["on_none"] = rng.choice(("extend", "extend", "fail", "escalate"))
    if quorum["on_none"] == "extend" and rng.random() < 0.5:
        quorum["extend_to"] = of + rng.randint(0, 2)
    if rng.random() < 0.3:
        quorum["adaptive"] = True
    return quorum


def joining(rng: random.Random, task: dict[str, Any]) -> dict[str, Any]:
    """Draw what becomes of the results of a task that has its other words already."""
    words: dict[str, Any] = {}
    keeps = task.get("speculate", {}).get("keep") == "all"
    is_fork = "fork" in task
    if is_fork != keeps and rng.random() < 0.5:
        kinds = ["vote", "integrator", *(["rank"] if "critic" in task.get("verify", {}) else [])]
        match rng.choice(kinds):
            case "vote":
                words["join"] = {"vote": {"equal": rng.choice((EQUAL["json"], EQUAL["numeric"]))}}
            case "rank":
                words["join"] = {"rank": {"top": rng.randint(1, 4)}}
            case "integrator":
                words["join"] = {"integrator": {"agent": "integrator@1.0.0"}}
    drawn = rng.random()
    if drawn < 0.15:
        words["on_failure"] = "skip"
    elif drawn < 0.25:
        words |= {"on_failure": "default", "default": {"n": 0, "items": [1, 2]}}
    fork = task.get("fork")
    if is_fork and rng.random() < 0.2 and (fork or not isinstance(fork, list)) and fork != "${input.items}":
        words["minimum"] = 1
    return words


def is_impossible(task: dict[str, Any], fleet: Fleet) -> bool:
    """Say whether a task asks for more distinct machines than there are, and has to be refused."""
    speculate, verify = task.get("speculate", {}), task.get("verify", {})
    if not speculate and not verify and "join" not in task:
        return False
    quorum = verify.get("quorum", {})
    of, units = quorum.get("of", speculate.get("replicas", 1)), fleet.units(speculate.get("distinct", "device"))
    taken = [1] if "critic" in verify or "test" in verify else []
    taken += [2] if isinstance(quorum.get("equal"), dict) and "critic" in quorum["equal"] else []
    taken += [of] if "senior" in verify else []
    return units < of or any(units <= one for one in taken)


# --- what is answered --------------------------------------------------------------------------------------


def answer(honest: int, by: str, lie: int, rng: random.Random) -> dict[str, Any]:
    """Return a result, as it may be said: honest ones are equal by `by`; `lie` is 0, or the number of the lie."""
    if lie:
        return {"n": (1 + lie) * LIE, "items": list(range(lie % 6))}
    n: float = honest
    if by in ("numeric", "critic"):
        n += round(rng.uniform(-0.4, 0.4), 3)
    elif by == "json" and rng.random() < 0.5:
        return {"items": list(range(honest % 6)), "n": float(honest)}
    return {"n": n, "items": list(range(honest % 6))}


def verdict(agent: str, given: Any, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return what a judge fails with, and what it says: it does not lie, but may break or say nonsense."""
    drawn = rng.random()
    if drawn < 0.05:
        return ("agent_error" if drawn < 0.03 else "runner_died"), {}
    if drawn < 0.08 and agent != "integrator":
        return "", {"opinion": "none"}
    match agent:
        case "critic":
            return "", {"score": (0.8 if is_honest(given["output"]) else 0.2) + rng.choice((0.0, 0.1))}
        case "check":
            return "", {"passed": is_honest(given["output"])}
        case "same":
            return "", {"equal": are_equal(given["a"], given["b"])}
        case "senior":
            found = given["candidates"]
            best = min(range(len(found)), key=lambda place: found[place]["n"])
            return "", {"choice": best if rng.random() < 0.8 else None}
    return "", {"n": len(given["results"]), "items": list(range(len(given["results"]) % 6))}


def is_honest(output: Any) -> bool:
    """Whether a result is none of those that a liar gives."""
    return bool(output["n"] < LIE)


def are_equal(one: Any, other: Any) -> bool:
    """Whether two results are the same answer, however it is said."""
    return bool(abs(one["n"] - other["n"]) < 1.0)
