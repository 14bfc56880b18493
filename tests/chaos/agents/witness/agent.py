import random
import time


def run(input: dict) -> dict:
    time.sleep(input.get("ms", 0) / 1000)
    if random.random() < input.get("fails", 0):
        raise RuntimeError("as it was told")
    said = {"answer": f"={input['n'] ** 2:010d}", "pad": "x" * input.get("pad", 0)}
    # The same JSON, and not the same bytes.
    return said if random.random() < 0.5 else dict(reversed(said.items()))
