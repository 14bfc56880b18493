import json

import aiohttp
import pytest
from hive_common.contracts.limits import BLOB_BYTES_MAX
from hive_common.contracts.values import digest_of
from hive_common.inference.ollama import Ollama
from hive_common.inference.openai import OpenAI
from hive_common.kernel.ids import new_id
from hive_proto.executors.v1 import executors_pb2

OPEN = ("/healthz", "/readyz", "/v1/ca", "/v1/executors/enrol")
WITHOUT_BODY = ("/v1/audit/verify", "/v1/executors/{executor}/credentials")
SAMPLES = {
    "job_id": new_id(),
    "task_id": new_id(),
    "call_id": new_id(),
    "approval_id": new_id(),
    "canary_id": new_id(),
    "id": "smollm2:135m",
    "digest": "sha256:" + "0" * 64,
    "executor": "executor-1",
    "key": "ada",
    "name": "square",
    "version": "1.0.0",
    "namespace": "notes",
    "fingerprint": "0123456789abcdef",
}


async def document(world):
    async with world.session() as http:
        return await (await http.get("/openapi.json")).json()


def operations(spec):
    for template, item in spec["paths"].items():
        for method, operation in item.items():
            yield method.upper(), template.format(**SAMPLES), template, operation


async def test_every_path_but_health_needs_a_key(world):
    spec = await document(world)
    seen = 0
    async with world.session(None) as stranger:
        for method, path, template, operation in operations(spec):
            response = await stranger.request(method, path)
            if template in OPEN:
                assert response.status != 401 and operation["security"] == []
                continue
            seen += 1
            assert response.status == 401, (method, path)
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
            if method != "HEAD" and not (OpenAI.route(path) or Ollama.route(path)):
                problem = await response.json(content_type="application/problem+json")
                assert problem["code"] == "unauthenticated" and problem["status"] == 401
        for path in ("/openapi.json", "/metrics", "/nowhere", "/v1", "/docs", "/healthz/"):
            assert (await stranger.get(path)).status == 401, path
    assert seen > 20


@pytest.mark.parametrize(
    "value", ["Bearer x", "Bearer ", "Basic {key}", "{key}", "bearer {key}x", "Bearer {key} x"]
)
async def test_a_wrong_key_is_refused(world, value):
    headers = {"Authorization": value.format(key=world.keys["admin"])}
    async with world.session(None) as http:
        assert (await http.get("/v1/jobs", headers=headers)).status == 401


async def test_the_scheme_may_be_written_as_one_likes(world):
    async with world.session(None) as http:
        headers = {"Authorization": f"bearer {world.keys['admin']}"}
        assert (await http.get("/v1/jobs", headers=headers)).status == 200


async def test_an_executor_may_use_blobs_and_nothing_else(world):
    spec = await document(world)
    world.enrol()
    async with world.session(None) as http:
        http.headers["Authorization"] = f"Bearer {world.assertion()}"
        for method, path, template, _ in operations(spec):
            response = await http.request(method, path, data=b"")
            if template in OPEN or template.startswith("/v1/blobs/"):
                assert response.status not in (401, 403), (method, path)
            else:
                assert response.status == 403, (method, path)
        data = b"result"
        assert (await http.put(f"/v1/blobs/{digest_of(data)}", data=data)).status == 201
        assert (await http.get("/v1/blobs/../jobs")).status in (403, 404)


async def test_the_openapi_document_is_whole(world):
    spec = await document(world)
    assert spec["openapi"].startswith("3.1")
    schemas = spec["components"]["schemas"]
    ids = [operation["operationId"] for _, _, _, operation in operations(spec)]
    assert len(ids) == len(set(ids))
    assert "422" not in json.dumps(spec["paths"]) and "HTTPValidationError" not in schemas
    references = [part.split('"')[0] for part in json.dumps(spec).split('"#/components/schemas/')[1:]]
    assert set(references) <= set(schemas) and "Problem" in references
    for method, path, template, operation in operations(spec):
        assert operation["summary"] and operation["description"], path
        success = [status for status in operation["responses"] if status.startswith("2")]
        assert success, path
        for status, response in operation["responses"].items():
            assert response["description"]
            if method != "HEAD":
                assert response["content"], (path, status)
        if method in ("POST", "PUT") and template not in WITHOUT_BODY:
            assert operation["requestBody"]["content"], path
        for name in ("{" in template and template.split("{")[1:]) or ():
            assert any(p["name"] == name.split("}")[0] for p in operation["parameters"]), path
    assert spec["security"] and spec["components"]["securitySchemes"]


