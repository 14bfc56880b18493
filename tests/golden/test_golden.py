"""Golden histories hash and decode the same for ever; the tampered one fails.

The bytes are checked with the standard library alone, so that a change of our own code cannot change the verdict.
"""

import base64
import hashlib
import hmac
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hive_common.contracts.events import JOB_TERMINAL, TASK_TERMINAL, TYPES, decode, encode
from hive_common.eventlog.envelope import NewEvent, envelope_of, leaf_hash, prepare, splice

HERE = Path(__file__).parent
HISTORIES = sorted(file for file in HERE.glob("*.jsonl") if "tampered" not in file.stem)
HEADS = {
    "v1": "cb219d74d3e6da82b16e6b3d493974cf3ac3be556b62f4d3c3fe788413a0a45f",
    "v1_joining": "8529258de28cd7c7617630545e11607f0f5f3d8f87f6a20d839d1daddee56248",
    "v1_approvals": "988acb72448bca4e38f46c331e35ff971b5eba7aa9ad7c3eb9e3329b3a50e3b7",
    "v1_forks": "7d96cff93e16d281087fbbe828e23e09b334f8ccc1dc759c53312519ba75a17f",
    "v1_canaries": "d99568847994ab1cc0fdb79d253fa0628e0c27b44734ae6713ebe79fa279d968",
    "v1_reputation": "11332e56f47293bdb12de2492157f7514bc72273943178b49035059977580795",
}
"""The hash at the head of each history. Nobody may ever have to change one."""


class Broken(Exception):
    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position = position


def rows_of(file: Path) -> list[dict[str, Any]]:
    *lines, trailer = file.read_bytes().splitlines(keepends=True)
    end = json.loads(trailer)
    assert end == {"count": len(lines) - 1, "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}
    return [json.loads(line) for line in lines[1:]]


def verify(rows: list[dict[str, Any]]) -> str:
    """Check the chain and the commitments, and return the hash at the head."""
    prev = "0" * 64
    heads: Counter[str] = Counter()
    ended: set[str] = set()
    for position, row in enumerate(rows, start=1):
        event = row["event"].encode()
        envelope = json.loads(event)
        if row["position"] != position or envelope["position"] != position:
            raise Broken(position, "another position")
        if envelope["prev"] != prev:
            raise Broken(position, "prev is not the hash of the event before")
        if hashlib.sha256(b"\x00" + event).hexdigest() != row["hash"]:
            raise Broken(position, "hash")
        commit = hmac.new(base64.b64decode(row["salt"]), base64.b64decode(row["payload"]), "sha256")
        if commit.hexdigest() != envelope["payload_commit"]:
            raise Broken(position, "payload_commit")
        heads[envelope["stream"]] += 1
        if envelope["version"] != heads[envelope["stream"]]:
            raise Broken(position, "version")
        if envelope["type"] in TASK_TERMINAL | JOB_TERMINAL:
            if envelope["stream"] in ended:
                raise Broken(position, "second terminal event")
            ended.add(envelope["stream"])
        prev = row["hash"]
    return prev


@pytest.mark.parametrize("file", HISTORIES, ids=lambda file: file.stem)
def test_history_hashes_to_the_same_for_ever(file: Path) -> None:
    assert verify(rows_of(file)) == HEADS[file.stem]


@pytest.mark.parametrize("file", HISTORIES, ids=lambda file: file.stem)
def test_every_event_still_decodes_and_encodes_to_its_bytes(file: Path) -> None:
    for row in rows_of(file):
        envelope = envelope_of(row["event"].encode())
        payload = base64.b64decode(row["payload"])
        decoded = decode(envelope.type, envelope.schema, payload)
        assert type(decoded).__name__ == envelope.type
        assert decode(envelope.type, envelope.schema, encode(decoded)) == decoded


@pytest.mark.parametrize("file", HISTORIES, ids=lambda file: file.stem)
def test_todays_code_still_writes_the_envelopes_of_v1(file: Path) -> None:
    for row in rows_of(file):
        old = envelope_of(row["event"].encode())
        event = NewEvent(
            old.stream,
            old.version,
            old.type,
            old.schema,
            base64.b64decode(row["payload"]),
            old.ts_us,
            old.actor,
            old.owner,
            old.ns,
            old.subject,
            old.correlation,
            old.causation,
        )
        body, _ = prepare(old.log, event, base64.b64decode(row["salt"]))
        again = splice(old.position, old.prev, body)
        assert again == row["event"].encode()
        assert leaf_hash(again).hex() == row["hash"]


def test_v1_holds_most_types_of_its_time() -> None:
    seen = {json.loads(row["event"])["type"] for row in rows_of(HERE / "v1.jsonl")}
    assert seen <= set(TYPES)
    assert len(seen) >= 20


def test_tampered_history_fails_where_it_was_tampered_with() -> None:
    with pytest.raises(Broken) as caught:
        verify(rows_of(HERE / "v1_tampered.jsonl"))
    assert caught.value.position == 13
