"""Scores what an explorer brought: is the quote from the passage, is it about the question, is the model grounded?

There is no model in it: one that invents cannot judge whether another one did. It counts words, and nothing that a
model says can talk it out of that.
"""

import re

STOP = """\
a an and any are as at be but by can do does for from has have how if in into is it its not of on one or so
than that the their them then there these they this to was were what when where which while who why will with"""
EMPTY = frozenset(STOP.split())
GROUNDED = 0.8
QUOTE, ABOUT, OWN_WORDS = 0.3, 0.5, 0.2


def run(input: dict) -> dict:
    """Take an explorer's `input` and `output`; return `score` from 0 to 1, and what it is made of."""
    passage, question = input["input"]["text"], input["input"]["question"]
    said, quote = input["output"]["said"], input["output"]["quote"]
    if not quote or quote not in passage:
        return {"score": 0.0, "reason": "the quote does not stand in the passage"}
    support = share(words(said), words(passage))
    if support < 0.5:
        return {"score": 0.0, "reason": f"only {support:.0%} of what the model said stands in the passage"}
    about = share(words(question), words(quote))
    if not about:
        return {"score": 0.0, "reason": "the quote has no word of the question"}
    numbers = set(re.findall(r"\d+", said)) <= set(re.findall(r"\d+", passage))
    own = support if numbers and support >= GROUNDED and words(said) - words(question) else 0.0
    return {"score": round(QUOTE + ABOUT * about + OWN_WORDS * own, 3), "support": round(support, 3)}


def words(text: str) -> set[str]:
    """Return the words that carry meaning, without endings."""
    return {
        re.sub(r"(ing|ed|es|s|e)$", "", word) for word in re.findall(r"\w{2,}", text.lower()) if word not in EMPTY
    }


def share(of: set[str], among: set[str]) -> float:
    """Return how much of one set stands in the other."""
    return len(of & among) / len(of) if of else 0.0