async def test_answers_fit_their_schemas(world, http):
    jsonschema = pytest.importorskip("jsonschema")
    spec = await document(world)
    job = world.jobs.add(SAMPLES["job_id"], state="succeeded", output_json=b"{}", error_code="x")
    await world.jobs.record(job.job_id, "JobSubmitted")
    world.jobs.jobs[SAMPLES["task_id"]] = job
    checked = []
    for method, path, template, operation in operations(spec):
        if method != "GET":
            continue
        async with http.get(path) as response:
            content = operation["responses"][str(response.status)]["content"]
            assert response.content_type in content, (path, response.content_type)
            if response.content_type.endswith("json") and "ndjson" not in response.content_type:
                schema = content[response.content_type]["schema"] | {"components": spec["components"]}
                jsonschema.Draft202012Validator(schema).validate(await response.json(content_type=None))
                checked.append(template)
    assert len(checked) > 12


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/index.html", 404, "not_found"),
        ("PATCH", "/v1/jobs", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/agents/unknown", 404, "not_found"),
        ("GET", "/v1/agents/square/9.9.9", 404, "not_found"),
        ("GET", "/v1/executors/nobody", 404, "not_found"),
        ("GET", "/v1/blobs/sha256:zz", 400, "invalid_argument"),
        ("POST", "/v1/agents", 400, "invalid_argument"),
    ],
)
async def test_what_is_not_there_is_a_problem_too(http, method, path, status, code):
    response = await http.request(method, path)
    problem = await response.json(content_type="application/problem+json")
    assert response.status == status == problem["status"] and problem["code"] == code
    if status == 405:
        assert response.headers["Allow"]


async def test_executors_are_listed_and_drained(world, http):
    page = await (await http.get("/v1/executors")).json()
    assert page["executors"][0]["capabilities"] == {"cores": 2}
    response = await http.post("/v1/executors/executor-1/drain", json={"reason": "battery"})
    assert response.status == 200 and (await response.json())["state"] == "drained"
    assert world.executors.requests[-1].reason == "battery" and world.executors.requests[-1].caller == world.caller
    response = await http.post("/v1/executors/executor-1/undrain")
    assert (await response.json())["state"] == "online" and world.executors.requests[-1].undrain
    response = await http.post("/v1/executors/executor-1/drain", json={"why": "x"})
    assert response.status == 400 and "unknown field `why`" in (await response.json())["detail"]


async def test_a_person_takes_an_executor_out_of_quarantine(world, http):
    world.executors.executor.reputation.CopyFrom(
        executors_pb2.Reputation(
            standing="quarantined",
            invalid=2,
            valid=7,
            agents=[executors_pb2.AgentReputation(agent="guess@1.0.0", invalid=2, valid=7)],
        )
    )
    found = (await (await http.get("/v1/executors/executor-1")).json())["reputation"]
    counts = {"in_a_row": 0, "valid": 7, "invalid": 2, "late": 0, "lost": 0}
    assert found == {"standing": "quarantined", **counts, "agents": [{"agent": "guess@1.0.0", **counts}]}
    response = await http.post("/v1/executors/executor-1/trust", json={"reason": "a new memory module"})
    assert response.status == 200 and (await response.json())["reputation"]["standing"] == "new"
    asked = world.executors.requests[-1]
    assert (asked.executor_id, asked.reason) == ("executor-1", "a new memory module")


async def test_agents_are_published_listed_and_shown(world, http):
    digest = "sha256:" + "1" * 64
    response = await http.post("/v1/agents", json={"manifest_digest": digest})
    assert response.status == 201 and response.headers["Location"] == "/v1/agents/square/1.0.0"
    assert world.agents.requests[-1].manifest_digest == digest
    assert (await (await http.get("/v1/agents/square/1.0.0")).json())["manifest"] == {"name": "square"}
    assert len((await (await http.get("/v1/agents/square")).json())["versions"]) == 1
    response = await http.post("/v1/agents", json={"manifest_digest": "1"})
    assert response.status == 400


