"""Job files as people write them: YAML or JSON, sent as JSON. The scheduler judges what stands in them."""

import json
from pathlib import Path
from typing import Any

from hive_common.artifacts.documents import load_yaml, refuse
from hive_common.contracts.limits import INLINE_BYTES_MAX, MIB
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import HiveError, InvalidArgument

from hive_cli.inputs import read_json_file

FILE_BYTES_MAX = 16 * MIB


def load_job(file: Path) -> dict[str, Any]:
    """Read a job file.

    Raises:
        InvalidArgument: it cannot be read, is neither YAML nor JSON, or is not a job; with the place in it.
    """
    if file.suffix == ".json":
        document = read_json_file(file)
    else:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
        document = load_yaml(data, str(file), bytes_max=FILE_BYTES_MAX)
    if not isinstance(document, dict):
        refuse(str(file), "", "is not an object", "a job document")
    for field, wanted in (("apiVersion", "hive/v1"), ("kind", "Job")):
        if document.get(field) != wanted:
            refuse(str(file), field, f"got {json.dumps(document.get(field), default=str)}", f"`{wanted}`")
    return document


def split_input(document: dict[str, Any], value: Any) -> tuple[dict[str, Any], bytes | None]:
    """Return the document to send with its input, and the input's bytes where they have to go ahead as a blob.

    Args:
        document: as it was loaded.
        value: the input that takes the place of the document's own; None leaves it out.
    """
    body = {name: part for name, part in document.items() if name != "input"}
    if value is None:
        return body, None
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    if len(data) <= INLINE_BYTES_MAX:
        return {**body, "input": value}, None
    return {**body, "input_digest": digest_of(data)}, data


def in_file(error: HiveError, file: Path) -> HiveError:
    """Return the error with the file it is about in front."""
    if error.message.startswith(str(file)):
        return error
    return type(error)(f"{file}: {error.message}", **{**error.fields, "file": str(file)})
