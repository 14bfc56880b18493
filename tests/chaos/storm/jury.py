"""What the log says about judged work: replicas, judges, decisions and joins. A part of the oracle.

As there, nothing of the product is used: what was asked for is in the job's document, what was given and by whom in
the events, and what is true about a number everybody knows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.storm.judged import WITNESS, answer
from tests.chaos.storm.oracle import Event, History, Job, Task
from tests.chaos.storm.plan import Planned

DEVICE_CODES = frozenset({"lost", "runner_died"})
"""A task may end with these in any storm: after four attempts that died with their device it is given up."""
LOST_MAX = 3
"""Attempts of a task that are replaced because their device was lost."""
TRUSTED_AFTER = 10
RUNNER_DIED = "runner_died"
UNDECIDED = frozenset({"judge_failed", "invalid_input", "invalid_module", "permission_denied", "killed"})
"""A judged task may fail with these though nothing was decided."""
IN_PLACE = frozenset({"lost", "retry"})
VERDICTS = {"critic": "score", "test": "passed"}


@dataclass
class Findings:
    """What was found.

    Attributes:
        unjust: what is not as the job's words want it.
        short: jobs from which devices took results away.
        counts: of decisions, judges, joins, lies and so on.
    """

    unjust: list[str] = field(default_factory=list)
    short: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)


class Words:
    """What a step of a job's document asks for. Args: `step` is JSON."""

    def __init__(self, step: dict[str, Any]) -> None:
        speculate, verify = step.get("speculate", {}), step.get("verify", {})
        quorum = verify.get("quorum", {})
        self.step = step
        self.k: int = quorum.get("k", 1)
        self.of: int = quorum.get("of", speculate.get("replicas", 1))
        extends = bool(quorum) and quorum.get("on_none", "extend") == "extend"
        self.most: int = quorum.get("extend_to", 2 * self.of) if extends else self.of
        self.keeps = speculate.get("keep") == "all"
        self.hedged = "hedge_after" in speculate
        self.adaptive: bool = quorum.get("adaptive", False)
        self.apart = speculate.get("distinct") == "executor"
        self.judges = {kind: verify[kind]["agent"] for kind in VERDICTS if kind in verify}
        if isinstance(quorum.get("equal"), dict) and "critic" in quorum["equal"]:
            self.judges["pairs"] = quorum["equal"]["critic"]["agent"]
        self.min_score: float = verify.get("critic", {}).get("min_score", 0)
        self.filtered = bool(VERDICTS.keys() & verify.keys())
        self.judged = self.of > 1 or self.filtered
        self.tries: int = step.get("retry", {}).get("max_attempts", 1)
        self.skips = step.get("on_failure", "fail") == "skip"
        self.minimum: int = step.get("minimum", 0)
        join = step.get("join", "all")
        self.join = join if isinstance(join, str) else next(iter(join))
        self.top: int | None = join["rank"]["top"] if self.join == "rank" else None
        self.joined = self.join != "all" or self.skips or self.minimum > 0


def check(history: History, planned: Mapping[str, Planned]) -> Findings:
    """Look at every job that somebody submitted."""
    found = Findings()
    for job in history.jobs.values():
        wanted = planned.get(job.nonce)
        if wanted is not None and wanted.expected != "refused":
            _check_job(found, job, wanted)
    return found


def is_lie(task: Task, output: Any) -> bool:
    """Say whether a witness would not have given this output."""
    return bool(task.made.get("agent") == WITNESS and output["answer"] != answer(task.given["n"]))


def _check_job(found: Findings, job: Job, wanted: Planned) -> None:
    tasks = [task for task in job.tasks if task.judging is None]
    if len(tasks) > wanted.tasks:
        found.unjust.append(f"job {job.id}: {len(tasks)} tasks of {wanted.tasks}")
    judges: dict[str, list[Task]] = {}
    for one in job.tasks:
        if one.judging is not None:
            found.counts["judges"] += 1
            judges.setdefault(one.judging.get("task", ""), []).append(one)
    steps = {step["id"]: Words(step) for step in wanted.document.get("tasks", ())}
    for name, words in steps.items():
        there = [task for task in tasks if task.made.get("step", name) == name]
        for task in there:
            found.counts["lies"] += sum(is_lie(task, output) for output in task.outputs.values())
            if bool(task.replicas) != words.judged:
                found.unjust.append(f"task {task.id}: {task.replicas} replicas, judged: {words.judged}")
            elif words.judged:
                case = Case(found, task, words, judges.pop(task.id, []))
                case.check()
        _check_join(found, job, words, there, judges.pop("", []) if words.join == "integrator" else [])
    found.unjust += [f"job {job.id}: a judge of `{task}`, which nobody asked for" for task in judges]