async def test_signatures_keys_and_yanks_are_passed_on(world, http):
    digests = {"manifest_digest": "sha256:" + "1" * 64, "signature_digest": "sha256:" + "2" * 64}
    assert (await http.post("/v1/agents", json=digests)).status == 201
    assert world.agents.requests[-1].signature_digest == digests["signature_digest"]
    assert (await (await http.get("/v1/agents/square/1.0.0")).json())["yanked_us"] is None
    response = await http.post("/v1/agents/square/1.0.0/yank", json={"reason": "it leaks"})
    assert response.status == 200 and (await response.json())["yank_reason"] == "it leaks"
    assert world.agents.requests[-1].caller == world.caller
    key = {"public_key": "a0" * 32, "name": "ada", "trusted": True, "since_us": 5, "reason": "", "position": 7}
    assert await (await http.get("/v1/signers")).json() == {"keys": [key]}
    response = await http.post("/v1/signers", json={"public_key": "a0" * 32, "name": "ada"})
    assert await response.json() == key and world.agents.requests[-1].caller == world.caller
    response = await http.post("/v1/signers/ada/distrust", json={"reason": "stolen"})
    assert (await response.json())["trusted"] is False
    assert (world.agents.requests[-1].key, world.agents.requests[-1].reason) == ("ada", "stolen")
    for path, body in (
        ("/v1/signers", b"{}"),
        ("/v1/agents/a/1/yank", b"{}"),
        ("/v1/signers", b'{"name": "\xff"}'),
    ):
        response = await http.post(path, data=body)
        assert response.status == 400, await response.text()


async def test_grants_are_passed_on(world, http):
    shown = await (await http.get("/v1/agents/square/grants")).json()
    assert shown["grants"][0]["granted"]["model"]["max_tokens"] == 1 and shown["grants"][0]["asked"] is None
    assert (shown["grants"][1]["granted"], shown["grants"][1]["until_us"]) == (None, 9)
    wanted = {"model": {"max_tokens": 5}, "scratch": None}
    body = {"permissions": wanted, "ask": True, "until_us": 77}
    response = await http.post("/v1/agents/square/grants", json=body)
    assert response.status == 200 and await response.json() == shown
    sent = world.agents.requests[-1]
    assert (sent.name, sent.ask, sent.until_us, sent.caller) == ("square", True, 77, world.caller)
    assert json.loads(sent.permissions_json) == wanted
    response = await http.post("/v1/agents/square/ungrant", json={"permissions": ["model"], "reason": "over"})
    assert response.status == 200 and await response.json() == shown
    sent = world.agents.requests[-1]
    assert (list(sent.permissions), sent.reason, sent.caller) == (["model"], "over", world.caller)
    for refused in ({}, {"permissions": []}, {"permissions": {}, "until": 1}):
        assert (await http.post("/v1/agents/square/grants", json=refused)).status == 400


async def test_the_log_is_read_verified_and_exported(world, http):
    page = await (await http.get("/v1/audit/events?from=2&limit=2")).json()
    assert [event["position"] for event in page["events"]] == [2, 3] and page["next"] == 4
    assert page["events"][0]["payload"] == {"a": 1} and page["events"][0]["hash"] == "02" * 32
    response = await http.get("/v1/audit/events?from=4", headers={"Accept": "application/x-ndjson"})
    events = [json.loads(line) for line in (await response.read()).splitlines()]
    assert events[1]["payload_base64"] == "/wA=" and "payload" not in events[1]
    response = await http.post(f"/v1/audit/verify?against_position=2&against_hash={'ab' * 32}")
    body = await response.json()
    assert body["ok"] is True and body["first_bad_position"] is None and body["head_hash"] == "01" * 32
    assert world.audit.requests[-1].against_hash == b"\xab" * 32
    page = await (await http.get("/v1/audit/decisions?job=j&after=3&limit=9")).json()
    assert (page["checks"][0]["result"], page["checks"][0]["reasons"], page["next"]) == ("differs", ["a", "b"], 7)
    asked = world.audit.requests[-1]
    assert (asked.job_id, asked.task_id, asked.after, asked.limit) == ("j", "", 3, 9)
    assert (await (await http.get("/v1/audit/decisions?task=t")).json())["next"] is None
    response = await http.get("/v1/audit/export")
    assert await response.read() == b'{"header": 1}\n{"position": 1}\n'


async def test_an_export_that_breaks_off_does_not_pass_for_whole(world, http):
    world.audit.break_export = True
    response = await http.get("/v1/audit/export")
    with pytest.raises(aiohttp.ClientPayloadError):
        await response.read()


