"""The audit service as it is deployed: a process, its gRPC port, its health, its own schema."""

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hive_audit.export import verify_file
from hive_audit.log_source import LogSource
from hive_common.bus.authority import Authority
from hive_common.kernel.errors import CorruptLog, InvalidArgument, Unauthenticated
from hive_common.ops.config import PostgresConfig, ServiceConfig, write_config
from hive_common.ops.ports import free_port
from hive_common.rpc.client import bearer, call, open_channel, stream
from hive_common.testing.fixtures import Database
from hive_common.testing.nats import EmbeddedNats
from hive_proto.audit.v1 import audit_pb2, audit_pb2_grpc
from psycopg.conninfo import conninfo_to_dict

from .conftest import Tamper
from .histories import fill
from .test_decisions import quorum_case

KEY = "service-key"


class Service:
    """One running audit process."""

    def __init__(self, folder: Path, database: Database, nats: EmbeddedNats) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        address = conninfo_to_dict(database.role_dsn("audit"))
        self.config = ServiceConfig(
            service="audit",
            owner="owner",
            postgres=PostgresConfig(
                str(address["host"]),
                int(address["port"]),  # type: ignore[arg-type]
                str(address["user"]),
                self._secret("postgres", str(address["password"])),
                str(address["dbname"]),
            ),
            nats=nats.issuer.service("audit", folder),
            ops_port=free_port(),
            grpc_port=free_port(),
            service_key_file=self._secret("key", KEY),
            artifacts_dir=str(folder),
        )
        write_config(folder / "audit.json", self.config)

    def _secret(self, name: str, value: str) -> str:
        file = self._folder / f"secret-{name}"
        file.write_text(value)
        file.chmod(0o600)
        return str(file)

    def start(self) -> None:
        command = [sys.executable, "-m", "hive_audit", "--config", str(self._folder / "audit.json"), "--supervised"]
        with (self._folder / "audit.log").open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log)

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        assert self._process is not None
        self._process.send_signal(with_signal)
        return self._process.wait(30)

    def ops(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.config.ops_port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    async def until(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(60):
                while not await asyncio.to_thread(condition):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            log = (self._folder / "audit.log").read_text()[-3000:]
            pytest.fail(f"not reached; readiness {self.ops('/readyz')}; log ends: {log}")

    def is_ready(self) -> bool:
        return self.ops("/readyz")[0] == 200

    def metric(self, name: str) -> float:
        for line in self.ops("/metrics")[1].splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        return -1

    @asynccontextmanager
    async def stub(self) -> AsyncIterator["audit_pb2_grpc.AuditAsyncStub"]:
        async with open_channel(f"127.0.0.1:{self.config.grpc_port}") as channel:
            yield audit_pb2_grpc.AuditStub(channel)


@contextmanager
def running(folder: Path, database: Database, nats: EmbeddedNats) -> Iterator[Service]:
    service = Service(folder, database, nats)
    service.start()
    try:
        yield service
    finally:
        service.stop(signal.SIGKILL)


def with_key(**more: Any) -> dict[str, Any]:
    return {"metadata": bearer(KEY), "timeout": 30, **more}


async def collect(answers: Any) -> list[Any]:
    return [answer async for answer in stream(answers)]


async def test_it_verifies_reads_and_exports(database: Database, nats_server: EmbeddedNats, tmp_path: Path) -> None:
    head = await fill(database, 600)
    with running(tmp_path, database, nats_server) as service:
        await service.until(service.is_ready)
        async with service.stub() as audit:
            result = await call(audit.Verify(audit_pb2.VerifyRequest(), **with_key()))
            assert (result.ok, result.events, result.head, result.log_id) == (True, head, head, database.log_id)
            again = audit_pb2.VerifyRequest(against_position=head, against_hash=result.head_hash)
            assert (await call(audit.Verify(again, **with_key()))).ok
            again = audit_pb2.VerifyRequest(against_position=head + 1, against_hash=result.head_hash)
            assert (await call(audit.Verify(again, **with_key()))).first_bad_position == head + 1

            request = audit_pb2.EventsRequest(**{"from": 5, "to": 1700, "limit": 1600})
            events = await collect(audit.Events(request, **with_key()))
            assert [event.position for event in events] == list(range(5, 1605))
            assert events[0].payload == b'{"n":1}' and len(events[0].salt) == 32
            default = await collect(audit.Events(audit_pb2.EventsRequest(), **with_key()))
            assert [event.position for event in default] == list(range(1, 1001))

            path = tmp_path / "log.ndjson"
            with path.open("wb") as file:
                for chunk in await collect(audit.Export(audit_pb2.ExportRequest(), **with_key())):
                    file.write(chunk.lines)
            verified = verify_file(path)
            assert verified.ok and verified.head_hash == result.head_hash.hex()

            judged = await quorum_case().write(database)
            request = audit_pb2.DecisionsRequest(limit=1)
            page = await call(audit.Decisions(request, **with_key()))
            assert [(one.task_id, one.result, one.step) for one in page.checks] == [(judged, "same", "answer")]
            assert page.next_after == page.checks[0].position
            request = audit_pb2.DecisionsRequest(after=page.next_after)
            assert not (await call(audit.Decisions(request, **with_key()))).checks
            with pytest.raises(InvalidArgument):
                await call(audit.Decisions(audit_pb2.DecisionsRequest(limit=201), **with_key()))
        assert service.stop() == 0


async def test_calls_without_the_key_or_out_of_range_are_refused(
    database: Database, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    with running(tmp_path, database, nats_server) as service:
        await service.until(service.is_ready)
        async with service.stub() as audit:
            with pytest.raises(Unauthenticated):
                await call(audit.Verify(audit_pb2.VerifyRequest(), timeout=10))
            for request in (
                audit_pb2.VerifyRequest(against_position=3),
                audit_pb2.VerifyRequest(against_hash=bytes(32)),
                audit_pb2.VerifyRequest(against_position=3, against_hash=bytes(31)),
            ):
                with pytest.raises(InvalidArgument, match="against_position"):
                    await call(audit.Verify(request, **with_key()))
            for fields in ({"limit": 10_001}, {"from": -1}, {"to": -1}, {"limit": -1}):
                call_ = audit.Events(audit_pb2.EventsRequest(**fields), **with_key())
                with pytest.raises(InvalidArgument, match="limit"):
                    await anext(stream(call_))
            with pytest.raises(InvalidArgument, match="to: 99"):
                await anext(stream(audit.Export(audit_pb2.ExportRequest(to=99), **with_key())))


async def test_it_verifies_as_the_log_grows_and_goes_on_where_it_was_after_a_kill(
    database: Database, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    with running(tmp_path, database, nats_server) as service:
        await service.until(service.is_ready)
        head = await fill(database, 20)
        await service.until(lambda: service.metric("hive_audit_position") == head)
        service.stop(signal.SIGKILL)
        head = await fill(database, 20)
        service.start()
        await service.until(lambda: service.metric("hive_audit_position") == head)
        await service.until(lambda: service.metric("hive_relay_position") == head)
        assert service.metric("hive_audit_broken") == 0
        assert service.metric('hive_audit_events{kind="task"}') == head - 1
    with psycopg.connect(database.role_dsn("audit")) as conn:
        assert conn.execute("SELECT position, broken_position FROM audit.progress").fetchone() == (head, None)
        assert dict(conn.execute("SELECT kind, events FROM audit.counts").fetchall()) == {
            "log": 1,
            "task": head - 1,
        }


async def test_a_break_stops_it_and_shows_everywhere_also_after_a_restart(
    database: Database, nats_server: EmbeddedNats, tmp_path: Path, tamper: Tamper
) -> None:
    await fill(database, 20)
    tamper("UPDATE log.payloads SET payload = '{}' WHERE position = 43")
    with running(tmp_path, database, nats_server) as service:
        for _ in range(2):
            await service.until(lambda: service.metric("hive_audit_broken") == 1)
            assert service.metric("hive_audit_position") == 42
            status, body = service.ops("/readyz")
            assert status == 503 and "position 43" in json.loads(body)["problems"]["log"]
            async with service.stub() as audit:
                result = await call(audit.Verify(audit_pb2.VerifyRequest(), **with_key(wait_for_ready=True)))
                assert (result.ok, result.first_bad_position, result.events) == (False, 43, 42)
                with pytest.raises(CorruptLog, match="position 43"):
                    await collect(audit.Export(audit_pb2.ExportRequest(), **with_key()))
            service.stop(signal.SIGKILL)
            service.start()


@pytest.mark.parametrize("while_running", [True, False])
async def test_a_tail_cut_off_behind_what_it_has_seen_is_a_break(
    database: Database, nats_server: EmbeddedNats, tmp_path: Path, tamper: Tamper, while_running: bool
) -> None:
    head = await fill(database, 20)
    with running(tmp_path, database, nats_server) as service:
        await service.until(lambda: service.metric("hive_audit_position") == head)
        if not while_running:
            service.stop(signal.SIGKILL)
        tamper("DELETE FROM log.events WHERE position > 60", "DELETE FROM log.payloads WHERE position > 60")
        if not while_running:
            service.start()
        await service.until(lambda: service.metric("hive_audit_broken") == 1)
        assert "position 61 is missing" in json.loads(service.ops("/readyz")[1])["problems"]["log"]


async def test_it_waits_for_servers_that_come_back(database: Database, tmp_path: Path) -> None:
    """NATS is away when the service starts, and is killed while it runs; connections to Postgres are cut."""
    nats = EmbeddedNats(tmp_path / "nats", authority=Authority.new())
    with running(tmp_path, database, nats) as service:
        await service.until(lambda: service.ops("/readyz")[0] == 503)
        nats.start()
        try:
            await service.until(service.is_ready)
            with psycopg.connect(database.dsn, autocommit=True) as conn:
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE usename = 'hive_audit' AND datname = current_database()"
                )
            nats.stop(signal.SIGKILL)
            head = await fill(database, 10)
            nats.start()
            await service.until(lambda: service.metric("hive_audit_position") == head)
            await service.until(lambda: service.metric("hive_relay_position") == head)
            await service.until(service.is_ready)
        finally:
            nats.stop()


async def test_a_page_is_bounded_by_bytes_too(database: Database) -> None:
    from hive_common.eventlog.log import Append, LogWriter

    from .histories import event

    payload = b"x" * 1024 * 1024
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        for number in range(40):
            await writer.append(Append((event(f"s{number}", payload=payload),)))
    async with await LogSource.open(database.role_dsn("audit")) as source:
        first = await source.page(0, 41)
        assert 2 <= len(first) <= 18
        read = [row async for rows in source.pages(0, 41) for row in rows]
    assert [row[0] for row in read] == list(range(1, 42))
    assert all(row[6] == payload for row in read[1:])
