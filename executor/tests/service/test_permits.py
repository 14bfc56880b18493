"""What an attempt may do is what its token says."""

import msgspec
import pytest
from hive_common.contracts.events import AgentRef
from hive_common.contracts.messages import Assignment
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.contracts.values import inline
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.permissions.tokens import Claims, Minter, new_key, public_key
from hive_executor.permits import Permits

ROOT = new_key()
MODEL = Permissions(model=ModelPermission(("small",), 9))
CLAIMS = Claims(executor="e", key="UKEY", job="j", task="t", attempt=2, permissions=MODEL, expires_us=1_000)
AGENT = AgentRef("a", "1.0.0", "sha256:0", "python", 1, 1, 1, model=ModelPermission(("*",), 99))


class Still:
    def __init__(self, us: int = 0) -> None:
        self.us = us

    def now_us(self) -> int:
        return self.us

    def boot_ms(self) -> int:
        return 0


def permits(now_us: int = 0, public: str = public_key(ROOT)) -> Permits:
    return Permits("e", "UKEY", public, Still(now_us))


def assignment(token: str) -> Assignment:
    return Assignment("t", 2, "j", "step", AGENT, inline(b"{}"), 1_000, 1, 1, token=token)


def minted(**changes: object) -> Assignment:
    return assignment(Minter(ROOT).mint(msgspec.structs.replace(CLAIMS, **changes)))


def test_an_attempt_may_do_what_its_token_says_whatever_stands_beside_it() -> None:
    claims = permits().claims(minted())
    assert claims is not None and claims.permissions == MODEL
    assert permits().claims(assignment("")) is None
    assert permits(public="").claims(assignment("")) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"executor": "f"}, "another executor"),
        ({"key": "UOTHER"}, "another executor"),
        ({"job": "other"}, "another attempt"),
        ({"task": "other"}, "another attempt"),
        ({"attempt": 3}, "another attempt"),
        ({"expires_us": 0}, "expired"),
    ],
)
def test_a_token_that_is_not_this_attempts_gives_nothing(changes: dict[str, object], says: str) -> None:
    with pytest.raises(PermissionDenied, match=says):
        permits().claims(minted(**changes))


def test_a_token_of_another_installation_gives_nothing() -> None:
    with pytest.raises(PermissionDenied, match="not of this installation"):
        permits().claims(assignment(Minter(new_key()).mint(CLAIMS)))


def test_an_executor_that_was_never_told_the_key_gives_nothing() -> None:
    with pytest.raises(PermissionDenied, match="hive up"):
        permits(public="").claims(minted())
    with pytest.raises(InvalidArgument):
        permits(public="nonsense")
