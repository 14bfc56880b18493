"""What an agent may be allowed beyond computing: the shapes in which manifests ask, grants give and tokens carry.

`None` (and 0 for `scratch_bytes`) is: not at all (law 6). How one set of permissions is narrowed by another stands
in `hive_common.permissions`.
"""

from typing import Final

import msgspec

PERMISSIONS: Final = ("model", "http", "kv", "fork", "scratch")
"""By these names manifests ask and people grant."""


class ModelPermission(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent may ask of models.

    Args:
        names: models; `*` is every one.
        max_tokens: what all calls of one attempt may generate together.
        pin: where what it sends may go.
    """

    names: tuple[str, ...]
    max_tokens: int
    pin: str = "any"


class HttpPermission(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which hosts an agent may talk to over HTTP.

    Args:
        hosts: `example.org`, `*.example.org` (names below it, not itself), each with `:port` unless that is 443, or
            with `http://` in front where it is not to be encrypted.
        methods: in capitals.
        private: names may also lead to loopback, private and link-local addresses.
    """

    hosts: tuple[str, ...]
    methods: tuple[str, ...] = ("GET",)
    private: bool = False


class KvPermission(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent may keep between tasks: keys and values of one namespace, so many bytes together at most."""

    namespace: str
    quota_bytes: int


class ForkPermission(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which child tasks an agent may make.

    Args:
        agents: `name` or `name@version`; in a job each with the version that it got when the job was submitted.
        max: tasks below one task: its children, and all of theirs.
        depth: how deep: 1: its children may have none.
    """

    agents: tuple[str, ...]
    max: int
    depth: int = 1


class Permissions(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A set of permissions: what a manifest asks for, what was granted, or what a token carries.

    `asks` names those of them for each use of which a person is asked first.
    """

    model: ModelPermission | None = None
    http: HttpPermission | None = None
    kv: KvPermission | None = None
    fork: ForkPermission | None = None
    scratch_bytes: int = 0
    asks: tuple[str, ...] = ()


NONE: Final = Permissions()
