import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.package import AgentPackage, pack
from hive_common.artifacts.signing import Signature, sign
from hive_common.artifacts.store import FolderStore
from hive_common.bus.jwt import new_seed, public_nkey
from hive_common.bus.nats import connect, request
from hive_common.contracts.events import Capabilities, Event, ExecutorEnrolled, encode
from hive_common.contracts.messages import HelloReply, HelloRequest, hello_subject, inbox_prefix
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent, Stored
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import NatsConfig, ServiceConfig
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.identities import EVERYTHING, Issuer
from hive_common.testing.services import key_of, running_service, service_config
from hive_proto.agents.v1 import agents_pb2, agents_pb2_grpc
from hive_proto.executors.v1 import executors_pb2 as pb
from hive_proto.executors.v1 import executors_pb2_grpc
from hive_registry.bootstrap import main
from nats.aio.client import Client

CAPABILITIES = Capabilities(
    os="linux", arch="x86_64", cores=4, memory_bytes=8 << 30, slots=4, runtimes=("python", "command")
)
AUTHOR = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
"""The installation's own key, which a registry of a test trusts from its start."""

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: {name}
version: {version}
runtime: python
entry: agent.py
"""


class Registry:
    """A running registry and what a test does with it."""

    def __init__(self, config: ServiceConfig, channel: Any, database: Database, nats: NatsServer) -> None:
        self.config = config
        self._nats = nats
        self.key = key_of(config)
        self.channel = channel
        self.channel = channel
        self.executors = executors_pb2_grpc.ExecutorsStub(channel)
        self.agents = agents_pb2_grpc.AgentsStub(channel)
        self.store = FolderStore(config.artifacts_dir)
        self._database = database
        self._clients: dict[str, Client] = {}
        self._enrolled: set[str] = set()

    async def enrol(self, executors: Sequence[str], name: str = "laptop") -> int:
        """Have executors enrolled, as by tokens, and return the log's head once the registry knows it."""
        enrolled = [
            ExecutorEnrolled(name=name, public_key=public_nkey(new_seed("user")), owner=self.config.owner)
            for _ in executors
        ]
        new = tuple(
            NewEvent(executor, 1, "ExecutorEnrolled", 1, encode(event), 1, executor, self.config.owner)
            for executor, event in zip(executors, enrolled, strict=True)
        )
        async with await LogWriter.open(self._database.role_dsn("registry")) as writer:
            head = await writer.append(Append(new))
        request = pb.KeysRequest(executor_ids=list(executors))
        while len((await call(self.executors.Keys(request, metadata=self.key))).keys) < len(executors):
            await asyncio.sleep(0.01)
        self._enrolled.update(executors)
        return head

    async def joined(self, name: str = "laptop") -> str:
        """Return the id of an executor that was enrolled just now."""
        executor = new_id()
        await self.enrol([executor], name)
        return executor

    async def append(self, stream: str, event: Event) -> None:
        """Write the first event of a stream, as an earlier registry did."""
        new = NewEvent(stream, 1, type(event).__name__, 1, encode(event), 1, "registry", self.config.owner)
        async with await LogWriter.open(self._database.role_dsn("registry")) as writer:
            await writer.append(Append((new,)))

    async def write(self, stream: str, event: Event) -> None:
        """Append the first event of a stream, as an earlier registry did."""
        new = NewEvent(stream, 1, type(event).__name__, 1, encode(event), 1, "me", self.config.owner)
        async with await LogWriter.open(self._database.role_dsn("registry")) as writer:
            await writer.append(Append((new,)))

    async def hello(self, executor: str, name: str = "laptop", **changes: Any) -> HelloReply:
        """Say hello the way an executor does: with its own inbox."""
        client = self._clients.get(executor)
        if client is None:
            client = await connect(self.nats_of(executor), executor, inbox=inbox_prefix(executor))
            self._clients[executor] = client
        capabilities = msgspec.structs.replace(CAPABILITIES, **changes)
        body = HelloRequest(name=name, session="s", capabilities=capabilities)
        return await request(client, hello_subject(executor), body, HelloReply, 20)

    def nats_of(self, executor: str) -> NatsConfig:
        """Return how an executor connects to NATS, or everything how somebody does who may do anything."""
        folder = Path(self.config.nats.credentials_file).parent
        make = self._nats.issuer.service if executor == EVERYTHING else self._nats.issuer.executor
        return make(executor, folder)

    async def upload(self, package: AgentPackage) -> str:
        """Put the blobs of a package into the store."""
        for blob in package.blobs.values():
            await self.store.put(blob)
        return package.digest

    async def signed(self, digest: str, key: Ed25519PrivateKey = AUTHOR) -> Signature:
        """Sign what has a digest, and put that into the store."""
        signature = sign(digest, "square", key)
        for blob in signature.blobs.values():
            await self.store.put(blob)
        return signature

    async def push(self, digest: str, key: Ed25519PrivateKey = AUTHOR) -> agents_pb2.AgentVersion:
        """Publish what has a digest, signed."""
        signature = await self.signed(digest, key)
        request = agents_pb2.PushRequest(manifest_digest=digest, signature_digest=signature.digest)
        return await call(self.agents.Push(request, metadata=self.key))

    async def events(self, after: int = 1) -> list[Stored]:
        """Return what the log holds, without its genesis event, the trust in `AUTHOR`, and what `enrol` wrote."""
        async with LogReader(self._database.dsn) as reader:
            found = await reader.read(after)
        author = derive_id("signer", "default", public_hex(AUTHOR))
        hidden = {("ExecutorEnrolled", executor) for executor in self._enrolled} | {("SigningKeyTrusted", author)}
        return [e for e in found if (e.type, e.stream) not in hidden]

    async def close(self) -> None:
        """Close the executors' connections."""
        for client in self._clients.values():
            await client.close()


