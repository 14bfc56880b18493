"""The body of a call, read once for what routing needs, and changed in as little as possible."""

from typing import Any, Final

import msgspec
from hive_common.inference.abilities import COMPLETION, EMBEDDING, TOOLS
from hive_common.inference.bodies import asking_for_usage, changed, decode
from hive_common.inference.calls import ModelCall

_NOTHING: Final = (b"", b"null", b"[]", b"{}")
NO_RAW: Final = msgspec.Raw(b"")


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
        InvalidArgument: the body is no JSON object.
    """
    body, known = call.body, decode(call.body, _Body)
    drop_usage = False
    if call.stream and call.endpoint != "embeddings":
        body, drop_usage = asking_for_usage(body, bytes(known.stream_options))
    if call.tokens_max > 0 and call.endpoint != "embeddings":
        body = _limited(body, call.tokens_max)
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


def _limited(body: bytes, tokens_max: int) -> bytes:
    fields = decode(body, dict[str, Any])
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    asked, answers = fields.get(name), fields.get("n")
    each = max(1, tokens_max // answers) if isinstance(answers, int) and answers > 0 else tokens_max
    if isinstance(asked, int) and 0 < asked <= each:
        return body
    return changed(body, **{name: each})
