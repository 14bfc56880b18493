"""Runs the agent of a folder once, in the same sandbox, without publishing anything."""

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from hive_common.artifacts.package import pack
from hive_common.artifacts.schemas import violation
from hive_common.contracts.events import Child
from hive_common.contracts.limits import LOG_BYTES_MAX, MIB, OUTPUT_BYTES_MAX
from hive_common.contracts.permissions import Permissions
from hive_common.inference.backends import BackEnds
from hive_common.inference.calls import Completer
from hive_common.inference.config import BackEndConfig
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import new_id

from hive_executor.agents import program_of
from hive_executor.blobs import FolderCache
from hive_executor.host import Means, Of, allowed, always, forked
from hive_executor.host.addresses import SystemResolver
from hive_executor.host.http import HttpClient
from hive_executor.host.kv import FleetingKv
from hive_executor.host.unreachable import Unreachable
from hive_executor.sandbox import Capabilities, Limits, LogLine, Outcome, RunnerPool
from hive_executor.sandbox.model import INVALID_OUTPUT

_MODULES_BYTES_MAX = 256 * MIB


async def run_once(
    folder: Path,
    input_: bytes,
    cache_dir: Path,
    on_log: Callable[[LogLine], None] | None = None,
    gateway: BackEndConfig | None = None,
    on_fork: Callable[[Child], None] | None = None,
) -> Outcome:
    """Run the agent in `folder` with JSON `input_`, within the limits of its manifest.

    Args:
        folder: with `manifest.yaml`.
        input_: JSON text.
        cache_dir: compiled modules; the one of an executor saves building the Python runtime again.
        on_log: called with each line while the agent runs.
        gateway: of an installation, whose models the agent may call where its manifest asks for that.
        on_fork: called with each task that it forked and that would be made, once it has succeeded.

    Raises:
        InvalidArgument: the folder is not an agent, or the input breaks its schema.
        FailedPrecondition: the Python runtime cannot be built.
            It also is raised where the manifest asks for files, and the system limits the size of no folder.
        Unavailable: no runner comes up.
    """
    package = pack(folder)
    manifest = package.manifest
    _check_input(manifest.input, input_)
    resources = manifest.resources
    limits = Limits(
        wall_ms=resources.timeout_ms,
        memory_bytes=resources.memory_bytes,
        fuel=resources.fuel,
        output_bytes=OUTPUT_BYTES_MAX,
        log_bytes=LOG_BYTES_MAX,
    )
    with tempfile.TemporaryDirectory(prefix="hive-agent-") as scratch:
        program = await program_of(package, FolderCache(Path(scratch), _MODULES_BYTES_MAX))
        async with _capabilities(manifest.asked, gateway) as granted:
            pool = RunnerPool(size=1, cache_dir=cache_dir)
            await pool.start()
            try:
                outcome = await pool.run(
                    program,
                    input_,
                    limits,
                    on_log=on_log,
                    granted={**granted, **always(lambda permille: None)},
                    scratch_bytes=manifest.asked.scratch_bytes,
                )
            finally:
                await pool.close()
            if on_fork is not None and outcome.status == "succeeded":
                for child in forked(granted):
                    on_fork(child)
    return _checked_output(manifest.output, outcome)


@asynccontextmanager
async def _capabilities(permissions: Permissions, gateway: BackEndConfig | None) -> AsyncIterator[Capabilities]:
    """What the manifest asks for: whoever tries an agent out grants it that. Values are not kept."""
    async with AsyncExitStack() as stack:
        resolver = SystemResolver()
        stack.callback(resolver.close)
        completer = await _completer(gateway, stack) if permissions.model is not None else Unreachable("")
        yield allowed(permissions, Means(completer, HttpClient(resolver), FleetingKv()), Of(task=new_id()))


async def _completer(gateway: BackEndConfig | None, stack: AsyncExitStack) -> Completer:
    if gateway is None:
        return Unreachable(
            "there is no installation here, whose models could be called; start one with: hive up --with-model"
        )
    back_ends = await stack.enter_async_context(BackEnds([gateway]))
    if back_ends.all[0].is_up:
        return back_ends
    return Unreachable(f"{gateway.url} does not answer; start the installation with: hive up")


def _check_input(schema: dict[str, object], input_: bytes) -> None:
    try:
        value = msgspec.json.decode(input_)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the input is not JSON: {error}", path="input") from error
    broken = violation(schema, value)
    if broken is not None:
        where = f"input.{broken[0]}" if broken[0] else "input"
        raise InvalidArgument(f"{where}: {broken[1]}; expected what the manifest's `input` says", path=where)


def _checked_output(schema: dict[str, object], outcome: Outcome) -> Outcome:
    if outcome.output is None:
        return outcome
    broken = violation(schema, msgspec.json.decode(outcome.output))
    if broken is None:
        return outcome
    where = f"output.{broken[0]}" if broken[0] else "output"
    return msgspec.structs.replace(
        outcome, status="failed", code=INVALID_OUTPUT, message=f"{where}: {broken[1]}", output=None
    )
