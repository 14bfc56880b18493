"""Finds where an answer may stand: the passages of the documents that say most of what the question asks about.

No model reads all of the documents: a small one could not, and counting words (BM25) finds passages well enough.
"""

import math
import re
from collections import Counter

from hive import log

PASSAGE_CHARACTERS_MAX = 900
SATURATION, LENGTH_WEIGHT = 1.5, 0.3  # k1 and b of BM25; short passages often say little
STOP = """\
a about after all also an and any are as at be been before but by can could did do does for from had happen
happens has have he how i if in into is it its long may me more most much must no not of on one only or other
our out over she should so some such than that the their them then there these they this those to up was we were
what when where which while who whom whose why will with without would you your"""
EMPTY = frozenset(STOP.split())


def run(input: dict) -> dict:
    """Take `question`, `documents` ({path, text}) and `readings`; return the best passages to read."""
    question, most = input["question"], input["readings"]
    passages = [passage for document in input["documents"] for passage in split(document)]
    asked = list(dict.fromkeys(words(question)))
    if not asked:
        raise ValueError(f"the question has no word to look for: {question!r}")
    weights = weights_of(asked, passages)
    best: dict[str, list[tuple[float, dict]]] = {}
    for score, passage in scored(passages, weights):
        best.setdefault(passage["path"], []).append((score, passage))
    if not best:
        raise ValueError(
            f"none of {len(input['documents'])} documents has a word of the question ({', '.join(asked)})"
        )
    ranked = sorted(best.values(), key=lambda found: -found[0][0])[:most]
    log.info(f"{len(passages)} passages of {len(input['documents'])} documents; {len(ranked)} documents to read")
    return {"readings": [reading(found) for found in ranked], "passages": len(passages), "terms": weights}


def reading(found: list[tuple[float, dict]]) -> dict:
    """Return the best passage of a document."""
    score, passage = found[0]
    return {**passage, "relevance": round(score, 2)}


def split(document: dict) -> list[dict]:
    """Cut a document at its blank lines into {path, line, title, text}; a heading goes with what is below it."""
    passages, title, begun = [], "", 1
    lines: list[str] = []

    def end() -> None:
        text = " ".join(" ".join(lines).split())
        if text:
            passages.append({"path": document["path"], "line": begun, "title": title, "text": text})
        lines.clear()

    fenced = False
    for number, line in enumerate(document["text"].splitlines(), 1):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        if fenced or fence:  # code, which answers no question
            end()
        elif re.match(r"#{1,6} ", line):
            end()
            title = line.strip("# ")
        elif not line.strip() or sum(map(len, lines)) + len(line) > PASSAGE_CHARACTERS_MAX:
            end()
            lines += [line.strip()] if line.strip() else []
            begun = number
        else:
            begun = begun if lines else number
            lines.append(line.strip()[:PASSAGE_CHARACTERS_MAX])
    end()
    return passages


def words(text: str) -> list[str]:
    """Return the words that say something, without endings, so that `leases` finds `lease`. Code is no prose."""
    prose = re.sub(r"`[^`]*`", " ", text.lower())
    return [stem(word) for word in re.findall(r"[a-z0-9]+", prose) if word not in EMPTY]


def stem(word: str) -> str:
    """Cut a usual ending of English."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def weights_of(asked: list[str], passages: list[dict]) -> dict[str, float]:
    """Return what each word of the question says: the fewer passages have it, the more."""
    having = Counter(word for passage in passages for word in set(words(passage["title"] + " " + passage["text"])))
    rare = {word: math.log(1 + (len(passages) - having[word] + 0.5) / (having[word] + 0.5)) for word in asked}
    return {word: round(weight, 3) for word, weight in rare.items() if having[word]}


def scored(passages: list[dict], weights: dict[str, float]) -> list[tuple[float, dict]]:
    """Return (BM25, passage) of those that have a word of the question, best first."""
    counts = [Counter(words(passage["title"] + " " + passage["text"])) for passage in passages]
    usual = sum(count.total() for count in counts) / max(1, len(counts))
    found = []
    for passage, count in zip(passages, counts, strict=True):
        length = 1 - LENGTH_WEIGHT + LENGTH_WEIGHT * count.total() / usual
        score = sum(
            weight * count[word] * (SATURATION + 1) / (count[word] + SATURATION * length)
            for word, weight in weights.items()
            if count[word]
        )
        if score:
            found.append((score, passage))
    return sorted(found, key=lambda one: -one[0])
