"""Values that guests keep: staged by the attempt's token before its outcome is reported, or no success at all."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.artifacts.package import pack
from hive_common.bus.jwt import public_nkey, read_credentials
from hive_common.bus.nats import connect, respond
from hive_common.contracts.events import AgentRef
from hive_common.contracts.messages import AttemptKey, KvReply, KvRequest, call_subject
from hive_common.contracts.permissions import KvPermission, Permissions
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import BudgetExhausted, HiveError, Unavailable, body_of
from hive_common.kernel.ids import new_id
from hive_common.permissions.tokens import Claims, Minter, new_key, public_key

from .conftest import ControlPlane, Gateway, Home, until

ROOT = new_key()
MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: counter
version: 1.0.0
runtime: python
entry: agent.py
permissions:
  kv: {namespace: notes, quota: 1Ki}
  scratch: 64Ki
"""
AGENT = """\
import os
from hive import kv
def run(input):
    if "file" in input:
        with open("/scratch/" + input["file"], "w") as file:
            file.write("x")
        return {"files": os.listdir("/scratch")}
    if "key" in input:
        kv.put(input["key"], 1)
    if input.get("fail"):
        1 / 0
    return {"key": kv.get("before")}
"""


class Registry:
    """Answers `call.kv`, and notes what the control plane had heard by then."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control
        self.staged: list[KvRequest] = []
        self.heard: list[int] = []
        self.errors: list[HiveError] = []

    async def call(self, _executor: str, request: KvRequest) -> KvReply:
        if request.op == "stage":
            self.staged.append(request)
            self.heard.append(len([report for report in self._control.reports if report.status != "started"]))
            if self.errors:
                raise self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        return KvReply()


@pytest.fixture
async def registry(home: Home, control: ControlPlane) -> AsyncIterator[Registry]:
    client = await connect(home.services_nats, "registry")
    registry = Registry(control)
    await respond(client, call_subject("*", "kv"), KvRequest, registry.call, lambda e: KvReply(error=body_of(e)))
    await client.flush()
    yield registry
    await client.close()


@pytest.fixture
def counter(tmp_path: Path, gateway: Gateway) -> AgentRef:
    folder = tmp_path / "counter"
    folder.mkdir()
    (folder / "agent.py").write_text(AGENT)
    (folder / "manifest.yaml").write_text(MANIFEST)
    return gateway.publish(pack(folder))


def assigned(home: Home, control: ControlPlane, agent: AgentRef, **input_: Any) -> tuple[AttemptKey, str]:
    """Give an attempt with its token to the executor."""
    task = new_id()
    claims = Claims(
        executor=home.executor_id,
        key=public_nkey(read_credentials(home.nats.credentials_file).seed),
        job=control.jobs_id,
        task=task,
        attempt=1,
        permissions=Permissions(kv=KvPermission("notes", 1024), scratch_bytes=65_536),
        expires_us=SystemClock().now_us() + 3_600_000_000,
    )
    token = Minter(ROOT).mint(claims)
    return control.assign(agent, input_, task=task, token=token), token


async def test_what_an_attempt_wrote_is_staged_before_its_success_is_reported(
    home: Home, control: ControlPlane, registry: Registry, counter: AgentRef
) -> None:
    async with home.running(token_public_key=public_key(ROOT)):
        key, token = assigned(home, control, counter, key="a")
        assert (await control.outcome(key)).status == "succeeded"
        failing, _ = assigned(home, control, counter, key="b", fail=True)
        assert (await control.outcome(failing)).code == "agent_error"
        reading, _ = assigned(home, control, counter)
        assert (await control.outcome(reading)).status == "succeeded"
    (request,) = registry.staged
    assert (request.namespace, request.token) == ("notes", token)
    assert [(write.key, bytes(write.value)) for write in request.writes] == [("a", b"1")]  # type: ignore[arg-type]
    assert registry.heard == [0]


async def test_values_that_are_not_taken_fail_the_attempt_with_the_name_of_the_permission(
    home: Home, control: ControlPlane, registry: Registry, counter: AgentRef
) -> None:
    registry.errors = [BudgetExhausted("namespace notes would grow beyond its quota")]
    async with home.running(token_public_key=public_key(ROOT)):
        key, _ = assigned(home, control, counter, key="a")
        outcome = await control.outcome(key)
    assert (outcome.status, outcome.code) == ("failed", "permission_denied")
    assert "`kv`" in outcome.message
    assert "quota" in outcome.message


async def test_a_registry_that_is_away_is_asked_again(
    home: Home, control: ControlPlane, registry: Registry, counter: AgentRef
) -> None:
    registry.errors = [Unavailable("away")] * 2 + [Unavailable("still away")]
    async with home.running(token_public_key=public_key(ROOT)):
        key, _ = assigned(home, control, counter, key="a")
        await until(lambda: len(registry.staged) >= 3, "it asks again and again")
        assert control.outcomes(key) == []
        registry.errors.clear()
        assert (await control.outcome(key)).status == "succeeded"
    assert len({msgspec.json.encode(request) for request in registry.staged}) == 1, "the same each time"


async def test_files_are_those_of_the_attempt(
    home: Home, control: ControlPlane, registry: Registry, counter: AgentRef
) -> None:
    async with home.running(token_public_key=public_key(ROOT)):
        for name in ("a", "b"):
            key, _ = assigned(home, control, counter, file=name)
            outcome = await control.outcome(key)
            if outcome.status == "cancelled" and "empty root" in outcome.message:
                pytest.skip("needs user namespaces with mounts: run on Linux with unprivileged user namespaces")
            assert outcome.output is not None, outcome
            assert outcome.output.raw == b'{"files":["%s"]}' % name.encode()
        # Without a token there is no folder, whatever the agent's manifest asks for.
        bare = control.assign(counter, {"file": "c"})
        assert (await control.outcome(bare)).code == "agent_error"
