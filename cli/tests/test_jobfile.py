from pathlib import Path

import pytest
from hive_cli.jobfile import in_file, load_job, split_input
from hive_common.contracts.limits import INLINE_BYTES_MAX
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument

JOB = "apiVersion: hive/v1\nkind: Job\nname: squares\ntasks: []\n"


def test_yaml_and_json_give_the_same_document(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "job.json").write_text('{"apiVersion": "hive/v1", "kind": "Job",\t"name": "squares", "tasks": []}')
    assert load_job(tmp_path / "job.yaml") == load_job(tmp_path / "job.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "not a mapping"),
        ("apiVersion: hive/v2\nkind: Job", r"apiVersion: got \"hive/v2\"; expected `hive/v1`"),
        ("apiVersion: hive/v1\nkind: Agent", r"kind: got \"Agent\"; expected `Job`"),
        ("a: [1", "line 1"),
        ("a: 1\na: 2", "a"),
    ],
)
def test_what_is_no_job_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=message) as caught:
        load_job(file)
    assert str(file) in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"gone\.yaml: cannot be read"):
        load_job(tmp_path / "gone.yaml")


def test_a_small_input_rides_along_and_a_large_one_goes_ahead_as_a_blob() -> None:
    small, nothing = split_input({"name": "x", "input": 1}, {"a": 2})
    assert (small, nothing) == ({"name": "x", "input": {"a": 2}}, None)
    large, blob = split_input({"name": "x", "input": 1}, "y" * INLINE_BYTES_MAX)
    assert blob is not None
    assert large == {"name": "x", "input_digest": digest_of(blob)}


def test_an_input_of_exactly_the_limit_rides_along() -> None:
    assert split_input({}, "y" * (INLINE_BYTES_MAX - 2))[1] is None
    assert split_input({}, "y" * (INLINE_BYTES_MAX - 1))[1] is not None


def test_errors_of_the_control_plane_name_the_file_once() -> None:
    error = in_file(InvalidArgument("tasks[0].needs: there is no task x", path="tasks[0].needs"), Path("job.yaml"))
    assert error.message == "job.yaml: tasks[0].needs: there is no task x"
    assert error.fields == {"path": "tasks[0].needs", "file": "job.yaml"}
    assert in_file(error, Path("job.yaml")) is error
