"""What is taken down of an answer that passes: its tokens, how it ended, and its text for the record."""

from typing import Final

import msgspec

from hive_common.inference.sse import Events, data_of, is_done
from hive_common.kernel.errors import CATALOGUE, Unavailable

_KEPT_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of one answer for the record. What is longer is left out of it, with a mark."""


_TOKENS_MAX: Final = 1 << 40


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


class _Counted(msgspec.Struct):
    usage: _Usage | None = None
    choices: list[msgspec.Raw] | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Counted).decode


class Tally:
    """Watches one answer.

    Args:
        keep: its bytes are wanted for the record.
        drop_usage: the stream's event with nothing but the usage does not go to the caller.

    Attributes:
        prompt_tokens, completion_tokens: as the back end counts; 0 where it does not.
        done: the stream came to its proper end.
        error: code of the error that the stream carried; empty without one.
        truncated: there was more than is kept.
    """

    __slots__ = (
        "_drop_usage",
        "_keep",
        "_kept",
        "_kept_bytes",
        "completion_tokens",
        "done",
        "error",
        "prompt_tokens",
        "truncated",
    )

    def __init__(self, keep: bool, drop_usage: bool) -> None:
        self.prompt_tokens = self.completion_tokens = 0
        self.done = self.truncated = False
        self.error = ""
        self._keep = keep
        self._drop_usage = drop_usage
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """How many bytes are kept."""
        return self._kept_bytes

    def forget(self) -> None:
        """Let go of what is kept."""
        self._kept, self._kept_bytes = [], 0

    @property
    def kept(self) -> bytes:
        """The bytes that passed, as far as they are kept."""
        return b"".join(self._kept)

    def whole(self, body: bytes) -> None:
        """Take down an answer that is not a stream."""
        self._count(body)
        self.done = True
        self._take(body)

    def events(self, piece: bytes) -> bytes:
        """Take down whole events of a stream, and return what of them goes on to the caller."""
        # A look for bytes on each piece, and JSON only where it may be worth it.
        if b'"usage"' in piece or b'"error"' in piece or b"[DONE]" in piece:
            piece = b"".join([event for event in Events().feed(piece) if self._passes(event)])
        self._take(piece)
        return piece

    def _passes(self, event: bytes) -> bool:
        if is_done(event):
            self.done = True
            return True
        if b'"usage"' not in event and b'"error"' not in event:
            return True
        counted = self._count(data_of(event) or b"")
        return not (self._drop_usage and counted is not None and counted.usage and not counted.choices)

    def _count(self, data: bytes) -> _Counted | None:
        try:
            counted = _decode(data)
        except msgspec.DecodeError:
            # Whatever it is, it is the caller's; it only says nothing about tokens.
            return None
        if counted.usage is not None:
            self.prompt_tokens = _tokens(counted.usage.prompt_tokens)
            self.completion_tokens = _tokens(counted.usage.completion_tokens)
        if bytes(counted.error) not in (b"", b"null"):
            self.error = _code_of(counted.error)
        return counted

    def _take(self, piece: bytes) -> None:
        if not self._keep or self.truncated:
            return
        if self._kept_bytes + len(piece) > _KEPT_BYTES_MAX:
            self.truncated = True
            return
        self._kept.append(piece)
        self._kept_bytes += len(piece)


def _tokens(said: int | None) -> int:
    # Of whoever made the answer, who may say anything.
    return min(max(said or 0, 0), _TOKENS_MAX)


class _ErrorText(msgspec.Struct):
    message: str = ""
    code: msgspec.Raw = msgspec.Raw(b"")


def _code_of(error: msgspec.Raw) -> str:
    """Return the catalogue's code of an error event. Back ends have codes of their own."""
    try:
        code = msgspec.json.decode(msgspec.json.decode(error, type=_ErrorText).code, type=str)
    except msgspec.DecodeError:
        return Unavailable.code
    return code if code in CATALOGUE else Unavailable.code


class _Error(msgspec.Struct):
    error: _ErrorText | None = None


def raise_error_of(piece: bytes) -> None:
    """Raise Unavailable where the first event of a stream is an error already."""
    for event in Events().feed(piece)[:1]:
        try:
            found = msgspec.json.decode(data_of(event) or b"", type=_Error).error
        except msgspec.DecodeError:
            return
        if found is not None:
            raise Unavailable(found.message or "the back end failed")
