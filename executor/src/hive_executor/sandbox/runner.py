"""The process in which guests run: `python -m hive_executor.sandbox.runner MODULES SCRATCH STOPS [CGROUP...]`.

Its socket is on descriptor 0; on descriptor STOPS come the numbers of runs that are to end. It holds no secrets,
sees no file but the compiled modules in MODULES and no process but itself (where the system can do that), and can
be killed at any time. It runs one guest at a time. SCRATCH is how many bytes of files it may have; one that may
have any is there for one guest only.

What costs memory is imported after the fork, because the keeper needs none of it.
"""

import os
import sys
from pathlib import Path

from hive_executor.sandbox import confine
from hive_executor.sandbox.separate import separate


def main() -> None:
    """Confine this process, then serve."""
    modules, scratch_bytes, stops, *groups = sys.argv[1:]
    os.set_inheritable(int(stops), False)  # the keeper has no use for it
    kept = separate([Path(group) for group in groups])
    confine.rename("hive-runner")

    from hive_executor.sandbox.serving import serve

    serve(kept.pid, kept.layers, Path(modules), int(stops), int(scratch_bytes))


if __name__ == "__main__":
    main()
