"""What guests get of `http`, and what ends their attempt: from an agent's code, through a runner, to sockets."""

import json
from collections.abc import Callable

import pytest
from hive_common.contracts.permissions import HttpPermission
from hive_executor.host.http import HttpAccess, HttpClient
from hive_executor.sandbox import Capabilities, Program, RunnerPool

from .conftest import limits, python
from .web import Names, ok, redirect, serving

Module = Callable[[str], Program]

ASK = python(
    "from hive import HttpError, http\n"
    "def run(input):\n"
    "    try:\n"
    "        answer = http.request(**input)\n"
    "    except HttpError as error:\n"
    "        return {'code': error.code, 'message': error.message}\n"
    "    finally:\n"
    "        print('went on')\n"
    "    return {'status': answer.status, 'text': answer.text, 'headers': answer.headers}\n"
)


def granted(names: Names, *hosts: str, methods: tuple[str, ...] = ("GET",), private: bool = True) -> Capabilities:
    return {"http": HttpAccess(HttpClient(names), HttpPermission(hosts, methods, private), task="t", attempt=1)}


def asking(url: str, **more: object) -> bytes:
    return json.dumps({"method": "GET", "url": url, **more}).encode()


async def test_an_agent_asks_a_host_that_its_manifest_names(pool: RunnerPool) -> None:
    async with serving(ok("grüezi", "X-A: 1", "x-a: 2")) as web:
        url = f"http://a.test:{web.port}"
        capabilities = granted(Names(a_test=[["127.0.0.1"]]), url, methods=("GET", "POST"))
        outcome = await pool.run(ASK, asking(url), limits(), granted=capabilities)
        answer = json.loads(outcome.output or b"{}")
        assert (answer["status"], answer["text"], answer["headers"]["x-a"]) == (200, "grüezi", "1, 2"), outcome
        posted = asking(url, method="POST", json={"n": 1}, headers={"X-B": "b"})
        assert (await pool.run(ASK, posted, limits(), granted=capabilities)).status == "succeeded"
    assert web.requests[1].endswith('\r\n\r\n{"n": 1}')
    assert (web.headers["content-type"], web.headers["x-b"]) == ("application/json", "b")


async def test_without_the_permission_the_attempt_ends_with_its_name(pool: RunnerPool) -> None:
    outcome = await pool.run(ASK, asking("https://a.test/"), limits())
    assert (outcome.code, outcome.output, outcome.log) == ("permission_denied", None, [])
    assert "`http`" in outcome.message


@pytest.mark.parametrize(
    ("reason", "private", "url"),
    [
        ("b.test", False, "https://b.test/"),
        ("a.test, which leads to 127.0.0.1 (loopback", False, "http://a.test:{port}/"),
        ("not for 'http://127.0.0.1", True, "http://a.test:{port}/out"),
    ],
    ids=["a host that is not named", "a name that leads to loopback", "a redirect to loopback"],
)
async def test_what_leads_elsewhere_ends_the_attempt_whatever_the_agent_does(
    pool: RunnerPool, reason: str, private: bool, url: str
) -> None:
    async with serving(redirect("http://127.0.0.1:1/")) as web:
        # The name led outside when it was granted; by now it leads to this machine.
        names = Names(a_test=[["127.0.0.1"]])
        capabilities = granted(names, f"http://a.test:{web.port}", private=private)
        outcome = await pool.run(ASK, asking(url.format(port=web.port)), limits(), granted=capabilities)
    assert (outcome.code, outcome.output, outcome.log) == ("permission_denied", None, []), outcome
    assert "`http`" in outcome.message
    assert reason in outcome.message


async def test_injected_headers_are_an_error_with_the_name_of_the_header(pool: RunnerPool) -> None:
    names = Names()
    for headers in ({"X-A": "a\r\nHost: evil"}, {"Host": "evil"}, {"Transfer-Encoding": "chunked"}):
        request = asking("https://a.test/", headers=headers)
        outcome = await pool.run(ASK, request, limits(), granted=granted(names, "a.test"))
        answer = json.loads(outcome.output or b"{}")
        assert answer["code"] == "invalid_argument", outcome
        assert repr(next(iter(headers))) in answer["message"]
    assert names.asked == []


async def test_a_component_asks_a_host(pool: RunnerPool, module: Module) -> None:
    async with serving(ok("hello")) as web:
        url = f"http://a.test:{web.port}"
        outcome = await pool.run(
            module("http_component"),
            json.dumps({"url": url}).encode(),
            limits(),
            granted=granted(Names(a_test=[["127.0.0.1"]]), url),
        )
    assert json.loads(outcome.output or b"{}")["body"] == "hello", outcome
    assert (await pool.run(module("http_component"), b"{}", limits())).code == "permission_denied"
