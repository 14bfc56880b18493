"""The agent that `hive agent init` writes: small, and works as it stands."""

from pathlib import Path

from hive_common.kernel.errors import Conflict, InvalidArgument

_MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: {name}
version: 1.0.0
description: Greets somebody.
runtime: python
entry: agent.py
# JSON Schema of what run() takes and returns.
input:
  type: object
  required: [name]
  properties:
    name: {{type: string}}
output:
  type: object
resources: {{memory: 64Mi, timeout: 10s}}
permissions: {{}}
"""

_AGENT = """\
from hive import log


def run(input: dict) -> dict:
    log.info(f"greeting {input['name']}")
    return {"greeting": f"Hello, {input['name']}!"}
"""

_JOB = """\
apiVersion: hive/v1
kind: Job
name: {name}
input: {{name: World}}
limits: {{deadline: 60s}}
tasks:
  - id: greet
    agent: {name}@1.0.0
    input: {{name: "${{input.name}}"}}
output: "${{tasks.greet.output}}"
"""

_INPUT = '{"name": "World"}\n'


def write_agent(name: str, folder: Path) -> tuple[Path, list[str]]:
    """Write the files and return the folder with their names.

    Raises:
        InvalidArgument: the name breaks the rule for names, or the folder cannot be written.
        Conflict: there is something in the folder already.
    """
    from hive_common.artifacts.names import NAME_PATTERN

    if not NAME_PATTERN.match(name):
        raise InvalidArgument(
            f"{name!r} is no name for an agent; expected a lower-case letter, then letters, digits and `-`, "
            "63 at most"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder}: exists already; expected a new or empty folder", file=str(folder))
    files = {
        "manifest.yaml": _MANIFEST.format(name=name),
        "agent.py": _AGENT,
        "job.yaml": _JOB.format(name=name),
        "input.json": _INPUT,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    except OSError as error:
        raise InvalidArgument(f"{folder}: cannot be written: {error.strerror}", file=str(folder)) from error
    return folder, list(files)
