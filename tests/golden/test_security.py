"""What docs/SECURITY.md names as shown by a test is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`([\w/.-]*test_\w+\.py)::(test_\w+)`")


def test_every_test_that_the_security_document_names_exists() -> None:
    named = NAMED.findall((ROOT / "docs" / "SECURITY.md").read_text())
    assert len(named) >= 10
    missing = [f"{file}::{test}" for file, test in named if not _has(ROOT / file, test)]
    assert not missing


def _has(file: Path, test: str) -> bool:
    return file.is_file() and re.search(rf"^(async )?def {test}\(", file.read_text(), re.MULTILINE) is not None
