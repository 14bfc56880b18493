"""The gRPC stubs that are checked in are what `make proto` writes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi", "__init__.py")


def stubs(folder: Path) -> dict[str, bytes]:
    """Return every generated file below `folder`, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for glob in STUBS for file in folder.rglob(glob)}


def test_generating_them_again_makes_no_difference(tmp_path: Path) -> None:
    package = tmp_path / "hive_proto"
    shutil.copytree(ROOT / "proto" / "hive_proto", package, ignore=shutil.ignore_patterns(*STUBS, "__pycache__"))
    assert not stubs(package), "the copy holds contracts alone"
    shutil.copy(ROOT / "proto" / "generate.sh", tmp_path)
    subprocess.run(
        ["bash", str(tmp_path / "generate.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        timeout=100,
    )
    made = stubs(package)
    checked_in = stubs(ROOT / "proto" / "hive_proto")
    # The package's own marker is no stub.
    checked_in.pop("__init__.py")
    assert made.pop("__init__.py", b"") == b""
    assert made.keys() == checked_in.keys()
    changed = [name for name in made if made[name] != checked_in[name]]
    assert changed == [], "run `make proto` and commit what it writes"
