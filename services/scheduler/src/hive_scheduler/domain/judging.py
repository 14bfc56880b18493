"""The words `speculate`, `verify` and `join` of a task, read strictly and made into a rule of judgement.

Refused is what nothing could ever meet: more votes than results, a judge of its own work, a join of one result.
Whether there are as many devices or owners as `distinct` needs changes with every machine that joins, and is not
known here.
"""

import math
from typing import Final, Literal

import msgspec
from hive_common.artifacts.documents import refuse
from hive_common.artifacts.schemas import check_schema
from hive_common.contracts.jobdocument import EqualBy, HedgeByProgress, JoinBy, Quorum, Speculate, Task, Verify
from hive_common.contracts.judgement import (
    REPLICAS_MAX,
    CanonicalJson,
    Embedding,
    Equality,
    Exact,
    JudgeKind,
    Numeric,
    PairCritic,
    Rule,
)
from hive_common.contracts.limits import DEADLINE_MAX_MS, PROGRESS_STEP_PERMILLE, TIMEOUT_MAX_MS
from msgspec import UNSET

from hive_scheduler.domain.words import duration_ms, require, require_agent

JoinKind = Literal["all", "rank", "vote", "integrator"]
MIN_SCORE_DEFAULT: Final = 0.0


class EqualityWords(msgspec.Struct, frozen=True):
    """What is equal, and which agent is asked for what the rule needs: about pairs, or for vectors."""

    rule: Equality
    agent: str | None = None


class Join(msgspec.Struct, frozen=True):
    """What becomes of several results.

    Attributes:
        top: how many go on under `rank`; None: all.
        reserve_ms: so long before the job's deadline the integrator gets what there is; None: its timeout.
    """

    kind: JoinKind = "all"
    top: int | None = None
    equal: EqualityWords | None = None
    integrator: str = ""
    reserve_ms: int | None = None


PLAIN_JOIN = Join()


class Judging(msgspec.Struct, frozen=True):
    """How the results of a task are judged. Agents are `name@version`, empty where none is asked.

    Attributes:
        hedged: further replicas start only when the first is slow: than `hedge_after_ms`, or than 95 % were.
        hedge_unless_permille: one that said so in time that so much of its work is done is not slow; 0: none can.
        adaptive: one result of an executor that is trusted is enough.
    """

    rule: Rule
    join: Join
    hedged: bool = False
    hedge_after_ms: int | None = None
    hedge_unless_permille: int = 0
    adaptive: bool = False
    critic: str = ""
    test: str = ""
    pair_critic: str = ""
    senior: str = ""
    vector: str = ""

    @property
    def planned(self) -> int:
        """How many attempts are made to begin with; 0 where nothing is judged, and the first success decides."""
        rule = self.rule
        if rule.of == 1 and rule.min_score is None and not rule.tested:
            return 0
        return 1 if self.hedged or self.adaptive else rule.of

    @property
    def replicated(self) -> bool:
        """Whether a task may have several attempts that run beside each other."""
        return max(self.rule.of, self.rule.extend_to) > 1

    @property
    def agents(self) -> frozenset[str]:
        """Every agent that the words name, besides the task's own."""
        return frozenset(filter(None, (*self.judges.values(), self.join.integrator)))

    @property
    def judges(self) -> dict[JudgeKind, str]:
        """The agents that judge single results, by what they do; empty where none is asked."""
        return {
            "critic": self.critic,
            "test": self.test,
            "vector": self.vector,
            "pairs": self.pair_critic,
            "senior": self.senior,
        }


