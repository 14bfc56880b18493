"""Calls whose answers are lost: what only the owner of an installation does: agents, keys, money and orders."""

import asyncio
import hashlib
import json
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import Message
from hive_common.contracts.messages import KillOrder
from hive_common.control.keys import private_key, public_text, sign
from hive_common.control.orders import following
from hive_common.control.verifier import Verifier
from hive_common.kernel.ids import derive_id, new_id
from hive_common.rpc.client import call
from hive_proto.agents.v1 import agents_pb2
from hive_proto.control.v1 import control_pb2
from hive_proto.keys.v1 import keys_pb2
from hive_proto.models.v1 import models_pb2
from hive_proto.values.v1 import values_pb2

from tests.chaos.answers import HERE, Rig, Unary, reading

KEEPER = "keeper"
NAMESPACE = "kept"
MANIFEST = f"""\
apiVersion: hive/v1
kind: Agent
name: {KEEPER}
version: 1.0.0
runtime: python
entry: agent.py
permissions:
  kv: {{namespace: {NAMESPACE}, quota: 64Ki}}
  http: {{hosts: [a.example]}}
"""
AGENT = """\
from hive import kv

def run(input):
    for key in input["keys"]:
        kv.put(key, key)
    return {}
"""
KEYS = [f"k{number:02}" for number in range(20)]
FIRST = KEYS[0]


async def asked(rig: Rig, service: str, method: str, request: Message) -> Any:
    async with rig.owner(service) as (stub, metadata):
        return await call(getattr(stub, method)(request, metadata=metadata))


async def payloads(rig: Rig, name: str, *streams: str) -> list[dict[str, Any]]:
    """Return what stands in the events of a type."""
    async with rig.reader() as reader:
        found = await reader.read(0, 10_000, types=[name], streams=list(streams) or None)
    return [json.loads(event.payload or b"{}") for event in found]


# --- versions and signing keys ---


