import asyncio
import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from hive_common.contracts.events import Capabilities, Gpu, Power
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.config import load_config
from hive_common.ops.ports import free_port
from hive_executor import capabilities, machine
from hive_executor.blobs import BlobClient, Flights, FolderCache
from hive_executor.capabilities import Device, is_news
from hive_executor.config import ExecutorConfig
from hive_executor.gate import Gate, Prefetch
from hive_executor.gateway import Gateway
from hive_executor.lock import FolderLock
from hive_executor.pulls import Lease


class ManualClock:
    def __init__(self):
        self.ms = 1_000_000

    def now_us(self):
        return self.ms * 1000

    def boot_ms(self):
        return self.ms


# --- gate --------------------------------------------------------------------------------------------------


async def test_the_gate_lets_in_as_many_as_there_are_slots_in_the_order_they_came():
    gate, order, most = Gate(2, 1000), [], 0

    async def guest(n):
        nonlocal most
        async with gate.admitted(1):
            order.append(n)
            most = max(most, gate.running)
            await asyncio.sleep(0.001)

    await asyncio.gather(*(guest(n) for n in range(10)))
    assert (order, most, gate.running) == (list(range(10)), 2, 0)


async def test_the_gate_counts_memory_and_lets_a_too_large_guest_in_alone():
    gate, inside = Gate(4, 100), []

    async def guest(memory):
        async with gate.admitted(memory):
            inside.append(memory)
            assert sum(inside) <= 100 or inside == [500]
            await asyncio.sleep(0.001)
            inside.remove(memory)

    await asyncio.gather(*(guest(memory) for memory in (60, 30, 60, 500, 10, 90, 10)))
    assert gate.running == 0


async def test_a_guest_that_is_cancelled_while_it_waits_takes_no_slot():
    gate = Gate(1, 100)
    async with gate.admitted(1):
        waiting = asyncio.create_task(_enter(gate))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    await asyncio.wait_for(_enter(gate), 1)
    assert gate.running == 0


