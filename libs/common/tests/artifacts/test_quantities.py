import pytest
from hive_common.artifacts.quantities import parse_duration, parse_quantity
from hive_common.kernel.errors import InvalidArgument
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("64Mi", 64 << 20), ("1Gi", 1 << 30), ("512Ki", 512 << 10), ("5M", 5_000_000), ("7", 7), (4096, 4096), (0, 0)],
)
def test_sizes_are_read_as_in_kubernetes(text: object, size_bytes: int) -> None:
    assert parse_quantity(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("500ms", 500), ("10s", 10_000), ("2m", 120_000), ("1h", 3_600_000), ("1d", 86_400_000)],
)
def test_durations_are_read_with_their_unit(text: str, milliseconds: int) -> None:
    assert parse_duration(text) == milliseconds


@pytest.mark.parametrize(
    "wrong", ["", "Mi", "64 Mi", "64mi", "-1", -1, "1.5Gi", True, None, 1.0, "64Mi\n", "٣Mi", [], "9" * 19]
)
def test_what_is_no_size_is_refused_with_file_and_path(wrong: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_quantity(wrong, file="manifest.yaml", path="resources.memory")
    assert refused.value.message.startswith("manifest.yaml: resources.memory: ")
    assert "64Mi" in refused.value.message


@pytest.mark.parametrize("wrong", [10, "10", "s", "1.5s", "10 s", "10S", "-1s", None, True, "10s\n"])
def test_what_is_no_duration_is_refused_with_file_and_path(wrong: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_duration(wrong, file="job.yaml", path="limits.deadline")
    assert refused.value.fields["path"] == "limits.deadline"


@given(st.integers(0, 10**15))
def test_a_duration_in_milliseconds_is_itself(number: int) -> None:
    assert parse_duration(f"{number}ms") == number
