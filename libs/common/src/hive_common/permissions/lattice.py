"""How sets of permissions compare: `meet` is what two allow together, `covers` whether one is within another.

    covers(parent, meet(parent, anything))        a child can only get less
    covers(a, b) exactly if meet(a, b) is as b

Names of models stay in their order, because the first one is the one that is called where a guest names none.
"""

from collections.abc import Callable
from functools import lru_cache

import msgspec

from hive_common.contracts.permissions import (
    PERMISSIONS,
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.inference.calls import narrowest
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions.hosts import Host, parse_host

ANY_MODEL = "*"
READING = ("GET", "HEAD")
"""Methods of HTTP that change nothing (RFC 9110, section 9.2.1)."""


def named(permissions: Permissions) -> tuple[str, ...]:
    """Return the names of what is permitted."""
    return tuple(name for name in PERMISSIONS if _has(permissions, name))


def only(permissions: Permissions, *names: str) -> Permissions:
    """Return the permissions of these names alone."""
    return Permissions(
        model=permissions.model if "model" in names else None,
        http=permissions.http if "http" in names else None,
        kv=permissions.kv if "kv" in names else None,
        fork=permissions.fork if "fork" in names else None,
        scratch_bytes=permissions.scratch_bytes if "scratch" in names else 0,
        asks=tuple(name for name in permissions.asks if name in names),
    )


def joined(first: Permissions, second: Permissions, asks: tuple[str, ...] = ()) -> Permissions:
    """Return two sets that have no permission in common as one, in which a person is also asked for `asks`."""
    return Permissions(
        model=first.model or second.model,
        http=first.http or second.http,
        kv=first.kv or second.kv,
        fork=first.fork or second.fork,
        scratch_bytes=first.scratch_bytes or second.scratch_bytes,
        asks=tuple(name for name in PERMISSIONS if name in (*first.asks, *second.asks, *asks)),
    )


def meet(first: Permissions, second: Permissions) -> Permissions:
    """Return what both allow. Whoever one of them says to ask is asked."""
    both = Permissions(
        model=_model(first.model, second.model),
        http=_http(first.http, second.http),
        kv=_kv(first.kv, second.kv),
        fork=_fork(first.fork, second.fork),
        scratch_bytes=max(0, min(first.scratch_bytes, second.scratch_bytes)),
    )
    asked = {*first.asks, *second.asks}
    return msgspec.structs.replace(both, asks=tuple(name for name in named(both) if name in asked))


def covers(parent: Permissions, child: Permissions) -> bool:
    """Say whether a child may do nothing that its parent could not."""
    return not widened(parent, child)


def widened(parent: Permissions, child: Permissions) -> tuple[str, ...]:
    """Return the names of those permissions in which a child has more than its parent."""
    return tuple(name for name in named(child) if not _covers_one(parent, child, name))


def reading(http: HttpPermission) -> HttpPermission | None:
    """Return what of a permission changes nothing, for tasks that are done several times; None: nothing."""
    methods = tuple(method for method in http.methods if method in READING)
    return msgspec.structs.replace(http, methods=methods) if methods else None


def model_covers(wide: str, narrow: str) -> bool:
    """Say whether a name of a model in a permission stands for another one too."""
    return wide in (ANY_MODEL, narrow)


def delegated(parent: Permissions, own: Permissions) -> Permissions:
    """Return what a task may do that another one forked: no more than that one, and one level less of forking.

    Args:
        parent: what the task that forked it may do.
        own: what its agent may do alone.
    """
    fork = parent.fork
    if fork is not None:
        less = msgspec.structs.replace(fork, depth=fork.depth - 1) if fork.depth > 1 else None
        parent = msgspec.structs.replace(parent, fork=less)
    return meet(parent, own)


def agent_covers(wide: str, narrow: str) -> bool:
    """Say whether `name` or `name@version` stands for another one too."""
    return wide == narrow or ("@" not in wide and narrow.partition("@")[0] == wide)


@lru_cache(maxsize=4096)
def host_of(text: str) -> Host | None:
    """Return a host of a permission; None where it is none, and stands for nothing."""
    return parse_host(text)


def host_covers(wide: str, narrow: str) -> bool:
    """Say whether a host of a permission stands for another one too."""
    first, second = host_of(wide), host_of(narrow)
    return first is not None and second is not None and first.covers(second)


def _has(permissions: Permissions, name: str) -> bool:
    return permissions.scratch_bytes > 0 if name == "scratch" else getattr(permissions, name) is not None


def _covers_one(parent: Permissions, child: Permissions, name: str) -> bool:
    if not _has(parent, name) or (name in parent.asks and name not in child.asks):
        return False
    match name:
        case "model":
            return _model_within(parent.model, child.model)
        case "http":
            return _http_within(parent.http, child.http)
        case "kv":
            return _kv_within(parent.kv, child.kv)
        case "fork":
            return _fork_within(parent.fork, child.fork)
        case _:
            return parent.scratch_bytes >= child.scratch_bytes


def _model_within(parent: ModelPermission | None, child: ModelPermission | None) -> bool:
    assert parent is not None and child is not None
    return (
        _all_within(parent.names, child.names, model_covers)
        and child.max_tokens <= parent.max_tokens
        and _pin(parent.pin, child.pin) == child.pin
    )


def _http_within(parent: HttpPermission | None, child: HttpPermission | None) -> bool:
    assert parent is not None and child is not None
    return (
        _all_within(parent.hosts, child.hosts, host_covers)
        and set(child.methods) <= set(parent.methods)
        and (parent.private or not child.private)
    )


def _kv_within(parent: KvPermission | None, child: KvPermission | None) -> bool:
    assert parent is not None and child is not None
    return parent.namespace == child.namespace and child.quota_bytes <= parent.quota_bytes


def _fork_within(parent: ForkPermission | None, child: ForkPermission | None) -> bool:
    assert parent is not None and child is not None
    within = _all_within(parent.agents, child.agents, agent_covers)
    return within and child.max <= parent.max and child.depth <= parent.depth


def _model(first: ModelPermission | None, second: ModelPermission | None) -> ModelPermission | None:
    if first is None or second is None:
        return None
    names = _both(first.names, second.names, model_covers)
    pin = _pin(first.pin, second.pin)
    tokens = min(first.max_tokens, second.max_tokens)
    return ModelPermission(names, tokens, pin) if names and pin and tokens > 0 else None


def _http(first: HttpPermission | None, second: HttpPermission | None) -> HttpPermission | None:
    if first is None or second is None:
        return None
    hosts = _both(first.hosts, second.hosts, host_covers)
    methods = tuple(method for method in first.methods if method in second.methods)
    return HttpPermission(hosts, methods, first.private and second.private) if hosts and methods else None


def _kv(first: KvPermission | None, second: KvPermission | None) -> KvPermission | None:
    if first is None or second is None or first.namespace != second.namespace:
        return None
    quota = min(first.quota_bytes, second.quota_bytes)
    return KvPermission(first.namespace, quota) if quota > 0 else None


def _fork(first: ForkPermission | None, second: ForkPermission | None) -> ForkPermission | None:
    if first is None or second is None:
        return None
    agents = _both(first.agents, second.agents, agent_covers)
    most, depth = min(first.max, second.max), min(first.depth, second.depth)
    return ForkPermission(agents, most, depth) if agents and most > 0 and depth > 0 else None


def _pin(first: str, second: str) -> str:
    """Return the narrower pin; empty where they exclude each other."""
    try:
        return narrowest(first, second)
    except PermissionDenied:
        return ""


def _all_within(parent: tuple[str, ...], child: tuple[str, ...], wide: Callable[[str, str], bool]) -> bool:
    return all(any(wide(one, other) for one in parent) for other in child)


def _both(first: tuple[str, ...], second: tuple[str, ...], wide: Callable[[str, str], bool]) -> tuple[str, ...]:
    """Return what stands in both. Of two names one stands for the other, or nothing is in both."""
    found = [one for one in first if any(wide(other, one) for other in second)]
    found += [other for other in second if any(wide(one, other) for one in first)]
    return tuple(dict.fromkeys(found))
