"""Splits files into parts of about the same size."""

from hive import log

PART_BYTES = 250_000


def run(input: dict) -> dict:
    """Take `files` as a list of {path, text}; return `parts`, each a list of such files."""
    parts: list[list[dict]] = []
    room = 0
    for file in input["files"]:
        if not parts or len(file["text"]) > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(file)
        room -= len(file["text"])
    log.info(f"{len(input['files'])} files in {len(parts)} parts")
    return {"parts": parts}
