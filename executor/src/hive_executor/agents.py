"""Agents by digest, ready to run: fetched, their signatures verified, and compiled where that is needed."""

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Final, get_args

from hive_common.artifacts.package import AgentPackage
from hive_common.artifacts.signing import unpack_signed, untrusted
from hive_common.contracts.events import AgentRef
from hive_common.kernel.errors import InvalidArgument

from hive_executor.blobs import BlobClient, Flights, FolderCache
from hive_executor.sandbox import Program, prepare
from hive_executor.sandbox.model import Runtime
from hive_executor.signers import Signers

SOURCES_BYTES_MAX: Final = 64 << 20
"""Sources of agents that are kept in memory."""

RUNTIMES: Final[tuple[str, ...]] = get_args(Runtime)


class Agents:
    """The agents that this executor has run lately.

    Args:
        blobs: where packages come from.
        modules: WebAssembly files of agents.
        cache_dir: compiled modules.
        signers: know whose agents may run.
    """

    def __init__(self, blobs: BlobClient, modules: FolderCache, cache_dir: Path, signers: Signers) -> None:
        self._blobs = blobs
        self._modules = modules
        self._cache_dir = cache_dir
        self._signers = signers
        self._flights: Flights[Program] = Flights()
        # Verified under the signer in the key; digests were checked when the bytes came in.
        self._programs: OrderedDict[tuple[str, str], Program] = OrderedDict()

    async def close(self) -> None:
        """Stop what is under way."""
        await self._flights.close()

    async def program(self, ref: AgentRef) -> Program:
        """Return an agent, ready to run.

        Raises:
            InvalidArgument: it can never run (`InvalidModule` among them), or its signature is not good.
            PermissionDenied: nobody trusts the key that signed it.
            NotFound: the gateway does not have it.
            Unavailable: it could not be fetched now, or nobody says which keys are trusted.
        """
        if ref.signer not in await self._signers.current():
            raise untrusted(f"{ref.name}@{ref.version}", ref.signer)
        key = ref.digest, ref.signer
        known = self._programs.get(key)
        if known is not None and _is_there(known):
            self._programs.move_to_end(key)
            return known
        return await self._flights.join(f"{ref.digest} {ref.signature}", lambda: self._load(ref))

    async def _load(self, ref: AgentRef) -> Program:
        package, signer = await unpack_signed(self._blobs.fetch, ref.digest, ref.signature, (ref.signer,))
        if package.manifest.reference != f"{ref.name}@{ref.version}":
            raise InvalidArgument(f"{ref.digest}: is {package.manifest.reference}, not {ref.name}@{ref.version}")
        program = await program_of(package, self._modules)
        if program.runtime != "python":
            await prepare(program, self._cache_dir)
        self._programs[ref.digest, signer] = program
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
