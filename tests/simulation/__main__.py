"""`python -m tests.simulation`: run worlds from seeds; one that fails is shown, and runs again with --trace."""

import argparse
import gc
import json
import sys
import time

from .world import Shape, run_seed


def main() -> int:
    """Run what was asked for; exit code 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--cpu", type=float, default=0.0, help="no further seed after so many seconds of CPU")
    parser.add_argument("--trace", action="store_true", help="show everything that happens")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that fails")
    for name in Shape._fields:
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    shape = Shape(*(getattr(given, name) for name in Shape._fields))
    gc.freeze()
    begun = time.process_time()
    failed, virtual_s, events, messages, ran = [], 0.0, 0, 0, 0
    for seed in range(given.seed, given.seed + given.seeds):
        outcome = run_seed(seed, shape, print if given.trace else None)
        ran += 1
        virtual_s += outcome.virtual_s
        events += outcome.events
        messages += outcome.messages
        if outcome.problems:
            failed.append(seed)
            print(f"seed {seed} fails after {outcome.virtual_s:.1f} s: {outcome.problems[0]}")
            print(f"  again, with all that happens: make simulate SEED={seed} TRACE=1")
            if not given.keep_going:
                break
        if given.cpu and time.process_time() - begun > given.cpu:
            break
    cpu_s = time.process_time() - begun
    line = {
        "seeds": ran,
        "failed": failed,
        "cpu_s": round(cpu_s, 1),
        "seeds_per_cpu_s": round(ran / cpu_s, 1),
        "virtual_h": round(virtual_s / 3600, 2),
        "events": events,
        "messages": messages,
    }
    print(json.dumps(line))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
