import asyncio
import json
import sys

import aiohttp
import msgspec
import pytest
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.kernel.ids import derive_id
from hive_common.ops.config import write_config
from hive_common.ops.lifecycle import Stop
from hive_common.ops.ports import free_port
from hive_gateway.bootstrap import Gateway, main
from hive_gateway.keys import KeyRing
from hive_gateway.settings import KeySettings, settings_of


async def test_the_process_serves_and_ends_on_sigterm_with_a_stream_open(world, tmp_path, read_sse):
    http_port = free_port()
    config = msgspec.structs.replace(world.config(http_port=http_port), grpc_port=free_port())
    write_config(tmp_path / "gateway.json", config)
    command = [sys.executable, "-m", "hive_gateway", "--config", str(tmp_path / "gateway.json"), "--supervised"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    ops = f"http://127.0.0.1:{config.ops_port}"
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    headers = {"Authorization": f"Bearer {world.keys['admin']}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with asyncio.timeout(60):
            while not await _ready(http, f"{ops}/readyz"):
                assert process.returncode is None
                await asyncio.sleep(0.05)
        async with http.get(f"http://127.0.0.1:{http_port}/v1/jobs/{job.job_id}/stream") as response:
            await read_sse(response, 1)
            process.terminate()
            rest = await response.content.read()
            assert b"[DONE]" not in rest
        _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, stderr.decode()
    entries = [json.loads(line) for line in stderr.decode().splitlines()]
    assert entries[-1]["message"] == "stopped: SIGTERM"
    assert not any(entry["level"] == "error" for entry in entries), entries
    for secret in (*world.keys.values(), world.service_key):
        assert secret not in stderr.decode()


async def _ready(http, url):
    try:
        async with http.get(url) as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


@pytest.mark.parametrize("which", ["http", "grpc", "ops"])
async def test_a_taken_port_is_named(world, which):
    taken = world.gateway.http_port
    config = world.config(http_port=taken if which == "http" else 0)
    if which != "http":
        config = msgspec.structs.replace(config, **{f"{which}_port": taken})
    with pytest.raises(FailedPrecondition, match=str(taken)):
        await main(config, Stop())


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"keys": []}, "at least one key"),
        ({"keys": [{"name": "a", "scope": "root", "file": "x"}]}, r"\$\.keys\[0\]\.scope"),
        ({"http_prot": 1}, "unknown field `http_prot`"),
        ({"http_port": "x"}, r"\$\.http_port"),
        ({"keys": [{"name": "a", "scope": "admin", "file": "/nonexistent"}]}, "/nonexistent: cannot be read"),
    ],
)
async def test_a_bad_configuration_names_the_place(world, extra, says):
    with pytest.raises(InvalidArgument, match=says):
        Gateway(world.config(**extra))


async def test_a_peer_that_is_not_named_is_missed(world):
    config = msgspec.structs.replace(world.config(), peers={"scheduler": "127.0.0.1:1"})
    with pytest.raises(InvalidArgument, match="registry"):
        settings_of(config)


def test_a_key_that_others_may_read_is_refused(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret")
    file.chmod(0o644)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        KeyRing.load([KeySettings("a", "admin", str(file))], "owner")


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b")])
def test_two_keys_of_one_name_or_one_secret_are_refused(tmp_path, names):
    keys = []
    for number, name in enumerate(names):
        file = tmp_path / str(number)
        file.touch(mode=0o600)
        file.write_text("same" if names[0] != names[1] else str(number))
        keys.append(KeySettings(name, "admin", str(file)))
    with pytest.raises(InvalidArgument, match="two keys have the same"):
        KeyRing.load(keys, "owner")


def test_a_caller_is_a_pseudonym_of_its_owner_and_name(tmp_path):
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text("secret\n")
    ring = KeyRing.load([KeySettings("laptop", "admin", str(file))], "owner")
    caller = ring.caller("Bearer secret")
    assert caller.pseudonym == derive_id("caller", "owner", "laptop") and caller.scope == "admin"