class Case:
    """A judged task, followed through its events."""

    def __init__(self, found: Findings, task: Task, words: Words, judges: list[Task]) -> None:
        self._found = found
        self._task = task
        self._words = words
        self._judges = judges
        self._planned = task.replicas
        self._ended: Counter[str] = Counter()
        self._more: Counter[str] = Counter()
        self._live: set[int] = set()
        self._gave: set[int] = set()
        self._decision: dict[str, Any] | None = None
        self._trust = 0

    def check(self) -> None:
        """Go through the events, and then look at the judges."""
        before = ""
        for event in self._task.events:
            number = event.data.get("attempt", 0)
            match event.type:
                case "TaskAssigned":
                    self._assigned(number)
                case "AttemptSucceeded" | "AttemptFailed" | "AttemptLost":
                    self._live.discard(number)
                    if event.type == "AttemptSucceeded":
                        self._gave.add(number)
                    lost = event.type == "AttemptLost" or event.data.get("code") == RUNNER_DIED
                    self._ended["lost" if lost else event.type] += 1
                case "TaskExtended":
                    self._extended(event.data["attempts"], event.data["reason"])
                case "TaskDecided":
                    self._decided(event)
                case "TaskSucceeded" | "TaskFailed":
                    self._end(event, before)
            before = event.type
        self._check_judges()

    def _wrong(self, text: str) -> None:
        self._found.unjust.append(f"task {self._task.id}: {text}")

    def _assigned(self, number: int) -> None:
        attempts = self._task.attempts
        if len(self._live) + len(self._gave) + sum(self._ended[kind] for kind in ("lost", "AttemptFailed")) >= (
            self._planned
        ):
            self._wrong(f"attempt {number}, and {self._planned} are planned")
        others = {attempts[one].executor for one in self._live | self._gave}
        if self._words.apart and attempts[number].executor in others:
            self._wrong(f"attempt {number} is on the executor of another one")
        self._live.add(number)

    def _extended(self, attempts: int, reason: str) -> None:
        words = self._words
        self._planned += attempts
        self._more[reason] += attempts
        self._found.counts[f"more: {reason}"] += attempts
        replaced = sum(self._more[one] for one in IN_PLACE)
        if self._planned - replaced > words.most:
            self._wrong(f"{self._planned} attempts and {replaced} in place of others, of {words.most}")
        if self._more["lost"] > min(self._ended["lost"], LOST_MAX):
            self._wrong(f"{self._more['lost']} attempts in place of {self._ended['lost']} that were lost")
        if self._more["retry"] > min(self._ended["AttemptFailed"], words.tries - 1):
            self._wrong(f"{self._more['retry']} attempts in place of {self._ended['AttemptFailed']} that failed")
        if reason == "hedge" and (not words.hedged or self._gave or not self._live):
            self._wrong("a hedge that nobody asked for, or beside nobody at work")
        if reason == "check" and not words.adaptive:
            self._wrong("a check that nobody asked for")

    # --- the decision ---

    def _decided(self, event: Event) -> None:
        made = event.data["decision"]
        if self._decision is not None:
            self._wrong(f"{event.position}: a second decision")
        self._decision, self._trust = made, event.data.get("trust", 0)
        self._found.counts["decisions"] += 1
        self._found.counts["trusted"] += self._trust > 0
        candidates = {one["attempt"]: one for one in made.get("candidates", ())}
        running = {one["attempt"] for one in made.get("running", ())}
        if (set(candidates), running) != (self._gave, self._live):
            self._wrong(f"decided over {[*candidates]} and {[*running]}, not {self._gave} and {self._live}")
            return
        for number, one in candidates.items():
            if one["executor"] != self._task.attempts[number].executor:
                self._wrong(f"attempt {number} is said to be of another executor")
            self._check_scores(number, one)
        if self._trust and (not self._words.adaptive or self._trust < TRUSTED_AFTER or len(candidates) != 1):
            self._wrong(f"a trust of {self._trust} decides over {len(candidates)}")
        votes: list[int] = made.get("votes", [])
        if not set(votes) <= self._gave or len(set(votes)) < len(votes):
            self._wrong(f"votes {votes} of {self._gave}")
            return
        if made["outcome"] == "decided":
            self._won(made["winner"], votes)
        elif made["outcome"] == "kept":
            self._kept(votes, made)

    def _check_scores(self, number: int, candidate: dict[str, Any]) -> None:
        """What a decision says of a candidate is what the judge said, and no lie passes."""
        for kind, word in VERDICTS.items():
            said = candidate.get(word)
            verdicts = [one for one in self._verdicts(kind) if one[0] == [number]]
            if said is not None and [one[1][word] for one in verdicts] != [said]:
                self._wrong(f"attempt {number}: `{word}` is {said}, and was {verdicts}")

    def _verdicts(self, kind: str) -> Iterator[tuple[list[int], Any]]:
        for one in self._judges:
            assert one.judging is not None
            if one.judging["kind"] == kind:
                for output in one.outputs.values():
                    yield list(one.judging["attempts"]), output

    def _won(self, winner: int, votes: list[int]) -> None:
        words, outputs = self._words, self._task.outputs
        needed = 1 if self._trust else words.k
        executors = {self._task.attempts[one].executor for one in votes} if words.apart else set(votes)
        if words.keeps or winner not in self._gave or len(executors) < needed:
            self._wrong(f"attempt {winner} wins with the votes {votes} of {len(executors)} executors")
            return
        if needed > 1 and any(outputs[one] != outputs[winner] for one in votes):
            self._wrong(f"attempt {winner} wins, and its votes {votes} are not equal")
        if is_lie(self._task, outputs[winner]):
            self._wrong(f"attempt {winner} wins with a lie")
        if words.filtered and not self._passed(winner):
            self._wrong(f"attempt {winner} wins, and did not pass")

    def _passed(self, number: int) -> bool:
        scores = [output["score"] for attempts, output in self._verdicts("critic") if attempts == [number]]
        tests = [output["passed"] for attempts, output in self._verdicts("test") if attempts == [number]]
        return all(score >= self._words.min_score for score in scores) and all(tests) and bool(scores or tests)

    def _kept(self, votes: list[int], made: dict[str, Any]) -> None:
        valid = {one for one in self._gave if not self._words.filtered or self._passed(one)}
        if not self._words.keeps or set(votes) != valid or self._live or not votes:
            self._wrong(f"{votes} are kept of {valid}, {self._live} are at work")
        if len(self._gave) < self._words.of:
            self._found.short.add(self._task.job)
        if self._words.filtered and any(is_lie(self._task, self._task.outputs[one]) for one in votes):
            self._wrong("a lie is kept that did not pass")

    def _end(self, event: Event, before: str) -> None:
        made = self._decision
        judges = [end.data.get("code") for one in self._judges for end in one.ends]
        if event.type == "TaskFailed" and (DEVICE_CODES & {*judges} or (made is not None and made.get("spent"))):
            self._found.short.add(self._task.job)
        if made is None:
            if event.type == "TaskSucceeded" or event.data.get("code") not in UNDECIDED:
                self._wrong(f"{event.position}: {event.type} without a decision")
            return
        if before != "TaskDecided":
            self._wrong(f"{event.position}: {event.type} after {before}, and not after its decision")
        outcome, votes = made["outcome"], made.get("votes") or [None]
        winner = votes[0] if outcome == "kept" else made.get("winner")
        if event.type == "TaskSucceeded" and (outcome == "failed" or event.data["attempt"] != winner):
            self._wrong(
                f"{event.position}: attempt {event.data['attempt']} ends it; decided was {outcome} {winner}"
            )
        if event.type == "TaskFailed" and outcome != "failed":
            self._wrong(f"{event.position}: it fails, and decided was {outcome}")

    # --- judges ---

    def _check_judges(self) -> None:
        seen: set[tuple[str, tuple[int, ...]]] = set()
        end = self._task.ends[0].position if self._task.ends else None
        for one in self._judges:
            judging = one.judging
            assert judging is not None
            kind, judged = judging["kind"], tuple(judging["attempts"])
            who = f"{kind} {one.id} of {list(judged)}"
            if self._words.judges.get(kind) != one.made["agent"]:
                self._wrong(f"{who} is by {one.made['agent']}")
            if (kind, judged) in seen:
                self._wrong(f"{who} is the second one")
            seen.add((kind, judged))
            began = one.events[0].position
            given = {event.data["attempt"] for event in self._successes() if event.position < began}
            if not set(judged) <= given or (end is not None and began > end):
                self._wrong(f"{who} is asked when {given} are there, or after the end")
            makers = {self._task.attempts[number].executor for number in set(judged) & given}
            if self._words.apart and any(attempt.executor in makers for attempt in one.attempts.values()):
                self._wrong(f"{who} is where what it judges was made")

    def _successes(self) -> Iterator[Event]:
        return (event for event in self._task.events if event.type == "AttemptSucceeded")


