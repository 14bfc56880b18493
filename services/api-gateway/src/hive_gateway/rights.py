"""What a caller may use, by the scope of the key. What is not named here only administrators may."""

import re
from typing import Final

from hive_common.inference.ollama import Ollama
from hive_common.inference.openai import OpenAI
from hive_common.kernel.errors import PermissionDenied

from hive_gateway.keys import Caller

_READS: Final = frozenset({"GET", "HEAD"})
_USER_PATHS: Final = re.compile(r"/v1/(jobs|blobs/[^/]+|jobs/.+)\Z")
"""Whatever the method: to submit, follow and cancel, and to store what is large."""

_USER_READS: Final = re.compile(
    r"(/openapi\.json|/v1/(agents|executors|agents/.+|executors/[^/]+|tasks/.+|model-calls/.+))\Z"
)
USER_METHODS: Final = frozenset(
    {
        *(f"/hive.jobs.v1.Jobs/{name}" for name in ("Submit", "Get", "List", "Cancel", "Watch", "WatchBatches")),
        *(f"/hive.jobs.v1.Jobs/{name}" for name in ("Explain", "GetDecision", "Tasks", "Logs")),
        *(f"/hive.models.v1.Models/{name}" for name in ("List", "Complete", "Explain", "GetJobUsage")),
        *(f"/hive.agents.v1.Agents/{name}" for name in ("List", "Get")),
        *(f"/hive.executors.v1.Executors/{name}" for name in ("List", "Get")),
    }
)
_REFLECTION: Final = "/grpc.reflection."


def check_path(caller: Caller, method: str, path: str) -> None:
    """Refuse a call of REST that `caller` may not make. Raises PermissionDenied."""
    match caller.scope:
        case "admin":
            return
        case "executor":
            if path.startswith("/v1/blobs/") or path == f"/v1/executors/{caller.name}/credentials":
                return
            raise PermissionDenied(
                "an executor may only read and write blobs, and renew its own credentials", scope=caller.scope
            )
    if OpenAI.route(path) or Ollama.route(path) or _USER_PATHS.match(path):
        return
    if method in _READS and _USER_READS.match(path):
        return
    raise _denied(caller)


def check_method(caller: Caller, method: str) -> None:
    """Refuse a gRPC call that `caller` may not make. Raises PermissionDenied."""
    if caller.scope == "admin" or (
        caller.scope == "user" and (method in USER_METHODS or method.startswith(_REFLECTION))
    ):
        return
    raise _denied(caller)


def _denied(caller: Caller) -> PermissionDenied:
    return PermissionDenied(
        f"key `{caller.name}` may call models and submit jobs; this needs the key of the owner or of an admin",
        scope=caller.scope,
    )
