"""What clients submit: jobs of all sizes, drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tests.chaos.storm import judged

Expected = Literal["succeeded", "failed", "either", "refused"]
SHAPES = {
    "single": 26,
    "small fork": 20,
    "fork": 12,
    "long": 2,
    "large fork": 2,
    "graph": 6,
    "fails": 4,
    "flaky": 4,
    "cancelled": 4,
    "refused": 2,
    **judged.SHAPES,
}
PADS = (0, 0, 6_000)
"""Bytes beside the result; some outcomes do not fit into what is left of a block on a full disk."""
DEADLINE = "8h"
"""A leader whose clock was set takes what is in the log for what it says: further away than clocks are set."""
KEYED = 0.6
"""Part of the submits that carry an idempotency key."""


@dataclass(frozen=True)
class Planned:
    """A job to submit.

    Attributes:
        nonce: its name, by which it is found in the log whatever the client heard.
        tasks: how many it comes to, 0 where it is refused.
        output: what it gives when it succeeds; of one that leaves out what fails, unless devices take away more.
        cancel_after_s: when the client asks for its end.
    """

    nonce: str
    document: dict[str, Any]
    tasks: int
    expected: Expected
    output: Any = None
    key: str = ""
    cancel_after_s: float | None = None


def jobs(rng: random.Random, tasks: int) -> Iterator[Planned]:
    """Yield jobs for ever; none is larger than a tenth of `tasks`."""
    number = 0
    while True:
        shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        yield _job(rng, f"storm-{number}-{rng.getrandbits(32):08x}", shape, max(20, tasks // 10))
        number += 1


def trickle(rng: random.Random) -> Iterator[Planned]:
    """Yield small jobs for ever, every second one with a key: what keeps coming however far the others are.

    Over every third a quorum decides.
    """
    number = 0
    while True:
        nonce = f"trickle-{number}-{rng.getrandbits(32):08x}"
        key = nonce if number % 2 else ""
        yield _judged(nonce, key, judged.single(rng)) if number % 3 == 2 else _single(rng, nonce, key, 5)
        number += 1


def _single(rng: random.Random, nonce: str, key: str, ms: int) -> Planned:
    n = rng.randrange(1000)
    step = {"id": "one", "agent": "weather@1.0.0", "input": {"n": n, "ms": ms, "pad": rng.choice(PADS)}}
    return Planned(nonce, _document(nonce, [step], "${tasks.one.output.square}"), 1, "succeeded", n * n, key)


def _job(rng: random.Random, nonce: str, shape: str, most: int) -> Planned:
    key = nonce if rng.random() < KEYED else ""
    ms, pad = rng.choice([0, 0, 5, 20, 60]), rng.choice(PADS)
    match shape:
        case "single":
            return _single(rng, nonce, key, rng.choice([0, 20, 400]))
        case "long":
            # Long enough that an attempt which is lost and its successor run at the same time.
            return _single(rng, nonce, key, 3_000)
        case "small fork" | "fork" | "large fork":
            low, high = {"small fork": (2, 20), "fork": (20, 100), "large fork": (150, 400)}[shape]
            return _fork(nonce, key, min(most, rng.randint(low, high)), ms, pad=pad)
        case "graph":
            return _graph(nonce, key, rng.randint(3, 15), ms)
        case "fails":
            step = {"id": "one", "agent": "weather@1.0.0", "input": {"n": 1, "fails": 1}}
            return Planned(nonce, _document(nonce, [step], None), 1, "failed", key=key)
        case "flaky":
            retry = {"max_attempts": 5, "backoff": "50ms"}
            return _fork(nonce, key, rng.randint(2, 10), ms, "either", fails=0.3, retry=retry)
        case "cancelled":
            planned = _fork(nonce, key, min(most, rng.randint(10, 60)), 100, "either")
            if rng.random() < 0.4:
                planned = _judged(nonce, key, judged.steps(rng, rng.choice(list(judged.SHAPES))))
            return Planned(**{**vars(planned), "expected": "either", "cancel_after_s": rng.uniform(0, 2)})
        case _ if shape in judged.SHAPES:
            return _judged(nonce, key, judged.steps(rng, shape))
        case _:
            step = {"id": "one", "agent": "nobody@1.0.0", "input": {}}
            return Planned(nonce, _document(nonce, [step], None), 0, "refused", key=key)


def _judged(nonce: str, key: str, steps: judged.Steps) -> Planned:
    step, words, given, count, output, may_fail = steps
    expected: Expected = "either" if may_fail else "succeeded"
    return Planned(nonce, _document(nonce, [step], words, given), count, expected, output, key)


def _fork(
    nonce: str,
    key: str,
    count: int,
    ms: int,
    expected: Expected = "succeeded",
    fails: float = 0,
    pad: int = 0,
    **step: Any,
) -> Planned:
    fork = {
        "id": "each",
        "agent": "weather@1.0.0",
        "fork": "${input}",
        "input": {"n": "${item}", "ms": ms, "fails": fails, "pad": pad},
        **step,
    }
    document = _document(nonce, [fork], "${tasks.each.output[*].square}", list(range(count)))
    return Planned(nonce, document, count, expected, [n * n for n in range(count)], key)


def _graph(nonce: str, key: str, count: int, ms: int) -> Planned:
    """A fork, and one more fork over what came out of it."""
    each = {"id": "each", "agent": "weather@1.0.0", "fork": "${input}", "input": {"n": "${item}", "ms": ms}}
    again = {
        "id": "again",
        "agent": "weather@1.0.0",
        "needs": ["each"],
        "fork": "${tasks.each.output[*].square}",
        "input": {"n": "${item}"},
    }
    document = _document(nonce, [each, again], "${tasks.again.output[*].square}", list(range(count)))
    return Planned(nonce, document, 2 * count, "succeeded", [n**4 for n in range(count)], key)


def _document(nonce: str, steps: list[dict[str, Any]], output: str | None, given: Any = None) -> dict[str, Any]:
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": nonce,
        "input": given,
        "limits": {"deadline": DEADLINE, "fan_out": 2000},
        "tasks": steps,
        "output": output,
    }
