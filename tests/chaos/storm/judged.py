"""What clients submit of judged work: jobs whose tasks have replicas, judges and joins, drawn from a seed.

The witness says the square of a number. On the way, some executors make lies of its answers (`wires.Liar`), of
which no two agree and of three at most one is told: whatever is checked here comes out right.
"""

import random
from typing import Any

SHAPES = {"quorum": 8, "checked": 4, "kept": 4, "integrated": 4, "hedged": 4}
WITNESS, JUROR = "witness@1.0.0", "juror@1.0.0"
APART = "executor"
MOST_FAIL = 3
Steps = tuple[dict[str, Any], str, list[Any] | None, int, Any, bool]
"""A step, the job's output in words, its input, how many tasks it comes to, its output, whether it may fail."""


def answer(n: int) -> str:
    """Return what an honest witness says of a number."""
    return f"={n * n:010d}"


def quorum(rng: random.Random, of: int) -> dict[str, Any]:
    """Draw the words for a quorum of two among `of` results."""
    rule: dict[str, Any] = {"k": 2, "of": of, "equal": "json"}
    if (drawn := rng.random()) < 0.2:
        rule["equal"] = {"critic": {"agent": JUROR}}
    elif drawn < 0.5:
        rule["adaptive"] = True
    return {"speculate": {"distinct": APART, "replicas": of}, "verify": {"quorum": rule}}


def checked(rng: random.Random) -> dict[str, Any]:
    """Draw the words for results that a critic or a test has to pass: of several, or of one after the other."""
    judge = rng.choice(({"critic": {"agent": JUROR, "min_score": 1}}, {"test": {"agent": JUROR}}))
    if rng.random() < 0.5:
        return {"speculate": {"distinct": APART, "replicas": 2}, "verify": judge}
    return {"speculate": {"distinct": APART}, "verify": {**judge, "quorum": {"k": 1, "of": 1, "extend_to": 3}}}


def steps(rng: random.Random, shape: str) -> Steps:
    """Draw the one step of a judged job."""
    match shape:
        case "kept":
            return _kept(rng)
        case "integrated":
            return _integrated(rng)
        case "hedged":
            return _hedged(rng)
    count, fails = rng.randint(2, 7), rng.choice((0, 0, 0.15))
    words = quorum(rng, 3) if shape == "quorum" else checked(rng)
    given = {"n": "${item}", "ms": rng.choice((0, 5, 60)), "fails": fails, "pad": rng.choice((0, 0, 6_000))}
    retry = {"max_attempts": 6, "backoff": "50ms"}
    step = {"id": "each", "agent": WITNESS, "fork": "${input}", "input": given, "retry": retry, **words}
    numbers = [rng.randrange(10_000) for _ in range(count)]
    outputs = [answer(n) for n in numbers]
    return step, "${tasks.each.output[*].answer}", numbers, count, outputs, bool(fails)


def single(rng: random.Random) -> Steps:
    """Draw a task alone, over which a quorum decides."""
    n = rng.randrange(10_000)
    step = {"id": "one", "agent": WITNESS, "input": {"n": n}, **quorum(rng, 3)}
    return step, "${tasks.one.output.answer}", None, 1, answer(n), False


def _kept(rng: random.Random) -> Steps:
    """All results of one task go on, to a vote or, with their scores, in an order."""
    n = rng.randrange(10_000)
    step: dict[str, Any] = {"id": "one", "agent": WITNESS, "input": {"n": n}}
    step["speculate"] = {"distinct": APART, "replicas": 3, "keep": "all"}
    if rng.random() < 0.5:
        step["join"] = {"vote": {"equal": "json"}}
        return step, "${tasks.one.output.answer}", None, 1, answer(n), False
    step["verify"] = {"critic": {"agent": JUROR, "min_score": 1}}
    step["join"] = {"rank": {"top": rng.randint(1, 2)}}
    return step, "${tasks.one.output[0].answer}", None, 1, answer(n), False


def _integrated(rng: random.Random) -> Steps:
    """Some tasks of a fork fail for good and are left out; an integrator adds up the others."""
    count = rng.randint(3, 7)
    bad = rng.randint(0, min(MOST_FAIL, count - 2))
    items = [{"n": rng.randrange(10_000), "fails": int(place < bad)} for place in range(count)]
    rng.shuffle(items)
    good = [one["n"] for one in items if not one["fails"]]
    step: dict[str, Any] = {"id": "each", "agent": WITNESS, "fork": "${input}", "input": "${item}"}
    step |= {"on_failure": "skip", "minimum": rng.randint(1, len(good) - 1 or 1)}
    step |= {"retry": {"max_attempts": 2, "backoff": "50ms"}, **rng.choice((quorum(rng, 2), checked(rng)))}
    if rng.random() < 0.3:
        return step, "${tasks.each.output[*].answer}", items, count, [answer(n) for n in good], False
    step["join"] = {"integrator": {"agent": JUROR}}
    output = {"count": len(good), "sum": sum(n * n for n in good), "partial": bool(bad)}
    return step, "${tasks.each.output}", items, count, output, False


def _hedged(rng: random.Random) -> Steps:
    """A second attempt starts where the first is slow; what an executor says is taken as it is, and is true."""
    count = rng.randint(1, 6)
    given = {"n": "${item}", "ms": rng.choice((0, 60, 400))}
    speculate = {"distinct": APART, "replicas": 2, "hedge_after": rng.choice(("50ms", "200ms", "p95"))}
    step = {"id": "each", "agent": "weather@1.0.0", "fork": "${input}", "input": given, "speculate": speculate}
    numbers = list(range(count))
    return step, "${tasks.each.output[*].square}", numbers, count, [n * n for n in numbers], False
