"""Prepares the shared CPython component: `python -m hive_executor.sandbox.warm [--cache DIR]`."""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from hive_common.kernel.errors import HiveError

from hive_executor.sandbox.compiler import prepare_python_runtime


def default_cache_dir() -> Path:
    """Return where compiled modules live unless the caller says otherwise: `$XDG_CACHE_HOME/hivefabric`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hivefabric"


def main() -> int:
    """Prepare the runtime, saying on stderr what takes time; print the path of the result."""
    parser = argparse.ArgumentParser(prog="hive_executor.sandbox.warm", description=main.__doc__)
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR")
    cache = parser.parse_args().cache or default_cache_dir()
    started = time.monotonic()
    try:
        path = asyncio.run(prepare_python_runtime(cache, lambda text: print(f"  {text} …", file=sys.stderr)))
    except HiveError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(f"  CPython component ready after {time.monotonic() - started:.1f} s", file=sys.stderr)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