async def test_models_have_openais_shape_and_so_have_errors_there(world, http):
    body = await (await http.get("/v1/models")).json()
    assert body["object"] == "list" and body["data"][0]["id"] == "smollm2:135m"
    await world.stop_peer("router")
    response = await http.get("/v1/models")
    assert response.status == 503
    assert (await response.json())["error"]["code"] == "unavailable"


async def test_a_peer_that_is_away_is_503_and_readiness_says_so(world, http, eventually):
    await eventually(lambda: not world.gateway.health.problems())
    assert (await http.get("/readyz")).status == 200
    port = await world.stop_peer("registry")
    response = await http.get("/v1/executors")
    problem = await response.json(content_type="application/problem+json")
    assert response.status == 503 and response.headers["Retry-After"] == "1"
    assert problem["retryable"] is True and problem["peer"] == "registry" and str(port) not in problem["detail"]
    await eventually(lambda: "registry" in world.gateway.health.problems())
    async with world.session(None) as stranger:
        ready = await stranger.get("/readyz")
        assert ready.status == 503 and (await ready.json())["problems"] == ["registry"]
        assert (await stranger.get("/healthz")).status == 200
    await world.start_peer("registry", port)
    await eventually(lambda: not world.gateway.health.problems())
    assert (await http.get("/v1/executors")).status == 200


async def test_a_peer_that_refuses_the_service_key_is_not_the_callers_fault(world, http):
    port = await world.stop_peer("registry")
    world.service_key = "another"
    await world.start_peer("registry", port)
    response = await http.get("/v1/executors")
    assert response.status in (500, 503)
    while response.status == 503:
        response = await http.get("/v1/executors")
    assert response.status == 500 and (await response.json())["code"] == "internal"


async def test_calls_are_counted_by_route_and_status(world, http):
    await http.get(f"/v1/jobs/{new_id()}")
    await http.get("/v1/made-up-by-the-caller")
    text = await (await http.get("/metrics")).text()
    assert 'hive_requests_total{code="404",method="GET /v1/jobs/{job_id}"}' in text
    assert 'method="unmatched"' in text and "made-up" not in text


class TestBlobs:
    async def test_what_was_put_is_there(self, http):
        data = b"x" * 40_000_000
        path = f"/v1/blobs/{digest_of(data)}"
        assert (await http.head(path)).status == 404
        response = await http.put(path, data=data)
        assert response.status == 201 and (await response.json())["size_bytes"] == len(data)
        assert (await http.put(path, data=data)).status == 200
        head = await http.head(path)
        assert head.status == 200 and head.headers["Content-Length"] == str(len(data))
        response = await http.get(path)
        assert await response.read() == data and digest_of(data) in response.headers["ETag"]

    async def test_bytes_of_another_digest_are_refused_and_not_kept(self, http):
        path = f"/v1/blobs/{digest_of(b'right')}"
        response = await http.put(path, data=b"wrong")
        assert response.status == 400 and digest_of(b"wrong") in (await response.json())["detail"]
        assert (await http.get(path)).status == 404

    async def test_a_declared_size_over_the_limit_is_413_before_a_byte_is_read(self, world):
        head = (
            f"PUT /v1/blobs/{digest_of(b'')} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.keys['admin']}\r\n"
            f"Content-Length: {BLOB_BYTES_MAX + 1}\r\n\r\n"
        )
        import asyncio

        reader, writer = await asyncio.open_connection("127.0.0.1", world.gateway.http_port)
        writer.write(head.encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)
        assert b" 413 " in answer
        writer.close()

    async def test_a_body_that_grows_over_the_limit_is_413(self, world, http, monkeypatch):
        monkeypatch.setattr("hive_gateway.routes.blobs.BLOB_BYTES_MAX", 1_000_000)
        monkeypatch.setattr("hive_gateway.routes.jobs.SUBMIT_BYTES_MAX", 1_000_000)

        async def endless():
            for _ in range(40):
                yield b"x" * 100_000

        response = await http.put(f"/v1/blobs/{digest_of(b'')}", data=endless())
        assert response.status == 413
        response = await http.post("/v1/jobs", data=endless())
        assert response.status == 413 and (await response.json())["limit_bytes"] == 1_000_000
        assert world.jobs.requests == []
