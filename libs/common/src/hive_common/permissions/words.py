"""Permissions in words, for the person who is about to grant them."""

from hive_common.contracts.permissions import Permissions
from hive_common.permissions.lattice import ANY_MODEL

_PLACES = {
    "any": "wherever it runs",
    "pool": "on devices of this pool",
    "own-devices": "on the owner's own devices",
}
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def in_words(permissions: Permissions) -> tuple[str, ...]:
    """Return a line for each permission: what whoever has it may do."""
    lines = {
        "model": _model(permissions),
        "http": _http(permissions),
        "kv": _kv(permissions),
        "fork": _fork(permissions),
        "scratch": _scratch(permissions),
    }
    ask = "; a person is asked each time"
    return tuple(f"{name}: {line}{ask if name in permissions.asks else ''}" for name, line in lines.items() if line)


def size_in_words(count: int) -> str:
    """Return a number of bytes as people say it; exact where a larger unit would not be."""
    for unit, size in _UNITS:
        if count and count % size == 0:
            return f"{count // size:,} {unit}"
    return f"{count:,} bytes"


def _model(permissions: Permissions) -> str:
    model = permissions.model
    if model is None:
        return ""
    several = "s" if len(model.names) > 1 else ""
    which = (
        "any language model" if ANY_MODEL in model.names else f"the language model{several} {_list(model.names)}"
    )
    where = _PLACES.get(model.pin, f"on devices of {model.pin.replace(':', ' ', 1)}")
    return f"send what it knows to {which}, {where}, for at most {model.max_tokens:,} tokens per attempt"


def _http(permissions: Permissions) -> str:
    http = permissions.http
    if http is None:
        return ""
    private = ", private networks and this machine included" if http.private else ""
    verb = "read from" if set(http.methods) <= {"GET", "HEAD"} else "read from and send data to"
    return f"{verb} {_list(http.hosts)} over HTTP ({', '.join(http.methods)}){private}"


def _kv(permissions: Permissions) -> str:
    kv = permissions.kv
    return (
        ""
        if kv is None
        else (
            f"keep up to {size_in_words(kv.quota_bytes)} in the namespace {kv.namespace!r}, "
            "where later tasks and other agents with the same permission read them"
        )
    )


def _fork(permissions: Permissions) -> str:
    fork = permissions.fork
    if fork is None:
        return ""
    deep = "" if fork.depth == 1 else f", {fork.depth} levels deep"
    return f"start up to {fork.max:,} tasks of {_list(fork.agents)} with what it may do itself or less{deep}"


def _scratch(permissions: Permissions) -> str:
    if permissions.scratch_bytes <= 0:
        return ""
    return f"use {size_in_words(permissions.scratch_bytes)} of disk while an attempt runs"


def _list(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
