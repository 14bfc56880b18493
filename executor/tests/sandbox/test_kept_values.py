"""What guests get of `kv`: their own writes at once, everything staged together once they have succeeded."""

import json
from bisect import bisect_right
from collections.abc import Callable

import msgspec
import pytest
from hive_common.contracts.events import KvWrite
from hive_common.contracts.limits import KV_STAGED_BYTES_MAX, KV_VALUE_BYTES_MAX
from hive_common.contracts.messages import KvReply, KvRequest
from hive_common.contracts.permissions import KvPermission
from hive_common.kernel.errors import (
    BudgetExhausted,
    Conflict,
    DeadlineExceeded,
    ErrorBody,
    HiveError,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from hive_executor.host import keep
from hive_executor.host.approval import Approvals
from hive_executor.host.kv import KvAccess, RegistryKv
from hive_executor.link import Link
from hive_executor.sandbox import Program, RunnerPool

from .conftest import limits, python

Module = Callable[[str], Program]


class Kept:
    """A store in memory that takes what is staged at once."""

    def __init__(self, *, error: HiveError | None = None, **values: object) -> None:
        self.values = {key: msgspec.json.encode(value) for key, value in values.items()}
        self.requests: list[KvRequest] = []
        self._error = error

    async def ask(self, request: KvRequest, within_s: float) -> KvReply:
        self.requests.append(request)
        if self._error is not None:
            raise self._error
        if request.op == "get":
            value = self.values.get(request.key)
            return KvReply() if value is None else KvReply(value=msgspec.Raw(value))
        if request.op == "list":
            keys = sorted(key for key in self.values if key.startswith(request.prefix))
            keys = keys[bisect_right(keys, request.after) :]
            return KvReply(keys=tuple(keys[: request.limit]), more=len(keys) > request.limit)
        for write in request.writes:
            if isinstance(write.value, msgspec.UnsetType):
                self.values.pop(write.key, None)
            else:
                self.values[write.key] = bytes(write.value)
        return KvReply()


def access(store: Kept, quota_bytes: int = 1 << 20) -> KvAccess:
    return KvAccess(store, KvPermission("notes", quota_bytes), approvals=Approvals("the attempt's"))


COUNT = python(
    "from hive import kv\n"
    "def run(input):\n"
    "    kv.put('count', kv.get('count', 0) + 1)\n"
    "    kv.put('of/' + input['name'], {'seen': [kv.get('count')], 'none': None})\n"
    "    kv.delete('old')\n"
    "    if input.get('fail'):\n"
    "        1 / 0\n"
    "    return {'count': kv.get('count'), 'keys': kv.list(), 'old': kv.get('old', 'gone')}\n"
)


async def test_an_agent_reads_its_own_writes_and_hands_them_over_at_its_end(pool: RunnerPool) -> None:
    store = Kept(count=4, old="x", other=1)
    kv = access(store)
    outcome = await pool.run(COUNT, b'{"name": "b"}', limits(), granted={"kv": kv})
    assert json.loads(outcome.output or b"{}") == {
        "count": 5,
        "keys": ["count", "of/b", "other"],
        "old": "gone",
    }, outcome
    # Nobody else sees any of it before.
    assert store.values == {"count": b"4", "old": b'"x"', "other": b"1"}
    assert {request.op for request in store.requests} == {"get", "list"}
    await keep({"kv": kv})
    assert store.values == {"count": b"5", "of/b": b'{"seen":[5],"none":null}', "other": b"1"}
    assert [request.op for request in store.requests].count("stage") == 1
    assert {(request.token, request.namespace) for request in store.requests} == {("the attempt's", "notes")}


async def test_an_attempt_that_is_tried_again_sees_nothing_of_the_one_that_failed(pool: RunnerPool) -> None:
    store = Kept(count=4)
    failed = await pool.run(COUNT, b'{"name": "a", "fail": 1}', limits(), granted={"kv": access(store)})
    assert failed.code == "agent_error"
    again = access(store)
    outcome = await pool.run(COUNT, b'{"name": "a"}', limits(), granted={"kv": again})
    assert json.loads(outcome.output or b"{}")["count"] == 5


async def test_without_the_permission_the_attempt_ends_with_its_name(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(COUNT, b'{"name": "a"}', limits())
    assert (outcome.code, outcome.output) == ("permission_denied", None)
    assert "`kv`" in outcome.message
    assert (await pool.run(module("kv_component"), b"{}", limits())).code == "permission_denied"


async def test_a_component_reads_values_and_may_not_name_another_namespace(
    pool: RunnerPool, module: Module
) -> None:
    program, granted = module("kv_component"), {"kv": access(Kept(a=[1, None]))}
    for request in (b'{"key": "a"}', b'{"key": "a", "namespace": "notes"}'):
        outcome = await pool.run(program, request, limits(), granted=granted)
        assert json.loads(outcome.output or b"{}") == {"value": [1, None]}, outcome
    outcome = await pool.run(program, b'{"key": "a", "namespace": "others"}', limits(), granted=granted)
    assert (outcome.code, outcome.output) == ("permission_denied", None)
    assert "`kv` is granted for notes, not for 'others'" in outcome.message


async def test_an_agent_is_told_what_is_no_key_and_what_is_too_much(pool: RunnerPool) -> None:
    program = python(
        "from hive import KvError, kv\n"
        "def run(input):\n"
        "    codes = []\n"
        "    for key, size in input['puts']:\n"
        "        try:\n"
        "            kv.put(key, 'x' * size)\n"
        "            codes.append('')\n"
        "        except KvError as error:\n"
        "            codes.append(error.code)\n"
        "    return {'codes': codes}\n"
    )
    store = Kept()
    puts = [("", 1), ("a b", 1), ("../other\x00", 1), ("k" * 257, 1), ("a", KV_VALUE_BYTES_MAX), ("a", 1_000)]
    puts += [("b", 100_000), ("a", 10), ("c", 98_000), ("d", 2_000)]
    granted = {"kv": access(store, quota_bytes=200_000)}
    outcome = await pool.run(program, json.dumps({"puts": puts}).encode(), limits(), granted=granted)
    assert json.loads(outcome.output or b"{}")["codes"] == [
        *["invalid_argument"] * 4,
        *("payload_too_large", "", "", "", "", "budget_exhausted"),
    ], outcome
    assert store.requests == []


async def call(kv: KvAccess, operation: str, **request: object) -> object:
    return json.loads(await kv.call(operation, json.dumps(request).encode(), 1_000))


async def test_pages_hold_own_writes_at_their_place() -> None:
    kv = access(Kept(**{f"k{n}": n for n in range(1, 8)}))
    for key in ("k2", "k3", "k4"):
        await call(kv, "delete", key=key)
    await call(kv, "put", key="k55", value=1)
    await call(kv, "put", key="k9", value=1)
    await call(kv, "put", key="z", value=1)
    found, after, more = [], "", True
    while more:
        page = await call(kv, "keys", prefix="k", after=after, limit=2)
        assert isinstance(page, dict)
        found += page["keys"]
        after, more = found[-1], page["more"]
    assert found == ["k1", "k5", "k55", "k6", "k7", "k9"]


async def test_requests_that_are_none_are_refused() -> None:
    kv = access(Kept())
    for operation, request in (
        ("drop", {}),
        ("get", {}),
        ("get", {"key": 1}),
        ("get", {"key": "a", "more": 1}),
        ("put", {"key": "a"}),
        ("keys", {"limit": 0}),
        ("keys", {"limit": 1001}),
        ("keys", {"prefix": "a b"}),
    ):
        with pytest.raises(InvalidArgument):
            await call(kv, operation, **request)
    for raw in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"key": "a", "value": }'):
        with pytest.raises(InvalidArgument):
            await kv.call("put", raw, 1_000)


async def test_one_attempt_writes_what_fits_into_one_message() -> None:
    kv = access(Kept(), quota_bytes=1 << 30)
    value = "x" * (KV_VALUE_BYTES_MAX - 2)
    for key in "abc":
        await call(kv, "put", key=key, value=value)
    with pytest.raises(HiveError, match=f"{KV_STAGED_BYTES_MAX} bytes"):
        await call(kv, "put", key="d", value=value)
    # What it overwrites or deletes does not count twice.
    await call(kv, "put", key="a", value=value)
    await call(kv, "delete", key="b")
    await call(kv, "put", key="d", value=value)


async def test_what_the_registry_refuses_fails_the_attempt_and_what_it_does_not_answer_gives_it_back() -> None:
    for error in (BudgetExhausted("the quota"), PermissionDenied("no token"), Conflict("staged before")):
        kv = access(Kept(error=error))
        await call(kv, "put", key="a", value=1)
        with pytest.raises(PermissionDenied, match="`kv`"):
            await keep({"kv": kv})
    for away in (Unavailable("away"), DeadlineExceeded("slow")):
        kv = access(Kept(error=away))
        await call(kv, "put", key="a", value=1)
        with pytest.raises(type(away)):
            await keep({"kv": kv})


async def test_an_attempt_that_wrote_nothing_stages_nothing() -> None:
    store = Kept()
    await keep({"kv": access(store)})
    await keep({})
    assert store.requests == []


async def test_a_lost_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    link, asked = Link("x"), list[KvRequest]()

    async def lost_once(subject: str, body: KvRequest, _type: object, _timeout_s: float) -> KvReply:
        asked.append(body)
        if len(asked) == 1:
            raise DeadlineExceeded("no answer")
        assert subject == "hive.exec.x.call.kv"
        return KvReply()

    monkeypatch.setattr(link, "request", lost_once)
    request = KvRequest(op="stage", token="t", namespace="n", writes=(KvWrite("a"),))
    assert await RegistryKv(link).ask(request, 30) == KvReply()
    assert asked == [request, request]


async def test_what_is_refused_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    link, asked = Link("x"), list[object]()

    async def refused(*arguments: object) -> KvReply:
        asked.append(arguments)
        return KvReply(error=ErrorBody("permission_denied", "no"))

    monkeypatch.setattr(link, "request", refused)
    with pytest.raises(PermissionDenied):
        await RegistryKv(link).ask(KvRequest(op="get", token="", namespace="n", key="a"), 30)
    assert len(asked) == 1
