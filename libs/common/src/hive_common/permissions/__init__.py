"""Permissions: how manifests ask for them, how one set narrows another, what they mean in words.

All of it is pure. `hive_common.permissions.tokens` carries them between processes.
"""

from hive_common.permissions.asking import parse, parse_one
from hive_common.permissions.checks import check_fork, check_http, check_kv, check_model, check_scratch, denied
from hive_common.permissions.lattice import (
    agent_covers,
    covers,
    delegated,
    joined,
    meet,
    named,
    only,
    reading,
    widened,
)
from hive_common.permissions.words import in_words

__all__ = [
    "agent_covers",
    "check_fork",
    "check_http",
    "check_kv",
    "check_model",
    "check_scratch",
    "covers",
    "delegated",
    "denied",
    "in_words",
    "joined",
    "meet",
    "named",
    "only",
    "parse",
    "parse_one",
    "reading",
    "widened",
]
