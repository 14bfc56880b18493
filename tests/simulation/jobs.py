"""Made-up jobs, and what their tasks do."""

import random
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

    def of(self, assignment: Assignment, rng: random.Random) -> Plan:
        """Draw what an attempt does."""
        takes_s = rng.uniform(0.01, 0.3) if rng.random() > self._slow else rng.uniform(1.0, 20.0)
        output: dict[str, Any] = {"n": rng.randrange(100)}
        code, silent = "", False
        match assignment.agent.name:
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


class Draft(NamedTuple):
    """A job that a client is going to submit, and when it asks for its end."""

    submission: Submission
    cancel_after_s: float | None


def draft(number: int, rng: random.Random) -> Draft:
    """Draw a job."""
    tasks: list[dict[str, Any]] = []
    for index in range(rng.randint(1, 5)):
        tasks.append(_task(index, [task["id"] for task in tasks], tasks, rng))
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
    return Draft(submission, rng.uniform(0.0, 15.0) if rng.random() < 0.25 else None)


def _task(index: int, before: list[str], tasks: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    needs = sorted(rng.sample(before, rng.randint(0, min(2, len(before)))))
    task: dict[str, Any] = {
        "id": f"t{index}",
        "agent": f"{rng.choice(AGENTS)}@1.0.0",
        "needs": needs,
        "input": {"k": index},
        "timeout": rng.choice(("2s", "10s", "30s")),
    }
    if rng.random() < 0.6:
        task["retry"] = {"max_attempts": rng.randint(1, 4), "backoff": rng.choice(("0s", "1s", "4s", "15s"))}
        if rng.random() < 0.2:
            task["retry"]["codes"] = ["agent_error", "timeout"]
    lists = [one["id"] for one in tasks if one["agent"].startswith("lister") and "fork" not in one]
    drawn = rng.random()
    if drawn < 0.2:
        task["fork"] = list(range(rng.randint(0, 8)))
    elif drawn < 0.35:
        task["fork"] = "${input.items}"
    elif drawn < 0.7 and lists:
        source = rng.choice(lists)
        task["needs"] = sorted({*needs, source})
        task["fork"] = f"${{tasks.{source}.output.items}}"
    if "fork" in task:
        task["input"] = {"k": "${item}", "i": "${index}"}
    return task


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
        for name in AGENTS:
            output = STRICT if name == "strict" else {}
            manifest = AgentManifest(name=name, version="1.0.0", runtime="python", entry="agent.py", output=output)
            raw = manifest_json(manifest)
            digest = values.digest_of(raw)
            event = AgentVersionPublished(name, "1.0.0", digest, msgspec.Raw(raw), signer=AUTHOR, signature=digest)
            self.append(derive_id("agent", "default", name, "1.0.0"), event)

    def register(self, name: str, slots: int) -> str:
        """Make an executor known, and return its id."""
        executor = derive_id("executor", name)
        capabilities = Capabilities("linux", "x86_64", 4, 16 << 30, slots, ("python",))
        # Of the owner whose jobs they are: those of others have to be known before they get work like this.
        self.append(executor, ExecutorEnrolled(name, f"nkey of {name}", OWNER), OWNER)
        self.append(executor, ExecutorRegistered(name, capabilities), OWNER)
        return executor
