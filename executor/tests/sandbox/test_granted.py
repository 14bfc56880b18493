"""Which capabilities an attempt is granted."""

import msgspec
import pytest
from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.events import AgentRef
from hive_common.contracts.messages import Assignment
from hive_common.contracts.permissions import (
    NONE,
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.contracts.values import inline
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions.tokens import Claims
from hive_executor.host import Means, approvals_of, granted, scratch
from hive_executor.host.addresses import SystemResolver
from hive_executor.host.approval import Approvals
from hive_executor.host.http import HttpClient
from hive_executor.host.kv import FleetingKv

from .scripted import Scripted


def means(completer: Scripted) -> Means:
    return Means(completer, HttpClient(SystemResolver()), FleetingKv())


def assignment(pin: str = "") -> Assignment:
    # What stands beside an agent counts for nothing: the token does.
    agent = AgentRef("a", "1.0.0", "sha256:0", "python", 1, 1, 1, model=ModelPermission(("*",), 99))
    return Assignment("t", 2, "j", "step", agent, inline(b"{}"), 1_000, 1, 1, pin=pin, token="its token")


def model(pin: str) -> Permissions:
    return Permissions(model=ModelPermission(("m",), 9, pin))


def test_what_a_manifest_does_not_ask_for_is_not_there() -> None:
    assert granted(assignment(), NONE, means(Scripted())) == {}
    assert granted(assignment("own-devices"), NONE, means(Scripted())) == {}


async def test_the_narrower_pin_of_job_and_manifest_goes_with_each_call() -> None:
    for job, manifest, narrow in (
        ("", "any", "any"),
        ("pool", "region:eu", "region:eu"),
        ("own-devices", "pool", "own-devices"),
    ):
        completer = Scripted()
        access = granted(assignment(job), model(manifest), means(completer))["model"]
        await access.call("chat", b"{}", 1_000)
        assert [(call.pin, call.token, call.attempt) for call in completer.calls] == [(narrow, "its token", 2)]


def test_pins_that_exclude_each_other_grant_nothing() -> None:
    with pytest.raises(PermissionDenied):
        granted(assignment("own-devices"), model("region:eu"), means(Scripted()))


EVERYTHING = Permissions(
    model=ModelPermission(("m",), 9),
    http=HttpPermission(("a.test",)),
    kv=KvPermission("notes", 1024),
    fork=ForkPermission(("a",), 1),
    scratch_bytes=4096,
)


async def test_each_permission_has_its_capability() -> None:
    assert set(granted(assignment(), EVERYTHING, means(Scripted()))) == {"model", "http", "kv", "fork"}
    assert await scratch(EVERYTHING, Approvals()) == 4096
    assert await scratch(NONE, Approvals()) == 0


async def test_where_nobody_can_be_asked_what_asks_is_refused_by_name() -> None:
    asking = msgspec.structs.replace(EVERYTHING, asks=("model", "http", "kv", "fork", "scratch"))
    approvals = approvals_of(assignment(), asking, means(Scripted()))
    capabilities = granted(assignment(), asking, means(Scripted()), approvals)
    for name, operation, request in (
        ("model", "chat", b'{"messages": []}'),
        ("http", "request", b'{"url": "https://a.test/"}'),
        ("kv", "get", b'{"key": "k"}'),
        ("kv", "keys", b"{}"),
        ("kv", "put", b'{"key": "k", "value": 1}'),
        ("kv", "delete", b'{"key": "k"}'),
        ("fork", "create", b'{"agent": "a", "inputs": [{}]}'),
    ):
        with pytest.raises(PermissionDenied, match=f"`{name}` .*nobody can be asked here"):
            await capabilities[name].call(operation, request, 1_000)
    with pytest.raises(PermissionDenied, match=r"`scratch` .*nobody can be asked here"):
        await scratch(asking, approvals)


async def test_what_a_token_says_of_budgets_and_replicas_goes_along() -> None:
    completer, shared = Scripted(), (SharedBudget("job:j", tokens=5),)
    claims = Claims(
        executor="e",
        key="key",
        job="j",
        task="t",
        attempt=2,
        permissions=EVERYTHING,
        expires_us=1,
        budgets=shared,
        replicated=True,
    )
    found = granted(assignment(), EVERYTHING, means(completer), None, claims)
    await found["model"].call("chat", b"{}", 1_000)
    assert [(call.budgets, call.metered) for call in completer.calls] == [(shared, True)]
    with pytest.raises(PermissionDenied, match="in a replicated task"):
        await found["http"].call("request", b'{"url": "https://a.test/", "method": "POST"}', 1_000)
