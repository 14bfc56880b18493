"""The body of a call, read once for what routing needs, and changed in as little as possible."""

from typing import Any, Final

import msgspec
from hive_common.inference.abilities import COMPLETION, EMBEDDING, TOOLS
from hive_common.inference.bodies import asking_for_usage, decode
from hive_common.inference.calls import ModelCall
from hive_common.kernel.errors import InvalidArgument

_NOTHING: Final = (b"", b"null", b"[]", b"{}")
NO_RAW: Final = msgspec.Raw(b"")

LIMITS: Final = ("max_tokens", "max_completion_tokens")
N_PREDICT: Final = "n_predict"
"""llama.cpp's own name for it, where -1 is without end."""

ANSWERS_MAX: Final = 128

Fields = dict[str, msgspec.Raw]


class _Body(msgspec.Struct):
    """What is looked at. The rest may be anything."""

    messages: msgspec.Raw = NO_RAW
    prompt: msgspec.Raw = NO_RAW
    input: msgspec.Raw = NO_RAW
    tools: msgspec.Raw = NO_RAW
    functions: msgspec.Raw = NO_RAW
    stream_options: msgspec.Raw = NO_RAW


class Prepared(msgspec.Struct, frozen=True):
    """A body as the back end gets it.

    Attributes:
        body: the bytes.
        needs: abilities that the model has to have.
        prompt_bytes: of text to read; 0 where it holds images, whose size says nothing.
        drop_usage: the event with the usage was asked for by the router, not by the caller.
    """

    body: bytes
    needs: frozenset[str]
    prompt_bytes: int
    drop_usage: bool


_EMBEDS: Final = frozenset({EMBEDDING})
_COMPLETES: Final = frozenset({COMPLETION})
_CALLS_TOOLS: Final = frozenset({COMPLETION, TOOLS})


def prepared(call: ModelCall) -> Prepared:
    """Read a call's body, and ask for its usage where that comes with a stream only if it is asked for.

    Raises:
        InvalidArgument: the body is no JSON object, or asks for more answers than may be generated.
    """
    body, known = call.body, decode(call.body, _Body)
    drop_usage = False
    if call.stream and call.endpoint != "embeddings":
        body, drop_usage = asking_for_usage(body, bytes(known.stream_options))
    if call.tokens_max > 0 and call.endpoint != "embeddings":
        body = _limited(body, call.tokens_max, call.endpoint)
    return Prepared(body, _needs(call.endpoint, known), _prompt_bytes(known), drop_usage)


def _needs(endpoint: str, known: _Body) -> frozenset[str]:
    if endpoint == "embeddings":
        return _EMBEDS
    # `functions` is what `tools` were called before.
    plain = endpoint != "chat" or (bytes(known.tools) in _NOTHING and bytes(known.functions) in _NOTHING)
    return _COMPLETES if plain else _CALLS_TOOLS


def _prompt_bytes(known: _Body) -> int:
    messages, single = bytes(known.messages), bytes(known.input)
    if b'"image_url"' in messages or b'"input_audio"' in messages:
        return 0
    # Of a list of inputs each is read on its own.
    return len(messages) + len(bytes(known.prompt)) + (len(single) if single.startswith(b'"') else 0)


def answers_of(fields: Fields, endpoint: str) -> int:
    """Return how many answers a body asks for; each may have as many tokens as it allows.

    Raises:
        InvalidArgument: more than anybody may.
    """
    answers = max([_positive(fields, name) for name in ("n", "best_of") if given(fields, name)], default=1)
    if answers > ANSWERS_MAX:
        raise InvalidArgument(f"body.n: got {answers}; expected at most {ANSWERS_MAX}", path="n")
    return answers * (prompts_of(fields) if endpoint == "completions" else 1)


def prompts_of(fields: Fields) -> int:
    """Return how many prompts a body has: lists of texts, or of lists of tokens, are one each."""
    most = 1
    for name in ("prompt", "input"):
        raw = bytes(fields.get(name, b""))
        if raw.startswith(b"["):
            parts = decode(raw, list[msgspec.Raw])
            several = bool(parts) and bytes(parts[0])[:1] in (b'"', b"[")
            most = max(most, len(parts) if several else 1)
    return most


def limit_of(fields: Fields) -> int:
    """Return what an answer may have by its body; 0 where that has no limit. Raises InvalidArgument."""
    return min([_positive(fields, name) for name in LIMITS if given(fields, name)], default=0)


def given(fields: Fields, name: str) -> bool:
    """Say whether a body has a field."""
    return bytes(fields.get(name, b"")) not in (b"", b"null")


def _positive(fields: Fields, name: str) -> int:
    try:
        value: Any = msgspec.json.decode(fields[name])
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"body.{name}: {error}", path=name) from error
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"body.{name}: got {value!r:.40}; expected a number from 1 on", path=name)
    return value


def _limited(body: bytes, tokens_max: int, endpoint: str) -> bytes:
    """Lower what a body may have generated; always written anew, so that no field stands in it twice."""
    fields = decode(body, Fields)
    answers = answers_of(fields, endpoint)
    each = tokens_max // answers
    if each < 1:
        raise InvalidArgument(f"got {answers} answers to make of {tokens_max} tokens; expected fewer", path="n")
    lowered = {name: min(_positive(fields, name), each) for name in (*LIMITS, N_PREDICT) if given(fields, name)}
    if lowered.keys() <= {N_PREDICT}:
        lowered["max_tokens"] = lowered.get(N_PREDICT, each)
    return msgspec.json.encode({**fields, **lowered})
