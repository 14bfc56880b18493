"""Guests that mean harm to the host through what they were granted: bounded, by name, and nothing stays behind."""

import asyncio
import json
import socket

import pytest
from hive_common.contracts.permissions import ModelPermission
from hive_executor.host import ModelAccess
from hive_executor.sandbox import Capabilities, RunnerPool, frames
from hive_executor.sandbox.model import HOST_ANSWER_BYTES_MAX, HOST_REQUEST_BYTES_MAX
from hive_executor.sandbox.pool import _outcome
from hive_executor.sandbox.runner_process import RunnerGone, _Channel

from .conftest import MIB, limits, python
from .scripted import Scripted
from .test_hostile import attempt, watched  # noqa: F401 - a fixture

SAY = (
    "import json\n"
    "from componentize_py_types import Err\n"
    "from hive import ModelError, model\n"
    "from wit_world.imports import model as raw\n"
    "def code(call):\n"
    "    try:\n"
    "        call()\n"
    "    except ModelError as error:\n"
    "        return error.code\n"
    "    except Err as error:\n"
    "        return error.value.code\n"
    "    return 'ok'\n"
)


def granted(completer: Scripted, max_tokens: int = 1_000_000) -> Capabilities:
    return {"model": ModelAccess(completer, ModelPermission(("small",), max_tokens))}


async def test_a_huge_request_is_refused_before_it_leaves_the_runner(watched: RunnerPool) -> None:  # noqa: F811
    program = python(
        SAY + "def run(input):\n"
        f"    sizes = [{HOST_REQUEST_BYTES_MAX + 1}, {60 * MIB}]\n"
        f"    wide = '\\u20ac' * {HOST_REQUEST_BYTES_MAX // 2}\n"
        "    codes = [code(lambda: model.chat('x' * size)) for size in sizes]\n"
        "    return {'codes': [*codes, code(lambda: model.chat(wide)), code(lambda: model.chat('x'))]}\n"
    )
    completer = Scripted()
    outcome = await watched.run(
        program, b"{}", limits(wall_ms=60_000, memory_bytes=512 * MIB), granted=granted(completer)
    )
    assert json.loads(outcome.output or b"{}") == {"codes": ["payload_too_large"] * 3 + ["ok"]}, outcome
    assert len(completer.calls) == 1


async def test_a_request_larger_than_the_guest_may_be_ends_the_guest(watched: RunnerPool) -> None:  # noqa: F811
    program = python(SAY + f"def run(input):\n    model.chat('x' * {200 * MIB})\n    return {{}}\n")
    outcome = await attempt(watched, program, limits(memory_bytes=32 * MIB))
    assert outcome.code == "memory_exceeded", outcome


async def test_a_huge_answer_does_not_reach_the_guest(watched: RunnerPool) -> None:  # noqa: F811
    huge = b'{"usage": {"completion_tokens": 1}, "x": "' + b"x" * HOST_ANSWER_BYTES_MAX + b'"}'
    large = huge[: HOST_ANSWER_BYTES_MAX - 2] + b'"}'
    program = python(SAY + "def run(input):\n    return {'code': code(lambda: model.chat('x'))}\n")
    for body, code in ((huge, "payload_too_large"), (large, "ok")):
        outcome = await watched.run(
            program, b"{}", limits(memory_bytes=128 * MIB), granted=granted(Scripted(body=body))
        )
        assert json.loads(outcome.output or b"{}") == {"code": code}, outcome
    # What does not fit the guest is the guest's end, and not the runner's.
    outcome = await watched.run(program, b"{}", limits(memory_bytes=4 * MIB), granted=granted(Scripted(body=large)))
    assert outcome.code in ("memory_exceeded", "trap"), outcome


async def test_endless_calls_end_with_the_limit_of_the_attempt(watched: RunnerPool) -> None:  # noqa: F811
    completer = Scripted()
    program = python(
        SAY + "def run(input):\n"
        "    while True:\n"
        "        try:\n"
        "            model.chat('x')\n"
        "        except BaseException:\n"
        "            pass\n"
    )
    loop = asyncio.get_running_loop()
    started = loop.time()
    outcome = await watched.run(program, b"{}", limits(wall_ms=2_000), granted=granted(completer, max_tokens=5))
    assert outcome.code == "timeout", outcome
    assert loop.time() - started < 10
    # Only what the budget allows gets as far as a model.
    assert len(completer.calls) == 2


