"""Keys that the registry has made: who they belong to, what they may do, and how soon a revoked one is refused."""

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio
import pytest
from hive_common.inference.ollama import Ollama
from hive_common.inference.openai import OpenAI
from hive_common.kernel.errors import PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.rpc.client import bearer, call
from hive_common.rpc.rules import KeyRules, metadata_of, rules_of
from hive_gateway.keys import Caller
from hive_gateway.rights import USER_METHODS, check_method, check_path
from hive_proto.agents.v1 import agents_pb2
from hive_proto.executors.v1 import executors_pb2
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from hive_proto.keys.v1 import keys_pb2, keys_pb2_grpc
from hive_proto.models.v1 import models_pb2, models_pb2_grpc

from .conftest import World
from .test_paths import document, operations

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": []}
USER = Caller("ci", "user", "pseudonym")


def shows(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_a_key_calls_models_as_itself_within_what_it_may(world: World) -> None:
    secret = world.keyring.add("ci", pin="pool", counts_only=True)
    async with world.session(None) as http:
        assert (await http.post(CHAT, json=BODY, headers=shows(secret))).status == 200
        wider = {**shows(secret), "X-Hive-Pin": "any"}
        assert (await http.post(CHAT, json=BODY, headers=wider)).status == 403
    request = world.models.requests[0]
    assert (request.key, request.caller) == ("ci", world.keyring.named("ci").pseudonym)
    assert (request.pin, request.counts_only, request.cloud) == ("pool", True, False)


async def test_only_a_key_made_for_it_lets_calls_leave(world: World) -> None:
    secret = world.keyring.add("ci", cloud=True)
    async with world.session(None) as http:
        await http.post(CHAT, json=BODY, headers=shows(secret))
    async with world.session() as http:
        await http.post(CHAT, json=BODY)
    assert [request.cloud for request in world.models.requests] == [True, False]


async def test_over_grpc_what_a_caller_says_of_its_key_does_not_count(world: World) -> None:
    secret = world.keyring.add("ci", pin="pool", counts_only=True)
    said = models_pb2.CompleteRequest(model="m", key="owner", caller="me", cloud=True, pin="own-devices")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.gateway.grpc_port}") as channel:
        stub = models_pb2_grpc.ModelsStub(channel)
        assert [part async for part in stub.Complete(said, metadata=bearer(secret))]
    (request,), (rules,) = world.models.requests, world.models.rules
    assert request.caller == world.keyring.named("ci").pseudonym
    # Beside the call, where the router looks, and nowhere else.
    ci = world.keyring.named("ci").pseudonym
    assert rules == KeyRules("pool", counts_only=True, cloud=False, key="ci", only=ci)


async def test_what_the_registry_says_is_kept_for_seconds(world: World) -> None:
    secret = world.keyring.add("ci")
    async with world.session(None) as http:
        for _ in range(3):
            assert (await http.get("/v1/models", headers=shows(secret))).status == 200
        # Somebody may have been slow: what was kept is asked for again then.
        assert world.keyring.finds <= 3
        many = (http.get("/v1/models", headers=shows("hive_nobody")) for _ in range(20))
        assert {answer.status for answer in await asyncio.gather(*many)} == {401}


async def test_what_looks_like_no_key_is_looked_up_nowhere(world: World) -> None:
    async with world.session(None) as http:
        for wrong in ("nobody", "Bearer", "hive", "hive_" + "x" * 300):
            assert (await http.get("/v1/models", headers=shows(wrong))).status == 401
    assert world.keyring.finds == 0


async def test_revoked_here_a_key_is_refused_at_once(world: World) -> None:
    secret = world.keyring.add("ci")
    async with world.session() as admin, world.session(None) as http:
        assert (await http.get("/v1/models", headers=shows(secret))).status == 200
        revoked = await admin.post("/v1/keys/ci/revoke", json={"reason": "leaked"})
        assert (revoked.status, (await revoked.json())["revoked_us"]) == (200, 7)
        refused = await http.get("/v1/models", headers=shows(secret))
        assert (refused.status, "was revoked" in await refused.text()) == (401, True)
    assert world.keyring.requests[-1].reason == "leaked"


async def test_revoked_elsewhere_a_key_is_refused_within_seconds(world: World) -> None:
    secret = world.keyring.add("ci")
    async with world.session(None) as http:
        assert (await http.get("/v1/models", headers=shows(secret))).status == 200
        world.keyring.named("ci").revoked_us = 7
        async with asyncio.timeout(20):
            while (await http.get("/v1/models", headers=shows(secret))).status != 401:
                await asyncio.sleep(0.1)