def identities(issuer: Issuer, folder: Path, valid_s: int = 3600) -> dict[str, Any]:
    """Return what the registry of a test signs with: the keys that the server of `issuer` trusts."""

    def secret(name: str, text: str) -> str:
        file = folder / name
        file.touch(mode=0o600)
        file.write_text(text)
        return str(file)

    keys = issuer.authority
    return {
        "account": keys.account,
        "operator_seed_file": secret("operator", keys.operator_seed),
        "executor_signer_seed_file": secret("signing", keys.signing_seed),
        "system_credentials_file": issuer.service("registry-system", folder).credentials_file,
        "valid_s": valid_s,
    }


@pytest.fixture
def config(database: Database, nats_server: NatsServer, tmp_path: Path) -> ServiceConfig:
    extra = {
        "blobs_url": "http://127.0.0.1:8500",
        "identities": identities(nats_server.issuer, tmp_path),
        "author_keys": [{"name": "author", "public_key": public_hex(AUTHOR)}],
    }
    return service_config("registry", database, nats_server, tmp_path, extra=extra)


@pytest.fixture
async def registry(config: ServiceConfig, database: Database, nats_server: NatsServer) -> AsyncIterator[Registry]:
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        try:
            yield registry
        finally:
            await registry.close()


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., AgentPackage]:
    """Returns a function that packs an agent with a name, a version and a source."""

    def make(
        name: str = "square",
        version: str = "1.0.0",
        source: str = "def run(input): return {}\n",
        permissions: str = "{}",
    ) -> AgentPackage:
        folder = tmp_path / "agents" / f"{name}-{version}-{abs(hash(source + permissions))}"
        folder.mkdir(parents=True, exist_ok=True)
        manifest = MANIFEST.format(name=name, version=version) + f"permissions: {permissions}\n"
        (folder / "manifest.yaml").write_text(manifest)
        (folder / "agent.py").write_text(source)
        return pack(folder)

    return make
