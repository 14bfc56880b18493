"""Calls whose answers are lost: tasks with known answers."""

import json
import secrets
from typing import Any

from google.protobuf.message import Message
from hive_proto.canaries.v1 import canaries_pb2

from tests.chaos.answers import Rig, Unary, reading
from tests.chaos.owner_cases import asked

AGENT = "spin@1.0.0"


def of_its_own() -> canaries_pb2.AddRequest:
    """Return a canary that was not there before; the executor of this installation answers it rightly."""
    number = secrets.randbelow(10**9)
    given, answer = json.dumps({"n": number, "ms": 0}).encode(), json.dumps({"n": number}).encode()
    return canaries_pb2.AddRequest(agent=AGENT, input_json=given, answer_json=answer, caller="somebody")


async def add_request(rig: Rig) -> Message:
    return of_its_own()


async def added_once(rig: Rig, request: Any, answer: Any) -> None:
    assert await rig.types_of(answer.canary_id) == ["CanaryAdded"]
    gone = canaries_pb2.RemoveRequest(canary_id=answer.canary_id, caller="somebody")
    await asked(rig, "Canaries", "Remove", gone)


async def remove_request(rig: Rig) -> Message:
    added = await asked(rig, "Canaries", "Add", of_its_own())
    return canaries_pb2.RemoveRequest(canary_id=added.canary_id, caller="somebody")


async def removed_once(rig: Rig, request: Any, answer: Any) -> None:
    assert await rig.types_of(request.canary_id) == ["CanaryAdded", "CanaryRemoved"]


CASES: dict[str, Unary] = {
    "Canaries.Add": Unary(add_request, lambda rig, answer: answer.agent == AGENT, added_once),
    "Canaries.Remove": Unary(remove_request, lambda rig, answer: answer.removed, removed_once),
    "Canaries.List": reading(
        lambda rig: canaries_pb2.ListRequest(agent="nobody@1.0.0"), lambda rig, answer: not answer.canaries
    ),
}