NO_REQUESTS = [
    "nonsense",
    "",
    "[]",
    "null",
    '{"model": 1}',
    "{" * 100_000,
    '{"messages": []',
    '{"messages": [], "stream": true}',
    '{"messages": [], "n": 1e9}',
    '{"messages": NaN}',
    "\x00",
]
ODD_REQUESTS = [
    '{"max_tokens": 99999999999999999999999}',
    '{"messages": "\\ud800"}',
    '{"a":' * 100_000 + "1" + "}" * 100_000,
]


async def test_what_is_no_request_is_an_invalid_argument(watched: RunnerPool) -> None:  # noqa: F811
    completer = Scripted()
    program = python(
        SAY + "def run(input):\n    return {'codes': [code(lambda: raw.chat(one)) for one in input['all']]}\n"
    )
    outcome = await watched.run(
        program, json.dumps({"all": NO_REQUESTS}).encode(), limits(wall_ms=60_000), granted=granted(completer)
    )
    assert json.loads(outcome.output or b"{}") == {"codes": ["invalid_argument"] * len(NO_REQUESTS)}, outcome
    assert completer.calls == []
    # What the host does not look into is passed on, or refused, but never half of it.
    outcome = await watched.run(
        program, json.dumps({"all": ODD_REQUESTS}).encode(), limits(wall_ms=60_000), granted=granted(completer)
    )
    assert set(json.loads(outcome.output or b"{}")["codes"]) <= {"ok", "invalid_argument"}, outcome


async def test_the_model_that_is_checked_is_the_model_that_is_called(watched: RunnerPool) -> None:  # noqa: F811
    completer = Scripted()
    program = python(SAY + "def run(input):\n    return {'code': code(lambda: raw.chat(input['request']))}\n")
    for request_ in ('{"model": "small", "model": "large"}', '{"model": "small", "mod\\u0065l": "large"}'):
        outcome = await watched.run(
            program, json.dumps({"request": request_}).encode(), limits(), granted=granted(completer)
        )
        assert outcome.code == "permission_denied", outcome
    assert completer.calls == []


async def test_a_call_that_does_not_end_keeps_no_attempt_alive(watched: RunnerPool) -> None:  # noqa: F811
    lets_go = asyncio.Event()
    completer = Scripted(hangs=True, lets_go=lets_go)
    program = python(SAY + "def run(input):\n    return {'code': code(lambda: model.chat('x'))}\n")
    outcome = await watched.run(program, b"{}", limits(wall_ms=2_000), granted=granted(completer))
    assert outcome.code == "timeout", outcome
    assert completer.cancelled.is_set()
    lets_go.set()


async def test_a_call_while_the_agent_is_imported_is_refused_like_any_other(watched: RunnerPool) -> None:  # noqa: F811
    program = python("from hive import model\nmodel.chat('x')\ndef run(input):\n    return {}\n")
    assert (await watched.run(program, b"{}", limits())).code == "permission_denied"


def test_a_runner_that_lets_a_denied_guest_go_on_is_not_believed() -> None:
    done = frames.Done("", "", "", b'{"stolen": 1}', False, 1, 1, 1)
    outcome = _outcome(done, [], "the permission `model` is not granted")
    assert (outcome.status, outcome.code, outcome.output) == ("failed", "permission_denied", None)
    assert _outcome(done, [], "").output == b'{"stolen": 1}'


async def test_a_runner_that_makes_calls_of_no_guest_is_ended() -> None:
    """As one would that a guest has broken out into."""
    call = bytes(frames.encode(frames.HostCall("model", "chat", "{}")))

    async def answer(call: frames.HostCall) -> frames.HostAnswer:
        await asyncio.Event().wait()
        raise AssertionError

    for request, calls in ((None, 1), (answer, 2)):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        channel = _Channel()
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)  # noqa: B023
        theirs.sendall(call * calls)
        with pytest.raises(RunnerGone, match="broke the protocol"):
            await channel.ask(None, MIB, on_call=request)
        theirs.close()
