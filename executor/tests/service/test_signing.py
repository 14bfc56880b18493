"""What an executor runs: agents whose signature is good, of keys that are trusted now, and nothing else."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.signing import assemble, sign
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from hive_executor import agents as agents_module
from hive_executor.agents import Agents
from hive_executor.blobs import FolderCache
from hive_executor.signers import Signers
from hypothesis import given
from hypothesis import strategies as st

from .conftest import AUTHOR, ControlPlane, Gateway, Home, until

STRANGER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
KEY = public_hex(STRANGER)


def output_of(report):
    assert report.status == "succeeded", report
    return msgspec.json.decode(report.output.raw)


class Blobs:
    """Has blobs, which may not be what they are called."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.blobs = dict(blobs)
        self.fetched: list[str] = []

    async def fetch(self, digest: str) -> bytes:
        self.fetched.append(digest)
        if digest not in self.blobs:
            raise NotFound(digest)
        return self.blobs[digest]


def trusting(folder: Path, *keys: str, position: int = 1) -> Signers:
    signers = Signers(folder, lambda: None, lambda: None)
    signers.told(keys, position)
    return signers


def agents_with(folder: Path, blobs: Blobs, signers: Signers) -> Agents:
    return Agents(blobs, FolderCache(folder / "modules", 1 << 20), folder, signers)  # type: ignore[arg-type]


# --- in a whole executor -------------------------------------------------------------------------------------


async def test_an_agent_that_nobody_signed_is_not_run(home: Home, control: ControlPlane, agent) -> None:
    async with home.running():
        outcome = await control.outcome(control.assign(msgspec.structs.replace(agent, signature=""), {}))
        assert (outcome.status, outcome.code) == ("failed", "invalid_module")
        assert "is not signed; expected an agent that `hive agent push` published" in outcome.message
        outcome = await control.outcome(control.assign(msgspec.structs.replace(agent, signer="", signature=""), {}))
        assert (outcome.status, outcome.code) == ("failed", "permission_denied")


async def test_an_agent_of_a_stranger_is_run_once_its_key_is_trusted(
    home: Home, control: ControlPlane, gateway: Gateway, package
) -> None:
    foreign = gateway.publish(package, STRANGER)
    async with home.running():
        outcome = await control.outcome(control.assign(foreign, {}))
        assert (outcome.status, outcome.code) == ("failed", "permission_denied")
        assert f"probe@1.0.0: signed by the key {KEY}, which is not trusted here" in outcome.message
        assert f"hive agent key trust {KEY}" in outcome.message
        control.decide_signers(AUTHOR, STRANGER)
        assert output_of(await control.outcome(control.assign(foreign, {"n": 3})))["n"] == 3


async def test_distrust_ends_what_runs_and_what_comes(home: Home, control: ControlPlane, agent) -> None:
    async with home.running():
        running = control.assign(agent, {"sleep_s": 3600})
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        control.decide_signers(STRANGER)
        outcome = await control.outcome(running)
        assert (outcome.status, outcome.code) == ("failed", "permission_denied")
        assert "is not trusted here" in outcome.message
        outcome = await control.outcome(control.assign(agent, {}))
        assert (outcome.status, outcome.code) == ("failed", "permission_denied")
        control.decide_signers(AUTHOR)
        assert output_of(await control.outcome(control.assign(agent, {"n": 1})))["n"] == 1


async def test_an_attempt_waits_until_the_registry_has_told_whose_agents_may_run(
    home: Home, control: ControlPlane, agent
) -> None:
    control.is_telling_signers = False
    async with home.running():
        key = control.assign(agent, {"n": 5})
        hellos = len(control.hellos)
        await until(lambda: key in control.held and len(control.hellos) > hellos + 1, "the registry is asked again")
        assert control.outcomes(key) == []
        control.is_telling_signers = True
        assert output_of(await control.outcome(key))["n"] == 5


