"""From results to a decision: filters first (critic, test), then votes.

The votes for a result are the results that are equal to it, its own among them, one for each owner, device or
executor where the rule says so. Equality need not be transitive (`equality`), so nothing is chained: each vote for
the winner is equal to the winner itself. Most votes win; between results of as many votes, the attempt with the
lowest number, if they share a vote. If they do not, two answers contest each other and nothing is decided.

Everything depends on the sets of results and of attempts that run, never on the order in which results came. A
decision comes early when no result that may still come could lead to another: what could win then would be equal to
what wins now. With `k` = 1 nothing is compared and the first valid result wins: the one rule in which time decides.

Sources: X. Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models, 2022 (the most
consistent of several results); D. P. Anderson, BOINC: A Platform for Volunteer Computing, Journal of Grid Computing
18, 2020, on validation by quorum over distinct hosts.
"""

import math
from collections.abc import Collection, Iterable
from itertools import combinations

import msgspec

from hive_common.contracts.judgement import (
    REPLICAS_MAX,
    Candidate,
    Distinct,
    Embedding,
    Pair,
    PairCritic,
    Producer,
    Rule,
)
from hive_common.judgement.equality import agreed, has_keys
from hive_common.kernel.errors import InvalidArgument


class Decided(msgspec.Struct, frozen=True, tag="decided"):
    """`winner` is the result; `votes` are the attempts that count for it, one for each that may vote."""

    winner: int
    votes: tuple[int, ...]


class Kept(msgspec.Struct, frozen=True, tag="kept"):
    """All valid results go on, under `keep: all`."""

    votes: tuple[int, ...]


class Wait(msgspec.Struct, frozen=True, tag="wait"):
    """Nothing can be said yet: for attempts that run, or for what judges have not said of results.

    Attributes:
        vectors: results that are compared by vectors, those that have theirs among them: which these are only who
            makes pairs of them knows.
    """

    scores: tuple[int, ...] = ()
    tests: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    vectors: tuple[int, ...] = ()


class Extend(msgspec.Struct, frozen=True, tag="extend"):
    """What there is and what runs cannot decide: one more attempt."""


