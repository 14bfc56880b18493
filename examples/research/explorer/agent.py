"""Reads one passage with a model, and comes back with the sentence that answers the question.

A small model invents as easily as it reads. So it is asked to copy a sentence, and what it says only serves to
find the sentence of the passage that is most like it: the quote is always word for word from the document.
"""

import random
import re

from hive import log, model

SYSTEM = "Copy the one sentence of the text that answers the question."
SHOWN = (
    (
        "The museum opens at nine. On Mondays it stays closed, because the rooms are cleaned then. It has a shop.",
        "Why is the museum closed on Mondays?",
        "On Mondays it stays closed, because the rooms are cleaned then.",
    ),
    (
        "A pump brings the water up. Each tank holds 400 litres. When a tank is full, a float stops the pump.",
        "What happens when a tank is full?",
        "When a tank is full, a float stops the pump.",
    ),
)
TOKENS_MAX = 60
TEMPERATURE = 0.5
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z*\"(`])")


def run(input: dict) -> dict:
    """Take `question` and a passage (`path`, `line`, `relevance`, `text`); return `said` and `quote`."""
    found = {"path": input["path"], "line": input["line"], "relevance": input["relevance"]}
    choices = sentences(input["text"])
    if len(choices) == 1:  # nothing to choose
        return {**found, "said": choices[0], "quote": choices[0], "model": ""}
    seed = random.randrange(2**31)  # noqa: S311 - each try of the same task shall be another one
    answer = model.chat(
        messages(input["text"], input["question"]),
        model=input.get("model") or "",
        temperature=TEMPERATURE,
        seed=seed,
        max_tokens=TOKENS_MAX,
    )
    said = " ".join(answer.text.split())
    quote = nearest(said, choices)
    log.info(f"{input['path']}: seed {seed}, the model said: {said}")
    return {**found, "said": said, "quote": quote, "model": answer["model"]}


def messages(text: str, question: str) -> list[dict]:
    """Show the model twice how it is done, then ask."""
    turns = [{"role": "system", "content": SYSTEM}]
    for passage, asked, sentence in (*SHOWN, (text, question, "")):
        turns.append({"role": "user", "content": f"Text: {passage}\n\nQuestion: {asked}"})
        turns.append({"role": "assistant", "content": sentence})
    return turns[:-1]


def sentences(text: str) -> list[str]:
    """Cut a passage into its sentences."""
    return [sentence.strip() for sentence in SENTENCE_END.split(text) if sentence.strip()]


def nearest(said: str, candidates: list[str]) -> str:
    """Return the sentence that shares most of its words with what was said; empty where none shares any."""
    spoken = set(re.findall(r"\w+", said.lower()))

    def likeness(sentence: str) -> float:
        written = set(re.findall(r"\w+", sentence.lower()))
        return len(spoken & written) / max(1, len(spoken | written))

    best = max(candidates, key=likeness, default="")
    return best if likeness(best) > 0 else ""