async def push(rig: Rig, files: dict[str, str]) -> None:
    """Publish the agent `spin` with other files."""
    folder = Path(tempfile.mkdtemp(dir=rig.home.root))
    shutil.copytree(HERE / "agents" / "spin", folder, dirs_exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    await asyncio.to_thread(rig.installation.hive, "agent", "push", str(folder))


async def yank_request(rig: Rig) -> Message:
    """Of a version that was published for this: yanked is for ever."""
    version = f"2.0.{secrets.randbelow(10**8)}"
    manifest = (HERE / "agents" / "spin" / "manifest.yaml").read_text()
    await push(rig, {"manifest.yaml": manifest.replace("version: 1.0.0", f"version: {version}")})
    return agents_pb2.YankRequest(name="spin", version=version, reason="it leaks", caller="somebody")


async def yanked_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.yank_reason == "it leaks"
    stream = derive_id("agent", "default", request.name, request.version)
    assert await rig.types_of(stream) == ["AgentVersionPublished", "AgentVersionYanked"]


async def trust_request(rig: Rig) -> Message:
    key = secrets.token_hex(32)
    return agents_pb2.TrustRequest(public_key=key, name=f"k{key[:16]}", caller="somebody")


async def trusted_once(rig: Rig, request: Any, answer: Any) -> None:
    assert await rig.types_of(derive_id("signer", "default", request.public_key)) == ["SigningKeyTrusted"]


async def distrust_request(rig: Rig) -> Message:
    request = await trust_request(rig)
    await asked(rig, "Agents", "Trust", request)
    return agents_pb2.DistrustRequest(key=request.public_key, reason="lost", caller="somebody")


async def distrusted_once(rig: Rig, request: Any, answer: Any) -> None:
    types = await rig.types_of(derive_id("signer", "default", request.key))
    assert types == ["SigningKeyTrusted", "SigningKeyDistrusted"]


# --- grants: `http` changes hands here, `kv` stays granted ---


def grant(*permissions: str) -> Message:
    wanted = json.dumps(dict.fromkeys(permissions)).encode()
    return agents_pb2.GrantRequest(name=KEEPER, permissions_json=wanted, caller="somebody")


def ungrant() -> Message:
    return agents_pb2.UngrantRequest(name=KEEPER, permissions=["http"], reason="enough", caller="somebody")


async def grant_request(rig: Rig) -> Message:
    await with_values(rig)
    await asked(rig, "Agents", "Ungrant", ungrant())
    return grant("http")


async def ungrant_request(rig: Rig) -> Message:
    await with_values(rig)
    await asked(rig, "Agents", "Grant", grant("http"))
    return ungrant()


def state_of(answer: Any, permission: str) -> str:
    (found,) = [one.state for one in answer.grants if one.permission == permission]
    return str(found)


async def granted_in_turns(rig: Rig, request: Any, answer: Any) -> None:
    """Granted and taken back alternate: what was asked for twice was done once."""
    types = await rig.types_of(derive_id("grants", "default", KEEPER))
    # The first is that of `kv`.
    turns = ["PermissionGranted", "PermissionRevoked"] * len(types)
    assert types[1:] == turns[: len(types) - 1]


# --- values ---


async def with_values(rig: Rig) -> None:
    """Have an agent keep values, once for all cases."""
    if rig.has_values:
        return
    await push(rig, {"manifest.yaml": MANIFEST, "agent.py": AGENT})
    await asked(rig, "Agents", "Grant", grant("kv", "http"))
    job = {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "keep",
        "input": {"keys": KEYS},
        "tasks": [{"id": "keep", "agent": f"{KEEPER}@1.0.0", "input": "${input}"}],
    }
    with rig.api() as api:
        submitted = await asyncio.to_thread(api.post, "/v1/jobs", job)
    assert "JobSucceeded" in await rig.types_of(submitted["job_id"], until_ended=True)
    rig.has_values = True


async def get_request(rig: Rig) -> Message:
    await with_values(rig)
    return values_pb2.GetRequest(namespace=NAMESPACE, key=FIRST)


async def list_request(rig: Rig) -> Message:
    await with_values(rig)
    return values_pb2.ListRequest(namespace=NAMESPACE, limit=1)


async def delete_request(rig: Rig) -> Message:
    await with_values(rig)
    page = await asked(rig, "Values", "List", values_pb2.ListRequest(namespace=NAMESPACE, after=FIRST))
    return values_pb2.DeleteRequest(namespace=NAMESPACE, key=page.keys[0], caller="somebody")


async def deleted_once(rig: Rig, request: Any, answer: Any) -> None:
    staged = await payloads(rig, "KvStaged")
    writes = [write for one in staged for write in one["writes"] if write["key"] == request.key]
    assert ["value" in write for write in writes] == [True, False]


# --- keys ---


async def create_request(rig: Rig) -> Message:
    """Of a key whose secret its owner has made: who does not hear of an answer asks for the same one again."""
    name = f"key-{secrets.token_hex(4)}"
    return keys_pb2.CreateRequest(name=name, digest=hashlib.sha256(name.encode()).hexdigest(), caller="somebody")


async def created_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.key.name == request.name
    assert await rig.types_of(derive_id("key", "default", request.name)) == ["KeyCreated"]


async def made_key(rig: Rig) -> Any:
    request = await create_request(rig)
    await asked(rig, "Keys", "Create", request)
    return request


async def get_key_request(rig: Rig) -> Message:
    return keys_pb2.GetRequest(name=(await made_key(rig)).name)


async def find_request(rig: Rig) -> Message:
    return keys_pb2.FindRequest(digest=(await made_key(rig)).digest)


async def revoke_key_request(rig: Rig) -> Message:
    return keys_pb2.RevokeRequest(name=(await made_key(rig)).name, reason="lost", caller="somebody")


async def key_revoked_once(rig: Rig, request: Any, answer: Any) -> None:
    assert await rig.types_of(derive_id("key", "default", request.name)) == ["KeyCreated", "KeyRevoked"]


# --- budgets ---


LIMIT = models_pb2.BudgetLimit(per="day", unit="usd", amount=10**9)


async def set_budget_request(rig: Rig) -> Message:
    return models_pb2.SetBudgetRequest(subject=f"job:{new_id()}", limits=[LIMIT], caller="somebody")


async def set_to_the_same(rig: Rig, request: Any, answer: Any) -> None:
    """Said twice it may stand there twice: the limit is the same one, and is no sum."""
    stream = derive_id("budget", "default", request.subject)
    limits = [one["limits"] for one in await payloads(rig, "BudgetSet", stream)]
    assert limits
    assert all(one == [{"per": "day", "unit": "usd", "amount": 10**9}] for one in limits)


async def return_request(rig: Rig) -> Message:
    request: Any = await set_budget_request(rig)
    await asked(rig, "Models", "SetBudget", request)
    return models_pb2.ReturnUnaccountedRequest(subject=request.subject, reason="looked", caller="somebody")


async def nothing_returned(rig: Rig, request: Any, answer: Any) -> None:
    """No router has died that had set something aside."""
    assert await payloads(rig, "BudgetReturned", derive_id("budget", "default", request.subject)) == []


# --- kill orders ---


async def order_request(rig: Rig) -> Message:
    """Sign the next order; it is about a job that nobody has submitted."""
    key = private_key(rig.home.kill_key_file.read_text(), "the key of this home")
    state = await asked(rig, "Control", "State", control_pb2.StateRequest())
    last = (
        Verifier(public_text(key)).take(KillOrder(order=state.order, signature=state.signature))
        if state.epoch
        else None
    )
    signed = sign(key, following(last, "kill", "job", new_id(), "drill", 1))
    return control_pb2.OrderRequest(order=signed.order, signature=signed.signature, caller="somebody")


def epoch_of(request: Any) -> int:
    return int(msgspec.json.decode(request.order)["epoch"])


async def ordered_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.epoch == epoch_of(request)
    epochs = [one["epoch"] for one in await payloads(rig, "KillOrdered")]
    assert epochs == list(range(1, answer.epoch + 1))


CASES: dict[str, Unary] = {
    "Agents.Yank": Unary(yank_request, lambda rig, answer: answer.yanked_us > 0, yanked_once),
    "Agents.Trust": Unary(trust_request, lambda rig, answer: answer.trusted, trusted_once),
    "Agents.Distrust": Unary(distrust_request, lambda rig, answer: not answer.trusted, distrusted_once),
    "Agents.Signers": reading(
        lambda rig: agents_pb2.SignersRequest(),
        lambda rig, answer: ("author", True) in {(key.name, key.trusted) for key in answer.keys},
    ),
    "Agents.Grant": Unary(
        grant_request, lambda rig, answer: state_of(answer, "http") == "granted", granted_in_turns
    ),
    "Agents.Ungrant": Unary(
        ungrant_request, lambda rig, answer: state_of(answer, "http") == "asked", granted_in_turns
    ),
    "Agents.Grants": reading(
        lambda rig: agents_pb2.GrantsRequest(name="spin"), lambda rig, answer: answer.name == "spin"
    ),
    "Values.Get": Unary(get_request, lambda rig, answer: json.loads(answer.value) == FIRST),
    "Values.List": Unary(list_request, lambda rig, answer: (list(answer.keys), answer.more) == ([FIRST], True)),
    "Values.Delete": Unary(delete_request, lambda rig, answer: answer.IsInitialized(), deleted_once),
    "Keys.Create": Unary(create_request, lambda rig, answer: not answer.secret, created_once),
    "Keys.List": reading(lambda rig: keys_pb2.ListRequest(), lambda rig, answer: answer.IsInitialized()),
    "Keys.Get": Unary(get_key_request, lambda rig, answer: answer.name.startswith("key-")),
    "Keys.Find": Unary(find_request, lambda rig, answer: answer.key.name.startswith("key-")),
    "Keys.Revoke": Unary(revoke_key_request, lambda rig, answer: answer.revoked_us > 0, key_revoked_once),
    "Models.Usage": reading(
        lambda rig: models_pb2.UsageRequest(by="model"), lambda rig, answer: answer.position >= rig.head
    ),
    "Models.GetJobUsage": reading(
        lambda rig: models_pb2.JobUsageRequest(job_id=rig.job_id),
        lambda rig, answer: answer.used.name == rig.job_id and not answer.budget.limits,
    ),
    "Models.Budgets": reading(lambda rig: models_pb2.BudgetsRequest(), lambda rig, answer: answer.IsInitialized()),
    "Models.SetBudget": Unary(
        set_budget_request,
        lambda rig, answer: [state.limit for state in answer.limits] == [LIMIT],
        set_to_the_same,
    ),
    "Models.ReturnUnaccounted": Unary(
        return_request, lambda rig, answer: [state.unaccounted for state in answer.limits] == [0], nothing_returned
    ),
    "Control.Order": Unary(order_request, lambda rig, answer: answer.epoch > 0, ordered_once),
    "Control.State": reading(lambda rig: control_pb2.StateRequest(), lambda rig, answer: answer.epoch >= 0),
}
