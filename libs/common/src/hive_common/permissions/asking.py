"""What a manifest asks for, or a person grants, as it is written:

model:   {names: [small], max_tokens: 4096, pin: pool}
http:    {hosts: [api.example.org, "*.example.net"], methods: [GET, POST], private: false}
kv:      {namespace: notes, quota: 1Mi}
fork:    {agents: [square, "cube@1.0.0"], max: 10, depth: 1}
scratch: 64Mi
"""

import re
from typing import Any, Final, TypeVar

import msgspec

from hive_common.artifacts.documents import nearest, refuse, refuse_validation
from hive_common.artifacts.names import is_name, is_version
from hive_common.artifacts.quantities import parse_quantity
from hive_common.contracts.limits import (
    FORK_AGENTS_MAX,
    FORK_DEPTH_MAX,
    FORK_MAX,
    HTTP_HOSTS_MAX,
    KV_QUOTA_BYTES_MAX,
    MODEL_NAMES_MAX,
    MODEL_TOKENS_MAX,
    SCRATCH_BYTES_MAX,
)
from hive_common.contracts.permissions import (
    PERMISSIONS,
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.inference.calls import PIN_ANY, PINS, is_pin
from hive_common.permissions.hosts import parse_host
from hive_common.permissions.lattice import joined

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MODEL_NAME_CHARACTERS_MAX: Final = 256

_NAMESPACE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_FORMER: Final = ("tools",)
"""Manifests may carry these names with nothing behind them since before they could ask for anything."""

_EXAMPLES: Final = {
    "model": "`{names: [...], max_tokens: ...}`",
    "http": "`{hosts: [...], methods: [GET]}`",
    "kv": "`{namespace: ..., quota: 1Mi}`",
    "fork": "`{agents: [...], max: ...}`",
}


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Model(_Strict, frozen=True):
    names: tuple[str, ...]
    max_tokens: int
    pin: str = PIN_ANY


class _Http(_Strict, frozen=True):
    hosts: tuple[str, ...]
    methods: tuple[str, ...] = ("GET",)
    private: bool = False


class _Kv(_Strict, frozen=True):
    namespace: str
    quota: str | int


class _Fork(_Strict, frozen=True):
    agents: tuple[str, ...]
    max: int
    depth: int = 1


T = TypeVar("T", bound=_Strict)


def parse(asked: dict[str, Any], file: str, path: str = "permissions") -> Permissions:
    """Return what a mapping of permissions says. A permission that is null is not asked for.

    Args:
        asked: as it stands in a document.
        file: its name, for errors.
        path: where in it the mapping stands.

    Raises:
        InvalidArgument: with the file, the path inside, what was expected, and the nearest known name.
    """
    found = Permissions()
    for name, value in asked.items():
        if value is None or (name != "model" and name in (*PERMISSIONS, *_FORMER) and not value):
            continue
        found = joined(found, parse_one(name, value, file, path))
    return found


def parse_one(name: str, value: Any, file: str, path: str = "permissions") -> Permissions:
    """Return one permission alone. Raises what `parse` raises."""
    if name not in PERMISSIONS:
        close = nearest(name, PERMISSIONS)
        refuse(
            file,
            _at(path, name),
            "unknown permission",
            f"`{close}`" if close else "one of " + ", ".join(PERMISSIONS),
        )
    where = _at(path, name)
    match name:
        case "model":
            return Permissions(model=_model(_convert(value, _Model, name, file, where), file, where))
        case "http":
            return Permissions(http=_http(_convert(value, _Http, name, file, where), file, where))
        case "kv":
            return Permissions(kv=_kv(_convert(value, _Kv, name, file, where), file, where))
        case "fork":
            return Permissions(fork=_fork(_convert(value, _Fork, name, file, where), file, where))
        case _:
            size = parse_quantity(value, file=file, path=where)
            _within(size, 1, SCRATCH_BYTES_MAX, "bytes", file, where)
            return Permissions(scratch_bytes=size)


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(value: Any, kind: type[T], name: str, file: str, path: str) -> T:
    if not isinstance(value, dict):
        refuse(file, path, "is not a mapping", _EXAMPLES[name])
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        refuse_validation(error, file, kind, path)


def _model(asked: _Model, file: str, path: str) -> ModelPermission:
    _different(asked.names, MODEL_NAMES_MAX, "models", "names, or `*`", file, f"{path}.names")
    for index, name in enumerate(asked.names):
        if not 1 <= len(name) <= MODEL_NAME_CHARACTERS_MAX:
            refuse(file, f"{path}.names[{index}]", f"got {name!r}", "the name of a model, or `*` for every one")
    _within(asked.max_tokens, 1, MODEL_TOKENS_MAX, "tokens", file, f"{path}.max_tokens")
    if not is_pin(asked.pin):
        refuse(file, f"{path}.pin", f"got {asked.pin!r}", PINS)
    return ModelPermission(asked.names, asked.max_tokens, asked.pin)


def _http(asked: _Http, file: str, path: str) -> HttpPermission:
    hosts = []
    for index, text in enumerate(asked.hosts):
        host = parse_host(text)
        if host is None:
            expected = (
                "`example.org`, `*.example.org`, each with `:port` unless that is 443, or with `http://` in front"
            )
            refuse(file, f"{path}.hosts[{index}]", f"{text!r} is no host", expected)
        hosts.append(str(host))
    _different(hosts, HTTP_HOSTS_MAX, "hosts", "hosts", file, f"{path}.hosts")
    _different(asked.methods, len(METHODS), "methods", "of " + ", ".join(METHODS), file, f"{path}.methods")
    for index, method in enumerate(asked.methods):
        if method not in METHODS:
            close = nearest(method.upper(), METHODS)
            refuse(
                file,
                f"{path}.methods[{index}]",
                f"got {method!r}",
                f"`{close}`" if close else "one of " + ", ".join(METHODS),
            )
    return HttpPermission(tuple(hosts), asked.methods, asked.private)


def _kv(asked: _Kv, file: str, path: str) -> KvPermission:
    if not _NAMESPACE.match(asked.namespace):
        refuse(file, f"{path}.namespace", f"got {asked.namespace!r}", "a-z, 0-9, `.`, `_` and `-`, at most 63")
    quota = parse_quantity(asked.quota, file=file, path=f"{path}.quota")
    _within(quota, 1, KV_QUOTA_BYTES_MAX, "bytes", file, f"{path}.quota")
    return KvPermission(asked.namespace, quota)


def _fork(asked: _Fork, file: str, path: str) -> ForkPermission:
    _different(asked.agents, FORK_AGENTS_MAX, "agents", "names", file, f"{path}.agents")
    for index, reference in enumerate(asked.agents):
        name, at, version = reference.partition("@")
        if not is_name(name) or (at and not is_version(version)):
            refuse(file, f"{path}.agents[{index}]", f"got {reference!r}", "`name` or `name@version`")
    _within(asked.max, 1, FORK_MAX, "children", file, f"{path}.max")
    _within(asked.depth, 1, FORK_DEPTH_MAX, "levels", file, f"{path}.depth")
    return ForkPermission(asked.agents, asked.max, asked.depth)


def _within(value: int, least: int, most: int, unit: str, file: str, path: str) -> None:
    if not least <= value <= most:
        refuse(file, path, f"got {value}", f"{least} to {most} {unit}")


def _different(
    values: tuple[str, ...] | list[str], most: int, what: str, expected: str, file: str, path: str
) -> None:
    if not 1 <= len(values) <= most or len(set(values)) < len(values):
        refuse(file, path, f"is no list of {what}", f"1 to {most} different {expected}")