def judging_of(task: Task, path: str) -> Judging | None:
    """Return how a task's results are judged; None where the task says none of the words.

    Args:
        path: of the task in the document.

    Raises:
        InvalidArgument: with the path of what is wrong.
    """
    if task.speculate is None and task.verify is None and task.join == "all":
        return None
    speculate, verify = task.speculate or Speculate(), task.verify or Verify()
    rule, equal = _rule(speculate, verify, path)
    _check_verify(verify, f"{path}.verify")
    join = _join(task, f"{path}.join")
    _check_join(task, join, speculate, verify, f"{path}.join")
    judges = {
        f"{path}.verify.critic.agent": verify.critic.agent if verify.critic else None,
        f"{path}.verify.test.agent": verify.test.agent if verify.test else None,
        f"{path}.verify.quorum.equal.{_word_of(equal)}.agent": equal.agent,
        f"{path}.verify.senior.agent": verify.senior.agent if verify.senior else None,
    }
    for where, agent in judges.items():
        if agent is not None:
            require_agent(agent, where)
            require(agent != task.agent, where, "another agent than the one whose results it judges", agent)
    hedge_after_ms, hedge_unless_permille = _hedge(speculate.hedge_after, f"{path}.speculate.hedge_after")
    return Judging(
        rule=rule,
        join=join,
        hedged=speculate.hedge_after is not None,
        hedge_after_ms=hedge_after_ms,
        hedge_unless_permille=hedge_unless_permille,
        adaptive=verify.quorum is not None and verify.quorum.adaptive,
        critic=judges[f"{path}.verify.critic.agent"] or "",
        test=judges[f"{path}.verify.test.agent"] or "",
        pair_critic=(equal.agent or "") if isinstance(equal.rule, PairCritic) else "",
        senior=judges[f"{path}.verify.senior.agent"] or "",
        vector=(equal.agent or "") if isinstance(equal.rule, Embedding) else "",
    )


def _word_of(equal: EqualityWords) -> str:
    return "embedding" if isinstance(equal.rule, Embedding) else "critic"


def _hedge(words: str | HedgeByProgress | None, path: str) -> tuple[int | None, int]:
    """Return after how many milliseconds another replica starts, and which progress by then prevents it."""
    if not isinstance(words, HedgeByProgress):
        return None if words == "p95" else duration_ms(words, path, TIMEOUT_MAX_MS), 0
    steps = round(words.progress * 1000 / PROGRESS_STEP_PERMILLE)
    is_step = math.isclose(words.progress * 1000, steps * PROGRESS_STEP_PERMILLE)
    fits = is_step and 0 < steps * PROGRESS_STEP_PERMILLE < 1000
    require(fits, f"{path}.progress", "0.05 to 0.95, in steps of 0.05", words.progress)
    return duration_ms(words.within, f"{path}.within", TIMEOUT_MAX_MS), steps * PROGRESS_STEP_PERMILLE


def _rule(speculate: Speculate, verify: Verify, path: str) -> tuple[Rule, EqualityWords]:
    replicas, at = speculate.replicas, f"{path}.speculate"
    require(1 <= replicas <= REPLICAS_MAX, f"{at}.replicas", f"1 to {REPLICAS_MAX}", replicas)
    quorum = verify.quorum
    if quorum is not None:
        _check_quorum(quorum, verify, f"{path}.verify.quorum")
        require(replicas in (1, quorum.of), f"{at}.replicas", f"that of the quorum, which is {quorum.of}", replicas)
        require(speculate.keep == "first", f"{at}.keep", "`first`: a quorum chooses one result", speculate.keep)
        require(
            quorum.k == 1 or speculate.hedge_after is None,
            f"{at}.hedge_after",
            f"none: the quorum needs {quorum.k} results at once",
            speculate.hedge_after,
        )
    made = replicas if quorum is None else quorum.of
    require(
        made > 1 or speculate.hedge_after is None,
        f"{at}.hedge_after",
        "`replicas` of 2 or more to start later",
        speculate.hedge_after,
    )
    require(made > 1 or speculate.keep == "first", f"{at}.keep", "`replicas` of 2 or more to keep", speculate.keep)
    equal = _equality(quorum.equal, f"{path}.verify.quorum.equal") if quorum else EqualityWords(CanonicalJson())
    on_none = quorum.on_none if quorum else "fail"
    extend_to = (quorum.extend_to or min(2 * quorum.of, REPLICAS_MAX)) if quorum and on_none == "extend" else 0
    return Rule(
        k=quorum.k if quorum else 1,
        of=made,
        extend_to=extend_to,
        equal=equal.rule,
        distinct=speculate.distinct,
        on_none=on_none,
        keep=speculate.keep,
        min_score=_min_score(verify),
        tested=verify.test is not None,
    ), equal


def _min_score(verify: Verify) -> float | None:
    if verify.critic is None:
        return None
    return MIN_SCORE_DEFAULT if verify.critic.min_score is None else verify.critic.min_score