class Escalate(msgspec.Struct, frozen=True, tag="escalate"):
    """Nothing is decided: a senior agent gets these results."""

    candidates: tuple[int, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Nothing is decided and nothing more is tried: `no_quorum`, `contested` or `no_valid_result`."""

    reason: str


Outcome = Decided | Kept | Wait | Extend | Escalate | Failed


class Sifted(msgspec.Struct, frozen=True):
    """Results by what the filters say: valid, out (with why), and those of which a judge has not spoken."""

    valid: tuple[Candidate, ...]
    out: dict[int, str]
    unknown: tuple[Candidate, ...]
    scores: tuple[int, ...]
    tests: tuple[int, ...]


def unit_of(distinct: Distinct, producer: Producer) -> str:
    """Return who votes with this attempt: attempts of one unit have one vote."""
    match distinct:
        case "owner":
            return producer.owner
        case "device":
            return producer.device
        case "executor":
            return producer.executor
    return f"attempt {producer.attempt}"


def sift(rule: Rule, candidates: Iterable[Candidate]) -> Sifted:
    """Apply the filters. What one judge has rejected needs no other; a score that is no number is none."""
    valid: list[Candidate] = []
    unknown: list[Candidate] = []
    out: dict[int, str] = {}
    scores, tests = [], []
    for one in sorted(candidates, key=lambda candidate: candidate.attempt):
        if rule.tested and one.passed is False:
            out[one.attempt] = "the test did not pass"
        elif rule.min_score is not None and one.score is not None and not rule.min_score <= one.score < math.inf:
            out[one.attempt] = f"its score is {one.score}, and {rule.min_score} is asked for"
        else:
            untested = rule.tested and one.passed is None
            unscored = rule.min_score is not None and one.score is None
            tests += [one.attempt] if untested else []
            scores += [one.attempt] if unscored else []
            (unknown if untested or unscored else valid).append(one)
    return Sifted(tuple(valid), out, tuple(unknown), tuple(scores), tuple(tests))


def judge(
    rule: Rule,
    candidates: Collection[Candidate],
    pairs: Iterable[Pair] = (),
    running: Collection[Producer] = (),
    coming: int = 0,
    spent: int = 0,
) -> Outcome:
    """Apply the rule to what there is.

    Args:
        rule: checked, as `check_rule` does.
        candidates: attempts that gave a result, in any order.
        pairs: what is known of pairs, where `rule.equal` goes by pairs. Those that are missing are not equal under
            `numeric`; under `critic` they are asked for, and under `embedding` the vectors that they take.
        running: attempts that may still give a result.
        coming: attempts that are to be made and have no executor yet.
        spent: attempts that ended without a result and will not be made again.

    Raises:
        InvalidArgument: an attempt stands there twice.
    """
    _check_attempts(candidates, running)
    sifted = sift(rule, candidates)
    made = len(candidates) + len(running) + coming + spent
    still = [*running, *sifted.unknown]
    wait = Wait(scores=sifted.scores, tests=sifted.tests)
    if rule.keep == "all":
        if still or coming:
            return wait
        if len(sifted.valid) >= rule.k:
            return Kept(tuple(one.attempt for one in sifted.valid))
        return _none(rule, sifted, made, "no_quorum")
    votes = Votes(rule, sifted.valid, pairs)
    by_vectors = rule.k > 1 and isinstance(rule.equal, Embedding)
    if by_vectors:
        # Of each as soon as it is there: it may be equal to what comes, though nothing is there to compare it with.
        wait = msgspec.structs.replace(wait, vectors=tuple(one.attempt for one in sifted.valid))
    if rule.k > 1 and votes.unknown_pairs:
        return wait if by_vectors else msgspec.structs.replace(wait, pairs=votes.unknown_pairs)
    open_units = {unit_of(rule.distinct, one) for one in still} | _fresh(coming)
    decided = votes.decided(open_units)
    if decided is not None:
        return decided
    possible = votes.possible(open_units)
    if open_units and (possible or rule.on_none == "escalate"):
        # A senior agent gets all that was paid for; a failure and one more attempt need not wait for it.
        return wait
    return _none(rule, sifted, made, "contested" if possible else "no_quorum")


def check_rule(rule: Rule) -> None:
    """Refuse a rule that nothing could ever meet.

    Raises:
        InvalidArgument: with `path` in its fields, below `verify.quorum` or `speculate`.
    """
    for holds, path, expected in (
        (1 <= rule.of <= REPLICAS_MAX, "of", f"1 to {REPLICAS_MAX}"),
        (1 <= rule.k <= rule.of, "k", f"1 to `of`, which is {rule.of}"),
        (rule.extend_to in (0, *range(rule.of, REPLICAS_MAX + 1)), "extend_to", f"{rule.of} to {REPLICAS_MAX}"),
        (rule.min_score is None or math.isfinite(rule.min_score), "min_score", "a finite number"),
    ):
        if not holds:
            raise InvalidArgument(f"{path}: expected {expected}", path=path, expected=expected)


def _check_attempts(candidates: Collection[Candidate], running: Collection[Producer]) -> None:
    attempts = [one.attempt for one in (*candidates, *running)]
    if len(set(attempts)) != len(attempts):
        raise InvalidArgument("an attempt stands twice among results and attempts that run", path="candidates")


def _fresh(coming: int) -> set[str]:
    return {f"to come {number}" for number in range(coming)}


def _none(rule: Rule, sifted: Sifted, made: int, reason: str) -> Outcome:
    if rule.on_none == "escalate":
        return Escalate(tuple(one.attempt for one in sifted.valid))
    if rule.on_none == "extend" and made < max(rule.extend_to, rule.of):
        return Extend()
    return Failed(reason if sifted.valid else "no_valid_result")


class Votes:
    """Valid results and who votes for which.

    Attributes:
        unknown_pairs: pairs that a critic has not judged, or of which a vector is missing.
    """

    def __init__(self, rule: Rule, valid: Collection[Candidate], pairs: Iterable[Pair]) -> None:
        self._rule = rule
        self._transitive = has_keys(rule.equal)
        self._units = {one.attempt: unit_of(rule.distinct, one) for one in valid}
        self.unknown_pairs: tuple[tuple[int, int], ...] = ()
        self._for: dict[int, frozenset[int]] = {}
        if rule.k == 1:
            self._for = {attempt: frozenset({attempt}) for attempt in self._units}
        elif self._transitive:
            self._by_keys(valid)
        else:
            self._by_pairs(valid, agreed(pairs))
        self._counts = {attempt: len(self._units_of(group)) for attempt, group in self._for.items()}

    def _by_keys(self, valid: Iterable[Candidate]) -> None:
        classes: dict[str, list[int]] = {}
        for one in valid:
            classes.setdefault(one.key, []).append(one.attempt)
        for members in classes.values():
            group = frozenset(members)
            self._for |= dict.fromkeys(members, group)

    def _by_pairs(self, valid: Iterable[Candidate], known: dict[tuple[int, int], bool]) -> None:
        groups = {attempt: {attempt} for attempt in self._units}
        unknown = []
        digests = {one.attempt: one.digest for one in valid}
        for a, b in combinations(sorted(groups), 2):
            same_bytes = bool(digests[a]) and digests[a] == digests[b]
            verdict = True if same_bytes else known.get((a, b))
            if verdict:
                groups[a].add(b)
                groups[b].add(a)
            elif verdict is None and isinstance(self._rule.equal, PairCritic | Embedding):
                unknown.append((a, b))
        self.unknown_pairs = tuple(unknown)
        self._for = {attempt: frozenset(group) for attempt, group in groups.items()}

    def _units_of(self, attempts: Iterable[int]) -> set[str]:
        return {self._units[attempt] for attempt in attempts}

    def leaders(self) -> list[int]:
        """Return one result of each answer that has most votes, lowest attempt first: more than one contest it."""
        most = max(self._counts.values(), default=0)
        found: list[int] = []
        for attempt in sorted(self._for):
            if self._counts[attempt] == most and all(self._for[attempt].isdisjoint(self._for[w]) for w in found):
                found.append(attempt)
        return found

    @property
    def electorate(self) -> int:
        """How many votes there could be in all."""
        return len(set(self._units.values()))

    def voters(self, winner: int) -> tuple[int, ...]:
        """Return the attempts that vote for it: its own, and the first of every other unit."""
        first = {self._units[winner]: winner}
        for attempt in sorted(self._for[winner]):
            first.setdefault(self._units[attempt], attempt)
        return tuple(sorted(first.values()))

    def equal_to(self, winner: int) -> frozenset[int]:
        """Return the attempts whose results are equal to this one, itself among them, also of units that voted."""
        return self._for[winner]

    def decided(self, open_units: set[str]) -> Decided | None:
        """Return the winner, unless there is none or what may still come could make it another."""
        leaders = self.leaders()
        if not leaders or self._counts[leaders[0]] < self._rule.k:
            return None
        winner = leaders[0]
        if self._rule.k > 1 and (len(leaders) > 1 or (open_units and not self._is_safe(winner, open_units))):
            return None
        return Decided(winner, self.voters(winner))

    def possible(self, open_units: set[str]) -> bool:
        """Say whether some result could still have `k` votes, or has them already."""
        newcomer = open_units if self._transitive else self._units_of(self._for) | open_units
        most = self._most(self._for, open_units)
        return max(most, len(newcomer) if open_units else 0) >= self._rule.k

    def _most(self, attempts: Iterable[int], open_units: set[str]) -> int:
        return max((len(self._units_of(self._for[one]) | open_units) for one in attempts), default=0)

    def _is_safe(self, winner: int, open_units: set[str]) -> bool:
        """Whether what wins in the end is equal to `winner`, whatever comes from `open_units`.

        A result that is there already and not equal to it can have at most all that comes besides its own votes.
        A result that is not there yet can, where equality is transitive, have only what comes; where it is not, it
        may also be equal to every result but the winner. But then each of those has one vote more by it.
        """
        votes = self._counts[winner]
        others = self._for.keys() - self._for[winner]
        if self._most(others, open_units) >= votes:
            return False
        if self._transitive:
            return len(open_units) < votes
        rest = self._for.keys() - {winner}
        equals = self._for[winner] - {winner}
        most = len(self._units_of(rest) | open_units)
        return most < votes or (most == votes and any(self._outgrows(one, winner, open_units) for one in equals))

    def _outgrows(self, one: int, winner: int, open_units: set[str]) -> bool:
        """Whether `one`, equal to the winner, has more votes than a newcomer that needs its vote."""
        units = self._units_of(self._for[one])
        others = self._units_of(self._for.keys() - {winner, one}) | open_units
        return (
            len(units) == self._counts[winner] and self._units[one] not in others and units.isdisjoint(open_units)
        )
