"""Which layers this system allows around the engine: `python -m hive_executor.sandbox.layers`.

It tries what runners do, in processes of its own, since it could not be undone in this one. It prints a JSON array:
for each layer its `name`, whether this system `has` it, and the `fix` where it has not.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from hive_executor.sandbox import confine
from hive_executor.sandbox.cgroups import Group, find_place
from hive_executor.sandbox.separate import separate

_MEMORY_BYTES: Final = 256 << 20
_PROCESSES: Final = 8
_FIXES: Final = {
    confine.CGROUP: "cgroup limits take a systemd unit with Delegate=memory pids and DelegateSubgroup=main, or root"
}
_FIX: Final = "Linux with unprivileged user namespaces and seccomp has what is missing"


def main() -> None:
    """Print the layers."""
    group = _group()
    try:
        with tempfile.TemporaryDirectory() as folder:
            code, found = _try(group.folders if group else (), Path(folder))
    finally:
        if group is not None:
            group.remove()
    report = [
        {"name": layer, "has": layer in found, "fix": "" if layer in found else _FIXES.get(layer, _FIX)}
        for layer in confine.LAYERS
    ]
    print(json.dumps(report))
    sys.exit(code)


def _group() -> Group | None:
    place = find_place()
    if place is None:
        return None
    try:
        return place.new_group(memory_bytes=_MEMORY_BYTES, processes=_PROCESSES)
    except OSError:
        return None


def _try(folders: tuple[Path, ...], mount_point: Path) -> tuple[int, list[str]]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        layers = confine.close_off(separate(folders).layers, visible=None, mount_point=mount_point)
        os.write(writer, "\n".join(layers).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        return os.waitstatus_to_exitcode(status), pipe.read().splitlines()


if __name__ == "__main__":
    main()