async def test_a_key_that_nobody_can_ask_about_is_refused(world: World) -> None:
    secret = world.keyring.add("ci")
    await world.stop_peer("registry")
    async with world.session(None) as http:
        assert (await http.get("/v1/models", headers=shows(secret))).status == 503


async def test_a_key_of_users_administers_nothing(world: World) -> None:
    secret = world.keyring.add("ci")
    async with world.session(None) as http:
        for method, path in (
            ("GET", "/v1/keys"),
            ("POST", "/v1/keys"),
            ("POST", "/v1/keys/ci/revoke"),
            ("POST", "/v1/executors/tokens"),
            ("POST", "/v1/executors/e/revoke"),
            ("POST", "/v1/executors/e/drain"),
            ("POST", "/v1/executors/e/trust"),
            ("POST", "/v1/agents"),
            ("GET", "/v1/approvals"),
            ("POST", f"/v1/approvals/{new_id()}/approve"),
            ("GET", "/v1/canaries"),
            ("POST", "/v1/canaries"),
            ("DELETE", f"/v1/canaries/{new_id()}"),
            ("GET", "/v1/control/kill"),
            ("POST", "/v1/control/kill"),
            ("GET", "/v1/audit/export"),
            ("GET", "/v1/model-usage"),
            ("POST", "/v1/model-budgets"),
            ("GET", "/metrics"),
        ):
            answer = await http.request(method, path, headers=shows(secret), json={})
            assert (answer.status, path) == (403, path)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.gateway.grpc_port}") as channel:
        job = world.jobs.add()
        jobs = jobs_pb2_grpc.JobsStub(channel)
        assert await jobs.Get(jobs_pb2.GetRequest(job_id=job.job_id), metadata=bearer(secret)) == job
        with pytest.raises(PermissionDenied):
            await call(keys_pb2_grpc.KeysStub(channel).List(keys_pb2.ListRequest(), metadata=bearer(secret)))


async def test_an_administrators_key_may_do_everything(world: World) -> None:
    secret = world.keyring.add("ops", scope="admin")
    async with world.session(None) as http:
        for path in ("/v1/keys", "/v1/model-usage", "/v1/model-budgets", "/v1/executors"):
            assert (await http.get(path, headers=shows(secret))).status == 200


async def test_a_key_is_made_after_its_budget(world: World) -> None:
    budget = {"per": "month", "unit": "usd", "amount": 5}
    async with world.session() as http:
        body = {"name": "ci", "cloud": True, "budgets": [budget]}
        created = await http.post("/v1/keys", json=body)
        assert (created.status, (await created.json())["secret"]) == (201, "hive_new")
        # Of a name that is there the budget stays as it is, whatever becomes of the rest.
        world.keyring.add("old")
        await http.post("/v1/keys", json={"name": "old", "budgets": [budget]})
        for name in ("*", "", "Ci", "a:b"):
            assert (await http.post("/v1/keys", json={"name": name, "budgets": [budget]})).status == 400
    (limited,) = world.models.settings
    assert (limited.subject, limited.limits[0].amount, limited.clear) == ("key:ci", 5, True)
    made = world.keyring.requests[0]
    assert (made.name, made.scope, made.cloud, made.caller) == ("ci", "user", True, world.caller)


async def test_budgets_are_set_in_the_name_of_who_does_it(world: World) -> None:
    async with world.session() as http:
        limits = [{"per": "day", "unit": "tokens", "amount": 10**30}]
        answer = await http.post("/v1/model-budgets", json={"subject": "total", "limits": limits})
        assert (answer.status, (await answer.json())["limits"][0]["spent"]) == (200, 3)
        await http.post("/v1/model-budgets/return", json={"subject": "total", "reason": "the bill says so"})
    first, second = world.models.settings
    assert (first.caller, first.limits[0].amount) == (world.caller, (1 << 63) - 1)
    assert (second.subject, second.reason, second.caller) == ("total", "the bill says so", world.caller)


