"""Agents: publishing, listing, finding and yanking versions, and the keys under which they are published."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import grpc.aio
import msgspec
from hive_common.artifacts.documents import nearest
from hive_common.artifacts.names import NAME_PATTERN
from hive_common.artifacts.package import (
    ARTIFACT_TYPE,
    MANIFEST_TYPE,
    AgentPackage,
    Descriptor,
    OciManifest,
    unpack,
)
from hive_common.artifacts.signing import Signature, check, read_signature, tag_of
from hive_common.artifacts.store import ArtifactStore
from hive_common.artifacts.versions import sort_key
from hive_common.contracts.events import AgentVersionPublished
from hive_common.contracts.values import is_digest
from hive_common.kernel.errors import Conflict, FailedPrecondition, InvalidArgument, NotFound, VersionConflict
from hive_common.kernel.ids import derive_id
from hive_proto.agents.v1 import agents_pb2, agents_pb2_grpc

from hive_registry.callers import actor_of
from hive_registry.domain import signers
from hive_registry.executors import Presence, page_limit
from hive_registry.grants import GrantDesk
from hive_registry.log_access import TRIES_MAX, Entry, LogAccess
from hive_registry.signers import SignerDesk
from hive_registry.views import AgentRow, SignerRow, Views

T = TypeVar("T")

PUBLISHING_MAX: Final = 2
"""Artifacts that are checked at the same time: each may hold a module of 64 MiB in memory."""


class AgentsServicer(agents_pb2_grpc.AgentsServicer):
    """`hive.agents.v1.Agents`.

    Args:
        views: reads.
        log: writes.
        store: where pushed blobs are.
        signers: knows the keys that are trusted.
        grants: what people have granted.
        check_stopped: refuses an agent's name and version where a kill order stops it.
        presence: asks the scheduler.
    """

    def __init__(
        self,
        views: Views,
        log: LogAccess,
        store: ArtifactStore,
        signers: SignerDesk,
        grants: GrantDesk,
        check_stopped: Callable[[str, str], None],
        presence: Presence,
    ) -> None:
        self._views = views
        self._log = log
        self._store = store
        self._signers = signers
        self._grants = grants
        self._check_stopped = check_stopped
        self._presence = presence
        self._publishing = asyncio.Semaphore(PUBLISHING_MAX)

    async def Push(
        self, request: agents_pb2.PushRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.AgentVersion:
        """Publish a version whose blobs are in the store, under a trusted signature.

        The same digest again gives the same answer.
        """
        actor = actor_of(context, request.caller, "registry")
        _require_digest("manifest_digest", request.manifest_digest)
        if not request.signature_digest:
            raise InvalidArgument(
                f"signature_digest: {request.manifest_digest} is not signed; expected the signature of its author: "
                "push it with `hive agent push`, which signs it with the key of this installation, or of --key",
                path="signature_digest",
            )
        _require_digest("signature_digest", request.signature_digest)
        async with self._publishing:
            signature = await self._signed(request.manifest_digest, request.signature_digest)
            package = await self._stored(unpack(self._store.get, request.manifest_digest))
            self._check_stopped(package.manifest.name, package.manifest.version)
            row = await self._published(package, signature, actor)
            await self._tag(package, signature)
        return _message(row)

    async def List(
        self, request: agents_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.ListResponse:
        """Return a page of versions in order of name, then precedence."""
        limit = page_limit(request.limit)
        name, key, version = _cursor(request.after)
        if not request.name:
            rows = await self._views.agents_after((name, key, version), limit)
        elif name in ("", request.name) and NAME_PATTERN.match(request.name):
            rows = await self._views.versions_after(request.name, (key, version), limit)
        else:
            raise InvalidArgument(f"name and after: expected an agent's name and a version of it, got {name!r}")
        return agents_pb2.ListResponse(versions=[_message(row) for row in rows])

    async def Get(
        self, request: agents_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.AgentVersion:
        """Return one version."""
        if not request.name or not request.version:
            raise InvalidArgument("name and version: expected both, such as square and 1.0.0")
        return _message(await self._row(request.name, request.version))

    async def Yank(
        self, request: agents_pb2.YankRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.AgentVersion:
        """Let no new job use a version."""
        actor = actor_of(context, request.caller, "registry")
        row = await self._row(request.name, request.version)
        events = signers.yank(row.yanked_us > 0, request.reason)
        if events:
            stream = derive_id("agent", self._log.ns, row.name, row.version)
            try:
                await self._log.append(stream, row.stream_version, events, actor)
            except VersionConflict:
                # Somebody else yanked it at this moment, which is all that can happen to a version.
                await self._log.catch_up()
            row = await self._row(request.name, request.version)
        await self._tell_scheduler()
        return _message(row)

    async def _tell_scheduler(self) -> None:
        """Return when the scheduler acts by what is decided here: who has the answer may submit at once.

        So it costs this rare call something and not each submit. One that cannot be asked now reads the log before
        it leads again.
        """
        await self._presence.present(self._log.position)

    async def Grant(
        self, request: agents_pb2.GrantRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.GrantsResponse:
        """Let all versions of an agent do what the newest one asks for, or less."""
        return await self._grants.grant(request, actor_of(context, request.caller, "registry"))

    async def Ungrant(
        self, request: agents_pb2.UngrantRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.GrantsResponse:
        """Take it back: tasks that are not given out yet do not get it any more."""
        return await self._grants.ungrant(request, actor_of(context, request.caller, "registry"))

    async def Grants(
        self, request: agents_pb2.GrantsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.GrantsResponse:
        """Say what an agent asks for and was granted."""
        return await self._grants.show(request.name)

    async def Trust(
        self, request: agents_pb2.TrustRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.SigningKey:
        """Let what a key signs be published and run."""
        actor = actor_of(context, request.caller, "registry")
        return _key_message(await self._signers.trust(request.public_key, request.name, actor))

    async def Distrust(
        self, request: agents_pb2.DistrustRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.SigningKey:
        """Let nothing that a key signed be published or run any more."""
        actor = actor_of(context, request.caller, "registry")
        row = await self._signers.distrust(request.key, request.reason, actor)
        await self._tell_scheduler()
        return _key_message(row)

    async def Signers(
        self, request: agents_pb2.SignersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> agents_pb2.SignersResponse:
        """Return the keys that are or were trusted."""
        return agents_pb2.SignersResponse(keys=[_key_message(row) for row in await self._signers.rows()])

    async def _stored(self, reading: Coroutine[Any, Any, T]) -> T:
        """Await what reads blobs from the store; say of one that is missing what is expected."""
        try:
            return await reading
        except NotFound as error:
            missing = error.fields.get("digest", "")
            raise FailedPrecondition(
                f"the blob {missing} is not in the artifact store; expected all blobs of an agent and of its "
                "signature before a push",
                digest=missing,
            ) from error

    async def _signed(self, digest: str, signature_digest: str) -> Signature:
        """Return the good, trusted signature of an artifact, of which nothing is looked at before."""
        signature = await self._stored(read_signature(self._store.get, signature_digest))
        check(signature, digest)
        signers.require_trusted(await self._signers.state(signature.signer), digest, signature.signer)
        for blob in signature.blobs:
            # All of it has to be there, so that others can copy it from here.
            await self._stored(self._store.get(blob))
        return signature

    async def _published(self, package: AgentPackage, signature: Signature, actor: str) -> AgentRow:
        manifest, signer = package.manifest, signature.signer
        stream = derive_id("agent", self._log.ns, manifest.name, manifest.version)
        for _ in range(TRIES_MAX):
            row = await self._views.agent(manifest.name, manifest.version)
            if row is not None:
                break
            state = await self._signers.state(signer)
            signers.require_trusted(state, manifest.reference, signer)
            entry = Entry(stream, 0, (_event_of(package, signature),))
            try:
                # Not if the key is distrusted meanwhile.
                await self._log.append_all((entry,), actor, {self._signers.stream_of(signer): state.version})
            except VersionConflict:
                # Somebody else publishes it at this moment, or did and the view was behind.
                await self._log.catch_up()
        else:
            row = await self._views.agent(manifest.name, manifest.version)
        if row is None:
            raise NotFound(f"there is no agent {manifest.reference}")
        if row.digest != package.digest:
            raise Conflict(
                f"{manifest.reference} is published with other contents ({row.digest}); "
                "versions are immutable; raise the version in manifest.yaml",
                published=row.digest,
                pushed=package.digest,
            )
        if row.signer != signer:
            signers.require_trusted(await self._signers.state(row.signer), manifest.reference, row.signer)
        return row

    async def _tag(self, package: AgentPackage, signature: Signature) -> None:
        descriptor = Descriptor(
            media_type=MANIFEST_TYPE,
            digest=package.digest,
            size=len(package.blobs[package.digest]),
            artifact_type=ARTIFACT_TYPE,
        )
        await self._store.tag(f"{package.manifest.name}:{package.manifest.version}", descriptor)
        size = len(signature.blobs[signature.digest])
        signed = Descriptor(media_type=MANIFEST_TYPE, digest=signature.digest, size=size)
        await self._store.tag(tag_of(package.digest), signed)

    async def _row(self, name: str, version: str) -> AgentRow:
        if name.isprintable() and version.isprintable():
            row = await self._views.agent(name, version)
            if row is not None:
                return row
        raise await self._not_found(name, version)

    async def _not_found(self, name: str, version: str) -> NotFound:
        versions = await self._views.version_names(name) if name.isprintable() else []
        if versions:
            close = f"{name}@{nearest(version, versions) or versions[0]}"
        else:
            near = nearest(name, await self._views.agent_names())
            newest = (await self._views.version_names(near))[:1] if near else []
            close = f"{near}@{newest[0]}" if newest else ""
        hint = f"; the nearest is {close}" if close else ""
        return NotFound(f"there is no agent {name}@{version}{hint}", nearest=close)


def _event_of(package: AgentPackage, signature: Signature) -> AgentVersionPublished:
    oci = msgspec.json.decode(package.blobs[package.digest], type=OciManifest)
    return AgentVersionPublished(
        name=package.manifest.name,
        version=package.manifest.version,
        digest=package.digest,
        # The very bytes that the config's digest names (law 10).
        manifest=msgspec.Raw(package.blobs[oci.config.digest]),
        size_bytes=package.size_bytes,
        signer=signature.signer,
        signature=signature.digest,
    )


def _require_digest(path: str, digest: str) -> None:
    if not is_digest(digest):
        raise InvalidArgument(f"{path}: got {digest[:80]!r}; expected sha256:<64 hex digits>", path=path)


def _key_message(row: SignerRow) -> agents_pb2.SigningKey:
    return agents_pb2.SigningKey(
        public_key=row.public_key,
        name=row.name,
        trusted=row.trusted,
        since_us=row.since_us,
        reason=row.reason,
        position=row.position,
    )


def _cursor(after: str) -> tuple[str, str, str]:
    if not after:
        return "", "", ""
    name, _, version = after.rpartition("@")
    if not NAME_PATTERN.match(name):
        raise InvalidArgument(f"after: got {after!r}; expected name@version", path="after")
    return name, sort_key(version), version


def _message(row: AgentRow) -> agents_pb2.AgentVersion:
    return agents_pb2.AgentVersion(
        name=row.name,
        version=row.version,
        digest=row.digest,
        manifest_json=row.manifest,
        published_us=row.published_us,
        size_bytes=row.size_bytes,
        position=row.position,
        signer=row.signer,
        signature_digest=row.signature,
        yanked_us=row.yanked_us,
        yank_reason=row.yank_reason,
    )
