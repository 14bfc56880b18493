"""Scores what an explorer brought: is the quote from the passage, is it about the question, is the model grounded?

There is no model in it: one that invents cannot judge whether another one did. It counts words, and nothing that a
model says can talk it out of that.
"""

import re

STOP = """\
a about after all also an and any are as at be been before but by can could did do does for from had happen
happens has have he how i if in into is it its long may me more most much must no not of on one only or other
our out over she should so some such than that the their them then there these they this those to up was we were
what when where which while who whom whose why will with without would you your"""
EMPTY = frozenset(STOP.split())
SUPPORT_MIN, GROUNDED = 0.5, 0.8
ABOUT, OWN_WORDS = 0.8, 0.2


def run(input: dict) -> dict:
    """Take an explorer's `input` and `output`; return `score` from 0 to 1, and what it is made of."""
    asked, passage = input["input"], input["input"]["text"]
    said, quote = input["output"]["said"], input["output"]["quote"]
    if not quote or quote not in passage:
        return {"score": 0.0, "reason": "the quote does not stand in the passage"}
    spoken, written = words(said), words(passage)
    support = len(spoken & written) / len(spoken) if spoken else 0.0
    if support < SUPPORT_MIN:
        return {"score": 0.0, "reason": f"only {support:.0%} of what the model said stands in the passage"}
    # Words of the question that few passages have weigh more: the planner has counted them.
    terms = asked["terms"]
    about = sum(terms[word] for word in terms.keys() & words(quote)) / (sum(terms.values()) or 1)
    invented = set(re.findall(r"\d+", said)) - set(re.findall(r"\d+", passage))
    grounded = support >= GROUNDED and not invented and bool(spoken - words(asked["question"]))
    score = ABOUT * about + OWN_WORDS * grounded
    return {"score": round(score, 3), "about": round(about, 3), "support": round(support, 3), "grounded": grounded}


def words(text: str) -> set[str]:
    """Return the words that carry meaning, without endings; as the planner does it."""
    return {stem(word) for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in EMPTY}


def stem(word: str) -> str:
    """Cut a usual ending of English."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
