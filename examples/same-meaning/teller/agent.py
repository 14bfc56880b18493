"""Answers a question in a sentence. Each try is another sample, in other words."""

import random

from hive import model


def run(input: dict) -> dict:
    """Take `question`, and perhaps `temperature` and `model`; return the `answer`."""
    answer = model.chat(
        [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": input["question"]},
        ],
        model=input.get("model") or "",
        temperature=input.get("temperature", 0.5),
        # The tries of one task have the same input: what makes each another sample is its seed.
        seed=random.randrange(2**31),  # noqa: S311
        max_tokens=48,
    )
    return {"answer": answer.text.strip()}