async def test_guests_that_run_and_wait_may_all_be_cancelled_at_once():
    """As when a job is cancelled: the one that leaves must not let in one that has just been cancelled."""
    gate = Gate(1, 100)
    guests = [asyncio.create_task(_stay(gate)) for _ in range(4)]
    await asyncio.sleep(0)
    assert gate.running == 1
    for guest in guests:
        guest.cancel()
    ended = await asyncio.gather(*guests, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    await asyncio.wait_for(_enter(gate), 1)
    assert gate.running == 0


async def _stay(gate):
    async with gate.admitted(1):
        await asyncio.Event().wait()


async def _enter(gate):
    async with gate.admitted(1):
        pass


def test_prefetch_asks_for_more_only_while_attempts_are_short():
    prefetch = Prefetch(2, 16, 50)
    assert prefetch.depth == 0
    prefetch.observe(2)
    assert prefetch.depth == 16
    prefetch.observe(5_000)
    assert prefetch.depth == 0


# --- lease -------------------------------------------------------------------------------------------------


def test_a_lease_counts_from_the_sending_of_the_pull():
    clock = ManualClock()
    lease = Lease(clock)
    assert not lease.is_valid
    sent = clock.ms
    clock.ms += 4_000  # the answer took so long
    lease.renew(sent, 6_000)
    assert lease.is_valid
    assert lease.age_ms == 4_000
    clock.ms += 2_000
    assert not lease.is_valid
    lease.renew(sent - 5_000, 6_000)  # an answer to an earlier pull comes late and takes nothing back
    assert lease.age_ms == 6_000


# --- blobs -------------------------------------------------------------------------------------------------


def test_the_cache_drops_what_was_not_used_for_longest(tmp_path):
    cache = FolderCache(tmp_path, 250)
    blobs = [bytes([n]) * 100 for n in range(3)]
    cache.put(blobs[0])
    cache.put(blobs[1])
    assert cache.get(digest_of(blobs[0])) == blobs[0]
    cache.put(blobs[2])
    assert [cache.get(digest_of(blob)) is not None for blob in blobs] == [True, False, True]
    again = FolderCache(tmp_path, 250)
    again.put(b"z" * 100)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 250


def test_a_damaged_blob_in_the_cache_is_a_miss(tmp_path):
    cache = FolderCache(tmp_path, 1000)
    path = cache.put(b"hello")
    path.write_bytes(b"hellO")
    assert cache.get(digest_of(b"hello")) is None
    assert not path.exists()


@pytest.fixture
async def blobs(tmp_path):
    """Makes clients of a gateway, and closes them."""
    made = []

    def make(url, header, timeout_ms):
        reached = Gateway(lambda: url, lambda: header)
        client = BlobClient(reached, FolderCache(tmp_path, 1000), timeout_ms)
        made.extend((client, reached))
        return client

    yield make
    for one in made:
        await one.close()


async def test_blobs_come_once_for_all_who_wait_and_then_from_the_cache(gateway, blobs):
    client = blobs(gateway.url, gateway.header(), 5_000)
    digest = gateway.keep(b"shared")
    assert await asyncio.gather(*(client.fetch(digest) for _ in range(5))) == [b"shared"] * 5
    assert await client.fetch(digest) == b"shared"
    assert gateway.requests == [("GET", digest)]


async def test_what_a_gateway_refuses_is_told_apart(gateway, blobs):
    client = blobs(gateway.url, {}, 300)
    with pytest.raises(Unavailable, match="401"):
        await client.fetch(digest_of(b"x"))
    client = blobs(gateway.url, gateway.header(), 300)
    with pytest.raises(NotFound):
        await client.fetch(digest_of(b"x"))
    with pytest.raises(InvalidArgument):
        await client.fetch("sha256:../../etc/passwd")
    client = blobs("", {}, 300)
    with pytest.raises(Unavailable, match="not known yet"):
        await client.store(b"x")


async def test_the_key_does_not_follow_a_redirect(blobs):
    seen = []

    async def elsewhere(request):
        seen.append(request.headers.get("Authorization"))
        return web.Response(body=b"x")

    async def redirect(request):
        raise web.HTTPFound(f"http://localhost:{port}/elsewhere")

    app = web.Application()
    app.router.add_get("/v1/blobs/{digest}", redirect)
    app.router.add_get("/elsewhere", elsewhere)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    client = blobs(f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}, 300)
    with pytest.raises(Unavailable, match="302"):
        await client.fetch(digest_of(b"x"))
    assert seen == []
    await runner.cleanup()


