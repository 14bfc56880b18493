"""Executors at the gateway: recognised by their signature; tokens, joining, renewal and revocation over REST."""

import base64

import aiohttp
import pytest
from hive_common.bus import assertion
from hive_common.bus.jwt import new_seed
from hive_common.contracts.joining import parse_token
from hive_common.contracts.values import digest_of
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import FailedPrecondition, RateLimited, Unauthenticated
from hive_common.kernel.ids import new_id
from hive_gateway import admission, devices
from hive_gateway.admission import AddressLimit
from hive_gateway.devices import Devices, Recent
from hive_gateway.routes.enrolment import BURST

DATA = b"result"
BLOB = f"/v1/blobs/{digest_of(DATA)}"
ENROL = {
    "token_id": new_id(),
    "secret": "s",
    "public_key": "U" * 56,
    "name": "desktop",
    "proof": base64.b64encode(b"proof").decode(),
}


def shows(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def code_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    return response.status, (await response.json())["code"]


async def test_an_executor_stores_and_fetches_blobs_with_what_it_signs(world):
    world.enrol()
    async with world.session(None) as http:
        for _ in range(3):
            token = world.assertion()
            assert (await http.put(BLOB, data=DATA, headers=shows(token))).status in (200, 201)
            assert await (await http.get(BLOB, headers=shows(token))).read() == DATA
    # Many calls, and the registry was asked for the key once, or again when two seconds had passed.
    assert world.executors.lookups < 6


async def test_an_assertion_is_verified_once_and_its_key_looked_up_once_in_two_seconds(world, monkeypatch):
    world.enrol()
    now_s = 100.0
    monkeypatch.setattr(devices.time, "monotonic", lambda: now_s)
    verified = []
    verify = assertion.verify
    monkeypatch.setattr(devices.assertion, "verify", lambda *args: verified.append(1) or verify(*args))
    recognised = Devices(world.gateway.peers, SystemClock())
    token = world.assertion()
    for _ in range(10):
        caller = await recognised.caller(token)
        assert (caller.name, caller.scope) == (world.device, "executor")
    assert (len(verified), world.executors.lookups) == (1, 1)
    now_s += devices.KEY_FRESH_S
    await recognised.caller(token)
    assert (len(verified), world.executors.lookups) == (1, 2)


async def test_a_revoked_executor_is_out_once_its_key_is_looked_up_again(world, monkeypatch):
    world.enrol()
    now_s = 100.0
    monkeypatch.setattr(devices.time, "monotonic", lambda: now_s)
    async with world.session(None) as http:
        token = world.assertion()
        assert (await http.get(BLOB, headers=shows(token))).status == 404
        world.enrol(revoked=True)
        now_s += devices.KEY_FRESH_S
        for _ in range(2):
            response = await http.get(BLOB, headers=shows(token))
            problem = await response.json()
            assert (response.status, problem["code"], problem["reason"]) == (403, "permission_denied", "revoked")
        fresh = shows(world.assertion(off_s=1))
        assert (await http.post(f"/v1/executors/{world.device}/credentials", headers=fresh)).status == 403
    assert not any("executor_id" in str(request) for request in world.executors.requests)


async def test_a_key_is_used_a_while_without_the_registry_and_not_for_ever(world, monkeypatch):
    world.enrol()
    now_s = 100.0
    monkeypatch.setattr(devices.time, "monotonic", lambda: now_s)
    async with world.session(None) as http:
        token = world.assertion()
        assert (await http.get(BLOB, headers=shows(token))).status == 404
        await world.stop_peer("registry")
        now_s += devices.KEY_STALE_S
        assert (await http.get(BLOB, headers=shows(token))).status == 404
        now_s += 1
        assert await code_of(await http.get(BLOB, headers=shows(token))) == (503, "unavailable")


async def test_an_unknown_executor_is_refused_and_asked_for_once(world):
    async with world.session(None) as http:
        for _ in range(5):
            response = await http.get(BLOB, headers=shows(world.assertion()))
            problem = await response.json()
            assert response.status == 401
            assert "not enrolled here; join with: hive executor join TOKEN" in problem["detail"]
    assert world.executors.lookups <= 3


async def test_another_key_than_the_enrolled_one_is_refused(world):
    world.enrol()
    world.seed = new_seed("user")
    async with world.session(None) as http:
        assert await code_of(await http.get(BLOB, headers=shows(world.assertion()))) == (401, "unauthenticated")


@pytest.mark.parametrize("off_s", [3600, -3600])
async def test_a_clock_an_hour_off_is_told_by_how_much(world, off_s):
    world.enrol()
    async with world.session(None) as http:
        response = await http.get(BLOB, headers=shows(world.assertion(off_s)))
        problem = await response.json()
        assert response.status == 401
        assert abs(problem["skew_s"] - off_s) <= 30
        assert "clock is" in problem["detail"] and "set it" in problem["detail"]


@pytest.mark.parametrize("token", ["eyJ.b.c", "eyJ..", "eyJ" * 1000 + ".y.z", "eyJhbGciOiJub25lIn0.e30.", "a.b.c"])
async def test_what_only_looks_like_an_assertion_is_refused(world, token):
    async with world.session(None) as http:
        assert await code_of(await http.get(BLOB, headers=shows(token))) == (401, "unauthenticated")


async def test_an_executor_renews_its_own_credentials_and_nobody_elses(world, http):
    world.enrol()
    own = f"/v1/executors/{world.device}/credentials"
    async with world.session(None) as device:
        answer = await device.post(own, headers=shows(world.assertion()))
        assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
        assert await answer.json() == {
            "executor_id": world.device,
            "owner": "o",
            "nats_jwt": "jwt",
            "expires_us": 7,
            "nats_url": "nats://n",
            "blobs_url": "http://b",
            "kill_public_key": "kill",
            "token_public_key": "token",
        }
        other = f"/v1/executors/{new_id()}/credentials"
        assert (await device.post(other, headers=shows(world.assertion()))).status == 403
        assert (await device.post(own)).status == 401
    # An owner's key may do everything but be a device.
    assert (await http.post(own)).status == 403


async def test_a_token_carries_the_address_and_what_the_registry_made(world, http):
    response = await http.post("/v1/executors/tokens", json={"valid_s": 120, "owner": "Grandma"})
    answer = await response.json()
    assert response.status == 201 and response.headers["Cache-Control"] == "no-store"
    token = parse_token(answer["token"])
    assert (token.url, token.fingerprint, token.secret, token.expires_us) == (world.url, "", "the-secret", 5)
    assert token.token_id == answer["token_id"]
    (asked,) = world.executors.requests
    assert (asked.valid_s, asked.owner, asked.caller) == (120, "Grandma", world.caller)
    async with world.session(None) as stranger:
        assert (await stranger.post("/v1/executors/tokens")).status == 401
    world.enrol()
    async with world.session(None) as device:
        assert (await device.post("/v1/executors/tokens", headers=shows(world.assertion()))).status == 403


async def test_joining_needs_no_key_and_says_what_is_wrong(world):
    async with world.session(None) as http:
        response = await http.post("/v1/executors/enrol", json=ENROL)
        assert response.status == 200 and (await response.json())["executor_id"] == "enrolled"
        (shown,) = world.executors.requests
        assert (shown.token_id, shown.name, shown.proof) == (ENROL["token_id"], "desktop", b"proof")
        world.executors.enrol_error = FailedPrecondition("this token has expired")
        response = await http.post("/v1/executors/enrol", json=ENROL)
        assert response.status == 409 and (await response.json())["detail"] == "this token has expired"
        response = await http.post("/v1/executors/enrol", json=ENROL | {"proof": "not base64"})
        assert response.status == 400
        response = await http.post("/v1/executors/enrol", json={})
        assert response.status == 400
        # Only this method is open, not what else stands under the path.
        assert (await http.get("/v1/executors/enrol")).status == 401


async def test_who_tries_too_often_waits(world):
    async with world.session(None) as http:
        statuses = [(await http.post("/v1/executors/enrol", json=ENROL)).status for _ in range(BURST + 3)]
        assert statuses[:BURST] == [200] * BURST and statuses[-1] == 429
        response = await http.post("/v1/executors/enrol", json=ENROL)
        assert int(response.headers["Retry-After"]) >= 1


async def test_an_executor_is_revoked_by_its_owner_only(world, http):
    async with world.session(None) as stranger:
        assert (await stranger.post("/v1/executors/executor-1/revoke")).status == 401
    response = await http.post("/v1/executors/executor-1/revoke", json={"reason": "lost"})
    answer = await response.json()
    assert (answer["state"], answer["revoked"]) == ("revoked", True)
    (asked,) = world.executors.requests
    assert (asked.executor_id, asked.reason, asked.caller) == ("executor-1", "lost", world.caller)


def test_what_is_remembered_is_bounded():
    recent: Recent[str] = Recent(2)
    for key in ("a", "b", "c"):
        recent.put(key, key)
    assert (recent.get("a"), recent.get("c"), len(recent)) == (None, "c", 2)
    limit = AddressLimit(burst=2, per_minute=60)
    for number in range(admission.ADDRESSES_MAX + 10):
        limit.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(limit) == admission.ADDRESSES_MAX


def test_one_address_does_not_use_up_what_others_have_and_gets_it_back_with_time():
    limit = AddressLimit(burst=2, per_minute=60)
    for address in ("192.0.2.1", "2001:db8::1", "2001:db8:0:1::1", "unknown"):
        limit.take(address, 0.0)
        limit.take(address, 0.0)
        with pytest.raises(RateLimited) as error:
            limit.take(address, 0.0)
        assert error.value.fields["retry_after_s"] == 1
    with pytest.raises(RateLimited):
        limit.take("2001:db8::2", 0.0)
    limit.take("192.0.2.1", 1.0)


async def test_a_call_with_no_registry_yet_says_so(world):
    await world.stop_peer("registry")
    async with world.session(None) as http:
        response = await http.post("/v1/executors/enrol", json=ENROL)
        assert response.status == 503
    with pytest.raises(Unauthenticated):
        await Devices(world.gateway.peers, SystemClock()).caller("not.a.token")
