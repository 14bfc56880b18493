"""Credentials that end, are renewed, are replaced while nobody is connected, and are refused for ever."""

import time
from pathlib import Path

import pytest
from hive_common.bus import assertion
from hive_common.bus.jwt import Credentials, claims_of, credentials_text, read_credentials
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.kernel.ids import new_id
from hive_executor.bootstrap import REVOKED_EXIT_CODE
from hive_executor.identity import Identity, problem_of

from .conftest import Gateway, Home, until

REVOKED = {"code": "permission_denied", "detail": "this executor was revoked", "reason": "revoked"}


class SetClock:
    def __init__(self) -> None:
        self.now_s = 1_790_000_000.0

    def now_us(self) -> int:
        return int(self.now_s * 1_000_000)

    def boot_ms(self) -> int:
        return int(self.now_s * 1000)


def give(home: Home, gateway: Gateway, begun_s: int, valid_s: int) -> None:
    """Write credentials for the executor of `home`."""
    assert gateway.issuer is not None
    seed = gateway.seeds[home.executor_id]
    made = gateway.issuer.authority.executor(home.executor_id, seed, begun_s, valid_s)
    Path(home.nats.credentials_file).write_text(credentials_text(made))


def expires_s(home: Home) -> int:
    return int(claims_of(read_credentials(home.nats.credentials_file).jwt)["exp"])


async def test_credentials_are_renewed_in_time_and_the_connection_outlives_them(control, home, gateway):
    give(home, gateway, int(time.time()), 15)
    first = expires_s(home)
    gateway.valid_s = 15
    async with home.running() as stop:
        # The gateway has given them before they are in the file.
        await until(lambda: expires_s(home) > first, "the credentials are new ones")
        assert time.time() < first
        assert Path(home.nats.credentials_file).stat().st_mode & 0o777 == 0o600
        # The server ends what was opened with the first ones; the next connection has the new ones.
        await until(lambda: time.time() > first + 1, "time.time() > first + 1")
        pulls = len(control.pulls)
        await until(lambda: len(control.pulls) > pulls, "len(control.pulls) > pulls")
        assert not stop.is_set()


async def test_an_executor_that_slept_longer_than_its_credentials_gets_new_ones_first(control, home, gateway):
    give(home, gateway, int(time.time()) - 7200, 3600)
    async with home.running():
        await until(lambda: len(control.pulls) > 0, "len(control.pulls) > 0")
    assert gateway.renewals >= 1


async def test_a_gateway_that_is_away_is_asked_again(control, home, gateway):
    give(home, gateway, int(time.time()) - 7200, 3600)
    gateway.problem = {"code": "unavailable", "detail": "not now"}
    async with home.running() as stop:
        await until(lambda: gateway.refusals >= 2, "gateway.refusals >= 2")
        assert not stop.is_set()
        gateway.problem = None
        await until(lambda: len(control.pulls) > 0, "len(control.pulls) > 0")


async def test_who_is_revoked_ends_with_its_own_code_and_one_sentence(control, home, gateway):
    async with home.running() as stop:
        await until(lambda: len(control.pulls) > 0, "len(control.pulls) > 0")
        gateway.problem = REVOKED
        control.pull_error = PermissionDenied("revoked")
        await stop.wait()
        assert stop.exit_code == REVOKED_EXIT_CODE == 4
        assert stop.reason == (
            f"executor {home.executor_id} was revoked, for ever; to come back, this machine joins anew"
        )


async def test_who_was_revoked_while_it_was_off_ends_at_once(control, home, gateway):
    give(home, gateway, int(time.time()) - 7200, 3600)
    gateway.problem = REVOKED
    async with home.running() as stop:
        await stop.wait()
        assert stop.exit_code == REVOKED_EXIT_CODE
    assert control.pulls == []


def test_an_assertion_is_shown_for_half_a_minute_and_then_a_new_one(home):
    clock = SetClock()
    identity = Identity(home.executor_id, home.nats.credentials_file, clock)
    shown = identity.header()
    clock.now_s += assertion.VALID_S / 2 - 1
    assert identity.header() == shown
    clock.now_s += 1
    assert identity.header() != shown
    again = identity.header()
    # A clock that was set back: the one from its future would be refused.
    clock.now_s -= 3600
    assert identity.header() != again


def test_the_time_left_is_that_of_the_clock_on_the_wall(home, gateway):
    clock = SetClock()
    give(home, gateway, int(clock.now_s), 1000)
    identity = Identity(home.executor_id, home.nats.credentials_file, clock)
    assert (identity.left_s, identity.renew_s(0.5)) == (1000, 500)
    clock.now_s += 1000
    assert identity.left_s <= 0


def test_what_is_no_jwt_does_not_replace_what_there_is(home):
    identity = Identity(home.executor_id, home.nats.credentials_file, SetClock())
    before = read_credentials(home.nats.credentials_file)
    with pytest.raises(InvalidArgument):
        identity.keep("nonsense")
    assert read_credentials(home.nats.credentials_file) == before
    Path(home.nats.credentials_file).write_text(credentials_text(Credentials("nonsense", before.seed)))
    with pytest.raises(InvalidArgument):
        Identity(new_id(), home.nats.credentials_file, SetClock())


def test_an_answer_that_is_no_problem_document_is_tried_again():
    assert problem_of(502, b"<html>").code == "unavailable"
    assert problem_of(403, b'{"code": "permission_denied", "detail": "x", "reason": "revoked"}').fields[
        "reason"
    ] == ("revoked")
