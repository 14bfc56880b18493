"""Approvals over REST and gRPC: who decides is who the key says, and the hash goes along as it was given."""

from hive_common.kernel.ids import new_id
from hive_common.rpc.client import bearer, call, open_channel
from hive_proto.approvals.v1 import approvals_pb2, approvals_pb2_grpc

HASH = "a" * 64


async def test_one_is_looked_at_and_decided(world, http):
    job, approval = new_id(), new_id()
    listed = await (await http.get("/v1/approvals", params={"job": job})).json()
    assert [(one["job_id"], one["shown"]) for one in listed["approvals"]] == [(job, ["a: b"])]
    assert (await (await http.get(f"/v1/approvals/{approval}")).json())["approval_id"] == approval
    for verb, verdict in (("approve", "approved"), ("deny", "denied")):
        answer = await http.post(f"/v1/approvals/{approval}/{verb}", json={"hash": HASH, "reason": "because"})
        assert (answer.status, (await answer.json())["state"]) == (200, verdict)
    asked = world.approvals.decided
    assert [(one.verdict, one.hash, one.reason) for one in asked] == [
        ("approved", HASH, "because"),
        ("denied", HASH, "because"),
    ]
    assert len({one.caller for one in asked}) == 1 and asked[0].caller


async def test_another_hash_and_none_are_refused(world, http):
    path = f"/v1/approvals/{new_id()}/approve"
    answer = await http.post(path, json={"hash": "b" * 64})
    assert (answer.status, (await answer.json())["code"]) == (409, "conflict")
    assert (await http.post(path, json={})).status == 400
    assert (await http.post("/v1/approvals/nobody/approve", json={"hash": HASH})).status in (400, 404)


async def test_over_grpc_nobody_decides_in_the_name_of_another(world):
    channel = open_channel(f"127.0.0.1:{world.gateway.grpc_port}")
    stub = approvals_pb2_grpc.ApprovalsStub(channel)
    request = approvals_pb2.DecideRequest(approval_id=new_id(), verdict="approved", hash=HASH, caller="somebody")
    found = await call(stub.Decide(request, metadata=bearer(world.keys["admin"])))
    assert found.state == "approved" and found.by not in ("", "somebody")
    await channel.close()
