"""`proto/subjects.md` names every subject, body and field that the code has, and none that it has not."""

import inspect
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hive_common.contracts import events, messages

TEXT = (Path(__file__).parents[2] / "proto" / "subjects.md").read_text()


def is_struct(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, msgspec.Struct)


def structs_of(annotation: Any) -> set[type[msgspec.Struct]]:
    parts = get_args(annotation)
    return {annotation} if is_struct(annotation) else {found for part in parts for found in structs_of(part)}


def is_base(struct: type[msgspec.Struct]) -> bool:
    return any(one.__module__ == messages.__name__ for one in struct.__subclasses__())


def reachable() -> dict[str, type[msgspec.Struct]]:
    waiting = [
        found
        for found in vars(messages).values()
        # What others are made from is described with these. Tests make some from them, too.
        if is_struct(found) and found.__module__ == messages.__name__ and not is_base(found)
    ]
    found: dict[str, type[msgspec.Struct]] = {}
    while waiting:
        struct = waiting.pop()
        if struct.__name__ not in found:
            found[struct.__name__] = struct
            waiting += [inner for hint in get_type_hints(struct).values() for inner in structs_of(hint)]
    return found


def section(struct: type[msgspec.Struct]) -> str:
    """Return the part of the document that describes a struct: its row, or the table under its name."""
    name = re.escape(struct.__name__)
    row = re.search(rf"^\| `{name}` \| (.*)\|$", TEXT, re.MULTILINE)
    if row is not None:
        return row.group(1)
    table = re.search(rf"^`{name}`\n\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table is not None, f"{struct.__name__} is not described"
    return table.group(1)


@pytest.mark.parametrize("name", sorted(reachable()))
def test_every_field_of_every_body_is_described(name: str) -> None:
    struct = reachable()[name]
    described = set(re.findall(r"`([a-z_]+)`", section(struct)))
    missing = [field.encode_name for field in msgspec.structs.fields(struct) if field.encode_name not in described]
    assert not missing


def test_tables_describe_no_field_that_there_is_not() -> None:
    for name, table in re.findall(r"^`(\w+)`\n\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        struct = reachable()[name]
        first_cells = " ".join(row.split("|")[1] for row in table.splitlines())
        described = set(re.findall(r"`([a-z_]+)`", first_cells))
        assert described == {field.encode_name for field in msgspec.structs.fields(struct)}, name


@pytest.mark.parametrize(
    "subject",
    [
        messages.pull_subject("<id>"),
        messages.report_subject("<id>"),
        messages.hello_subject("<id>"),
        messages.log_subject("<id>", "<task>", "<attempt>"),  # type: ignore[arg-type]
        messages.infer_subject("<id>"),
        messages.stream_subject("<id>", "<call>"),
        messages.call_subject("<id>", "model"),
        messages.call_subject("<id>", "model-done"),
        messages.inbox_prefix("<id>"),
        messages.HEAD_SUBJECT,
        messages.LEADER_SUBJECT,
        messages.EVENTS_STREAM,
        messages.EVENTS_SUBJECTS,
        messages.event_subject("<kind>", "<Type>"),
    ],
)
def test_every_subject_is_named(subject: str) -> None:
    assert f"`{subject}" in TEXT


def test_every_subject_function_of_the_module_is_looked_at() -> None:
    """A new subject has to be added to the test above."""
    functions = {name for name, found in vars(messages).items() if inspect.isfunction(found)}
    constants = {name for name in vars(messages) if name.isupper()}
    assert functions == {
        "pull_subject",
        "report_subject",
        "hello_subject",
        "log_subject",
        "infer_subject",
        "stream_subject",
        "call_subject",
        "inbox_prefix",
        "event_subject",
    }
    assert constants == {"HEAD_SUBJECT", "LEADER_SUBJECT", "EVENTS_STREAM", "EVENTS_SUBJECTS"}


def test_every_kind_and_failure_code_is_named() -> None:
    for word in [*events.KINDS, *events.FAILURE_CODES]:
        assert f"`{word}`" in TEXT
