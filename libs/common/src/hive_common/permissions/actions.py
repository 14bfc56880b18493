"""What exactly a guest wants to do, where a person is asked first: one canonical text, and its hash.

Device and services make the action of the same thing each for itself, so that what is done is what was approved.
The text is JSON in the manner of RFC 8785: members sorted by name, no spaces, and here no numbers but whole ones.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from hive_common.contracts.events import KvWrite
from hive_common.contracts.limits import APPROVAL_ACTION_BYTES_MAX
from hive_common.contracts.permissions import PERMISSIONS, Permissions
from hive_common.kernel.errors import InvalidArgument
from hive_common.permissions.checks import denied

EXCERPT_BYTES_MAX: Final = 2_048
"""So much of a body, a value or a prompt stands in the action itself; all of it is in the digest."""

SHOWN_HEADERS: Final = frozenset(
    {
        "accept",
        "accept-language",
        "cache-control",
        "content-language",
        "content-location",
        "content-type",
        "if-modified-since",
        "if-none-match",
        "range",
        "user-agent",
    }
)
"""Any other header may hold a secret, which must not get into the log: its digest stands in the action."""

MODEL_LIMITS: Final = frozenset({"model", "stream", "max_tokens", "max_completion_tokens", "n_predict"})
"""Not part of what is digested of a model call: the model is named beside it, and the device lowers the limits to
what the permission leaves."""

_KEYS: Final = frozenset({"agent", "permission", "operation", "what"})


class Action(NamedTuple):
    """What a guest wants to do.

    Attributes:
        agent: `name@version` of whose guest wants it.
        permission: that it takes.
        text: canonical JSON: `agent`, `permission`, `operation`, and `what` exactly.
    """

    agent: str
    permission: str
    text: str

    @property
    def hash(self) -> str:
        """SHA-256 of the bytes of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def canonical(value: Any) -> str:
    """Return a value as canonical JSON.

    Raises:
        InvalidArgument: text in it is no Unicode, or it is too deep.
    """
    try:
        return msgspec.json.encode(value, order="sorted").decode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise InvalidArgument(f"no canonical JSON: {error}") from error


def read_action(text: str) -> Action:
    """Return the action of a text that somebody else made.

    Raises:
        InvalidArgument: it is none, or not in its canonical form: two texts must not mean the same.
    """
    if len(text.encode(errors="surrogatepass")) > APPROVAL_ACTION_BYTES_MAX:
        raise InvalidArgument(f"action: expected {APPROVAL_ACTION_BYTES_MAX} bytes at most", path="action")
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"action: {error}; expected JSON", path="action") from error
    good = found.keys() == _KEYS and found["permission"] in PERMISSIONS
    if not good or not all(isinstance(found[name], str) for name in _KEYS - {"what"}):
        raise InvalidArgument("action: expected agent, permission, operation, and what", path="action")
    if canonical(found) != text:
        raise InvalidArgument("action: not in its canonical form", path="action")
    return Action(found["agent"], found["permission"], text)


def check_approved(permissions: Permissions, approved: Collection[str], action: Action) -> None:
    """Check that a person approved of an action, where one has to be asked.

    Raises:
        PermissionDenied: nobody did.
    """
    if action.permission in permissions.asks and action.hash not in approved:
        raise denied(action.permission, "is granted with a question at each use, and nobody approved of just this")


def http_action(agent: str, method: str, url: str, headers: Iterable[tuple[str, str]], body: bytes) -> Action:
    """Return the action of a request. Redirects are not part of it: each is one of its own."""
    named = [
        [name.lower(), value if name.lower() in SHOWN_HEADERS else f"sha256:{_digest(value.encode())}"]
        for name, value in headers
    ]
    what: dict[str, Any] = {"method": method, "url": url, "headers": sorted(named)}
    if body:
        what["body"] = _extract(body)
    return _action(agent, "http", "request", what)


def kv_read_action(agent: str, namespace: str, key: str) -> Action:
    """Return the action of reading one value."""
    return _action(agent, "kv", "get", {"namespace": namespace, "key": key})


def kv_list_action(agent: str, namespace: str, prefix: str) -> Action:
    """Return the action of listing keys, all pages of them."""
    return _action(agent, "kv", "keys", {"namespace": namespace, "prefix": prefix})


def kv_write_action(agent: str, namespace: str, write: KvWrite) -> Action:
    """Return the action of writing a value, or of deleting it."""
    what: dict[str, Any] = {"namespace": namespace, "key": write.key}
    if isinstance(write.value, msgspec.UnsetType):
        return _action(agent, "kv", "delete", what)
    return _action(agent, "kv", "put", {**what, "value": _extract(bytes(write.value))})


def model_action(
    agent: str, endpoint: str, model: str, body: Mapping[str, msgspec.Raw], counts_only: bool = False
) -> Action:
    """Return the action of a model call.

    Args:
        body: by parameter, each as JSON.
        counts_only: nothing of the prompt may be kept, not even its beginning.
    """
    rest = {name: value for name, value in body.items() if name not in MODEL_LIMITS}
    request = _extract(canonical(rest).encode())
    if counts_only:
        del request["begins"]
    return _action(agent, "model", endpoint, {"model": model, "request": request})


def fork_action(agent: str, child: str, inputs: Sequence[bytes]) -> Action:
    """Return the action of forking tasks, all with one call.

    Args:
        child: `name@version` of the tasks.
        inputs: of each, JSON.
    """
    what = {"agent": child, "tasks": len(inputs), "inputs": _extract(b"[" + b",".join(inputs) + b"]")}
    return _action(agent, "fork", "create", what)


def scratch_action(agent: str, size_bytes: int) -> Action:
    """Return the action of having files while an attempt runs."""
    return _action(agent, "scratch", "use", {"bytes": size_bytes})


def _action(agent: str, permission: str, operation: str, what: dict[str, Any]) -> Action:
    text = canonical({"agent": agent, "permission": permission, "operation": operation, "what": what})
    return Action(agent, permission, text)


def _extract(data: bytes) -> dict[str, Any]:
    """Return a digest of all of it, its size, and its beginning for a person to read."""
    excerpt = data[:EXCERPT_BYTES_MAX].decode(errors="replace")
    return {"sha256": _digest(data), "bytes": len(data), "begins": excerpt}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
