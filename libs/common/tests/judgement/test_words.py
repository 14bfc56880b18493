"""Rules told to people."""

import pytest
from hive_common.contracts.judgement import Embedding, Exact, Numeric, PairCritic, Rule
from hive_common.judgement.words import rule_in_words


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(min_score=0.7), "the result, if it is valid; valid is one if a critic gives it 0.7 at least"),
        (Rule(of=3), "the first valid one of 3 results of distinct devices"),
        (
            Rule(k=2, of=3, extend_to=6, distinct="owner"),
            "2 of 3 results that are the same JSON, one vote for each owner; otherwise up to 6 attempts",
        ),
        (
            Rule(k=2, of=2, equal=Numeric(0.5, 0.01), on_none="fail", distinct="none", tested=True),
            "2 of 2 results that are the same numbers within 0.5 or 1 %, one vote for each attempt; "
            "valid is one if it passes a test",
        ),
        (
            Rule(k=3, of=5, equal=Embedding(0.9), on_none="escalate"),
            "3 of 5 results that are alike in meaning, with a cosine of 0.9 at least, one vote for each device; "
            "otherwise a senior agent chooses",
        ),
        (
            Rule(of=4, keep="all", distinct="executor"),
            "all valid results of distinct executors of 4 attempts are kept",
        ),
    ],
)
def test_a_rule_is_told_in_one_line(rule: Rule, words: str) -> None:
    assert rule_in_words(rule) == words


@pytest.mark.parametrize(("equal", "words"), [(Exact(), "the same bytes"), (PairCritic(), "the eyes of a critic")])
def test_what_is_equal_is_named(equal: Exact | PairCritic, words: str) -> None:
    assert words in rule_in_words(Rule(k=2, of=3, equal=equal))
