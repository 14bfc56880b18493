import time


def run(input: dict) -> dict:
    end = time.monotonic() + input["ms"] / 1000
    turns = 0
    while time.monotonic() < end:
        turns += 1
    return {"n": input["n"]}