OWN = {
    "/v1/jobs": {"POST", "GET"},
    "/v1/jobs/{job_id}": {"GET", "DELETE"},
    "/v1/jobs/{job_id}/output": {"GET"},
    "/v1/jobs/{job_id}/tasks": {"GET"},
    "/v1/jobs/{job_id}/events": {"GET"},
    "/v1/jobs/{job_id}/logs": {"GET"},
    "/v1/jobs/{job_id}/stream": {"GET"},
    "/v1/jobs/{job_id}/logs/stream": {"GET"},
    "/v1/jobs/{job_id}/model-usage": {"GET"},
    "/v1/tasks/{task_id}/explain": {"GET"},
    "/v1/tasks/{task_id}/decision": {"GET"},
    "/v1/model-calls/{call_id}/explain": {"GET"},
}
"""Of these a key of users gets its own; that others are not there for it, scheduler and router see to."""
SHARED = {
    "/v1/agents": {"GET"},
    "/v1/agents/{name}": {"GET"},
    "/v1/agents/{name}/{version}": {"GET"},
    "/v1/agents/{name}/grants": {"GET"},
    "/v1/executors": {"GET"},
    "/v1/executors/{executor}": {"GET"},
    # Whoever knows the digest of all its bytes has been told it, or has them.
    "/v1/blobs/{digest}": {"GET", "HEAD", "PUT"},
}
"""What is the same for everybody who has a key, as models are."""


async def test_of_every_path_it_is_written_down_what_a_key_of_users_sees_there(world: World) -> None:
    found: dict[str, set[str]] = {}
    for method, path, template, operation in operations(await document(world)):
        if OpenAI.route(path) or Ollama.route(path) or operation.get("security") == []:
            continue
        with contextlib.suppress(PermissionDenied):
            check_path(USER, method, path)
            found.setdefault(template, set()).add(method)
    assert found == OWN | SHARED


@pytest.mark.parametrize(("scope", "only"), [("user", "pseudonym"), ("executor", "pseudonym"), ("admin", "")])
def test_every_call_to_a_peer_says_whose_jobs_its_key_sees(world: World, scope: Any, only: str) -> None:
    metadata = world.gateway.peers.scheduler.metadata(USER._replace(scope=scope))
    assert rules_of(metadata).only == only


async def test_whose_jobs_a_key_sees_is_not_for_callers_to_say(world: World) -> None:
    secret = world.keyring.add("ci")
    job = world.jobs.add()
    forged = metadata_of(KeyRules(key="admin"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.gateway.grpc_port}") as channel:
        request = jobs_pb2.GetRequest(job_id=job.job_id)
        await jobs_pb2_grpc.JobsStub(channel).Get(request, metadata=(*bearer(secret), *forged))
    async with world.session(None) as http:
        headers = shows(secret) | {"Hive-Rules-Bin": "e30="}
        assert (await http.get(f"/v1/jobs/{job.job_id}", headers=headers)).status == 200
    ci = world.keyring.named("ci").pseudonym
    assert [rules_of(seen.items()).only for seen in world.jobs.metadata] == [ci, ci]


ALLOWED: list[tuple[str, str]] = [
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models/m"),
    ("POST", "/api/chat"),
    ("POST", "/v1/jobs"),
    ("DELETE", "/v1/jobs/x"),
    ("GET", "/v1/jobs/x/stream"),
    ("GET", "/v1/tasks/x/explain"),
    ("GET", "/v1/tasks/x/decision"),
    ("PUT", "/v1/blobs/sha256:0"),
    ("GET", "/v1/agents/a/1.0.0"),
    ("GET", "/v1/executors"),
    ("GET", "/v1/model-calls/x/explain"),
    ("GET", "/openapi.json"),
]


@pytest.mark.parametrize(("method", "path"), ALLOWED)
def test_what_a_key_of_users_may(method: str, path: str) -> None:
    check_path(USER, method, path)


NOT_NAMED = ("/v1/jobsx", "/v1/keys", "/v1", "/v1/blobs/a/b", "/v1/agents\n", "/v1/executors/e/x")


@pytest.mark.parametrize("path", NOT_NAMED)
def test_what_is_not_named_a_key_of_users_may_not(path: str) -> None:
    with pytest.raises(PermissionDenied, match="ci"):
        check_path(USER, "GET", path)


def test_methods_that_users_may_call_exist() -> None:
    modules: list[Any] = [jobs_pb2, models_pb2, agents_pb2, executors_pb2]
    known = {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert known > USER_METHODS
    for method in known - USER_METHODS:
        with pytest.raises(PermissionDenied):
            check_method(USER, method)
