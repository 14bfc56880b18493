import msgspec
import pytest
from hive_common.inference.completions import assembled
from hive_common.inference.errors import error_event
from hive_common.inference.sse import DONE
from hive_common.inference.tally import Tally, raise_error_of
from hive_common.kernel.errors import DeadlineExceeded, Unavailable


def event(**fields: object) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(fields)


def token(text: str, index: int = 0) -> bytes:
    return event(id="x", choices=[{"index": index, "delta": {"content": text}, "finish_reason": None}])


USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})


def test_the_usage_is_counted_and_only_dropped_where_nobody_asked_for_it() -> None:
    stream = token("a") + USAGE + DONE
    for drop, passed in ((True, token("a") + DONE), (False, stream)):
        tally = Tally(keep=True, drop_usage=drop)
        assert tally.events(stream) == passed
        assert (tally.prompt_tokens, tally.completion_tokens, tally.done, tally.error) == (3, 2, True, "")
        assert tally.kept == passed


def test_a_usage_beside_a_token_stays() -> None:
    piece = event(choices=[{"index": 0, "delta": {"content": "a"}}], usage={"completion_tokens": 1})
    tally = Tally(keep=False, drop_usage=True)
    assert (tally.events(piece), tally.completion_tokens, tally.kept) == (piece, 1, b"")


@pytest.mark.parametrize("piece", [error_event(Unavailable("gone")), event(error="gone"), event(error={})])
def test_an_error_is_seen_and_passes(piece: bytes) -> None:
    tally = Tally(keep=True, drop_usage=True)
    assert tally.events(piece) == piece
    assert (tally.error, tally.done) == ("unavailable", False)


@pytest.mark.parametrize(
    "piece", [token('"error" [DONE] "usage"'), event(choices=[], error=None, usage=None), b'data: {"error"\n\n']
)
def test_what_only_looks_like_it_is_left_alone(piece: bytes) -> None:
    tally = Tally(keep=True, drop_usage=True)
    assert tally.events(piece) == piece
    assert (tally.error, tally.done, tally.completion_tokens) == ("", False, 0)


def test_counts_that_cannot_be_do_no_harm() -> None:
    tally = Tally(keep=False, drop_usage=False)
    tally.whole(msgspec.json.encode({"usage": {"prompt_tokens": -5, "completion_tokens": 2**62}}))
    assert (tally.prompt_tokens, tally.completion_tokens) == (0, 1 << 40)
    tally.whole(b'{"usage": {"prompt_tokens": 7, "completion_tokens": 1%b}}' % (b"0" * 500))
    assert 0 <= tally.completion_tokens <= 1 << 40


def test_a_stream_that_begins_with_an_error_is_one() -> None:
    with pytest.raises(Unavailable, match="gone"):
        raise_error_of(error_event(Unavailable("gone")))
    raise_error_of(token("a") + error_event(Unavailable("gone")))


def test_a_stream_is_put_together_to_the_answer_it_amounts_to() -> None:
    calls = [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]
    stream = (
        event(id="x", model="m", choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        + token("a")
        + token("z", index=1)
        + event(choices=[{"index": 0, "delta": {"tool_calls": calls}}])
        + event(choices=[{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}])
        + token("b")
        + event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        + DONE
    )
    whole = msgspec.json.decode(assembled(stream))
    first, second = whole["choices"]
    assert (whole["id"], whole["model"]) == ("x", "m")
    assert first["message"]["role"] == "assistant"
    assert (first["message"]["content"], first["finish_reason"]) == ("ab", "stop")
    assert first["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert second["message"]["content"] == "z"
    assert "truncated" not in whole


def test_a_stream_without_its_end_says_so() -> None:
    assert msgspec.json.decode(assembled(token("a")))["truncated"] is True
    assert msgspec.json.decode(assembled(b"")) == {"truncated": True}


def test_what_ended_a_stream_here_says_what_it_was() -> None:
    tally = Tally(keep=False, drop_usage=False)
    tally.events(error_event(DeadlineExceeded("no whole answer within 1 ms")))
    assert tally.error == "deadline_exceeded"
