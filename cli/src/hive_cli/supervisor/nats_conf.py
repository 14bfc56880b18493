"""Configuration of the NATS server: JetStream, one user per executor.

Executors talk under their own subjects and their own inbox, and have no JetStream API. Permissions are
allow-lists: deny-lists had bypasses.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from hive_common.contracts.messages import EVENTS_STREAM, EVENTS_SUBJECTS, inbox_prefix

PAYLOAD_BYTES_MAX = 1024 * 1024
STORE_BYTES_MIN = 64 * 1024 * 1024
STORE_BYTES_MAX = 4 * 1024 * 1024 * 1024
SERVICES_USER = "services"
EXTENSION_USER = "extension"


@dataclass(frozen=True)
class User:
    """A user of NATS. Without subjects it may do everything.

    Attributes:
        publish: subjects it may publish to.
        subscribe: subjects it may subscribe to.
    """

    name: str
    password: str = field(repr=False)
    publish: tuple[str, ...] | None = None
    subscribe: tuple[str, ...] | None = None


def services_user(password: str) -> User:
    """Return the user of the control plane."""
    return User(SERVICES_USER, password)


def executor_user(name: str, executor_id: str, password: str) -> User:
    """Return the user of one executor."""
    own = f"hive.exec.{executor_id}"
    return User(
        name,
        password,
        publish=(f"{own}.>",),
        subscribe=(f"{own}.control", f"{own}.infer", "hive.control.>", f"{inbox_prefix(executor_id)}.>"),
    )


def extension_user(password: str) -> User:
    """Return the user that extensions share: it reads the published events and nothing else.

    Its clients use the inbox prefix `_INBOX.extension`.
    """
    api = "$JS.API"
    reads = (
        f"{api}.INFO",
        f"{api}.STREAM.NAMES",
        f"{api}.STREAM.INFO.{EVENTS_STREAM}",
        f"{api}.STREAM.MSG.GET.{EVENTS_STREAM}",
        f"{api}.DIRECT.GET.{EVENTS_STREAM}",
        f"{api}.DIRECT.GET.{EVENTS_STREAM}.>",
        f"{api}.CONSUMER.CREATE.{EVENTS_STREAM}",
        f"{api}.CONSUMER.CREATE.{EVENTS_STREAM}.>",
        f"{api}.CONSUMER.DURABLE.CREATE.{EVENTS_STREAM}.>",
        f"{api}.CONSUMER.INFO.{EVENTS_STREAM}.>",
        f"{api}.CONSUMER.DELETE.{EVENTS_STREAM}.>",
        f"{api}.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.>",
        f"$JS.ACK.{EVENTS_STREAM}.>",
        f"$JS.FC.{EVENTS_STREAM}.>",
    )
    return User(EXTENSION_USER, password, publish=reads, subscribe=(EVENTS_SUBJECTS, f"_INBOX.{EXTENSION_USER}.>"))


def store_bytes(free_bytes: int, stored_bytes: int) -> int:
    """Return how much JetStream may store, for a disk with `free_bytes` on which it has `stored_bytes` already.

    Left to itself the server takes what is free at its start: on a full disk nothing, and it stays with nothing
    after space was made. What it stores is a copy of the log, so that half of a small disk is for others.
    """
    return max(STORE_BYTES_MIN, min(STORE_BYTES_MAX, (free_bytes + stored_bytes) // 2))


def render(
    *,
    port: int,
    monitor_port: int,
    store_dir: Path,
    users: list[User],
    host: str = "127.0.0.1",
    store_bytes_max: int | None = None,
) -> str:
    """Return the configuration file. It holds the passwords.

    Args:
        port: for clients.
        monitor_port: for health checks, loopback only.
        store_dir: of JetStream.
        users: everybody who may connect.
        host: address that clients connect to.
        store_bytes_max: how much JetStream may store; None leaves it to the server.
    """
    bound = f"\n  max_file_store: {store_bytes_max}" if store_bytes_max is not None else ""
    entries = "\n".join(f"    {_user(user)}" for user in users)
    return f"""# Written by `hive up`; changes are lost.
host: "{host}"
port: {port}
http: "127.0.0.1:{monitor_port}"
server_name: "hive"
max_payload: {PAYLOAD_BYTES_MAX}
jetstream {{
  store_dir: {json.dumps(str(store_dir))}{bound}
}}
authorization {{
  timeout: 5
  users: [
{entries}
  ]
}}
"""


def _user(user: User) -> str:
    parts = [f"user: {json.dumps(user.name)}", f"password: {json.dumps(user.password)}"]
    if user.publish is not None and user.subscribe is not None:
        publish = json.dumps(list(user.publish))
        subscribe = json.dumps(list(user.subscribe))
        parts.append(f"permissions: {{publish: {{allow: {publish}}}, subscribe: {{allow: {subscribe}}}}}")
    return "{" + ", ".join(parts) + "}"
