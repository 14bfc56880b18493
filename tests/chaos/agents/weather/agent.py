import random
import time


def run(input: dict) -> dict:
    time.sleep(input.get("ms", 0) / 1000)
    if random.random() < input.get("fails", 0):
        raise RuntimeError("as it was told")
    return {"square": input["n"] ** 2, "pad": "x" * input.get("pad", 0)}
