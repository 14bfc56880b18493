"""Random trees of tasks that fork tasks: none may do what its parent could not, or fork more than those above."""

from random import Random
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import msgspec
from hive_common.contracts import values
from hive_common.contracts.events import AgentRef, Child, JobSubmitted
from hive_common.contracts.permissions import NONE, ForkPermission, Permissions
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions import agent_covers, covers, named, only
from hive_common.permissions.grants import Grant
from hive_common.permissions.tokens import Minter, Verifier, new_key, public_key
from hive_common.testing.permission_sets import is_allowed, random_call, random_permissions
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.forks import ancestors
from hive_scheduler.domain.inputs import Evaluator
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.schemas import Schemas
from hive_scheduler.domain.task import TaskState
from hive_scheduler.permits import Permits, with_permissions
from hypothesis import given, settings

AGENTS = ("plan", "square", "cube")
STEPS = 25
CALLS = 20
EXECUTOR = "x"
ROOT = new_key()
VERIFIER = Verifier(public_key(ROOT))
CLOCK: Any = SimpleNamespace(now_us=lambda: 0)
DOCUMENT = msgspec.json.encode(
    {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "tree",
        "limits": {"fan_out": 40},
        "tasks": [{"id": "s", "agent": "plan@1.0.0", "fork": "${input}", "input": {}}],
    }
)


class Tree:
    """A job whose tasks fork whatever the check lets them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        asked = {name: self.permissions() for name in AGENTS}
        self.asked = asked
        grants = {
            name: {one: Grant(only(given, one), only(given, one), random.random() < 0.2) for one in named(given)}
            for name, given in asked.items()
        }
        self.catalogue: Any = SimpleNamespace(grants=grants, keys={EXECUTOR: "nkey"})
        kills: Any = SimpleNamespace(verifier=SimpleNamespace(epoch=0))
        self.permits = Permits(self.catalogue, CLOCK, Minter(ROOT), kills)
        plain = {name: AgentRef(name, "1.0.0", f"sha256:{name}", "python", 1, 1_000, 1) for name in AGENTS}
        submitted = JobSubmitted(
            name="tree",
            document=msgspec.Raw(DOCUMENT),
            input=values.inline(b"[1, 2]"),
            agents={f"{name}@1.0.0": with_permissions(plain[name], asked[name]) for name in AGENTS},
            request_digest="",
            deadline_us=1 << 60,
        )
        self.job = JobState("00000000-0000-7000-8000-000000000001", "owner", submitted, parse_job(DOCUMENT))
        self.decide()

    def permissions(self) -> Permissions:
        """Return what an agent asks for; forking is likely, since without it there are no trees."""
        some, random = random_permissions(self.random), self.random
        agents = tuple(random.sample((*AGENTS, *(f"{name}@1.0.0" for name in AGENTS)), random.randint(2, 6)))
        fork = (
            ForkPermission(agents, random.randint(1, 12), random.randint(1, 4)) if random.random() < 0.9 else None
        )
        return msgspec.structs.replace(some, fork=fork, asks=())

    def decide(self) -> None:
        evaluator = Evaluator(Schemas(), {}, frozenset())
        for decision in jobs.due(self.job, 0, evaluator):
            self.apply(decision.stream, decision.events)

    def apply(self, stream: str, decided: list[Any]) -> None:
        for event in decided:
            jobs.evolve(self.job, stream, event)

    def fork(self) -> None:
        """Have a task end with children that it may or may not have."""
        waiting = [task for task in self.job.tasks.values() if task.status == "ready"]
        if not waiting:
            return
        task = self.random.choice(waiting)
        wanted = tuple(
            Child(f"{self.random.choice(AGENTS)}@1.0.0", msgspec.Raw(b"{}"))
            for _ in range(self.random.randint(1, 4))
        )
        try:
            self.permits.check_forks(self.job, task, wanted)
        except PermissionDenied:
            wanted = ()
            if self.random.random() < 0.8:
                return
        self.apply(task.id, tasks.decide(task, tasks.Assign(EXECUTOR, "s", 1_000, 0)))
        output = values.inline(b"{}")
        self.apply(task.id, tasks.decide(task, tasks.Succeed(1, EXECUTOR, "s", output, forks=wanted)))
        self.decide()

    def change(self) -> None:
        """Take a grant back, or give it for less."""
        grants = self.catalogue.grants[self.random.choice(AGENTS)]
        if grants:
            name = self.random.choice(sorted(grants))
            less = only(random_permissions(self.random), name)
            if less == NONE:
                del grants[name]
            else:
                grants[name] = grants[name]._replace(granted=less)

    def token(self, task: TaskState) -> Permissions | None:
        """Return what the token of a task says, None where it gets none."""
        try:
            permissions = self.permits.of_task(self.job, task)
        except PermissionDenied:
            return None
        token = self.permits.token(EXECUTOR, self.job, task, 1, permissions)
        if not token:
            return NONE
        return VERIFIER.verify(token, executor=EXECUTOR, now_us=0).permissions


@settings(max_examples=75)
@given(random=st.randoms(use_true_random=False))
def test_no_token_of_a_child_says_what_its_parents_does_not(random: Random) -> None:
    tree = Tree(random)
    for _ in range(STEPS):
        tree.change() if random.random() < 0.2 else tree.fork()
    for task in tree.job.tasks.values():
        child = tree.token(task)
        if task.parent is None or child in (None, NONE):
            continue
        assert child is not None
        parent = tree.token(tree.job.tasks[task.parent])
        assert parent is not None and covers(parent, child)
        assert child.fork is None or (parent.fork is not None and child.fork.depth < parent.fork.depth)
        assert covers(tree.asked[task.agent.partition("@")[0]], msgspec.structs.replace(child, asks=()))
        for call in (random_call(random) for _ in range(CALLS)):
            assert is_allowed(parent, call) or not is_allowed(child, call)


@settings(max_examples=75)
@given(random=st.randoms(use_true_random=False))
def test_nobody_forks_more_deeper_or_others_than_any_above_was_granted(random: Random) -> None:
    tree = Tree(random)
    for _ in range(STEPS):
        tree.fork()
    below: dict[str, int] = {}
    for task in tree.job.tasks.values():
        for distance, above in enumerate(ancestors(task, tree.job.tasks), 1):
            fork = tree.asked[above.agent.partition("@")[0]].fork
            assert fork is not None and distance <= fork.depth
            assert any(agent_covers(name, task.agent) for name in fork.agents)
            below[above.id] = below.get(above.id, 0) + 1
            assert below[above.id] <= fork.max
    assert len(tree.job.tasks) <= tree.job.spec.fan_out
    # Nobody was asked, where a person has to be.
    for parent in tree.job.forks.families:
        agent = tree.job.tasks[parent].agent.partition("@")[0]
        assert not tree.catalogue.grants[agent]["fork"].ask
