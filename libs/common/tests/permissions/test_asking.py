"""How permissions are written, and what is said of those that are written wrongly."""

from typing import Any

import pytest
from hive_common.contracts.permissions import (
    NONE,
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.kernel.errors import InvalidArgument
from hive_common.permissions import parse

ASKED: dict[str, Any] = {
    "model": {"names": ["small"], "max_tokens": 4096, "pin": "pool"},
    "http": {"hosts": ["API.example.org:443", "*.example.net"], "methods": ["GET", "POST"]},
    "kv": {"namespace": "notes", "quota": "1Mi"},
    "fork": {"agents": ["square", "cube@1.0.0"], "max": 10, "depth": 2},
    "scratch": "64Mi",
}


def test_every_permission_is_read() -> None:
    assert parse(ASKED, "manifest.yaml") == Permissions(
        model=ModelPermission(("small",), 4096, "pool"),
        http=HttpPermission(("api.example.org", "*.example.net"), ("GET", "POST")),
        kv=KvPermission("notes", 1 << 20),
        fork=ForkPermission(("square", "cube@1.0.0"), 10, 2),
        scratch_bytes=64 << 20,
    )


@pytest.mark.parametrize("asked", [{}, {"model": None}, {"http": None}, {"scratch": 0}, {"tools": {}}, {"kv": {}}])
def test_nothing_is_asked_for_by_what_is_empty(asked: dict[str, Any]) -> None:
    assert parse(asked, "manifest.yaml") == NONE


@pytest.mark.parametrize(
    ("asked", "path", "says"),
    [
        ({"htpp": {}}, "htpp", "`http`"),
        ({"tools": ["x"]}, "tools", "unknown permission; expected one of model, http, kv, fork, scratch"),
        ({"http": ["a.example"]}, "http", "`{hosts: [...], methods: [GET]}`"),
        ({"http": {"host": ["a.example"]}}, "http.host", "`hosts`"),
        ({"http": {"hosts": []}}, "http.hosts", "1 to 100"),
        ({"http": {"hosts": ["a.example", "A.example:443"]}}, "http.hosts", "different"),
        ({"http": {"hosts": ["a.example", "https://b.example"]}}, "http.hosts[1]", "`example.org`"),
        ({"http": {"hosts": ["a.example"], "methods": ["post"]}}, "http.methods[0]", "`POST`"),
        ({"http": {"hosts": ["a.example"], "methods": ["CONNECT"]}}, "http.methods[0]", "one of GET"),
        ({"http": {"hosts": ["a.example"], "methods": []}}, "http.methods", "1 to 7"),
        ({"http": {"hosts": ["a.example"], "private": "no"}}, "http.private", "true or false"),
        ({"kv": {"namespace": "a/b", "quota": 1}}, "kv.namespace", "a-z"),
        ({"kv": {"namespace": "a", "quota": "1MB"}}, "kv.quota", "64Mi"),
        ({"kv": {"namespace": "a", "quota": "1Gi"}}, "kv.quota", "67108864"),
        ({"kv": {"namespace": "a"}}, "kv", "`quota`"),
        ({"fork": {"agents": ["Square"], "max": 1}}, "fork.agents[0]", "`name@version`"),
        ({"fork": {"agents": ["square@1"], "max": 1}}, "fork.agents[0]", "`name@version`"),
        ({"fork": {"agents": ["square"], "max": 0}}, "fork.max", "1 to 1000"),
        ({"fork": {"agents": ["square"], "max": 1, "depth": 9}}, "fork.depth", "1 to 8"),
        ({"scratch": "1Ti"}, "scratch", "1 to"),
        ({"scratch": [1]}, "scratch", "size"),
    ],
)
def test_a_permission_that_is_written_wrongly_is_named_with_what_was_expected(
    asked: dict[str, Any], path: str, says: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        parse(asked, "a/manifest.yaml")
    assert error.value.message.startswith(f"a/manifest.yaml: permissions.{path}: ")
    assert error.value.fields["path"] == f"permissions.{path}"
    assert says in error.value.message