async def test_a_flight_goes_on_when_one_of_its_passengers_leaves():
    flights, landed = Flights(), asyncio.Event()

    async def fly():
        await landed.wait()
        return 42

    first, second = (asyncio.create_task(flights.join("a", fly)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    landed.set()
    assert await second == 42


# --- capabilities ------------------------------------------------------------------------------------------


async def test_the_device_describes_itself():
    found = await Device(slots=0, memory_bytes=0, labels={"room": "attic"}).capabilities(())
    assert found.cores >= 1
    assert found.slots == found.cores
    assert found.memory_bytes > 0
    assert found.arch in {"amd64", "arm64"}
    assert found.os in {"linux", "darwin"}
    assert found.runtimes == ("python", "component", "command")
    assert found.engine.startswith("wasmtime ")
    assert found.labels == {"room": "attic"}
    assert found.tier == "worker"


async def test_executors_of_one_machine_are_one_device_unless_they_say_otherwise():
    def device(**more):
        return Device(slots=1, memory_bytes=1, labels={}, **more)

    first, second = [await device().capabilities(()) for _ in range(2)]
    assert first.device == second.device == machine.device()
    simulated = await device(device="another", tier="core").capabilities(())
    assert (simulated.device, simulated.tier) == ("another", "core")


def test_the_machines_id_does_not_leave_it(tmp_path):
    file, missing = tmp_path / "machine-id", tmp_path / "none"
    file.write_text("4C4C4544004E3810805AB4C04F4B3333\n")
    found = machine._linux_id((missing, file))
    assert found == "4c4c4544004e3810805ab4c04f4b3333"
    told = machine.digest_of(found)
    assert len(told) == 32
    assert told not in (found, hashlib.sha256(found.encode()).hexdigest()[:32])
    assert told == machine.digest_of(found) != machine.digest_of(found[:-1] + "4")


@pytest.mark.parametrize("text", ["", "uninitialized\n"])
def test_a_machine_id_that_is_none_gives_way_to_the_boots(tmp_path, text):
    empty, boot = tmp_path / "machine-id", tmp_path / "boot_id"
    empty.write_text(text)
    boot.write_text("0b7f1d1e-6d0c-4a6c-9d39-5a0c7c3b1f00\n")
    assert machine._linux_id((empty, boot)) == "0b7f1d1e-6d0c-4a6c-9d39-5a0c7c3b1f00"
    assert machine._linux_id((empty,)) == ""


def test_the_platforms_uuid_is_read_from_what_macos_prints():
    printed = '+-o J314sAP  <class IOPlatformExpertDevice>\n    {\n      "IOPlatformUUID" = "1BA6-AA"\n    }\n'
    assert machine.uuid_in(printed) == "1ba6-aa"
    assert machine.uuid_in("") == ""


def test_graphics_processors_are_read_from_what_the_system_says(tmp_path: Path):
    assert capabilities._from_nvidia_smi("NVIDIA RTX 4090, 24564\nodd line\n") == (
        Gpu("NVIDIA RTX 4090", 24564 << 20),
    )
    assert capabilities._from_system_profiler('{"SPDisplaysDataType":[{"sppci_model":"Apple M3"}]}') == (
        Gpu("Apple M3"),
    )
    assert capabilities._from_system_profiler("not JSON") == ()
    for name, vendor in (("card0", "0x1002"), ("card1", "0x1234"), ("card0-HDMI-A-1", "0x1002")):
        (tmp_path / name / "device").mkdir(parents=True)
        (tmp_path / name / "device" / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device" / "device").write_text("0x744c\n")
        (tmp_path / name / "device" / "mem_info_vram_total").write_text("25753026560\n")
    assert capabilities._from_drm(tmp_path) == (Gpu("AMD 0x744c", 25753026560),)


def test_a_few_percent_of_battery_are_no_news_and_a_charger_is():
    def at(percent, charging=False):
        power = Power(battery_percent=percent, charging=charging)
        return Capabilities(
            os="linux", arch="arm64", cores=1, memory_bytes=1, slots=1, runtimes=("python",), power=power
        )

    assert is_news(None, at(50))
    assert not is_news(at(50), at(46))
    assert is_news(at(50), at(45))
    assert is_news(at(50), at(50, charging=True))
    assert is_news(at(50), msgspec.structs.replace(at(50), slots=2))


# --- lock --------------------------------------------------------------------------------------------------


async def test_a_folder_belongs_to_one_executor_at_a_time(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    await first.acquire()
    with pytest.raises(FailedPrecondition, match=f"process {os.getpid()}"):
        await second.acquire(wait_s=0.1)
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0.05)
    first.release()
    await waiting
    second.release()


# --- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"executor_id": "me"}, "executor_id is 'me'"),
        ({"spool_reports_max": 0}, "spool_reports_max"),
        ({"slots": -1}, "must not be negative"),
        ({"colour": "red"}, "colour"),
        ({"tier": "moon"}, "tier"),
        ({"name": ""}, "name is empty"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_its_field(tmp_path, change, said):
    good = {
        "name": "a",
        "executor_id": new_id(),
        "nats": {"url": "nats://127.0.0.1:4222", "credentials_file": "c"},
        "state_dir": "s",
        "cache_dir": "c",
        "ops_port": 1,
    }
    file = tmp_path / "executor.json"
    file.write_bytes(msgspec.json.encode(good))
    assert load_config(file, ExecutorConfig).prefetch_max > 0
    file.write_bytes(msgspec.json.encode(good | change))
    with pytest.raises(InvalidArgument, match=said):
        load_config(file, ExecutorConfig)
