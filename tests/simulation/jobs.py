"""Made-up jobs, and what their tasks do."""

import random
import zlib
from typing import Any, NamedTuple

import msgspec
from hive_common.artifacts.manifest import AgentManifest, manifest_json
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentVersionPublished, Capabilities, ExecutorEnrolled, ExecutorRegistered
from hive_common.contracts.messages import Assignment
from hive_common.eventlog.batch import Prepared, Salts
from hive_common.eventlog.log import Append, NewEvent
from hive_common.kernel.ids import derive_id
from hive_common.testing.memory_log import MemoryLog
from hive_scheduler.submission import Submission

from .judged import JUDGES, MAKERS, Fleet, answer, is_impossible, joining, speculation, verdict

AUTHOR = "a0" * 32
STRICT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
AGENTS = ("work", "flaky", "strict", "lister", "stuck")


class Plan(NamedTuple):
    """What a guest does: how long it takes, the code it fails with, and what it gives."""

    takes_s: float
    code: str
    output: dict[str, Any]
    silent: bool = False


class Plans:
    """What guests do.

    Args:
        slow: the share of those that take much longer.
    """

    def __init__(self, slow: float) -> None:
        self._slow = slow
        self._lies = 0

    def of(self, assignment: Assignment, lies: float, rng: random.Random) -> Plan:
        """Draw what an attempt does on an executor that lies that often."""
        takes_s = rng.uniform(0.01, 0.3) if rng.random() > self._slow else rng.uniform(1.0, 20.0)
        output: dict[str, Any] = {"n": rng.randrange(100)}
        code, silent = "", False
        match assignment.agent.name:
            case name if name in JUDGES:
                code, output = verdict(name, msgspec.json.decode(assignment.input.raw or b""), rng)
            case name if name in MAKERS:
                code = rng.choice(("", "", "agent_error", "trap", "runner_died")) if name == "shaky" else ""
                output = self._answer(assignment, lies, rng)
            case "flaky":
                code = rng.choice(("", "", "agent_error", "agent_error", "trap", "runner_died"))
            case "strict":
                output["n"] = rng.choice((1, 2, 3, "not a number"))
            case "lister":
                output["items"] = list(range(rng.choice((0, 1, 2, 3, 5, 8, 13))))
            case "stuck":
                silent = rng.random() < 0.3
                code = "" if rng.random() < 0.9 else "permission_denied"
        return Plan(takes_s, code, output, silent)

    def _answer(self, assignment: Assignment, lies: float, rng: random.Random) -> dict[str, Any]:
        given = assignment.input.raw or b""
        is_lie = rng.random() < lies
        self._lies += is_lie
        return answer(zlib.crc32(given) % 500, msgspec.json.decode(given)["by"], self._lies * is_lie, rng)


class Draft(NamedTuple):
    """A job that a client is going to submit, and when it asks for its end.

    Attributes:
        impossible: it asks for more distinct machines than there are.
    """

    submission: Submission
    cancel_after_s: float | None
    impossible: bool


def draft(number: int, fleet: Fleet, rng: random.Random) -> Draft:
    """Draw a job."""
    tasks: list[dict[str, Any]] = []
    judged = rng.choice((0.0, 0.4, 0.8))
    for index in range(rng.randint(1, 5)):
        tasks.append(_task(index, tasks, fleet, judged, rng))
    limits: dict[str, Any] = {"fan_out": rng.choice((6, 10, 20, 40, 40))}
    # One that is generous is not to be reached: whatever happens, everything has been tried long before.
    limits["deadline"] = rng.choice(("8s", "20s")) if rng.random() < 0.15 else "3h"
    document = {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": f"job-{number}",
        "input": {"n": number, "items": list(range(rng.randint(0, 6)))},
        "tasks": tasks,
        "limits": limits,
        "priority": rng.choice(("high", "normal", "low")),
        "output": {"last": f"${{tasks.{tasks[-1]['id']}.output}}"},
    }
    submission = Submission(msgspec.json.encode(document), b"", "", f"key-{number}", "client")
    impossible = any(is_impossible(task, fleet) for task in tasks)
    return Draft(submission, rng.uniform(0.0, 15.0) if rng.random() < 0.25 else None, impossible)


