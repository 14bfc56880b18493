"""The whole answer that a stream amounts to, for the record: what one call without `stream` would have said."""

from typing import Any

import msgspec

from hive_common.inference.sse import Events, data_of

_FIRST = ("id", "object", "created", "model", "system_fingerprint")
_LAST = ("usage", "error")


def assembled(events: bytes) -> bytes:
    """Return the events of a stream joined to one JSON object: texts put together, the rest as it was last said.

    Events that are no JSON objects are left out. `truncated` is true where the stream has no proper end.
    """
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    ended = False
    for event in Events(len(events) + 1).feed(events):
        data = data_of(event)
        if data == b"[DONE]":
            ended = True
        elif data is not None:
            _join(whole, choices, data)
    if choices:
        whole["choices"] = [choices[index] for index in sorted(choices)]
    if not ended:
        whole["truncated"] = True
    return msgspec.json.encode(whole)


_SAID_ONCE = frozenset({"role", "finish_reason", "id", "type"})
"""Texts that are not continued."""


def _join(whole: dict[str, Any], choices: dict[int, dict[str, Any]], data: bytes) -> None:
    try:
        part = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        return
    for name in _FIRST:
        if part.get(name) is not None:
            whole.setdefault(name, part[name])
    for name in _LAST:
        if part.get(name) is not None:
            whole[name] = part[name]
    for choice in part.get("choices") or ():
        if isinstance(choice, dict):
            index = choice.get("index") if isinstance(choice.get("index"), int) else 0
            said = choice.pop("delta", None)
            if isinstance(said, dict):
                choice["message"] = said
            _merge(choices.setdefault(index or 0, {}), choice)


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        known = into.get(name)
        if known is None or value is None:
            into[name] = known if value is None else value
        elif isinstance(known, str) and isinstance(value, str) and name not in _SAID_ONCE:
            into[name] = known + value
        elif isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            _merge_lists(known, value)
        else:
            into[name] = value


def _merge_lists(into: list[Any], parts: list[Any]) -> None:
    """Join lists: calls of tools by their `index`, the rest (logprobs) one after the other."""
    for part in parts:
        index = part.get("index") if isinstance(part, dict) else None
        same = next((one for one in into if isinstance(one, dict) and one.get("index") == index), None)
        if index is not None and same is not None:
            _merge(same, part)
        else:
            into.append(part)
