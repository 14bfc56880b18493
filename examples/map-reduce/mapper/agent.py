"""Maps a part: how often each name stands in it, and where functions and classes are defined."""

import re
from collections import Counter

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+([A-Za-z_][A-Za-z0-9_]*)", re.MULTILINE)


def run(input: dict) -> dict:
    """Take `files` as {path, text}; return `names` with their counts, `defined` with their places, and totals."""
    names: Counter[str] = Counter()
    defined: dict[str, list[str]] = {}
    lines = 0
    for file in input["files"]:
        text = file["text"]
        lines += text.count("\n")
        names.update(NAME.findall(text))
        for found in DEFINITION.finditer(text):
            line = text.count("\n", 0, found.start(1)) + 1
            defined.setdefault(found[1], []).append(f"{file['path']}:{line}")
    return {"names": dict(names), "defined": defined, "files": len(input["files"]), "lines": lines}