def _check_quorum(quorum: Quorum, verify: Verify, path: str) -> None:
    require(1 <= quorum.of <= REPLICAS_MAX, f"{path}.of", f"1 to {REPLICAS_MAX}", quorum.of)
    require(1 <= quorum.k <= quorum.of, f"{path}.k", f"1 to `of`, which is {quorum.of}", quorum.k)
    if quorum.extend_to is not None:
        require(quorum.on_none == "extend", f"{path}.extend_to", "`on_none: extend` with it", quorum.extend_to)
        fits = quorum.of <= quorum.extend_to <= REPLICAS_MAX
        require(fits, f"{path}.extend_to", f"{quorum.of} to {REPLICAS_MAX}", quorum.extend_to)
    if quorum.on_none == "escalate" and verify.senior is None:
        refuse("", f"{path}.on_none", "nobody is named to escalate to", "`verify.senior: {agent: …}`")


def _check_verify(verify: Verify, path: str) -> None:
    if verify.schema is not None:
        check_schema(verify.schema, "", f"{path}.schema")
    if verify.senior is not None and (verify.quorum is None or verify.quorum.on_none != "escalate"):
        refuse("", f"{path}.senior", "nothing is ever given to it", "`quorum: {…, on_none: escalate}`")


def _equality(words: Literal["exact", "json"] | EqualBy, path: str) -> EqualityWords:
    if not isinstance(words, EqualBy):
        return EqualityWords(Exact() if words == "exact" else CanonicalJson())
    said = [name for name in ("numeric", "embedding", "critic") if getattr(words, name) is not UNSET]
    require(len(said) == 1, path, "one of numeric, embedding and critic", said)
    if words.numeric is not UNSET:
        absolute, relative = words.numeric.absolute, words.numeric.relative
        require(absolute >= 0, f"{path}.numeric.absolute", "0 or more", absolute)
        require(0 <= relative < 1, f"{path}.numeric.relative", "0 or more, and less than 1", relative)
        require(absolute or relative, f"{path}.numeric", "a tolerance; for none: `equal: json`", {})
        return EqualityWords(Numeric(absolute, relative))
    if words.embedding is not UNSET:
        least = words.embedding.min
        require(-1 <= least <= 1, f"{path}.embedding.min", "a cosine: -1 to 1", least)
        return EqualityWords(Embedding(least), agent=words.embedding.agent)
    assert words.critic is not UNSET
    return EqualityWords(PairCritic(), agent=words.critic.agent)


def _join(task: Task, path: str) -> Join:
    words = task.join
    if not isinstance(words, JoinBy):
        return Join(words, equal=EqualityWords(CanonicalJson()) if words == "vote" else None)
    said = [name for name in ("rank", "vote", "integrator") if getattr(words, name) is not UNSET]
    require(len(said) == 1, path, "one of rank, vote and integrator", said)
    if words.rank is not UNSET:
        top = words.rank.top
        require(top is None or top >= 1, f"{path}.rank.top", "1 or more", top)
        return Join("rank", top=top)
    if words.vote is not UNSET:
        equal = _equality(words.vote.equal, f"{path}.vote.equal")
        if equal.agent is not None:
            problem = "agents judge results of one task (`verify.quorum`), and none of several tasks"
            refuse("", f"{path}.vote.equal.{_word_of(equal)}", problem, "`exact`, `json` or `numeric`")
        return Join("vote", equal=equal)
    assert words.integrator is not UNSET
    said_by = words.integrator
    return Join(
        "integrator",
        integrator=require_agent(said_by.agent, f"{path}.integrator.agent"),
        reserve_ms=duration_ms(said_by.reserve, f"{path}.integrator.reserve", DEADLINE_MAX_MS),
    )


def _check_join(task: Task, join: Join, speculate: Speculate, verify: Verify, path: str) -> None:
    if join.kind == "all":
        return
    if task.fork is not None and speculate.keep == "all":
        refuse(
            "", path, f"each task of the fork keeps several results, and `{join.kind}` takes one of each", "`all`"
        )
    if task.fork is None and speculate.keep != "all":
        refuse(
            "",
            path,
            f"the task has one result, and `{join.kind}` needs several",
            "`fork`, or `speculate.keep: all`",
        )
    if join.kind == "rank" and verify.critic is None:
        refuse("", path, "results are ranked by a score, and nobody gives one", "`verify.critic: {agent: …}`")
