"""Agents by digest, ready to run: fetched, verified, and compiled where that is needed."""

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Final, get_args

from hive_common.artifacts.package import AgentPackage, unpack
from hive_common.contracts.events import AgentRef
from hive_common.kernel.errors import InvalidArgument

from hive_executor.blobs import BlobClient, Flights, FolderCache
from hive_executor.sandbox import Program, prepare
from hive_executor.sandbox.model import Runtime

SOURCES_BYTES_MAX: Final = 64 << 20
"""Sources of agents that are kept in memory."""

RUNTIMES: Final[tuple[str, ...]] = get_args(Runtime)


class Agents:
    """The agents that this executor has run lately.

    Args:
        blobs: where packages come from.
        modules: WebAssembly files of agents.
        cache_dir: compiled modules.
    """

    def __init__(self, blobs: BlobClient, modules: FolderCache, cache_dir: Path) -> None:
        self._blobs = blobs
        self._modules = modules
        self._cache_dir = cache_dir
        self._flights: Flights[Program] = Flights()
        self._programs: OrderedDict[str, Program] = OrderedDict()

    async def close(self) -> None:
        """Stop what is under way."""
        await self._flights.close()

    async def program(self, ref: AgentRef) -> Program:
        """Return an agent, ready to run.

        Raises:
            InvalidArgument: it can never run (`InvalidModule` among them).
            NotFound: the gateway does not have it.
            Unavailable: it could not be fetched now.
        """
        known = self._programs.get(ref.digest)
        if known is not None and _is_there(known):
            self._programs.move_to_end(ref.digest)
            return known
        return await self._flights.join(ref.digest, lambda: self._load(ref.digest))

    async def _load(self, digest: str) -> Program:
        package = await unpack(self._blobs.fetch, digest)
        program = await program_of(package, self._modules)
        if program.runtime != "python":
            await prepare(program, self._cache_dir)
        self._programs[digest] = program
        while len(self._programs) > 1 and sum(map(_source_bytes, self._programs.values())) > SOURCES_BYTES_MAX:
            self._programs.popitem(last=False)
        return program


def _is_there(program: Program) -> bool:
    # A look at the cache takes microseconds; a thread for it would take ten times that.
    return program.module_path is None or program.module_path.exists()


async def program_of(package: AgentPackage, modules: FolderCache) -> Program:
    """Return what the sandbox runs for a package; a module is written to `modules`.

    Raises:
        InvalidArgument: a runtime that this executor does not have.
    """
    manifest = package.manifest
    match manifest.runtime:
        case "python":
            return Program("python", package.digest, manifest.entry, files=dict(package.files))
        case "component" | "command":
            path = await asyncio.to_thread(modules.put, package.module)
            return Program(manifest.runtime, package.digest, manifest.entry, module_path=path)
        case other:
            raise InvalidArgument(f"{package.digest}: runtime {other!r}; expected one of {', '.join(RUNTIMES)}")


def _source_bytes(program: Program) -> int:
    return sum(len(source) for source in (program.files or {}).values())
