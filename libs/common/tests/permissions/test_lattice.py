"""What a set of permissions allows, and that a child never has more than its parent."""

from functools import reduce
from random import Random

import pytest
from hive_common.contracts.permissions import (
    NONE,
    PERMISSIONS,
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.permissions import covers, in_words, meet, named, only, widened
from hive_common.permissions.hosts import Host, parse_host
from hive_common.testing.permission_sets import Call, is_allowed, random_call, random_permissions
from hypothesis import given, settings
from hypothesis import strategies as st

# Each example stands for many chains or calls: drawing them one by one would take Hypothesis minutes.
EXAMPLES = 100
EACH = 100

seeds = given(seed=st.integers(0, 2**64 - 1))
deterministic = settings(max_examples=EXAMPLES, derandomize=True)


@deterministic
@seeds
def test_ten_thousand_chains_of_delegation_only_ever_narrow(seed: int) -> None:
    random = Random(seed)
    for _ in range(EACH):
        calls = [random_call(random) for _ in range(5)]
        parent = random_permissions(random)
        for _ in range(random.randint(1, 5)):
            child = meet(parent, random_permissions(random))
            assert covers(parent, child)
            assert widened(parent, child) == ()
            for call in calls:
                assert is_allowed(parent, call) or not is_allowed(child, call)
            for name in parent.asks:
                assert name in child.asks or name not in named(child)
            parent = child


@deterministic
@seeds
def test_ten_thousand_calls_none_outside_the_grant_is_allowed(seed: int) -> None:
    random = Random(seed)
    for _ in range(EACH):
        granted, call = random_permissions(random), random_call(random)
        assert is_allowed(granted, call) == stands_in(granted, call)


def stands_in(granted: Permissions, call: Call) -> bool:
    """What is allowed, said another way: by listing all that a permission names."""
    name, target, how = call
    if name == "model":
        return granted.model is not None and bool({target, "*"} & set(granted.model.names))
    if name == "http":
        return granted.http is not None and how in granted.http.methods and listed(granted.http.hosts, target)
    if name == "kv":
        return granted.kv is not None and granted.kv.namespace == target
    if name == "fork":
        made, depth = map(int, how.split("/"))
        fork = granted.fork
        agents = {target, target.split("@")[0]}
        return fork is not None and bool(agents & set(fork.agents)) and made < fork.max and depth <= fork.depth
    return 0 < granted.scratch_bytes >= int(target)


def listed(hosts: tuple[str, ...], target: str) -> bool:
    below = {
        "*.example.org": {"a.example.org", "b.a.example.org"},
        "*.a.example.org": {"b.a.example.org"},
    }
    return any(target == host or target in below.get(host, ()) for host in hosts)


@deterministic
@seeds
def test_what_two_sets_allow_together_is_what_each_of_them_allows(seed: int) -> None:
    random = Random(seed)
    for _ in range(10):
        sets = [random_permissions(random) for _ in range(3)]
        first, second, third = sets
        both = meet(first, second)
        assert covers(first, both) and covers(second, both)
        assert same(both, meet(second, first))
        assert same(meet(both, third), meet(first, meet(second, third)))
        assert same(meet(both, both), both)
        assert covers(first, second) == same(both, meet(second, second))
        everywhere = reduce(meet, sets)
        for _ in range(20):
            call = random_call(random)
            if call[0] == "model" and everywhere.model is None:
                continue  # pins that exclude each other leave nothing, whatever the names
            assert is_allowed(everywhere, call) == all(is_allowed(one, call) for one in sets)


def same(first: Permissions, second: Permissions) -> bool:
    return covers(first, second) and covers(second, first)


@seeds
@settings(max_examples=20, derandomize=True)
def test_a_set_is_made_of_its_parts(seed: int) -> None:
    whole = random_permissions(Random(seed))
    for name in PERMISSIONS:
        part = only(whole, name)
        assert covers(whole, part)
        assert named(part) == ((name,) if name in named(whole) else ())
    assert only(whole, *PERMISSIONS) == whole
    assert only(whole) == NONE


def test_the_first_model_stays_the_one_that_is_called_without_a_name() -> None:
    granted = Permissions(model=ModelPermission(("*",), 10))
    asked = Permissions(model=ModelPermission(("b", "a"), 20))
    narrow = meet(asked, granted).model
    assert narrow == ModelPermission(("b", "a"), 10)


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        (ModelPermission(("a",), 9), ModelPermission(("a",), 10)),
        (ModelPermission(("a",), 9), ModelPermission(("*",), 9)),
        (ModelPermission(("*",), 9, "pool"), ModelPermission(("a",), 9, "any")),
        (ModelPermission(("*",), 9, "region:eu"), ModelPermission(("a",), 9, "region:us")),
    ],
)
def test_each_part_of_a_permission_counts(parent: ModelPermission, child: ModelPermission) -> None:
    assert widened(Permissions(model=parent), Permissions(model=child)) == ("model",)


