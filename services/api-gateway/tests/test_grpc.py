import asyncio
import contextlib

import grpc
import grpc.aio
import msgspec
import pytest
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hive_common.kernel.errors import ErrorBody, NotFound
from hive_common.kernel.ids import new_id
from hive_common.ops.lifecycle import Stop
from hive_common.rpc.client import bearer, call
from hive_common.rpc.errors import TRAILER
from hive_common.rpc.rules import KeyRules, metadata_of, rules_of
from hive_gateway.bootstrap import Gateway
from hive_gateway.grpc_proxy import WITHHELD
from hive_proto.agents.v1 import agents_pb2, agents_pb2_grpc
from hive_proto.audit.v1 import audit_pb2, audit_pb2_grpc
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from hive_proto.models.v1 import models_pb2, models_pb2_grpc


@pytest.fixture
async def channel(world):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.gateway.grpc_port}") as opened:
        yield opened


@pytest.fixture
def key(world):
    return bearer(world.keys["admin"])


async def test_every_published_service_answers_and_presence_does_not(world, channel, key):
    job = world.jobs.add()
    got = await jobs_pb2_grpc.JobsStub(channel).Get(jobs_pb2.GetRequest(job_id=job.job_id), metadata=key)
    assert got == job
    listed = await executors_pb2_grpc.ExecutorsStub(channel).List(executors_pb2.ListRequest(), metadata=key)
    assert listed.executors[0].name == "executor-1"
    versions = await agents_pb2_grpc.AgentsStub(channel).List(agents_pb2.ListRequest(), metadata=key)
    assert versions.versions[0].name == "square"
    verified = await audit_pb2_grpc.AuditStub(channel).Verify(audit_pb2.VerifyRequest(), metadata=key)
    assert verified.ok
    models = await models_pb2_grpc.ModelsStub(channel).List(models_pb2.ListRequest(), metadata=key)
    assert models.models[0].name == "smollm2:135m"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await executors_pb2_grpc.PresenceStub(channel).List(executors_pb2.PresenceRequest(), metadata=key)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    forged = jobs_pb2.SubmitManyRequest(submits=[jobs_pb2.SubmitRequest(caller="somebody else")])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await jobs_pb2_grpc.IntakeStub(channel).SubmitMany(forged, metadata=key)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_credentials_of_executors_are_not_had_over_grpc(world, channel, key):
    stub = executors_pb2_grpc.ExecutorsStub(channel)
    for method, request in (
        (stub.Renew, executors_pb2.RenewRequest(executor_id=world.device)),
        (stub.Enrol, executors_pb2.EnrolRequest()),
        (stub.Keys, executors_pb2.KeysRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(request, metadata=key)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert world.executors.requests == []


async def test_every_method_but_health_needs_an_admin_key(world, channel):
    services = [m.DESCRIPTOR.services_by_name for m in (jobs_pb2, executors_pb2, agents_pb2, audit_pb2, models_pb2)]
    methods = [
        f"/{s.full_name}/{m.name}"
        for names in services
        for n, s in names.items()
        if n not in ("Presence", "Intake", "Exchange")
        for m in s.methods
        if m.name not in WITHHELD
    ]
    assert len(methods) > 15
    wrong = {
        (): grpc.StatusCode.UNAUTHENTICATED,
        bearer("wrong"): grpc.StatusCode.UNAUTHENTICATED,
        bearer(world.service_key): grpc.StatusCode.UNAUTHENTICATED,
        bearer(world.assertion()): grpc.StatusCode.UNAUTHENTICATED,
    }
    for metadata, code in wrong.items():
        for method in methods:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(method)(b"", metadata=metadata)
            assert refused.value.code() is code, method
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _reflect(channel, metadata, list_services="")
        assert refused.value.code() is code
    assert world.jobs.requests == []


async def test_health_needs_no_key(channel):
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_rules_of_a_key_go_with_its_calls_and_cannot_be_made_up(world):
    rules = {"pin": "own-devices", "counts_only": True}
    keys = [{"name": "admin", "scope": "admin", "file": world.secret("key-ruled", world.keys["admin"])} | rules]
    gateway = Gateway(world.config(keys=keys))
    job = world.jobs.add()
    request = jobs_pb2.CancelRequest(job_id=job.job_id)
    forged = metadata_of(KeyRules("pool"))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(gateway.peers.close)
        await gateway.start(Stop(), stack)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            stub = jobs_pb2_grpc.JobsStub(channel)
            await stub.Cancel(request, metadata=(*bearer(world.keys["admin"]), *forged))
    assert rules_of(world.jobs.metadata[-1].items()) == KeyRules(**rules, key="admin")


async def test_the_key_stays_here_and_the_caller_cannot_be_made_up(world, channel, key):
    job = world.jobs.add()
    request = jobs_pb2.CancelRequest(job_id=job.job_id, reason="x", caller="somebody else")
    await jobs_pb2_grpc.JobsStub(channel).Cancel(request, metadata=(*key, ("hive-caller", "somebody else")))
    assert world.jobs.requests[-1].caller == world.caller and world.jobs.requests[-1].reason == "x"
    metadata = world.jobs.metadata[-1]
    assert metadata["hive-caller"] == world.caller
    assert metadata["authorization"] == f"Bearer {world.service_key}"


async def test_errors_come_with_status_message_and_body(channel, key):
    stub = jobs_pb2_grpc.JobsStub(channel)
    missing = new_id()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.Get(jobs_pb2.GetRequest(job_id=missing), metadata=key)
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND and missing in failed.value.details()
    body = msgspec.json.decode(dict(failed.value.trailing_metadata())[TRAILER], type=ErrorBody)
    assert body.code == "not_found" and body.fields == {"job": missing}
    with pytest.raises(NotFound):
        await call(stub.Get(jobs_pb2.GetRequest(job_id=missing), metadata=key))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in stub.Watch(jobs_pb2.WatchRequest(job_id=missing), metadata=key):
            pass
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_streams_flow_and_end(world, channel, key):
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    watch = jobs_pb2_grpc.JobsStub(channel).Watch(jobs_pb2.WatchRequest(job_id=job.job_id), metadata=key)
    events = aiter(watch)
    assert (await anext(events)).type == "JobSubmitted"
    await world.jobs.record(job.job_id, "JobSucceeded")
    assert [event.type async for event in events] == ["JobSucceeded"]
    assert await watch.code() is grpc.StatusCode.OK


async def test_a_cancelled_call_is_cancelled_behind(world, channel, key, eventually):
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    watch = jobs_pb2_grpc.JobsStub(channel).Watch(jobs_pb2.WatchRequest(job_id=job.job_id), metadata=key)
    await watch.read()
    assert world.jobs.watching == 1
    watch.cancel()
    await eventually(lambda: world.jobs.watching == 0)
    world.audit.hold_verify = True
    verifying = audit_pb2_grpc.AuditStub(channel).Verify(audit_pb2.VerifyRequest(), metadata=key)
    await asyncio.wait_for(world.audit.verifying.wait(), 20)
    verifying.cancel()
    await asyncio.wait_for(world.audit.cancelled.wait(), 20)


async def test_a_deadline_is_passed_on(world, channel, key):
    world.audit.hold_verify = True
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await audit_pb2_grpc.AuditStub(channel).Verify(audit_pb2.VerifyRequest(), metadata=key, timeout=2)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.audit.cancelled.wait(), 20)


async def test_a_peer_that_is_away_is_unavailable_without_its_address(world, channel, key):
    port = await world.stop_peer("registry")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await executors_pb2_grpc.ExecutorsStub(channel).List(executors_pb2.ListRequest(), metadata=key)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "registry" in failed.value.details() and str(port) not in failed.value.details()
    body = msgspec.json.decode(dict(failed.value.trailing_metadata())[TRAILER], type=ErrorBody)
    assert body.retryable


async def _reflect(channel, metadata, **what):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(**what)
    stream = stub.ServerReflectionInfo(iter([request]), metadata=metadata)
    return await stream.read()


async def test_a_client_that_knows_only_reflection_can_call(world, channel, key):
    answer = await _reflect(channel, key, list_services="")
    names = {service.name for service in answer.list_services_response.service}
    assert {
        "hive.jobs.v1.Jobs",
        "hive.executors.v1.Executors",
        "hive.agents.v1.Agents",
        "hive.audit.v1.Audit",
        "hive.models.v1.Models",
    } <= names
    assert not {"hive.executors.v1.Presence", "hive.jobs.v1.Intake", "hive.models.v1.Exchange"} & names
    answer = await _reflect(channel, key, file_containing_symbol="hive.jobs.v1.Jobs")
    pool = DescriptorPool()
    for data in answer.file_descriptor_response.file_descriptor_proto:
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    method = pool.FindServiceByName("hive.jobs.v1.Jobs").methods_by_name["Get"]
    request = message_factory.GetMessageClass(method.input_type)(job_id=world.jobs.add().job_id)
    response = await channel.unary_unary("/hive.jobs.v1.Jobs/Get")(request.SerializeToString(), metadata=key)
    assert message_factory.GetMessageClass(method.output_type).FromString(response).name == "squares"
