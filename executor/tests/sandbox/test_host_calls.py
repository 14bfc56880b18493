"""What guests get of `model`, and what they are refused."""

import asyncio
import json
from collections.abc import Callable

import pytest
from hive_common.contracts.permissions import ModelPermission
from hive_common.kernel.errors import BudgetExhausted, NotFound, RateLimited
from hive_executor.host import ModelAccess
from hive_executor.sandbox import Capabilities, Program, RunnerPool

from .conftest import limits, python
from .scripted import Scripted

Module = Callable[[str], Program]

ASK = python(
    "from hive import model\n"
    "def run(input):\n"
    "    answer = model.chat(input['text'], **input.get('options', {}))\n"
    "    return {'text': answer.text, 'tokens': answer['usage']['completion_tokens']}\n"
)
CATCH = python(
    "from hive import ModelError, model\n"
    "def run(input):\n"
    "    codes = []\n"
    "    for options in input['calls']:\n"
    "        try:\n"
    "            codes.append(model.chat('x', **options).text)\n"
    "        except ModelError as error:\n"
    "            codes.append(error.code)\n"
    "    return {'codes': codes}\n"
)


def granted(completer: Scripted, names: tuple[str, ...] = ("small",), max_tokens: int = 100) -> Capabilities:
    return {
        "model": ModelAccess(
            completer, ModelPermission(names, max_tokens), pin="pool", job="j", task="t", attempt=2
        )
    }


async def test_an_agent_asks_a_model_and_goes_on_with_the_answer(pool: RunnerPool) -> None:
    completer = Scripted("vier €", tokens=3)
    outcome = await pool.run(
        ASK,
        '{"text": "2+2, in €?", "options": {"seed": 1, "unknown": [1.50]}}'.encode(),
        limits(),
        granted=granted(completer),
    )
    assert json.loads(outcome.output or b"{}") == {"text": "vier €", "tokens": 3}, outcome
    (call,) = completer.calls
    assert (call.endpoint, call.model, call.stream, call.pin) == ("chat", "small", False, "pool")
    assert (call.job, call.task, call.attempt, call.tokens_max) == ("j", "t", 2, 100)
    assert 0 < call.deadline_ms <= 20_000
    assert json.loads(call.body) == {
        "model": "small",
        "messages": [{"role": "user", "content": "2+2, in €?"}],
        "seed": 1,
        "unknown": [1.5],
        "max_tokens": 100,
    }


async def test_completions_and_embeddings_have_their_own_endpoints(pool: RunnerPool) -> None:
    completer = Scripted("four")
    program = python(
        "from hive import model\n"
        "def run(input):\n"
        "    text = model.complete('2+2=').text\n"
        "    return {'text': text, 'vectors': model.embed(['a', 'b'], model='other').vectors}\n"
    )
    outcome = await pool.run(program, b"{}", limits(), granted=granted(completer, ("small", "other")))
    assert json.loads(outcome.output or b"{}") == {"text": "four", "vectors": [[1.0], [2.0]]}, outcome
    assert [(call.endpoint, call.model) for call in completer.calls] == [
        ("completions", "small"),
        ("embeddings", "other"),
    ]


async def test_a_component_asks_a_model(pool: RunnerPool, module: Module) -> None:
    completer = Scripted("four", tokens=3)
    program = module("chat_component")
    outcome = await pool.run(program, b'{"messages": []}', limits(), granted=granted(completer))
    assert outcome.status == "succeeded", outcome
    assert json.loads(outcome.output or b"{}")["usage"] == {"completion_tokens": 3}
    outcome = await pool.run(program, b"nonsense", limits(), granted=granted(completer))
    assert (outcome.code, outcome.message) == ("agent_error", "invalid_argument")
    assert (await pool.run(program, b"{}", limits())).code == "permission_denied"


