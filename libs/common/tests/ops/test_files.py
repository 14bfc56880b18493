"""Files that are whole or not there."""

from pathlib import Path

import pytest
from hive_common.ops import files
from hive_common.ops.files import replace_file


def test_a_file_gets_its_content_and_mode_and_leaves_no_draft(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    for content in (b"first", b"second"):
        replace_file(file, content, mode=0o600)
        assert file.read_bytes() == content
        assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_crash_left_behind_does_not_shine_through(tmp_path: Path) -> None:
    (tmp_path / "secret.tmp").write_bytes(b"x" * 1000)
    (tmp_path / "secret.tmp").chmod(0o666)
    replace_file(tmp_path / "secret", b"new", mode=0o600)
    assert (tmp_path / "secret").read_bytes() == b"new"
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_content_is_synced_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, bytes | None]] = []

    def synced(descriptor: int) -> None:
        content = (tmp_path / "file").read_bytes() if (tmp_path / "file").exists() else None
        steps.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, content))

    monkeypatch.setattr(files.os, "fsync", synced)
    replace_file(tmp_path / "file", b"new")
    assert steps == [("file.tmp", None), (tmp_path.name, b"new")]
