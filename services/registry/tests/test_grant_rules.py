"""What a person may grant, and what comes of it."""

from typing import Any

import pytest
from hive_common.contracts.events import PermissionGranted, PermissionRevoked
from hive_common.contracts.permissions import HttpPermission, KvPermission, ModelPermission, Permissions
from hive_common.kernel.errors import InvalidArgument
from hive_common.permissions import only, parse
from hive_common.permissions.grants import Grant
from hive_registry.domain.grants import Asking, GrantsState, grant, revoke

DOCUMENTS: dict[str, Any] = {
    "model": {"names": ["small", "large"], "max_tokens": 100, "pin": "pool"},
    "http": {"hosts": ["*.example.org"], "methods": ["GET", "POST"]},
    "kv": {"namespace": "notes", "quota": "1Mi"},
    "scratch": "64Mi",
}
ASKED = parse(DOCUMENTS, "manifest.yaml")
ASKING = Asking("asks", "1.2.0", ASKED, DOCUMENTS)
NEVER = GrantsState()


def granted(wanted: dict[str, Any], state: GrantsState = NEVER, **options: Any) -> list[PermissionGranted]:
    found = grant(state, ASKING, wanted, **{"ask": False, "until_us": 0, "now_us": 10, **options})
    return [event for event in found if isinstance(event, PermissionGranted)]


def test_all_that_is_asked_for_is_granted_an_event_each() -> None:
    events = granted(dict.fromkeys(DOCUMENTS))
    assert [event.permission for event in events] == ["model", "http", "kv", "scratch"]
    assert [event.granted for event in events] == [only(ASKED, name) for name in DOCUMENTS]
    assert all(event.granted == event.asked and event.agent == "asks" for event in events)


def test_less_can_be_granted() -> None:
    (model,) = granted({"model": {"names": ["small"], "max_tokens": 5}}, ask=True, until_us=11)
    assert model.granted == Permissions(model=ModelPermission(("small",), 5, "pool"))
    assert model.asked == only(ASKED, "model")
    assert (model.ask, model.until_us) == (True, 11)
    (http,) = granted({"http": {"hosts": ["a.example.org"], "methods": ["GET"]}})
    assert http.granted == Permissions(http=HttpPermission(("a.example.org",), ("GET",)))
    (kv,) = granted({"kv": {"quota": 7}})
    assert kv.granted == Permissions(kv=KvPermission("notes", 7))
    assert granted({"scratch": "1Mi"})[0].granted == Permissions(scratch_bytes=1 << 20)


@pytest.mark.parametrize(
    ("wanted", "path", "says"),
    [
        ({}, "permissions", "one of model, http, kv, scratch"),
        ({"modle": None}, "permissions.modle", "`model`"),
        ({"fork": None}, "permissions.fork", "asks@1.2.0 does not ask for it"),
        ({"model": {"max_tokens": 101}}, "permissions.model.max_tokens", "100 or less"),
        ({"model": {"names": ["*"]}}, "permissions.model.names", '["small","large"] or less'),
        ({"model": {"pin": "any"}}, "permissions.model.pin", '"pool" or less'),
        ({"model": {"tokens": 1}}, "permissions.model.tokens", "`max_tokens`"),
        ({"model": 3}, "permissions.model", "mapping"),
        ({"http": {"hosts": ["a.example.org", "example.net"]}}, "permissions.http.hosts", "is wider than"),
        ({"http": {"methods": ["PUT"]}}, "permissions.http.methods", "manifest.yaml"),
        ({"http": {"private": True}}, "permissions.http.private", "is wider than"),
        ({"kv": {"namespace": "mail"}}, "permissions.kv.namespace", '"notes" or less'),
        ({"kv": {"quota": "2Mi"}}, "permissions.kv.quota", '"1Mi" or less'),
        ({"scratch": "65Mi"}, "permissions.scratch", '"64Mi" or less'),
        ({"scratch": "much"}, "permissions.scratch", "size"),
    ],
)
def test_a_grant_that_is_wider_than_the_request_is_refused_with_path_and_remedy(
    wanted: dict[str, Any], path: str, says: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        granted(wanted)
    assert error.value.fields["path"] == path
    assert says in error.value.message


@pytest.mark.parametrize("until_us", [1, 10, -5, 1 << 62])
def test_a_grant_ends_in_time_to_come(until_us: int) -> None:
    with pytest.raises(InvalidArgument) as error:
        granted({"model": None}, until_us=until_us)
    assert error.value.fields["path"] == "until"


def test_the_same_again_changes_nothing_and_another_decision_does() -> None:
    state = GrantsState(1, {"model": Grant(only(ASKED, "model"), only(ASKED, "model"))})
    assert granted({"model": None}, state) == []
    assert len(granted({"model": None}, state, ask=True)) == 1
    assert len(granted({"model": {"max_tokens": 1}}, state)) == 1


def test_what_is_granted_can_be_taken_back() -> None:
    state = GrantsState(2, {name: Grant(only(ASKED, name), only(ASKED, name)) for name in ("http", "model")})
    assert revoke(state, "asks", (), "over") == (
        PermissionRevoked("asks", "model", "over"),
        PermissionRevoked("asks", "http", "over"),
    )
    assert revoke(state, "asks", ("http", "kv"), "") == (PermissionRevoked("asks", "http"),)
    with pytest.raises(InvalidArgument, match="`http`"):
        revoke(state, "asks", ("htpp",), "")
