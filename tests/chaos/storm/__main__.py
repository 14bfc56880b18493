"""Run one storm; it ends with a line of JSON, and with exit code 1 where a law was broken."""

import argparse
import asyncio
import json
import sys

from tests.chaos.storm.run import Options, storm


def main() -> int:
    """Run one storm and print its line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=5000, help="that are submitted at least")
    parser.add_argument("--strikes", type=int, default=None, help="faults that strike; default: one for 150 tasks")
    parser.add_argument("--faults", default="", help="kinds that strike, with commas between them; default: all")
    parser.add_argument("--json", action="store_true", help="print nothing but the line")
    parser.add_argument("--keep", action="store_true", help="leave the home where it is, for a look")
    given = parser.parse_args()
    options = Options(
        seed=given.seed,
        tasks=given.tasks,
        strikes=given.strikes or max(8, given.tasks // 150),
        faults=tuple(given.faults.split(",")) if given.faults else (),
        keep=given.keep,
        quiet=given.json,
    )
    line = asyncio.run(storm(options))
    print(json.dumps(line))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