def _task(
    index: int, tasks: list[dict[str, Any]], fleet: Fleet, judged: float, rng: random.Random
) -> dict[str, Any]:
    before = [one["id"] for one in tasks]
    needs = sorted(rng.sample(before, rng.randint(0, min(2, len(before)))))
    task: dict[str, Any] = {
        "id": f"t{index}",
        "agent": f"{rng.choice(AGENTS)}@1.0.0",
        "needs": needs,
        "timeout": rng.choice(("2s", "10s", "30s")),
    }
    by = ""
    if rng.random() < judged:
        by, words = speculation(rng, fleet)
        task |= {**words, "agent": f"{rng.choice(MAKERS)}@1.0.0"}
    if rng.random() < 0.6:
        task["retry"] = {"max_attempts": rng.randint(1, 4), "backoff": rng.choice(("0s", "1s", "4s", "15s"))}
        if rng.random() < 0.2:
            task["retry"]["codes"] = ["agent_error", "timeout"]
    _fork(task, [one["id"] for one in tasks if _gives_list(one)], rng)
    if judged:
        task |= joining(rng, task)
    given: dict[str, Any] = {"k": index}
    if "fork" in task and not (by and "vote" in task.get("join", {})):
        given = {"k": "${item}", "i": "${index}"}
    if by:
        given["by"] = by
    if task["needs"] and judged and rng.random() < 0.5:
        given["read"] = f"${{tasks.{rng.choice(task['needs'])}.output}}"
    return {**task, "input": given}


def _gives_list(task: dict[str, Any]) -> bool:
    """Whether the output of a task has items."""
    by_one = "vote" in (join := task.get("join", {})) or "integrator" in join
    makes = task["agent"].partition("@")[0] in ("lister", *MAKERS)
    keeps = task.get("speculate", {}).get("keep") == "all"
    return "integrator" in join or (makes and (by_one or not ("fork" in task or keeps)))


def _fork(task: dict[str, Any], lists: list[str], rng: random.Random) -> None:
    drawn = rng.random()
    if "hedge_after" in task.get("speculate", {}) and drawn < 0.4:
        task["fork"] = list(range(rng.choice((4, 12, 30))))
    elif drawn < 0.2:
        task["fork"] = list(range(rng.randint(0, 8)))
    elif drawn < 0.35:
        task["fork"] = "${input.items}"
    elif drawn < 0.7 and lists:
        source = rng.choice(lists)
        task["needs"] = sorted({*task["needs"], source})
        task["fork"] = f"${{tasks.{source}.output.items}}"


OWNER = "00000000-0000-8000-8000-000000000001"


class Registry:
    """Writes what the registry writes."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._salts = Salts()

    def append(self, stream: str, event: events.Event, owner: str = "owner") -> None:
        """Append one event."""
        new = NewEvent(
            stream,
            self._log.version(stream) + 1,
            type(event).__name__,
            1,
            events.encode(event),
            1,
            "registry",
            owner,
        )
        self._log.log_append([Prepared(self._log.log_id, Append((new,)), self._salts)])

    def publish(self) -> None:
        """Publish the agents, signed by somebody who is trusted."""
        self.append(derive_id("signer", "default", AUTHOR), events.SigningKeyTrusted(AUTHOR, "author"))
        for name in (*AGENTS, *sorted(set(MAKERS)), *JUDGES):
            output = STRICT if name == "strict" else {}
            manifest = AgentManifest(name=name, version="1.0.0", runtime="python", entry="agent.py", output=output)
            raw = manifest_json(manifest)
            digest = values.digest_of(raw)
            event = AgentVersionPublished(name, "1.0.0", digest, msgspec.Raw(raw), signer=AUTHOR, signature=digest)
            self.append(derive_id("agent", "default", name, "1.0.0"), event)

    def register(self, name: str, slots: int, device: str) -> str:
        """Make an executor known, and return its id."""
        executor = derive_id("executor", name)
        capabilities = Capabilities("linux", "x86_64", 4, 16 << 30, slots, ("python",), device=device)
        # Of the owner whose jobs they are: those of others have to be known before they get work like this.
        self.append(executor, ExecutorEnrolled(name, f"nkey of {name}", OWNER), OWNER)
        self.append(executor, ExecutorRegistered(name, capabilities), OWNER)
        return executor
