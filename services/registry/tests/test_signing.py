"""What the registry takes: agents under the signature of a key that is trusted here, and nothing else."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.package import AgentPackage
from hive_common.artifacts.signing import assemble, sign
from hive_common.contracts.events import (
    AgentVersionYanked,
    SigningKeyDistrusted,
    SigningKeyTrusted,
    decode,
)
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.services import running_service
from hive_proto.agents.v1 import agents_pb2 as pb
from hive_registry.bootstrap import main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import AUTHOR, Registry

Package = Callable[..., AgentPackage]
STRANGER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
KEY = public_hex(STRANGER)


async def trust(registry: Registry, key: str = KEY, name: str = "ada") -> pb.SigningKey:
    return await call(registry.agents.Trust(pb.TrustRequest(public_key=key, name=name), metadata=registry.key))


async def distrust(registry: Registry, key: str = KEY, reason: str = "") -> pb.SigningKey:
    return await call(registry.agents.Distrust(pb.DistrustRequest(key=key, reason=reason), metadata=registry.key))


async def yank(registry: Registry, reason: str = "it leaks", version: str = "1.0.0") -> pb.AgentVersion:
    request = pb.YankRequest(name="square", version=version, reason=reason)
    return await call(registry.agents.Yank(request, metadata=registry.key))


async def happened(registry: Registry) -> list[object]:
    return [decode(e.type, e.schema, e.payload) for e in await registry.events() if e.payload is not None]


# --- what is refused -----------------------------------------------------------------------------------------


async def test_an_unsigned_agent_is_refused_with_the_remedy(registry: Registry, package: Package) -> None:
    digest = await registry.upload(package())
    with pytest.raises(InvalidArgument, match=r"is not signed; .* `hive agent push`") as refused:
        await call(registry.agents.Push(pb.PushRequest(manifest_digest=digest), metadata=registry.key))
    assert refused.value.fields["path"] == "signature_digest"
    for wrong in ("square", "sha256:../../etc/passwd"):
        request = pb.PushRequest(manifest_digest=digest, signature_digest=wrong)
        with pytest.raises(InvalidArgument, match="signature_digest: got"):
            await call(registry.agents.Push(request, metadata=registry.key))
    assert await registry.events() == []


async def test_an_agent_of_a_stranger_is_refused_until_the_key_is_trusted(
    registry: Registry, package: Package
) -> None:
    digest = await registry.upload(package())
    with pytest.raises(PermissionDenied, match=rf"hive agent key trust {KEY} --name") as refused:
        await registry.push(digest, STRANGER)
    assert refused.value.fields["public_key"] == KEY
    assert await registry.events() == []
    await trust(registry)
    published = await registry.push(digest, STRANGER)
    assert (published.signer, published.signature_digest) == (KEY, sign(digest, "square", STRANGER).digest)


async def test_of_what_a_stranger_signed_nothing_is_looked_at(registry: Registry, package: Package) -> None:
    with pytest.raises(PermissionDenied, match="which is not trusted here"):
        await registry.push(package().digest, STRANGER)


async def test_the_signature_of_another_agent_is_refused(registry: Registry, package: Package) -> None:
    digest, other = [await registry.upload(package(version=version)) for version in ("1.0.0", "2.0.0")]
    signature = await registry.signed(other)
    request = pb.PushRequest(manifest_digest=digest, signature_digest=signature.digest)
    with pytest.raises(InvalidArgument, match=f"the signature is of {other}; expected one of {digest}"):
        await call(registry.agents.Push(request, metadata=registry.key))


async def test_a_signature_in_the_name_of_somebody_else_is_refused(registry: Registry, package: Package) -> None:
    digest = await registry.upload(package())
    own = sign(digest, "square", STRANGER)
    forged = assemble(own.payload, own.value, public_hex(AUTHOR))
    for blob in forged.blobs.values():
        await registry.store.put(blob)
    request = pb.PushRequest(manifest_digest=digest, signature_digest=forged.digest)
    with pytest.raises(InvalidArgument, match="is not a signature of key"):
        await call(registry.agents.Push(request, metadata=registry.key))


async def test_a_part_of_the_signature_that_was_not_uploaded_is_named(registry: Registry, package: Package) -> None:
    digest = await registry.upload(package())
    for missing in (await registry.signed(digest)).blobs:
        signature = await registry.signed(digest)
        await registry.store.delete(missing)
        request = pb.PushRequest(manifest_digest=digest, signature_digest=signature.digest)
        with pytest.raises(FailedPrecondition, match=missing):
            await call(registry.agents.Push(request, metadata=registry.key))
    assert await registry.events() == []


async def test_whatever_byte_is_flipped_it_is_not_published(registry: Registry, package: Package) -> None:
    packed = package()
    digest = await registry.upload(packed)
    signature = await registry.signed(digest)
    blobs = packed.blobs | signature.blobs
    request = pb.PushRequest(manifest_digest=digest, signature_digest=signature.digest)
    folder = Path(registry.config.artifacts_dir) / "blobs" / "sha256"
    loop = asyncio.get_running_loop()

    async def pushed() -> pb.AgentVersion:
        return await call(registry.agents.Push(request, metadata=registry.key))

    def push() -> None:
        asyncio.run_coroutine_threadsafe(pushed(), loop).result()

    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data(), bit=st.integers(0, 7))
    def flipped(data: st.DataObject, bit: int) -> None:
        where = data.draw(st.sampled_from(sorted(blobs)))
        wrong = bytearray(blobs[where])
        wrong[data.draw(st.integers(0, len(wrong) - 1))] ^= 1 << bit
        path = folder / where.removeprefix("sha256:")
        path.write_bytes(wrong)
        try:
            with pytest.raises(HiveError):
                push()
        finally:
            path.write_bytes(blobs[where])

    await asyncio.to_thread(flipped)
    assert await registry.events() == []
    await asyncio.to_thread(push)
    assert [event.type for event in await registry.events()] == ["AgentVersionPublished"]


# --- keys ----------------------------------------------------------------------------------------------------


async def test_trust_and_distrust_are_events_and_saying_them_again_is_none(registry: Registry) -> None:
    key = await trust(registry)
    assert (key.public_key, key.name, key.trusted) == (KEY, "ada", True)
    assert await trust(registry) == key
    gone = await distrust(registry, "ada", "left the company")
    assert (gone.trusted, gone.reason) == (False, "left the company")
    assert await distrust(registry, KEY) == gone
    back = await trust(registry)
    assert (back.trusted, back.reason) == (True, "")
    assert await happened(registry) == [
        SigningKeyTrusted(KEY, "ada"),
        SigningKeyDistrusted("left the company"),
        SigningKeyTrusted(KEY, "ada"),
    ]
    keys = (await call(registry.agents.Signers(pb.SignersRequest(), metadata=registry.key))).keys
    assert {(k.name, k.trusted) for k in keys} == {("author", True), ("ada", True)}


async def test_a_distrusted_key_publishes_nothing_and_the_reason_is_told(
    registry: Registry, package: Package
) -> None:
    await trust(registry)
    digest = await registry.upload(package())
    await registry.push(digest, STRANGER)
    await distrust(registry, "ada", "stolen")
    for again in (digest, await registry.upload(package(version="1.0.1"))):
        with pytest.raises(PermissionDenied, match=rf"\(ada\), which is distrusted here: stolen; .*{KEY}"):
            await registry.push(again, STRANGER)
    # A version stays what it is, also when somebody else signs it.
    with pytest.raises(PermissionDenied, match=r"square@1\.0\.0: signed by the key"):
        await registry.push(digest, AUTHOR)


async def test_of_a_push_and_a_distrust_at_once_the_distrust_counts(registry: Registry, package: Package) -> None:
    await trust(registry)
    digests = [await registry.upload(package(version=f"1.0.{n}")) for n in range(8)]
    pushes = [registry.push(digest, STRANGER) for digest in digests]
    *results, gone = await asyncio.gather(*pushes, distrust(registry), return_exceptions=True)
    assert isinstance(gone, pb.SigningKey)
    for result in results:
        if isinstance(result, pb.AgentVersion):
            assert result.position < gone.position
        else:
            assert isinstance(result, PermissionDenied)


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        ("", "ada", "public_key: got ''; expected an Ed25519 public key of 64 hex digits"),
        (KEY.upper(), "ada", "public_key"),
        (KEY, "", "name: got ''; expected whose key it is"),
        (KEY, "a b", "name"),
        (KEY, "../x", "name"),
    ],
)
async def test_what_is_no_key_or_name_is_refused(registry: Registry, key: str, name: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        await trust(registry, key, name)


async def test_two_trusted_keys_have_two_names(registry: Registry) -> None:
    await trust(registry)
    with pytest.raises(Conflict, match="another trusted key is called ada"):
        await trust(registry, "1" * 64)
    with pytest.raises(NotFound, match="trusted are: ada, author"):
        await distrust(registry, "bob")
    await distrust(registry, "ada")
    await trust(registry, "1" * 64)


async def test_the_installations_own_key_stays_distrusted_after_a_restart(
    config: ServiceConfig, database: Database, nats_server: NatsServer
) -> None:
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        await distrust(registry, "author")
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        keys = (await call(registry.agents.Signers(pb.SignersRequest(), metadata=registry.key))).keys
        assert [(key.name, key.trusted) for key in keys] == [("author", False)]


async def test_an_executor_learns_at_hello_whose_agents_may_run(registry: Registry) -> None:
    executor = await registry.joined()
    before = await registry.hello(executor)
    assert before.signers == (public_hex(AUTHOR),)
    key = await trust(registry)
    after = await registry.hello(executor)
    assert set(after.signers) == {public_hex(AUTHOR), KEY}
    assert after.signers_position == key.position > before.signers_position
    gone = await distrust(registry)
    last = await registry.hello(executor)
    assert (last.signers, last.signers_position) == ((public_hex(AUTHOR),), gone.position)


# --- yank ----------------------------------------------------------------------------------------------------


async def test_a_yanked_version_says_why_and_stays(registry: Registry, package: Package) -> None:
    digest = await registry.upload(package())
    published = await registry.push(digest)
    yanked = await yank(registry)
    assert (yanked.digest, yanked.yank_reason) == (published.digest, "it leaks")
    assert yanked.yanked_us > 0
    assert await yank(registry, "again") == yanked
    assert (await happened(registry))[1:] == [AgentVersionYanked("it leaks")]
    assert await registry.push(digest) == yanked, "pushing the same again neither fails nor brings it back"
    assert digest_of(package().blobs[digest]) == digest


@pytest.mark.parametrize("reason", ["", "   ", "a\x1bb", "x" * 501])
async def test_a_yank_needs_a_reason_that_people_can_read(
    registry: Registry, package: Package, reason: str
) -> None:
    await registry.push(await registry.upload(package()))
    with pytest.raises(InvalidArgument, match="reason"):
        await yank(registry, reason)


async def test_what_is_not_there_cannot_be_yanked(registry: Registry, package: Package) -> None:
    await registry.push(await registry.upload(package()))
    with pytest.raises(NotFound, match=r"the nearest is square@1\.0\.0"):
        await yank(registry, version="1.0.1")


async def test_of_two_yanks_at_once_one_is_an_event(registry: Registry, package: Package) -> None:
    await registry.push(await registry.upload(package()))
    answers = await asyncio.gather(*(yank(registry, f"reason {n}") for n in range(4)))
    assert len({answer.yank_reason for answer in answers}) == 1
    assert len(await registry.events()) == 2