# --- joins -----------------------------------------------------------------------------------------------------


def _check_join(found: Findings, job: Job, words: Words, tasks: list[Task], integrators: list[Task]) -> None:
    name, unjust = words.step["id"], found.unjust
    joins = [event for event in job.joins if event.data["step"] == name]
    succeeded = any(end.type == "JobSucceeded" for end in job.ends)
    if len(joins) > (1 if words.joined else 0) or (succeeded and words.joined and not joins):
        unjust.append(f"job {job.id}: `{name}` was joined {len(joins)} times")
        return
    if not joins:
        return
    event = joins[0]
    found.counts["joins"] += 1
    what = f"{event.position}: `{name}` of job {job.id}"
    if any(not task.ends or task.ends[0].position > event.position for task in tasks):
        unjust.append(f"{what} was joined before its tasks had ended")
        return
    results = _kept_of(tasks[0]) if words.keeps else _results_of(tasks)
    failed = {} if words.keeps else {_place(task): task for task in tasks if task.ends[0].type != "TaskSucceeded"}
    for task in failed.values():
        if task.given.get("fails") != 1:
            found.short.add(job.id)
    order, missing = list(event.data.get("order", ())), set(event.data.get("missing", ()))
    if len(results) < max(words.minimum, 1) or event.data.get("closed") or event.data["kind"] != words.join:
        unjust.append(f"{what}: {event.data['kind']} of {len(results)}, at least {words.minimum}")
    if not words.keeps and missing != failed.keys():
        unjust.append(f"{what}: {missing} are missing, and {failed.keys()} failed")
    if not words.keeps and bool(event.data.get("partial")) != bool(failed):
        unjust.append(f"{what}: partial is {event.data.get('partial')}, and {failed.keys()} failed")
    match words.join:
        case "rank":
            if order != sorted(results)[: words.top]:
                unjust.append(f"{what}: {order} go on, of {sorted(results)} that have the same score")
        case "vote":
            if not order or order != [_majority(results)] or set(event.data["votes"]) != _equal(results, order[0]):
                unjust.append(f"{what}: {order} wins with {event.data['votes']}")
        case _:
            if order != sorted(results):
                unjust.append(f"{what}: {order} go on, and {sorted(results)} succeeded")
    if words.join == "integrator":
        unjust += [f"{what}: {text}" for text in _integrated(event, tasks, results, integrators)]


