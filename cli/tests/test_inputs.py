import json
from pathlib import Path
from typing import Any

import pytest
from hive_cli.inputs import build_input, parse_assignment, read_texts
from hive_common.kernel.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=3", 3),
        ("n=[1,2]", [1, 2]),
        ("n=true", True),
        ('n={"a":1}', {"a": 1}),
        ("n=hello", "hello"),
        ("n=", ""),
        ("n=a=b", "a=b"),
        ('n="3"', "3"),
        ("n=NaN", "NaN"),
        ("n=[1,", "[1,"),
        ('n="@x"', "@x"),
    ],
)
def test_a_value_is_json_where_it_parses_and_text_otherwise(text: str, value: Any) -> None:
    assert parse_assignment(text) == ("n", value)


@pytest.mark.parametrize("text", ["n", "=3", "", " =1"])
def test_an_assignment_without_a_name_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="expected name=value"):
        parse_assignment(text)


def test_a_glob_gives_paths_and_texts_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "c" / "two.py").write_text("zwei ü")
    (tmp_path / "one.py").write_text("eins")
    (tmp_path / ".hidden" / "no.py").write_text("no")
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_assignment("code=@**/*.py") == (
        "code",
        [{"path": "b/c/two.py", "text": "zwei ü"}, {"path": "one.py", "text": "eins"}],
    )


def test_a_glob_that_names_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match=r"no file fits '\*\.py'"):
        read_texts("*.py", "--input code=@*.py")


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"ab\xff")
    with pytest.raises(InvalidArgument, match=r"bad\.py: byte 2 is not UTF-8"):
        read_texts(str(tmp_path / "*.py"), "--input code=@…")


def test_assignments_set_members_over_the_input_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_text(json.dumps({"a": 1, "b": 2}))
    assert build_input({"z": 0}, ["b=3"], file) == {"a": 1, "b": 3}
    assert build_input({"z": 0}, ["b=3"], None) == {"z": 0, "b": 3}
    assert build_input(None, [], None) is None


def test_members_cannot_be_set_on_an_input_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is a list; expected an object"):
        build_input([1], ["a=1"], None)


def test_an_input_file_that_is_no_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_text('{"a": 1,\n oops}')
    with pytest.raises(InvalidArgument, match=r"input\.json: line 2, column 2"):
        build_input(None, [], file)
