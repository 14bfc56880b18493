from collections.abc import Callable
from pathlib import Path

import pytest

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: square
version: 1.0.0
runtime: python
entry: agent.py
input: {type: object, required: [n], properties: {n: {type: integer}}}
output: {type: object}
resources: {memory: 64Mi, timeout: 10s}
permissions: {}
"""
SOURCE = "def run(input: dict) -> dict:\n    return {'squared': input['n'] ** 2}\n"

MakeAgent = Callable[..., Path]


@pytest.fixture
def make_agent(tmp_path: Path) -> MakeAgent:
    """Returns a function that writes an agent's folder: manifest text and further files by relative path."""

    def make(manifest: str = MANIFEST, /, name: str = "square", **_: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "manifest.yaml").write_text(manifest)
        (folder / "agent.py").write_text(SOURCE)
        return folder

    return make
