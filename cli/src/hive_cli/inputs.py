"""Inputs of jobs and agents from the command line: `k=v`, `k=@glob`, and files."""

import glob
import json
from pathlib import Path
from typing import Any

from hive_common.contracts.limits import BLOB_BYTES_MAX
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge

FORMS = "name=value, name=@files (such as code=@src/**/*.py)"


def build_input(base: Any, assignments: list[str], file: Path | None) -> Any:
    """Return the input that a command line asks for.

    Args:
        base: what there is without any option: the job file's own input.
        assignments: of `--input`; they set members over the file's or the base's.
        file: of `--input-file`, which takes the place of the base.

    Raises:
        InvalidArgument: an assignment or the file does not fit; the message names it and what was expected.
    """
    value = base if file is None else read_json_file(file)
    if not assignments:
        return value
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InvalidArgument(
            f"--input {assignments[0]}: sets a member, but the input is {_kind(value)}; expected an object"
        )
    return {**value, **dict(parse_assignment(text) for text in assignments)}


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return name and value of one `--input`.

    A value that is JSON is taken as that, `@` names files, and anything else is a string as it stands.

    Raises:
        InvalidArgument: there is no name or no `=`, or no file fits.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InvalidArgument(f"--input {text}: expected {FORMS}")
    if value.startswith("@"):
        return name, read_texts(value[1:], f"--input {text}")
    try:
        return name, json.loads(value, parse_constant=_no_json)
    except ValueError:
        return name, value


def read_texts(pattern: str, option: str) -> list[dict[str, str]]:
    """Return `[{path, text}]` of every file that `pattern` names, sorted by path.

    Args:
        pattern: with `*`, `?`, `[…]`, and `**` for any number of folders; hidden ones have to be named.
        option: what the user typed, for errors.

    Raises:
        InvalidArgument: nothing fits, or a file is not UTF-8 or cannot be read.
        PayloadTooLarge: together they are more than a blob may hold.
    """
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())  # noqa: PTH207
    if not paths:
        raise InvalidArgument(f"{option}: no file fits {pattern!r} in {Path.cwd()}")
    found, size = [], 0
    for path in paths:
        text = read_text(Path(path))
        size += len(text)
        if size > BLOB_BYTES_MAX:
            raise PayloadTooLarge(f"{option}: the files are larger than {BLOB_BYTES_MAX // 2**20} MiB together")
        found.append({"path": Path(path).as_posix(), "text": text})
    return found


def read_json_file(file: Path) -> Any:
    """Read a JSON value. Raises InvalidArgument with line and column where it is none."""
    text = read_text(file)
    try:
        return json.loads(text, parse_constant=_no_json)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"{file}: line {error.lineno}, column {error.colno}: {error.msg}; expected JSON", file=str(file)
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{file}: {error}; expected JSON", file=str(file)) from error


def read_text(file: Path) -> str:
    """Return what stands in a file. Raises InvalidArgument where it cannot be read or is no text."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{file}: byte {error.start} is not UTF-8; expected a text file", file=str(file)
        ) from error


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
    return "null"
