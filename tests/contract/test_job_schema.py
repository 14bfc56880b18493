"""docs/job.schema.json is what `hive job schema` prints, and takes the job files that the scheduler takes."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml
from hive_cli.main import app
from hive_common.contracts.jobdocument import DIALECT
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.jobfile import parse_job
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "job.schema.json"
SCHEMA = json.loads(PUBLISHED.read_text())
JOBS = sorted(ROOT.glob("examples/*/job.y*ml"))

SMALLEST: dict[str, Any] = {
    "apiVersion": "hive/v1",
    "kind": "Job",
    "name": "one",
    "tasks": [{"id": "one", "agent": "one@1"}],
}


def task(**words: Any) -> dict[str, Any]:
    return {**SMALLEST, "tasks": [{**SMALLEST["tasks"][0], **words}]}


def is_valid(document: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(document))


def test_what_is_published_is_what_the_command_prints() -> None:
    """To write it anew: hive job schema > docs/job.schema.json"""
    printed = CliRunner().invoke(app, ["job", "schema"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == SCHEMA
    assert printed.stdout == PUBLISHED.read_text()


def test_it_is_a_schema_of_the_draft_that_it_names() -> None:
    assert SCHEMA["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def described(node: Any, path: str = "$") -> list[str]:
    """Return the words that an editor would show without a line of explanation."""
    missing = []
    for name, definition in node["$defs"].items():
        for word, inside in definition["properties"].items():
            target = inside.get("$ref") or next((one.get("$ref") for one in inside.get("anyOf", [])), None)
            if not (inside.get("description") or target or "enum" in inside):
                missing.append(f"{name}.{word}")
    return missing


def test_every_word_is_explained() -> None:
    assert described(SCHEMA) == []


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.parent.name)
def test_the_examples_fit(file: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(file.read_text()))


QUORUM = {"k": 2, "of": 3}
BOTH_REFUSE = [
    {},
    {**SMALLEST, "kind": "Jobs"},
    {**SMALLEST, "tasks": []},
    {**SMALLEST, "later": 1},
    {**SMALLEST, "name": "No Name"},
    {**SMALLEST, "limits": {"fan_out": 0}},
    {**SMALLEST, "limits": {"deadline": "soon"}},
    task(id="One"),
    task(agent="one"),
    task(retry={"max_attempts": 0}),
    task(timeout="10"),
    task(join="most"),
    task(join={}),
    task(join={"rank": {}, "vote": {}}),
    task(speculate={"replicas": 0}),
    task(speculate={"replicas": 2, "distinct": "machine"}),
    task(verify={"quorum": {"k": 2}}),
    task(verify={"quorum": {**QUORUM, "equal": "same"}}),
    task(verify={"quorum": {**QUORUM, "equal": {}}}),
    task(verify={"quorum": {**QUORUM, "equal": {"numeric": {"absolute": -1}}}}),
    task(verify={"quorum": {**QUORUM, "on_none": "retry"}}),
    task(verify={"critic": {"min_score": 0.5}}),
]


@pytest.mark.parametrize("number", range(len(BOTH_REFUSE)))
def test_what_the_schema_refuses_the_scheduler_refuses(number: int) -> None:
    document = BOTH_REFUSE[number]
    assert not is_valid(document)
    with pytest.raises(InvalidArgument) as caught:
        parse_job(msgspec.json.encode(document))
    assert "not supported yet" not in caught.value.message


def test_what_the_scheduler_takes_the_schema_takes() -> None:
    full = {
        **SMALLEST,
        "input": {"n": [1]},
        "limits": {"deadline": "60s", "fan_out": 10},
        "priority": "high",
        "models": {"pin": "pool"},
        "output": "${tasks.two.output}",
        "tasks": [
            *SMALLEST["tasks"],
            {
                "id": "two",
                "agent": "two@1.0.0",
                "needs": ["one"],
                "fork": "${input.n}",
                "input": {"n": "${item}"},
                "join": "all",
                "timeout": "10s",
                "retry": {"max_attempts": 3, "backoff": "1s", "codes": ["timeout"]},
            },
        ],
    }
    for document in (SMALLEST, full):
        parse_job(msgspec.json.encode(document))
        assert is_valid(document)
