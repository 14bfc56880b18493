"""Configuration of the NATS server: where it listens, JetStream, and whom it trusts.

There is no listener for websocket, MQTT or leafnodes, and monitoring stays on the loopback. Who may say what does
not stand here but in the credentials: `hive_common.bus.policy`.
"""

import json
from pathlib import Path

from hive_common.ops.tls import check_listener

from hive_cli.supervisor.certificates import Files

PAYLOAD_BYTES_MAX = 1024 * 1024
STORE_BYTES_MIN = 64 * 1024 * 1024
STORE_BYTES_MAX = 4 * 1024 * 1024 * 1024
AUTHORIZATION_S = 5


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
    trust: str,
    host: str = "127.0.0.1",
    store_bytes_max: int | None = None,
    tls: Files | None = None,
    engine_network: bool = False,
) -> str:
    """Return the configuration file. It holds no secrets, but what the server is asked to trust.

    Args:
        port: for clients.
        monitor_port: for health checks, loopback only.
        store_dir: of JetStream.
        trust: from `Authority.server_text`.
        host: address that clients connect to.
        store_bytes_max: how much JetStream may store; None leaves it to the server.
        tls: certificate and key; with them every client has to speak TLS from its first byte on.
        engine_network: as in `ServiceConfig`.

    Raises:
        ValueError: others than this machine could connect, and without TLS.
    """
    if tls is None:
        check_listener("host", host, engine_network=engine_network)
    bound = f"\n  max_file_store: {store_bytes_max}" if store_bytes_max is not None else ""
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
  timeout: {AUTHORIZATION_S}
}}
{_tls(tls) if tls is not None else ""}{trust}"""


def _tls(tls: Files) -> str:
    return f"""tls {{
  cert_file: {json.dumps(str(tls.certificate))}
  key_file: {json.dumps(str(tls.key))}
  handshake_first: true
}}
"""