def test_who_is_not_asked_has_more_than_who_is() -> None:
    kv = KvPermission("notes", 1)
    assert not covers(Permissions(kv=kv, asks=("kv",)), Permissions(kv=kv))
    assert covers(Permissions(kv=kv), Permissions(kv=kv, asks=("kv",)))


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("example.org", Host("example.org", 443, True)),
        ("EXAMPLE.org:443", Host("example.org", 443, True)),
        ("http://example.org", Host("example.org", 80, False)),
        ("http://example.org:8080", Host("example.org", 8080, False)),
        ("*.example.org", Host("example.org", 443, True, below=True)),
        ("[::0001]:8443", Host("::1", 8443, True)),
        ("10.0.0.1", Host("10.0.0.1", 443, True)),
        ("xn--bcher-kva.example", Host("xn--bcher-kva.example", 443, True)),
    ],
)
def test_hosts_have_one_form(text: str, host: Host) -> None:
    assert parse_host(text) == host
    assert parse_host(str(host)) == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "https://example.org",
        "example.org/path",
        "user@example.org",
        "example.org:0",
        "example.org:65536",
        "example.org:x",
        "example.org:",
        "example.org.",
        "exa mple.org",
        "ex\namle.org",
        "bücher.example",
        "a..b",
        "-a.example",
        "127.1",
        "0x7f.1",
        "2130706433",
        "010.0.0.1",
        "*.10.0.0.1",
        "*.[::1]",
        "::1",
        "[::1",
        "[::1]x",
        "[example.org]",
        "[fe80::1%eth0]",
        "a" * 64 + ".org",
        ".".join(["a"] * 130),
    ],
)
def test_what_is_no_host_or_an_address_in_disguise_is_refused(text: str) -> None:
    assert parse_host(text) is None


def test_names_below_an_address_do_not_exist() -> None:
    wide = Host("0.1", 443, True, below=True)
    assert not wide.covers(Host("127.0.0.1", 443, True))


def test_a_permission_is_said_in_words() -> None:
    permissions = Permissions(
        model=ModelPermission(("small", "large"), 4096, "own-devices"),
        http=HttpPermission(("a.example", "b.example", "c.example"), ("GET", "POST"), private=True),
        kv=KvPermission("notes", 1 << 20),
        fork=ForkPermission(("square",), 10, 2),
        scratch_bytes=1000,
        asks=("http",),
    )
    assert in_words(permissions) == (
        "model: send what it knows to the language models small and large, on the owner's own devices, "
        "for at most 4,096 tokens per attempt",
        "http: read from and send data to a.example, b.example and c.example over HTTP (GET, POST), "
        "private networks and this machine included; a person is asked each time",
        "kv: keep up to 1 MiB in the namespace 'notes', where later tasks and other agents with the same "
        "permission read them",
        "fork: start up to 10 tasks of square with what it may do itself or less, 2 levels deep",
        "scratch: use 1,000 bytes of disk while an attempt runs",
    )
    assert in_words(NONE) == ()