async def test_without_the_permission_the_attempt_ends_whatever_the_agent_does_about_it(pool: RunnerPool) -> None:
    program = python(
        "from hive import log, model\n"
        "def run(input):\n"
        "    try:\n"
        "        model.chat('x')\n"
        "    except BaseException:\n"
        "        pass\n"
        "    finally:\n"
        "        log.info('still here')\n"
        "    return {}\n"
    )
    outcome = await pool.run(program, b"{}", limits())
    assert (outcome.status, outcome.code, outcome.output) == ("failed", "permission_denied", None)
    assert "`model`" in outcome.message
    assert outcome.log == []
    assert (await pool.run(python("def run(input):\n    1/0"), b"{}", limits())).code == "agent_error"


async def test_a_model_that_the_manifest_does_not_name_is_not_granted(pool: RunnerPool) -> None:
    completer = Scripted()
    outcome = await pool.run(CATCH, b'{"calls": [{"model": "large"}]}', limits(), granted=granted(completer))
    assert outcome.code == "permission_denied"
    assert "'large'" in outcome.message
    assert completer.calls == []


async def test_a_star_is_every_model_and_the_loaded_one_unless_it_is_named(pool: RunnerPool) -> None:
    completer = Scripted()
    await pool.run(CATCH, b'{"calls": [{}, {"model": "large"}]}', limits(), granted=granted(completer, ("*",)))
    assert [call.model for call in completer.calls] == ["warm", "large"]


async def test_what_a_call_fails_with_is_an_exception_with_its_code(pool: RunnerPool) -> None:
    for error in (NotFound("nothing serves it"), RateLimited("later")):
        access = ModelAccess(Scripted(error=error), ModelPermission(("small",), 100))
        outcome = await pool.run(CATCH, b'{"calls": [{}, {}]}', limits(), granted={"model": access})
        assert json.loads(outcome.output or b"{}") == {"codes": [error.code, error.code]}
        assert access.spent == 0


async def test_tokens_are_counted_over_all_calls_and_each_may_have_what_is_left(pool: RunnerPool) -> None:
    completer = Scripted("ok", tokens=40)
    calls = [{"max_tokens": 50}, {"max_completion_tokens": 999}, {"n_predict": -1}, {}, {}]
    calls[2] = {"n_predict": 999}
    outcome = await pool.run(
        CATCH, json.dumps({"calls": calls}).encode(), limits(), granted=granted(completer, max_tokens=100)
    )
    assert json.loads(outcome.output or b"{}")["codes"] == [
        "ok",
        "ok",
        "ok",
        "budget_exhausted",
        "budget_exhausted",
    ]
    assert [call.tokens_max for call in completer.calls] == [50, 60, 20]
    bodies = [json.loads(call.body) for call in completer.calls]
    assert bodies[0]["max_tokens"] == 50
    assert bodies[1]["max_completion_tokens"] == 60
    assert "max_tokens" not in bodies[1]
    assert (bodies[2]["n_predict"], bodies[2]["max_tokens"]) == (20, 20)


async def test_several_answers_share_what_is_left(pool: RunnerPool) -> None:
    completer = Scripted("ok", tokens=None)
    calls = b'{"calls": [{"n": 3, "max_tokens": 30}, {"n": 11}, {}]}'
    outcome = await pool.run(CATCH, calls, limits(), granted=granted(completer, max_tokens=100))
    # An answer that does not say what it generated counts as all that it might have.
    assert json.loads(outcome.output or b"{}")["codes"] == ["ok", "budget_exhausted", "ok"]
    assert [call.tokens_max for call in completer.calls] == [90, 10]


async def test_parameters_that_would_get_round_the_limit_are_refused(pool: RunnerPool) -> None:
    completer = Scripted()
    refused: list[dict[str, object]] = [
        {"stream": True},
        {"max_tokens": 0},
        {"max_tokens": "9"},
        {"n_predict": -1},
        {"n": 1000},
        {"n": True},
    ]
    outcome = await pool.run(CATCH, json.dumps({"calls": refused}).encode(), limits(), granted=granted(completer))
    assert json.loads(outcome.output or b"{}") == {"codes": ["invalid_argument"] * len(refused)}, outcome
    assert completer.calls == []


