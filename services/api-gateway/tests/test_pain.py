"""Failures in groups over REST and gRPC: what is asked for goes along, and only administrators may ask."""

import pytest
from hive_common.kernel.errors import PermissionDenied
from hive_common.rpc.client import bearer, call, open_channel
from hive_gateway.keys import Caller
from hive_gateway.rights import check_method, check_path
from hive_proto.pain.v1 import pain_pb2, pain_pb2_grpc


async def test_groups_and_examples(world, http):
    found = await (await http.get("/v1/pain?since_us=5&agent=a@1.0.0&limit=9")).json()
    group = found["groups"][0]
    assert (group["fingerprint"], group["failures"], group["nano_usd"]) == ("0123456789abcdef", 3, 7)
    assert (found["position"], found["truncated"]) == (9, True)
    asked = world.pain.requests[-1]
    assert (asked.since_us, asked.agent, asked.limit) == (5, "a@1.0.0", 9)
    found = await (await http.get("/v1/pain/0123?examples=2&since_us=6")).json()
    asked = world.pain.requests[-1]
    assert (asked.fingerprint, asked.examples, asked.since_us) == ("0123", 2, 6)
    assert found["group"] == group
    example = found["examples"][0]
    assert (example["task_id"], example["attempt"], example["executor"]) == ("t", None, None)
    for path in ("/v1/pain/012", "/v1/pain/xyz0", "/v1/pain?limit=201", "/v1/pain/0123?examples=21"):
        assert (await http.get(path)).status == 400, path


async def test_over_grpc_administrators_alone(world):
    channel = open_channel(f"127.0.0.1:{world.gateway.grpc_port}")
    stub = pain_pb2_grpc.PainStub(channel)
    answer = await call(stub.List(pain_pb2.ListRequest(), metadata=bearer(world.keys["admin"])))
    assert answer.groups[0].agent == "a"
    await channel.close()
    user = Caller("ci", "user", "pseudonym")
    with pytest.raises(PermissionDenied):
        check_method(user, "/hive.pain.v1.Pain/List")
    with pytest.raises(PermissionDenied):
        check_path(user, "GET", "/v1/pain")
