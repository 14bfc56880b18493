"""Random permissions and random calls, for the properties that every set of them has."""

from random import Random
from typing import TypeVar

from hive_common.contracts.permissions import (
    PERMISSIONS,
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.kernel.errors import PermissionDenied
from hive_common.permissions import check_fork, check_http, check_kv, check_model, check_scratch
from hive_common.permissions.hosts import parse_host

T = TypeVar("T")

MODELS = ("small", "large", "coder")
PINS = ("any", "pool", "own-devices", "region:eu", "region:us")
HOSTS = (
    "example.org",
    "*.example.org",
    "a.example.org",
    "*.a.example.org",
    "a.example.org:8443",
    "http://a.example.org",
    "evil-example.org",
    "127.0.0.1",
    "[::1]:8443",
)
TARGETS = (
    "example.org",
    "a.example.org",
    "b.a.example.org",
    "a.example.org:8443",
    "http://a.example.org",
    "http://b.a.example.org",
    "evil-example.org",
    "example.org.evil",
    "127.0.0.1",
    "[::1]:8443",
    "[::1]",
)
METHODS = ("GET", "POST", "DELETE")
NAMESPACES = ("notes", "mail")
AGENTS = ("square", "square@1.0.0", "cube", "cube@2.0.0")

Call = tuple[str, str, str]
"""A permission, what is asked of it, and its method; a fork's is `made/depth`, scratch's target is its size."""


def random_permissions(random: Random) -> Permissions:
    """Return a set in which each permission may be missing."""
    return Permissions(
        model=_maybe(
            random,
            ModelPermission(_some(random, (*MODELS, "*")), random.randint(1, 4), random.choice(PINS)),
        ),
        http=_maybe(random, HttpPermission(_some(random, HOSTS), _some(random, METHODS), random.random() < 0.5)),
        kv=_maybe(random, KvPermission(random.choice(NAMESPACES), random.randint(1, 4))),
        fork=_maybe(random, ForkPermission(_some(random, AGENTS), random.randint(1, 4), random.randint(1, 3))),
        scratch_bytes=random.randint(0, 3),
        asks=tuple(name for name in PERMISSIONS if random.random() < 0.2),
    )


def random_call(random: Random) -> Call:
    """Return a call of one capability."""
    match random.choice(PERMISSIONS):
        case "model":
            return "model", random.choice((*MODELS, "other", "*", "")), ""
        case "http":
            return "http", random.choice(TARGETS), random.choice((*METHODS, "get", "PATCH"))
        case "kv":
            return "kv", random.choice((*NAMESPACES, "note", "")), ""
        case "fork":
            agent = random.choice(("square@1.0.0", "square@1.0.1", "cube@2.0.0", "squares@1.0.0"))
            return "fork", agent, f"{random.randint(0, 4)}/{random.randint(1, 3)}"
        case _:
            return "scratch", str(random.randint(0, 4)), ""


def is_allowed(permissions: Permissions, call: Call) -> bool:
    """Say what the checks of `hive_common.permissions` say of a call."""
    name, target, how = call
    try:
        match name:
            case "model":
                check_model(permissions, target)
            case "http":
                host = parse_host(target)
                assert host is not None
                check_http(permissions, host, how)
            case "kv":
                check_kv(permissions, target)
            case "fork":
                made, depth = how.split("/")
                check_fork(permissions, target, made=int(made), depth=int(depth))
            case _:
                check_scratch(permissions, int(target))
    except PermissionDenied as error:
        assert error.fields["permission"] == name
        return False
    return True


def _maybe(random: Random, value: T) -> T | None:
    return value if random.random() < 0.7 else None


def _some(random: Random, choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(random.sample(choices, random.randint(1, len(choices))))
