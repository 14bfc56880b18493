"""An extension: prints every event of a HiveFabric installation as it is committed."""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import RawCredentials
from nats.js.api import ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError


async def watch(access: dict[str, Any], since: DeliverPolicy, count: int) -> None:
    ca = access["ca_file"]
    client = await nats.connect(
        access["url"],
        user_credentials=RawCredentials(access["credentials"]),
        inbox_prefix=access["inbox_prefix"],
        **({"tls": ssl.create_default_context(cafile=ca), "tls_handshake_first": True} if ca else {}),
    )
    js, name = client.jetstream(), access["name"]
    with contextlib.suppress(NotFoundError):
        await js.delete_consumer("HIVE_EVENTS", name)  # of an earlier run
    events = await js.subscribe(
        "hive.events.>",
        stream="HIVE_EVENTS",
        ordered_consumer=True,
        idle_heartbeat=1,  # s; a stream that is gone is noticed after two to four of them
        config=ConsumerConfig(name=name, deliver_policy=since),
    )
    async for message in events.messages:
        event = json.loads(message.data)
        print(event["position"], event["type"], event["stream"], flush=True)
        count -= 1
        if count == 0:
            break
    await client.close()


def ask_for_access() -> str:
    """Ask the installation of this machine. Elsewhere, take along what the same command prints there."""
    hive = shutil.which("hive") or str(Path(sys.executable).with_name("hive"))
    name = f"subscribe-{os.getpid()}"
    command = [hive, "extension", "token", name, "--expires", "1d", "--json"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    home = Path(os.environ.get("HIVE_HOME") or "~/.hivefabric").expanduser()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--access", type=Path, help="what `hive extension token NAME --json` has printed")
    parser.add_argument("--all", action="store_true", help="from the first event on, not only new ones")
    parser.add_argument("--count", type=int, default=0, help="stop after so many events")
    options = parser.parse_args()
    if not options.access and not (home / "hive.json").exists():
        parser.error(f"{home}: no installation here; start one with: hive up")
    access = json.loads(options.access.read_text() if options.access else ask_for_access())
    since = DeliverPolicy.ALL if options.all else DeliverPolicy.NEW
    asyncio.run(watch(access, since, options.count))


if __name__ == "__main__":
    main()
