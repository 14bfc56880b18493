"""Metadata, `make`, `hive doctor` and the README say the same of which Python this needs."""

import tomllib
from pathlib import Path

from hive_cli.commands.doctor import PYTHON_BEYOND, PYTHON_MIN

ROOT = Path(__file__).parents[2]


def test_everybody_names_the_same_versions() -> None:
    oldest, beyond = (".".join(map(str, version)) for version in (PYTHON_MIN, PYTHON_BEYOND))
    projects = [ROOT / "pyproject.toml", *ROOT.glob("*/pyproject.toml"), *ROOT.glob("*/*/pyproject.toml")]
    said = {file: tomllib.loads(file.read_text())["project"]["requires-python"] for file in projects}
    assert len(said) == 10
    assert {*said.values()} == {f">={oldest},<{beyond}"}, said
    assert f"{PYTHON_MIN} <= sys.version_info < {PYTHON_BEYOND}" in (ROOT / "Makefile").read_text()
    minors = [f"3.{minor}" for minor in range(PYTHON_MIN[1], PYTHON_BEYOND[1])]
    assert f"Needs Python {', '.join(minors[:-1])} or {minors[-1]} " in (ROOT / "README.md").read_text()
