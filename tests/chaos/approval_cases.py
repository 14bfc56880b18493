"""Calls whose answers are lost: what people decide of what attempts ask."""

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from hive_common.kernel.ids import new_id
from hive_proto.agents.v1 import agents_pb2
from hive_proto.approvals.v1 import approvals_pb2

from tests.chaos.answers import Rig, Unary
from tests.chaos.owner_cases import asked

ASKER = "patient"
MANIFEST = f"""\
apiVersion: hive/v1
kind: Agent
name: {ASKER}
version: 1.0.0
runtime: python
entry: agent.py
permissions:
  kv: {{namespace: asked, quota: 64Ki}}
"""
AGENT = """\
from hive import kv

def run(key):
    kv.put(key, key)
    return {}
"""


async def with_asker(rig: Rig) -> None:
    """Have an agent that asks before it keeps anything."""
    found = await asked(rig, "Agents", "List", agents_pb2.ListRequest(name=ASKER))
    if found.versions:
        return
    folder = Path(tempfile.mkdtemp(dir=rig.home.root))
    (folder / "manifest.yaml").write_text(MANIFEST)
    (folder / "agent.py").write_text(AGENT)
    await asyncio.to_thread(rig.installation.hive, "agent", "push", str(folder))
    await asyncio.to_thread(shutil.rmtree, folder)
    wanted = json.dumps({"kv": None}).encode()
    grant = agents_pb2.GrantRequest(name=ASKER, permissions_json=wanted, ask=True, caller="somebody")
    await asked(rig, "Agents", "Grant", grant)


async def waiting(rig: Rig) -> Any:
    """Return an approval for which an attempt waits."""
    await with_asker(rig)
    job = {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "ask",
        "input": new_id(),
        "tasks": [{"id": "ask", "agent": f"{ASKER}@1.0.0", "input": "${input}"}],
    }
    with rig.api() as api:
        submitted = await asyncio.to_thread(api.post, "/v1/jobs", job)
    listing = approvals_pb2.ListRequest(job_id=submitted["job_id"])
    found: list[Any] = []

    async def asks() -> bool:
        found[:] = (await asked(rig, "Approvals", "List", listing)).approvals
        return bool(found)

    await rig.until(asks, "an attempt asks")
    return found[0]


async def decide_request(rig: Rig) -> approvals_pb2.DecideRequest:
    approval = await waiting(rig)
    return approvals_pb2.DecideRequest(
        approval_id=approval.approval_id, verdict="denied", hash=approval.hash, reason="no", caller="somebody"
    )


async def decided_once(rig: Rig, request: Any, answer: Any) -> None:
    assert await rig.types_of(request.approval_id) == ["ApprovalRequested", "ApprovalDecided"]


async def decided(rig: Rig) -> Any:
    """Return an approval that was denied, so that its attempt keeps no slot."""
    return await asked(rig, "Approvals", "Decide", await decide_request(rig))


async def list_request(rig: Rig) -> Message:
    return approvals_pb2.ListRequest(job_id=(await decided(rig)).job_id, all=True)


async def get_request(rig: Rig) -> Message:
    return approvals_pb2.GetRequest(approval_id=(await decided(rig)).approval_id)


CASES: dict[str, Unary] = {
    "Approvals.List": Unary(
        list_request, lambda rig, answer: [one.state for one in answer.approvals] == ["denied"]
    ),
    "Approvals.Get": Unary(get_request, lambda rig, answer: answer.state == "denied"),
    "Approvals.Decide": Unary(decide_request, lambda rig, answer: answer.state == "denied", decided_once),
}
