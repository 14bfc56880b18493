"""The whole answer that a stream amounts to, for the record: what one call without `stream` would have said."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from hive_common.inference.sse import Events, data_of

_FIRST: Final = ("id", "object", "created", "model", "system_fingerprint")
_LAST: Final = ("usage", "timings", "error")
_OBJECTS: Final = {"chat.completion.chunk": "chat.completion"}
"""What a stream calls itself, and what the answer is called that it amounts to."""

_SAID_ONCE: Final = frozenset({"role", "finish_reason", "id", "type"})
"""Texts that are not continued."""

_Part = dict[str, Any]
_Objects = list[_Part]
_decode_all = msgspec.json.Decoder(_Objects).decode
_decode = msgspec.json.Decoder(_Part).decode


def assembled(events: bytes) -> bytes:
    """Return the events of a stream joined to one JSON object: texts put together, the rest as it was last said.

    Events that are no JSON objects are left out. `truncated` is true where the stream has no proper end.
    """
    found = [data for data in _datas(events) if data]
    ended = found[-1:] == [b"[DONE]"]
    if ended:
        found.pop()
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for part in _objects(found):
        _join(whole, choices, part)
    if whole.get("object") in _OBJECTS:
        whole["object"] = _OBJECTS[whole["object"]]
    if choices:
        whole["choices"] = [_finished(choices[index]) for index in sorted(choices)]
    if not ended:
        whole["truncated"] = True
    return msgspec.json.encode(whole)


def _datas(events: bytes) -> Iterator[bytes | None]:
    if b"\r" in events:
        yield from map(data_of, Events(len(events) + 1).feed(events))
        return
    # What follows the last blank line is no whole event.
    for event in events.split(b"\n\n")[:-1]:
        yield event[6:] if event.startswith(b"data: ") and b"\n" not in event else data_of(event + b"\n\n")


def _objects(found: list[bytes]) -> _Objects:
    """Decode all at once, which costs a third of doing it one by one."""
    try:
        return _decode_all(b"[%b]" % b",".join(found))
    except msgspec.DecodeError:
        return [part for data in found if (part := _object(data)) is not None]


def _object(data: bytes) -> _Part | None:
    try:
        return _decode(data)
    except msgspec.DecodeError:
        return None


def _join(whole: dict[str, Any], choices: dict[int, dict[str, Any]], part: _Part) -> None:
    if not whole:
        whole |= {name: part[name] for name in _FIRST if part.get(name) is not None}
    for name in _LAST:
        if part.get(name) is not None:
            whole[name] = part[name]
    for choice in part.get("choices") or ():
        if not isinstance(choice, dict):
            continue
        index = choice.get("index")
        into = choices.setdefault(index if isinstance(index, int) else 0, {})
        said = choice.pop("delta", None)
        if isinstance(said, dict):
            _merge(into.setdefault("message", {}), said)
        _merge(into, choice)


class _Text(list[str]):
    """A text in pieces: adding to one string again and again would copy all of it each time."""


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if value is None:
            into.setdefault(name, None)
            continue
        known = into.get(name)
        if isinstance(value, str) and name not in _SAID_ONCE:
            if isinstance(known, _Text):
                known.append(value)
            else:
                into[name] = _Text([value])
        elif isinstance(value, dict):
            if not isinstance(known, dict):
                known = into[name] = {}
            _merge(known, value)
        elif isinstance(value, list):
            if not isinstance(known, list) or isinstance(known, _Text):
                known = into[name] = []
            _merge_lists(known, value)
        else:
            into[name] = value


def _merge_lists(into: list[Any], parts: list[Any]) -> None:
    """Join lists: calls of tools by their `index`, the rest (logprobs) one after the other."""
    for part in parts:
        index = part.get("index") if isinstance(part, dict) else None
        if index is None:
            into.append(part)
            continue
        same = next((one for one in into if isinstance(one, dict) and one.get("index") == index), None)
        if same is None:
            into.append(same := {})
        _merge(same, part)


def _finished(value: Any) -> Any:
    """Return a merged value with its texts in one piece."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _finished(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finished(inner) for inner in value]
    return value
