"""An extension: prints every event of a HiveFabric installation as it is committed."""

import argparse
import asyncio
import json
import os
from pathlib import Path

import nats
from nats.js.api import DeliverPolicy


async def watch(url: str, password: str, since: DeliverPolicy, count: int) -> None:
    client = await nats.connect(url, user="extension", password=password, inbox_prefix="_INBOX.extension")
    events = await client.jetstream().subscribe(
        "hive.events.>", stream="HIVE_EVENTS", ordered_consumer=True, deliver_policy=since
    )
    async for message in events.messages:
        event = json.loads(message.data)
        print(event["position"], event["type"], event["stream"], flush=True)
        count -= 1
        if count == 0:
            break
    await client.close()


def main() -> None:
    home = Path(os.environ.get("HIVE_HOME") or "~/.hivefabric").expanduser()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of NATS; default: the one in $HIVE_HOME/hive.json")
    parser.add_argument("--password-file", type=Path, default=home / "secrets" / "nats-extension")
    parser.add_argument("--all", action="store_true", help="from the first event on, not only new ones")
    parser.add_argument("--count", type=int, default=0, help="stop after so many events")
    options = parser.parse_args()
    if not options.url and not (home / "hive.json").exists():
        parser.error(f"{home}: no installation here; start one with: hive up")
    url = options.url or json.loads((home / "hive.json").read_text())["endpoints"]["nats"]
    since = DeliverPolicy.ALL if options.all else DeliverPolicy.NEW
    asyncio.run(watch(url, options.password_file.read_text().strip(), since, options.count))


if __name__ == "__main__":
    main()
