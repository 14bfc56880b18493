"""Groups files by size, so that no reviewer gets much more to read than another."""

from hive import log

GROUP_BYTES = 80_000


def run(input: dict) -> dict:
    """Take `files` as a list of {path, text} and return `groups`, each a list of such files, in path order."""
    files = sorted(input["files"], key=lambda file: file["path"])
    groups: list[list[dict]] = []
    room = 0
    for file in files:
        size = len(file["text"])
        if not groups or size > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(file)
        room -= size
    log.info(f"{len(files)} files in {len(groups)} groups")
    return {"groups": groups}
