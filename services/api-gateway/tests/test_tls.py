"""The gateway off the loopback: TLS or nothing, for REST and gRPC, with a certificate that names the address."""

import asyncio
import contextlib
import ssl

import aiohttp
import grpc.aio
import pytest
from hive_cli.home import Home
from hive_cli.supervisor import ca, certificates
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.lifecycle import Stop
from hive_common.ops.tls import client_context
from hive_common.rpc.client import bearer
from hive_gateway import doors
from hive_gateway.bootstrap import Gateway
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc

HOST = "127.0.0.1"
"""The loopback stands for the address: what is tested is the same on each."""


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(home, "192.0.2.1")
    return home


def tls_settings(home):
    own = certificates.files(home, "gateway")
    pair = {"cert_file": str(own.certificate), "key_file": str(own.key)}
    return {"ca_file": str(home.ca_file), "tls": {"hosts": [HOST], "pair": pair}}


@contextlib.asynccontextmanager
async def running(world, **extra):
    gateway = Gateway(world.config(**extra))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(gateway.peers.close)
        await gateway.start(Stop(), stack)
        yield gateway


@pytest.fixture
async def door(world, home):
    async with running(world, **tls_settings(home)) as gateway:
        yield gateway.doors[0]


@contextlib.asynccontextmanager
async def session(world, door, context, scheme="https", host=HOST):
    headers = {"Authorization": f"Bearer {world.keys['admin']}"}
    async with aiohttp.ClientSession(
        f"{scheme}://{host}:{door.http_port}", headers=headers, connector=aiohttp.TCPConnector(ssl=context)
    ) as opened:
        yield opened


async def test_rest_answers_over_tls_with_the_key_and_not_without(world, door, home):
    async with session(world, door, client_context(home.ca_file)) as https:
        async with https.get("/v1/executors") as response:
            assert response.status == 200
        async with https.get("/v1/executors", headers={"Authorization": ""}) as response:
            assert response.status == 401


async def test_the_certificate_of_the_ca_needs_no_key_on_either_listener(world, door, home):
    context = client_context(home.ca_file)
    async with (
        session(world, door, context) as https,
        https.get("/v1/ca", headers={"Authorization": ""}) as response,
    ):
        assert response.status == 200
        assert await response.text() == home.ca_file.read_text()
    async with world.session(None) as plain, plain.get("/v1/ca") as response:
        assert response.status == 404, "this one has no CA"


async def test_the_ca_of_somebody_else_is_not_enough(world, door, tmp_path):
    other = Home(tmp_path / "other")
    other.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(other, "192.0.2.1")
    async with session(world, door, client_context(other.ca_file)) as https:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await https.get("/v1/executors")


async def test_an_address_that_is_not_in_the_certificate_is_noticed(world, door, home):
    _, writer = await asyncio.open_connection(
        HOST, door.http_port, ssl=client_context(home.ca_file), server_hostname="192.0.2.1"
    )
    writer.close()
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        await asyncio.open_connection(
            HOST, door.http_port, ssl=client_context(home.ca_file), server_hostname="192.0.2.2"
        )


async def test_a_call_without_tls_gets_no_answer(world, door):
    async with session(world, door, False, scheme="http") as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get("/v1/ca")
    async with grpc.aio.insecure_channel(f"{HOST}:{door.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await executors_pb2_grpc.ExecutorsStub(channel).List(
                executors_pb2.ListRequest(), metadata=bearer(world.keys["admin"]), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_grpc_answers_over_tls(world, door, home):
    credentials = grpc.ssl_channel_credentials(home.ca_file.read_bytes())
    async with grpc.aio.secure_channel(f"{HOST}:{door.grpc_port}", credentials) as channel:
        listed = await executors_pb2_grpc.ExecutorsStub(channel).List(
            executors_pb2.ListRequest(), metadata=bearer(world.keys["admin"]), timeout=20
        )
    assert listed.executors[0].name == "executor-1"


async def test_an_address_that_is_away_keeps_nothing_from_starting(world, home, monkeypatch, eventually):
    there = False
    monkeypatch.setattr(doors, "_is_ours", lambda host: there)
    monkeypatch.setattr(doors, "_LOOK_S", 0.01)
    async with running(world, **tls_settings(home)) as gateway:
        assert gateway.http_port and not gateway.doors[0].http_port
        there = True
        await eventually(lambda: gateway.doors[0].http_port)
        context = client_context(home.ca_file)
        async with session(world, gateway.doors[0], context) as https, https.get("/v1/ca") as response:
            assert response.status == 200


def test_an_address_is_ours_or_not():
    assert doors._is_ours("127.0.0.1")
    assert not doors._is_ours("192.0.2.55")


def test_plain_rest_stays_on_the_loopback(world):
    with pytest.raises(InvalidArgument, match=r"http_host is '0\.0\.0\.0', and this listener has no TLS"):
        Gateway(world.config(http_host="0.0.0.0"))


async def test_a_certificate_with_the_key_of_another_is_named(world, home):
    settings = tls_settings(home)
    settings["tls"]["pair"]["key_file"] = str(certificates.files(home, "nats").key)
    with pytest.raises(InvalidArgument, match="cannot be used as certificate and key"):
        Gateway(world.config(**settings))
