"""Model calls that a person has to approve: the router takes just what was approved, whatever a device says."""

import json
from typing import Any, cast

import msgspec
import pytest
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import LogReader
from hive_common.inference.calls import ModelCall
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.permissions.actions import model_action
from hive_common.testing.tokens import TokenKey
from hive_router.tokens import CapabilityTokens

KEY = TokenKey()
TOKENS = CapabilityTokens(KEY.public, SystemClock(), KillLog(cast(LogReader, None), "default", ""))
AGENT = "a@1.0.0"
ASKING = Permissions(model=ModelPermission(("m", "n"), 10), asks=("model",))
BODY = {"messages": [{"role": "user", "content": "hello"}], "model": "m"}


def call(body: Any = None, **fields: Any) -> ModelCall:
    data = body if isinstance(body, bytes) else json.dumps(BODY if body is None else body).encode()
    values = {"id": new_id(), "endpoint": "chat", "model": "m", "body": data, "stream": False, "deadline_ms": 1_000}
    return ModelCall(**{**values, "origin": "e1", **fields})


def approved(asked: ModelCall, counts_only: bool = False) -> tuple[str, ...]:
    body = msgspec.json.decode(asked.body, type=dict[str, msgspec.Raw])
    return (model_action(AGENT, asked.endpoint, asked.model, body, counts_only).hash,)


def token(hashes: tuple[str, ...], permissions: Permissions = ASKING, **claims: Any) -> str:
    return KEY.token("e1", permissions, agent=AGENT, approved=hashes, **claims)


def test_what_was_approved_may_be_called_with_whatever_limit_the_device_sets() -> None:
    hashes = approved(call())
    assert TOKENS.within(call(), token(hashes)).agent == AGENT
    assert TOKENS.within(call({**BODY, "max_tokens": 3}), token(hashes)).agent == AGENT


@pytest.mark.parametrize(
    "other",
    [
        call({**BODY, "messages": [{"role": "user", "content": "hello!"}]}),
        call({**BODY, "temperature": 1}),
        call({**BODY, "n": 100}),
        call(model="n"),
        call(endpoint="completions"),
    ],
)
def test_anything_else_is_refused_by_name(other: ModelCall) -> None:
    for hashes in ((), approved(call())):
        with pytest.raises(PermissionDenied, match="nobody approved of just this") as error:
            TOKENS.within(other, token(hashes))
        assert error.value.fields["permission"] == "model"


def test_what_another_agent_may_and_what_is_no_object_is_refused() -> None:
    with pytest.raises(PermissionDenied):
        TOKENS.within(call(), KEY.token("e1", ASKING, agent="b@1.0.0", approved=approved(call())))
    with pytest.raises(InvalidArgument):
        TOKENS.within(call(b"[]"), token(approved(call())))


def test_where_no_prompt_is_kept_the_action_is_another_one() -> None:
    hashes = approved(call(), counts_only=True)
    assert TOKENS.within(call(), token(hashes, counts_only=True)).counts_only
    with pytest.raises(PermissionDenied):
        TOKENS.within(call(), token(hashes))


def test_where_nothing_asks_nothing_has_to_be_approved() -> None:
    assert TOKENS.within(call(), token((), msgspec.structs.replace(ASKING, asks=("http",)))).agent == AGENT
