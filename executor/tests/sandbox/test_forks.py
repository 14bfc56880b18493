"""What guests get of `fork`: the tasks that are granted, taken together, and nothing of an attempt that fails."""

import json
from collections.abc import Callable

import pytest
from hive_common.contracts.limits import FORK_STAGED_BYTES_MAX
from hive_common.contracts.permissions import ForkPermission
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge, PermissionDenied
from hive_executor.host import forked
from hive_executor.host.fork import ForkAccess
from hive_executor.sandbox import Program, RunnerPool

from .conftest import limits, python

Module = Callable[[str], Program]

DECOMPOSE = python(
    "from hive import ForkError, fork\n"
    "def run(input):\n"
    "    seen = []\n"
    "    for agent, inputs in input['forks']:\n"
    "        try:\n"
    "            seen.append(fork(agent, inputs))\n"
    "        except (ForkError, TypeError) as error:\n"
    "            seen.append(getattr(error, 'code', str(error)))\n"
    "        except BaseException:\n"
    "            pass\n"
    "    return {'seen': seen}\n"
)


def access(*agents: str, most: int = 3) -> ForkAccess:
    return ForkAccess(ForkPermission(agents or ("square@1.0.0", "cube@2.0.0"), most))


def forks(*calls: tuple[str, object]) -> bytes:
    return json.dumps({"forks": calls}).encode()


def staged(fork: ForkAccess) -> list[tuple[str, object]]:
    return [(child.agent, json.loads(bytes(child.input))) for child in forked({"fork": fork})]


async def test_an_agent_forks_by_name_or_version_within_its_grant(pool: RunnerPool) -> None:
    fork = access()
    given = forks(("square", [{"n": 1}, {"n": "ü"}]), ("cube@2.0.0", [{}]), ("square", []))
    outcome = await pool.run(DECOMPOSE, given, limits(), granted={"fork": fork})
    assert outcome.output is not None, outcome
    assert json.loads(outcome.output) == {"seen": [2, 3, 3]}
    assert staged(fork) == [("square@1.0.0", {"n": 1}), ("square@1.0.0", {"n": "ü"}), ("cube@2.0.0", {})]
    assert forked({}) == ()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (forks(("square", [{}] * 4)), "granted for 3 children"),
        (forks(("square", [{}] * 3), ("cube", [{}])), "granted for 3 children"),
        (forks(("round", [{}])), "granted for square@1.0.0, cube@2.0.0, not for 'round'"),
        (forks(("square@1.0.1", [{}])), "not for 'square@1.0.1'"),
    ],
)
async def test_what_is_outside_ends_the_attempt_whatever_the_guest_does(
    pool: RunnerPool, given: bytes, named: str
) -> None:
    outcome = await pool.run(DECOMPOSE, given, limits(), granted={"fork": access()})
    assert (outcome.code, outcome.output) == ("permission_denied", None)
    assert "`fork`" in outcome.message and named in outcome.message


async def test_without_the_permission_to_fork_ends_the_attempt(pool: RunnerPool) -> None:
    outcome = await pool.run(DECOMPOSE, forks(("square", [{}])), limits())
    assert (outcome.code, outcome.output) == ("permission_denied", None)
    assert "`fork` is not granted" in outcome.message


async def test_a_component_forks_over_the_interface_of_its_own(pool: RunnerPool, module: Module) -> None:
    fork = access("square@1.0.0")
    given = b'{"agent": "square@1.0.0", "inputs": [{"n": 1}, {"n": 2}]}'
    outcome = await pool.run(module("fork_component"), given, limits(), granted={"fork": fork})
    assert outcome.output == b'{"children":2}', outcome
    assert staged(fork) == [("square@1.0.0", {"n": 1}), ("square@1.0.0", {"n": 2})]


async def test_what_cannot_be_taken_is_said_to_the_guest_and_nothing_of_it_is_taken(pool: RunnerPool) -> None:
    fork = access(most=100)
    large = {"text": "x" * (FORK_STAGED_BYTES_MAX // 2)}
    given = forks(("square", [large]), ("square", [{}, large]), ("square", {}), ("square", [{}]))
    outcome = await pool.run(DECOMPOSE, given, limits(), granted={"fork": fork})
    assert outcome.output is not None, outcome
    first, second, third, last = json.loads(outcome.output)["seen"]
    assert (first, second, last) == (1, "payload_too_large", 2)
    assert "list of inputs" in third
    assert [value for _, value in staged(fork)] == [large, {}]


async def test_requests_that_are_none_are_refused() -> None:
    fork = access("square@1.0.0", "square@2.0.0")
    for operation, request in (
        ("run", b'{"agent": "square@1.0.0", "inputs": []}'),
        ("create", b"[]"),
        ("create", b'{"agent": "square@1.0.0", "inputs": {}}'),
        ("create", b'{"agent": "square@1.0.0", "inputs": [{]}'),
        ("create", b'{"agent": "square@1.0.0", "inputs": [], "max": 9}'),
        ("create", b'{"agent": "square@1.0.0", "inputs": [' + b"[" * 5_000 + b"]" * 5_000 + b"]}"),
        ("create", b'{"agent": "square", "inputs": [{}]}'),
    ):
        with pytest.raises(InvalidArgument):
            await fork.call(operation, request, 1_000)
    with pytest.raises(PermissionDenied):
        await fork.call("create", b'{"agent": "", "inputs": [1]}', 1_000)
    with pytest.raises(PayloadTooLarge):
        await fork.call("create", b'{"agent": "square@1.0.0", "inputs": ["%s"]}' % (b"x" * (256 << 10)), 1_000)
    assert fork.staged == ()
    await fork.call("create", b'{"agent": "square@1.0.0", "inputs": [ { "a" : 1 } ]}', 1_000)
    assert [bytes(child.input) for child in fork.staged] == [b'{"a":1}']
