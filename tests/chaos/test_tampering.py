"""What a superuser does to the log behind the system's back is found, and the first bad position is named."""

import json

import psycopg
import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CHANGES = {
    "a byte of an event": (
        "UPDATE log.events SET event = set_byte(event, 200, get_byte(event, 200) # 1) WHERE position = %(at)s",
        "UPDATE log.events SET event = set_byte(event, 200, get_byte(event, 200) # 1) WHERE position = %(at)s",
    ),
    "a byte of a hash": (
        "UPDATE log.events SET hash = set_byte(hash, 3, get_byte(hash, 3) # 1) WHERE position = %(at)s",
        "UPDATE log.events SET hash = set_byte(hash, 3, get_byte(hash, 3) # 1) WHERE position = %(at)s",
    ),
    "a payload": (
        "UPDATE log.payloads SET payload = set_byte(payload, 1, get_byte(payload, 1) # 1) WHERE position = %(at)s",
        "UPDATE log.payloads SET payload = set_byte(payload, 1, get_byte(payload, 1) # 1) WHERE position = %(at)s",
    ),
    "a type column": (
        "UPDATE log.events SET type = type || 'X' WHERE position = %(at)s",
        "UPDATE log.events SET type = left(type, -1) WHERE position = %(at)s",
    ),
}


@pytest.fixture
def superuser(tampered):
    """A connection that no role and no trigger holds back, which is what the auditor is for."""
    with psycopg.connect(tampered.admin_dsn(), autocommit=True) as connection:
        connection.execute("ALTER TABLE log.events DISABLE TRIGGER ALL")
        connection.execute("ALTER TABLE log.payloads DISABLE TRIGGER ALL")
        yield connection
        connection.execute("ALTER TABLE log.events ENABLE ALWAYS TRIGGER events_append_only")
        connection.execute("ALTER TABLE log.payloads ENABLE ALWAYS TRIGGER payloads_never_change")


@pytest.mark.parametrize("change", CHANGES)
def test_the_verifier_names_the_position_of(change, tampered, superuser):
    head = tampered.verify()["head"]
    at = max(2, head // 2)
    tamper, undo = CHANGES[change]
    superuser.execute(tamper, {"at": at})
    try:
        done = tampered.hive("audit", "verify", "--json", check=False)
        result = tampered.verify()
        assert done.returncode == 1
        assert not result["ok"]
        assert result["first_bad_position"] == at, result
        assert result["reason"]
    finally:
        superuser.execute(undo, {"at": at})
    assert tampered.verify()["ok"]


def test_a_deleted_row_is_found(tampered, superuser):
    at = tampered.verify()["head"] - 1
    row = superuser.execute("DELETE FROM log.events WHERE position = %s RETURNING *", (at,)).fetchone()
    try:
        result = tampered.verify()
        assert (result["ok"], result["first_bad_position"]) == (False, at)
    finally:
        superuser.execute("INSERT INTO log.events VALUES (%s, %s, %s, %s, %s, %s)", row)
    assert tampered.verify()["ok"]


def test_two_rows_that_changed_places_are_found(tampered, superuser):
    first = tampered.verify()["head"] // 2
    last, aside = first + 2, 1 << 40

    def swap():
        for old, new in ((first, aside), (last, first), (aside, last)):
            superuser.execute("UPDATE log.events SET position = %s WHERE position = %s", (new, old))

    swap()
    try:
        done = tampered.hive("audit", "verify", "--json", check=False)
        assert done.returncode == 1
        assert json.loads(done.stdout)["first_bad_position"] == first
    finally:
        swap()
    assert tampered.verify()["ok"]


def test_a_tail_that_was_cut_is_found_against_an_earlier_export(tampered, superuser, tmp_path):
    export = tmp_path / "log.ndjson"
    tampered.hive("audit", "export", str(export))
    assert tampered.json("audit", "verify", "--file", str(export))["ok"]
    head = tampered.verify()["head"]
    events = superuser.execute("DELETE FROM log.events WHERE position > %s RETURNING *", (head - 3,)).fetchall()
    payloads = superuser.execute("DELETE FROM log.payloads WHERE position > %s RETURNING *", (head - 3,)).fetchall()
    try:
        assert tampered.verify()["ok"], "what is left is a good chain: only the export knows better"
        against = tampered.hive("audit", "verify", "--against", str(export), "--json", check=False)
        assert against.returncode == 1
    finally:
        for row in events:
            superuser.execute("INSERT INTO log.events VALUES (%s, %s, %s, %s, %s, %s)", row)
        for row in payloads:
            superuser.execute("INSERT INTO log.payloads VALUES (%s, %s, %s)", row)
    assert tampered.verify("--against", str(export))["ok"]


def test_an_export_that_was_edited_does_not_verify(tampered, tmp_path):
    export = tmp_path / "log.ndjson"
    tampered.hive("audit", "export", str(export))
    lines = export.read_bytes().splitlines(keepends=True)
    export.write_bytes(b"".join(lines[:3] + lines[4:]))
    assert tampered.hive("audit", "verify", "--file", str(export), check=False).returncode == 1
