"""Migrations that an installation may have applied never change: it would refuse to start."""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
KNOWN = Path(__file__).parent / "migrations.json"


def test_a_migration_that_was_published_stays_as_it_is() -> None:
    known = json.loads(KNOWN.read_text())
    there = {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for place in ("libs/*/src", "services/*/src")
        for file in ROOT.glob(f"{place}/**/migrations/*.sql")
    }
    changed = [file for file, digest in known.items() if there.get(file) != digest]
    assert not changed, "a published migration was changed or removed; write a new one instead"
    assert there.keys() == known.keys(), f"add what is new to {KNOWN.name}, once it is what it should be"
