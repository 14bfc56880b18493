"""The questions that every host capability and every responder asks before it does something for an attempt."""

from typing import Final

from hive_common.contracts.permissions import Permissions
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions.hosts import Host
from hive_common.permissions.lattice import agent_covers, host_of, model_covers

SHOWN_MAX: Final = 10
SHOWN_CHARACTERS_MAX: Final = 80


def denied(permission: str, why: str) -> PermissionDenied:
    """Return the error that ends an attempt: `permission` is the name of what it lacks."""
    return PermissionDenied(f"the permission `{permission}` {why}", permission=permission)


def check_model(permissions: Permissions, model: str) -> None:
    """Check that a model may be called.

    Raises:
        PermissionDenied: `fields` has `permission`, as for all of these.
    """
    if permissions.model is None:
        raise denied("model", "is not granted")
    if not any(model_covers(name, model) for name in permissions.model.names):
        raise _other("model", permissions.model.names, model)


def check_http(permissions: Permissions, target: Host, method: str) -> None:
    """Check that a request may go to a host. Whether its address may be private is asked when it is resolved.

    Args:
        target: what the URL names: `Host(name, port, encrypted)`.
        method: in capitals.
    """
    http = permissions.http
    if http is None:
        raise denied("http", "is not granted")
    if target.below or not any(found.covers(target) for found in map(host_of, http.hosts) if found is not None):
        raise _other("http", http.hosts, str(target))
    if method not in http.methods:
        raise _other("http", http.methods, method)


def check_kv(permissions: Permissions, namespace: str) -> None:
    """Check that keys of a namespace may be used."""
    if permissions.kv is None:
        raise denied("kv", "is not granted")
    if permissions.kv.namespace != namespace:
        raise _other("kv", (permissions.kv.namespace,), namespace)


def check_fork(permissions: Permissions, agent: str, *, made: int, depth: int) -> None:
    """Check that a child task may be made.

    Args:
        agent: `name@version`.
        made: children that the task has already.
        depth: how many tasks deep the child would be below the one to which forking was granted.
    """
    fork = permissions.fork
    if fork is None:
        raise denied("fork", "is not granted")
    if not any(agent_covers(name, agent) for name in fork.agents):
        raise _other("fork", fork.agents, agent)
    if made >= fork.max:
        raise denied("fork", f"is granted for {fork.max} children, which there are already")
    if depth > fork.depth:
        raise denied("fork", f"is granted to a depth of {fork.depth}")


def check_scratch(permissions: Permissions, used_bytes: int) -> None:
    """Check that a scratch folder may hold so much."""
    if permissions.scratch_bytes <= 0:
        raise denied("scratch", "is not granted")
    if used_bytes > permissions.scratch_bytes:
        raise denied("scratch", f"is granted for {permissions.scratch_bytes} bytes, not for {used_bytes}")


def _other(permission: str, allowed: tuple[str, ...], wanted: str) -> PermissionDenied:
    shown = ", ".join(allowed[:SHOWN_MAX]) + (", …" if len(allowed) > SHOWN_MAX else "")
    return denied(permission, f"is granted for {shown}, not for {wanted[:SHOWN_CHARACTERS_MAX]!r}")