async def test_each_prompt_of_a_list_counts(pool: RunnerPool) -> None:
    completer = Scripted()
    program = python(
        "from hive import model\n"
        "def run(input):\n"
        "    model.complete(['a', 'b', 'c'])\n"
        "    model.complete([1, 2, 3])\n"
        "    return {}\n"
    )
    await pool.run(program, b"{}", limits(), granted=granted(completer, max_tokens=30))
    assert [json.loads(call.body)["max_tokens"] for call in completer.calls] == [10, 27]


@pytest.mark.parametrize("ending", ["cancelled", "limit"])
async def test_an_attempt_that_ends_cancels_its_call(pool: RunnerPool, ending: str) -> None:
    completer = Scripted(hangs=True)
    wall_ms = 60_000 if ending == "cancelled" else 2_000
    attempt = asyncio.create_task(
        pool.run(CATCH, b'{"calls": [{}, {}]}', limits(wall_ms=wall_ms), granted=granted(completer))
    )
    await completer.begun.wait()
    if ending == "cancelled":
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
    else:
        assert (await attempt).code == "timeout"
    assert completer.cancelled.is_set()
    assert len(completer.calls) == 1
    # The pool goes on, and nothing of the call reaches the next guest.
    outcome = await pool.run(ASK, b'{"text": "x"}', limits(), granted=granted(Scripted("new")))
    assert json.loads(outcome.output or b"{}")["text"] == "new"


async def test_what_is_no_answer_of_the_api_is_an_error_of_the_call(pool: RunnerPool) -> None:
    for body in (b"<html>", b"[]", b'{"usage": 1}'):
        outcome = await pool.run(CATCH, b'{"calls": [{}]}', limits(), granted=granted(Scripted(body=body)))
        assert json.loads(outcome.output or b"{}") == {"codes": ["unavailable"]}, outcome


async def test_log_lines_and_calls_at_the_same_time_do_not_mix(pool: RunnerPool) -> None:
    """The log is sent by another thread of the runner."""
    program = python(
        "from hive import log, model\n"
        "def run(input):\n"
        "    for number in range(200):\n"
        "        log.info('x' * 4000)\n"
        "        assert model.chat('y' * 4000).text == 'ok'\n"
        "    return {}\n"
    )
    completer = Scripted("ok", tokens=0)
    outcome = await pool.run(program, b"{}", limits(wall_ms=60_000), granted=granted(completer))
    assert outcome.status == "succeeded", outcome
    assert (len(completer.calls), len(outcome.log)) == (200, 200)


SPENT = BudgetExhausted("job `j` has spent $9 of $9 so far", subject="job:j", limit=9, spent=9, needed=1)
HELD = BudgetExhausted(
    "$9 are reserved for calls that run", subject="job:j", limit=9, spent=0, reserved=9, needed=1
)
OWN = BudgetExhausted("100 of the 100 tokens of this attempt are used up", limit=100, spent=100)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        # Another attempt would not get it either.
        (SPENT, "budget_exhausted"),
        # Another attempt has tokens of its own again.
        (OWN, "agent_error"),
        # The calls that hold it may come to cost less.
        (HELD, "agent_error"),
    ],
)
async def test_who_cannot_do_without_a_budget_that_others_share_fails_with_its_name(
    pool: RunnerPool, error: BudgetExhausted, code: str
) -> None:
    completer = Scripted(error=error)
    outcome = await pool.run(ASK, b'{"text": "x"}', limits(), granted=granted(completer))
    assert (outcome.status, outcome.code) == ("failed", code), outcome
    assert error.message in outcome.message
    # A guest may do without.
    caught = await pool.run(CATCH, b'{"calls": [{}, {}]}', limits(), granted=granted(completer))
    assert json.loads(caught.output or b"{}") == {"codes": ["budget_exhausted"] * 2}, caught
