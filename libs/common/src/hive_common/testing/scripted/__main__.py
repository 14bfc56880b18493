"""`python -m hive_common.testing.scripted --port 8600 --tokens 64 --pace-ms 5`."""

import argparse
import asyncio
import signal

import msgspec

from hive_common.ops.lifecycle import die_with_parent, loop_factory
from hive_common.testing.scripted.script import Script, ScriptedModel
from hive_common.testing.scripted.server import ScriptedBackEnd


async def _serve(script: Script, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with ScriptedBackEnd(script, port=port, host=host) as back_end:
        print(f"{back_end.url} plays {script.tokens} tokens, {script.pace_ms:g} ms apart", flush=True)
        await stop.wait()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m hive_common.testing.scripted", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pace-ms", type=float, default=0)
    parser.add_argument("--first-token-ms", type=float, default=0)
    parser.add_argument("--script", default="{}", help="further fields of Script, as JSON")
    parser.add_argument("--stay", action="store_true", help="do not end with the process that started it")
    given = parser.parse_args()
    script = Script(
        models=(ScriptedModel(name=given.model),),
        tokens=given.tokens,
        pace_ms=given.pace_ms,
        first_token_ms=given.first_token_ms,
    )
    script = msgspec.convert({**msgspec.to_builtins(script), **msgspec.json.decode(given.script)}, Script)
    if not given.stay:
        die_with_parent(signal.SIGTERM)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(script, given.host, given.port))


if __name__ == "__main__":
    main()
