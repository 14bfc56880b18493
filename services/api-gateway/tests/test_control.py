"""Kill orders at the gateway: passed on as they are, and only for those with a key."""

import grpc.aio
from hive_common.kernel.ids import new_id
from hive_common.rpc.client import bearer
from hive_proto.control.v1 import control_pb2, control_pb2_grpc

from .test_devices import shows

ORDER = {"order": '{"epoch":1}', "signature": "c2lnbmVk"}


async def test_an_order_goes_to_the_registry_as_it_was_signed(world, http) -> None:
    assert await (await http.get("/v1/control/kill")).json() == {
        "epoch": 0,
        "order": "",
        "signature": "",
        "stops": [],
    }
    response = await http.post("/v1/control/kill", json=ORDER)
    answer = await response.json()
    assert (response.status, answer["epoch"], answer["order"]) == (200, 1, ORDER["order"])
    (stop,) = answer["stops"]
    assert (stop["scope"], stop["target"], stop["reason"]) == ("agent", "square", "hostile")
    (asked,) = world.control.requests
    assert (asked.order, asked.signature, asked.caller) == (*ORDER.values(), world.caller)


async def test_what_is_no_order_is_refused_with_its_path(world, http) -> None:
    for body in ({}, {"order": 1, "signature": ""}, ORDER | {"more": 1}):
        assert (await http.post("/v1/control/kill", json=body)).status == 400
    assert world.control.requests == []


async def test_a_device_gives_no_orders(world) -> None:
    world.enrol()
    async with world.session(None) as device:
        for method in ("GET", "POST"):
            response = await device.request(
                method, "/v1/control/kill", json=ORDER, headers=shows(world.assertion())
            )
            assert response.status == 403
    assert world.control.requests == []


async def test_the_same_over_grpc(world) -> None:
    request = control_pb2.OrderRequest(**ORDER, caller=new_id())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.gateway.grpc_port}") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        answer = await stub.Order(request, metadata=bearer(world.keys["admin"]))
    assert answer.epoch == 1
    assert world.control.requests[-1].caller == world.caller
