"""Turns a result into a vector with a model that makes embeddings; the scheduler compares what two results gave.

What the cosine of two texts says depends on the model: before you choose `min`, try it with texts of which you know
whether they mean the same.
"""

import json

from hive import model


def run(input: dict) -> dict:
    """Take the `output` of an attempt, whose `input` is beside it; return its `vector`."""
    (vector,) = model.embed(text_of(input["output"])).vectors
    return {"vector": vector}


def text_of(output: dict) -> str:
    """Return what is compared: the text, where the result is nothing else, or all of it."""
    values = list(output.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(output, sort_keys=True, ensure_ascii=False)