async def test_what_was_told_outlives_a_restart_while_the_registry_is_away(
    home: Home, control: ControlPlane, agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with home.running():
        await control.outcome(control.assign(agent, {}))
    control.is_registry_away = True
    monkeypatch.setattr("hive_executor.bootstrap.GREETING_S_MAX", 0.1)
    before = control.pulls[-1].session
    async with home.running():
        await until(lambda: control.pulls[-1].session != before, "the new session pulls")
        assert output_of(await control.outcome(control.assign(agent, {"n": 2})))["n"] == 2


# --- signers -------------------------------------------------------------------------------------------------


async def test_without_news_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive_executor.signers.NEWS_WITHIN_S", 0.01)
    asked: list[int] = []
    signers = Signers(tmp_path, lambda: None, lambda: asked.append(1))
    with pytest.raises(Unavailable, match="does not say whose agents may run"):
        await signers.current()
    signers.told([KEY], 5)
    assert await signers.current() == {KEY}
    signers.wanted(6)
    assert asked == [1]
    with pytest.raises(Unavailable):
        await signers.current()
    signers.told([], 6)
    assert await signers.current() == frozenset()


async def test_a_damaged_file_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive_executor.signers.NEWS_WITHIN_S", 0.01)
    trusting(tmp_path, KEY)
    for content in (b"", b"{}", b"\xff", b'{"keys": 5, "position": 1}'):
        (tmp_path / "signers.json").write_bytes(content)
        again = Signers(tmp_path, lambda: None, lambda: None)
        again.load()
        assert not again.trusts(KEY)
        with pytest.raises(Unavailable):
            await again.current()


# --- any byte ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def signed(package):
    signature = sign(package.digest, "probe", AUTHOR)
    return package.blobs | signature.blobs, signature


@given(data=st.data(), bit=st.integers(0, 7))
def test_whatever_byte_is_flipped_it_is_not_prepared(tmp_path_factory, signed, package, data, bit) -> None:
    blobs, signature = signed
    unread = next(digest for digest, blob in signature.blobs.items() if blob.startswith(b'{"architecture"'))
    where = data.draw(st.sampled_from(sorted(blobs.keys() - {unread})), label="blob")
    place = data.draw(st.integers(0, len(blobs[where]) - 1), label="byte")
    wrong = bytearray(blobs[where])
    wrong[place] ^= 1 << bit
    folder = tmp_path_factory.getbasetemp()
    prepared = agents_with(folder, Blobs(blobs | {where: bytes(wrong)}), trusting(folder, public_hex(AUTHOR)))
    ref = Gateway().publish(package)
    with pytest.raises(InvalidArgument):
        asyncio.run(prepared.program(ref))


async def test_a_signature_in_the_name_of_somebody_else_is_refused(tmp_path: Path, package) -> None:
    ref = Gateway().publish(package)
    own = sign(package.digest, "probe", STRANGER)
    forged = assemble(own.payload, own.value, public_hex(AUTHOR))
    blobs = Blobs(package.blobs | own.blobs | forged.blobs)
    prepared = agents_with(tmp_path, blobs, trusting(tmp_path, public_hex(AUTHOR)))
    with pytest.raises(InvalidArgument, match="is not a signature of key"):
        await prepared.program(msgspec.structs.replace(ref, signature=forged.digest))
    with pytest.raises(PermissionDenied):
        await prepared.program(msgspec.structs.replace(ref, signature=own.digest))
    assert not set(blobs.fetched) & set(package.blobs), "nothing of the agent was read"


async def test_another_agent_of_the_same_author_is_not_run_in_its_place(tmp_path: Path, package) -> None:
    gateway = Gateway()
    ref = gateway.publish(package)
    prepared = agents_with(tmp_path, Blobs(gateway.blobs), trusting(tmp_path, public_hex(AUTHOR)))
    with pytest.raises(InvalidArgument, match=r"is probe@1\.0\.0, not other@1\.0\.0"):
        await prepared.program(msgspec.structs.replace(ref, name="other"))


async def test_a_warm_start_verifies_nothing_again_but_asks_who_is_trusted(
    tmp_path: Path, package, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway()
    ref = gateway.publish(package)
    blobs, signers = Blobs(gateway.blobs), trusting(tmp_path, public_hex(AUTHOR))
    prepared = agents_with(tmp_path, blobs, signers)
    first = await prepared.program(ref)
    fetched = len(blobs.fetched)
    monkeypatch.setattr(agents_module, "unpack_signed", None)
    assert await prepared.program(ref) is first
    assert len(blobs.fetched) == fetched
    signers.told([KEY], 2)
    with pytest.raises(PermissionDenied):
        await prepared.program(ref)
    assert digest_of(package.blobs[package.digest]) == ref.digest