def _place(task: Task) -> int:
    return int(task.made.get("index") or 0)


def _results_of(tasks: list[Task]) -> dict[int, Any]:
    won = [task for task in tasks if task.ends[0].type == "TaskSucceeded"]
    return {_place(task): task.outputs.get(task.ends[0].data["attempt"]) for task in won}


def _kept_of(task: Task) -> dict[int, Any]:
    decided = next((event for event in task.events if event.type == "TaskDecided"), None)
    votes = decided.data["decision"].get("votes", ()) if decided is not None else ()
    return {number: task.outputs.get(number) for number in votes}


def _equal(results: dict[int, Any], number: int) -> set[int]:
    return {one for one, output in results.items() if output == results.get(number)}


def _majority(results: dict[int, Any]) -> int | None:
    """Return the first of those that most are equal to; each is of another executor."""
    return max(sorted(results), key=lambda one: len(_equal(results, one)), default=None)


def _integrated(event: Event, tasks: list[Task], results: dict[int, Any], integrators: list[Task]) -> Iterator[str]:
    """Yield what is wrong with what an integrator was given, and with what it made of it."""
    if len(integrators) != 1 or integrators[0].id != event.data.get("task"):
        yield f"{len(integrators)} integrators"
        return
    one = integrators[0]
    if one.events[0].position < event.position:
        yield "its integrator is older than the join"
    if one.given is None:
        yield "nobody knows what its integrator was given"
        return
    given = {entry["index"]: entry.get("value") for entry in one.given["results"] if entry["status"] == "succeeded"}
    if given != results or one.given["size"] != len(tasks):
        yield f"its integrator was given {sorted(given)}, and {sorted(results)} succeeded"
    if one.given["partial"] != (len(results) < len(tasks)):
        yield f"its integrator was told partial: {one.given['partial']}"
    found = [int(output["answer"][1:]) for output in results.values()]
    for output in one.outputs.values():
        if (output["count"], output["sum"]) != (len(found), sum(found)):
            yield f"its integrator made {output} of {found}"
