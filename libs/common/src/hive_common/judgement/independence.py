"""Who may judge what: nobody the work of its own machine.

A verifier never runs on an executor that produced what it judges; where the rule asks for results of distinct
devices or owners, neither on such a device nor for such an owner. `distinct: none` lifts this, for installations of
one machine, and the decision shows that it did.
"""

from collections.abc import Iterable

from hive_common.contracts.judgement import Distinct, Producer
from hive_common.judgement.quorum import unit_of


def conflict(distinct: Distinct, place: Producer, judged: Iterable[Producer]) -> str:
    """Say why a verifier may not run somewhere; empty where it may.

    For placement: `place` is the executor that is looked at, with any attempt number.

    Args:
        distinct: of the task whose results are judged.
        judged: the attempts that produced what it would judge.
    """
    if distinct == "none":
        return ""
    for one in judged:
        if one.executor == place.executor:
            return "produced_what_it_judges"
        if distinct != "executor" and unit_of(distinct, one) == unit_of(distinct, place):
            return f"same_{distinct}_as_what_it_judges"
    return ""
