"""Executors' sessions: pulls, leases, assignments, cancels and reports.

Everything here is in memory and can be lost: what must survive is decided through the engine. An executor is
given work only in the answer to its own pull, and only after the assignment is committed.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import islice, takewhile
from typing import Final, NamedTuple

import msgspec
from hive_common.contracts.events import AgentRef
from hive_common.contracts.judgement import Distinct
from hive_common.contracts.limits import KIB, LEASE_MS, PULL_REPLY_BYTES_MAX
from hive_common.contracts.messages import Assignment, AttemptKey, PullReply, PullRequest
from hive_common.contracts.permissions import NONE
from hive_common.control.kill_log import KillLog
from hive_common.judgement.reputation import Standing
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import InvalidArgument, PermissionDenied

from hive_scheduler.catalogue import Catalogue
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.ahead import Queue
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.placement import Device, Fleet, Need, Picked
from hive_scheduler.domain.queue import PRIORITIES
from hive_scheduler.domain.shortage import shortage_of
from hive_scheduler.domain.task import TaskState
from hive_scheduler.engine import Engine
from hive_scheduler.metrics import ATTEMPTS_LIVE, EXECUTORS_ONLINE, LOST, PLACEMENTS, PULLS, QUEUE_DEPTH
from hive_scheduler.permits import Permits, is_plain, with_permissions

log = logging.getLogger(__name__)

PAST_SESSIONS_MAX: Final = 16
"""Sessions of one executor that are remembered as over."""
SESSION_CHARACTERS_MAX: Final = 128
STALL_MS: Final = 1_000
"""A tick that comes this late means that this process stood still, and that pulls may lie unread."""
ORDER_LOOK_MS: Final = 500
START_GRACE_MS: Final = 60_000
OVERTIME_MS: Final = 10_000
"""An attempt that has not started may take this long until it does (modules are compiled at first use), and
one that runs may stay this long beyond its timeout; after that it is given up."""
ASSIGNMENT_BYTES: Final = 1 * KIB
"""What an assignment takes in a reply besides its input and its token: ids, agent and limits are bounded well
below it."""
REPLY_MARGIN_BYTES: Final = 32 * KIB

PERMISSION_DENIED: Final = "permission_denied"

Key = tuple[str, int]


class _Live(NamedTuple):
    """A live attempt. `until_ms`: when it is given up although its executor still holds it."""

    session: str
    timeout_ms: int
    until_ms: int
    agent: str


class _Cancel(NamedTuple):
    """An attempt that its executor has to stop: since when, and when it was last told; 0: never."""

    since_ms: int
    told_ms: int = 0


class _Pull:
    def __init__(self, request: PullRequest, now_ms: int) -> None:
        self.request = request
        self.arrived_ms = now_ms
        self.answered: asyncio.Future[PullReply] = asyncio.get_running_loop().create_future()
        self.assignments: list[Assignment] = []
        self.bytes = REPLY_MARGIN_BYTES
        self.sealed = False


class _Executor:
    """What is known of an executor beyond the log."""

    def __init__(self, executor: str) -> None:
        self.id = executor
        self.session: str | None = None
        self.sequence = 0
        self.past: deque[str] = deque(maxlen=PAST_SESSIONS_MAX)
        self.lease_until_ms = 0
        self.last_seen_us = 0
        self.pull: _Pull | None = None
        self.live: dict[Key, _Live] = {}
        self.cancels: dict[Key, _Cancel] = {}
        self.held: dict[Key, None] = {}
        self.slots_free = 0
        self.ahead = 0
        self.memory_free_bytes = 0
        self.draining = False
        self.order_told = 0
        self.order_looked_ms = -ORDER_LOOK_MS


class Dispatcher:
    """Answers pulls, keeps leases and places ready tasks.

    Args:
        engine: decides; this object becomes its listener.
        fleet: the devices to place on.
        catalogue: executors as the log has them.
        kills: what is stopped.
        permits: what agents may do.
        clock: leases run on its boot clock.
        epoch: of this leader.
        lease_ms: how long attempts of an executor stay live without a pull.
    """

    def __init__(
        self,
        engine: Engine,
        fleet: Fleet,
        catalogue: Catalogue,
        kills: KillLog,
        permits: Permits,
        clock: Clock,
        epoch: int,
        lease_ms: int = LEASE_MS,
    ) -> None:
        self._engine = engine
        self._fleet = fleet
        self._catalogue = catalogue
        self._kills = kills
        self._permits = permits
        self._clock = clock
        self._epoch = epoch
        self._lease_ms = lease_ms
        # Within a third of the lease, so that two answers may be lost; a bit before, for the way there and back.
        self._answer_after_ms = lease_ms * 3 // 10
        # A cancel that an executor was told is no reason to answer its next pull at once for this long.
        self._cancel_again_ms = lease_ms // 3
        self.standing_of: Callable[[str], Standing] = lambda _: "new"
        """What is thought of an executor, for tasks of others than its owner."""
        self.on_assign: Callable[[str, JobState, TaskState], None] = lambda executor, job, task: None
        """Called before a task is given to an executor; MUST NOT decide."""
        self._executors: dict[str, _Executor] = {}
        self._pulls: OrderedDict[str, _Pull] = OrderedDict()
        self._leases: OrderedDict[str, None] = OrderedDict()
        self._refs: dict[str, AgentRef] = {}
        self._frozen = False
        self._last_tick_ms = clock.boot_ms()
        self._next_check_ms = 0
        engine.listener = self

    # --- pulls ---

    async def pull(self, executor: str, request: PullRequest) -> PullReply:
        """Take a pull and return its answer once there is one (messages.PullRequest).

        Raises:
            InvalidArgument: a session's name that is empty or longer than `SESSION_CHARACTERS_MAX`.
            PermissionDenied: the executor is revoked.
        """
        if not 0 < len(request.session) <= SESSION_CHARACTERS_MAX:
            raise InvalidArgument(f"session: expected 1 to {SESSION_CHARACTERS_MAX} characters", path="session")
        if executor not in self._catalogue.executors:
            await self._catalogue.catch_up()
            if executor not in self._catalogue.executors:
                return PullReply(epoch=self._epoch, unknown=True)
        if self._catalogue.is_revoked(executor):
            raise refused(executor)
        state = self._executors.setdefault(executor, _Executor(executor))
        if request.kill_epoch > self._kills.verifier.epoch:
            await self._look_for_order(state, request.kill_epoch)
        if request.session in state.past:
            return PullReply(epoch=self._epoch, superseded=True)
        begins = request.session != state.session
        if begins:
            self._begin_session(state, request)
        elif request.sequence <= state.sequence:
            return await self._again(state, request)
        pull = self._register(state, request)
        self._reconcile(state, pull)
        self._tell_of_order(state)
        self._engine.settle()
        if begins and not pull.sealed and not pull.assignments:
            # An executor that has only just come is not ready before it has a lease; and with that it is told what
            # it has to stop, which may have to be committed first.
            self._answer_after_commit(state, pull)
        return await asyncio.shield(pull.answered)

    def _begin_session(self, state: _Executor, request: PullRequest) -> None:
        if state.session is not None:
            state.past.append(state.session)
        state.session = request.session
        state.sequence = 0
        state.order_told = 0
        state.cancels.clear()

    async def _again(self, state: _Executor, request: PullRequest) -> PullReply:
        """Answer a pull that came twice like the first, and one that was overtaken with nothing."""
        pull = state.pull
        if pull is not None and pull.request.sequence == request.sequence:
            return await asyncio.shield(pull.answered)
        return self._reply_of(state, None)

    def _register(self, state: _Executor, request: PullRequest) -> _Pull:
        now_ms = self._clock.boot_ms()
        if state.pull is not None:
            self._answer(state, state.pull, with_work=False)
        state.sequence = request.sequence
        state.draining = request.draining
        state.slots_free = request.slots_free
        state.ahead = max(0, request.ahead)
        state.memory_free_bytes = request.memory_free_bytes
        self._renew(state, now_ms)
        pull = state.pull = _Pull(request, now_ms)
        self._pulls[state.id] = pull
        return pull

    def _renew(self, state: _Executor, now_ms: int) -> None:
        state.last_seen_us = self._clock.now_us()
        state.lease_until_ms = now_ms + self._lease_ms
        self._leases[state.id] = None
        self._leases.move_to_end(state.id)

    def _reconcile(self, state: _Executor, pull: _Pull) -> None:
        """Compare what the executor says it has with what it was given."""
        request = pull.request
        # In their order, and not a set's: what is told comes in the same order in every process.
        state.held = held = dict.fromkeys((key.task, key.attempt) for key in request.held)
        spooled = {(key.task, key.attempt) for key in request.spooled}
        for key, live in list(state.live.items()):
            if key in spooled:
                continue
            if live.session != state.session:
                self._lose(key, "session_ended")
            elif key not in held:
                self._give_again(state, pull, key)
        # One that is not held may still be on its way, in an answer that a later pull has overtaken.
        since_ms = self._clock.boot_ms() - self._lease_ms
        state.cancels = {
            key: cancel for key, cancel in state.cancels.items() if key in held or cancel.since_ms > since_ms
        }
        self._sync(state)
        if pull.assignments:
            self._answer_after_commit(state, pull)
        self._cancel_after_commit(state, [key for key in held if key not in state.live])

    def _cancel_after_commit(self, state: _Executor, keys: list[Key]) -> None:
        """Have the executor stop attempts which, by what is decided now, are not live any more."""

        def tell(_: int) -> None:
            now_ms = self._clock.boot_ms()
            for key in keys:
                state.cancels.setdefault(key, _Cancel(now_ms))
            # A pull with work in it is answered anyway, when its work is committed.
            pull = state.pull
            if pull is not None and not pull.sealed and not pull.assignments and self._cancels_due(state):
                self._answer(state, pull)

        if keys:
            self._engine.committer.after(tell)

    def _cancels_due(self, state: _Executor) -> bool:
        now_ms = self._clock.boot_ms()
        return any(now_ms - cancel.told_ms >= self._cancel_again_ms for cancel in state.cancels.values())

    def _give_again(self, state: _Executor, pull: _Pull, key: Key) -> None:
        found = self._engine.find_task(key[0])
        assert found is not None, f"attempt {key} is live and its job is not open"
        job, task = found
        try:
            token = self._token(state, job, task, key[1])
        except PermissionDenied as error:
            failure = tasks.Fail(
                key[1], state.id, state.live[key].session, PERMISSION_DENIED, self._engine.now_us(), error.message
            )
            self._engine.report(job, task, failure)
            return
        assignment = self._assignment(job, task, key[1], token)
        size = _size_of(assignment)
        if pull.bytes + size <= PULL_REPLY_BYTES_MAX:
            pull.bytes += size
            pull.assignments.append(assignment)

    def _answer_after_commit(self, state: _Executor, pull: _Pull) -> None:
        # What is assigned from here on may be committed later than the answer goes out.
        pull.sealed = True
        self._sync(state)
        self._engine.committer.after(lambda _: self._answer(state, pull))

    def _answer(self, state: _Executor, pull: _Pull, with_work: bool = True) -> None:
        if pull.answered.done():
            return
        pull.answered.set_result(self._reply_of(state, pull if with_work else None))
        if state.pull is pull:
            state.pull = None
            self._pulls.pop(state.id, None)
            self._sync(state)

    def _reply_of(self, state: _Executor, pull: _Pull | None) -> PullReply:
        known = self._catalogue.executors[state.id]
        # Every answer renews the lease, also one to a pull that was overtaken: it must not without the cancels.
        cancel = tuple(AttemptKey(*key) for key in state.cancels)
        if pull is not None:
            now_ms = self._clock.boot_ms()
            state.cancels = {key: cancel._replace(told_ms=now_ms) for key, cancel in state.cancels.items()}
        return PullReply(
            epoch=self._epoch,
            lease_ms=self._lease_ms,
            assignments=() if pull is None else tuple(pull.assignments),
            cancel=cancel,
            drained=known.drained,
            signers=self._catalogue.signers.position,
            kill=self._kills.verifier.signed if pull is not None and self._knows_less(pull) else None,
        )

    def signers_changed(self) -> None:
        """Tell everybody that the keys have changed whose agents may run (Catalogue)."""
        for state in self._executors.values():
            if state.pull is not None and not state.pull.sealed:
                self._answer_after_commit(state, state.pull)

    # --- kill orders ---

    def _knows_less(self, pull: _Pull) -> bool:
        return pull.request.kill_epoch < self._kills.verifier.epoch

    async def _look_for_order(self, state: _Executor, epoch: int) -> None:
        """Look whether there is an order that an executor says it has; it may say so now and then only."""
        now_ms = self._clock.boot_ms()
        if now_ms >= state.order_looked_ms + ORDER_LOOK_MS:
            state.order_looked_ms = now_ms
            await self._kills.catch_up(epoch)

    def order_taken(self) -> None:
        """Tell everybody who does not have it of a new order, and let it count for placement."""
        for state in self._executors.values():
            self._sync(state)
            self._tell_of_order(state)

    def _tell_of_order(self, state: _Executor) -> None:
        """Answer a pull of an executor that knows less; once for each order, since one may be unable to obey."""
        pull, epoch = state.pull, self._kills.verifier.epoch
        if pull is not None and self._knows_less(pull) and state.order_told < epoch:
            state.order_told = epoch
            if not pull.sealed:
                self._answer_after_commit(state, pull)

    def stop_executors(self) -> None:
        """Give up what stopped executors have, and have them end it. Their tasks wait for others."""
        stopped = self._kills.verifier.stopped
        for state in self._executors.values():
            if state.live and stopped.executor(state.id):
                lost = list(state.live)
                for key in lost:
                    self._lose(key, tasks.KILLED)
                self._cancel_after_commit(state, lost)

    # --- placement ---

    def pump(self) -> None:
        """Place ready tasks while there is a device for them (engine.Listener)."""
        queue = self._engine.queue
        if not queue or not self._fleet.has_room():
            return
        for priority in PRIORITIES:
            refused: set[Need] = set()
            while open_needs := [need for need in queue.needs(priority) if need not in refused]:
                for need in open_needs:
                    if not self._place_one(priority, need):
                        refused.add(need)

    def may_place(self, need: Need, count: int, distinct: Distinct) -> bool:
        """Say whether so many distinct ones could ever take a task that needs this (engine.Listener)."""
        return self._fleet.possible(need, count, distinct)

    def gone(self, need: Need, count: int, distinct: Distinct) -> int:
        """Return for how many of so many tasks that need this nobody is left (engine.Listener)."""
        if not self._fleet.any_revoked() or self._fleet.possible(need, count, distinct):
            return 0
        return shortage_of(need, count, distinct, self._fleet.devices()).gone

    def _place_one(self, priority: str, need: Need) -> bool:
        picked = self._fleet.place(need, self._queue_of(priority, need))
        if picked is None:
            return False
        state = self._executors[picked.executor]
        popped = self._engine.queue.pop(priority, need)
        found = None if popped is None else self._engine.find_task(popped[1])
        if found is None or not found[1].wanted:
            self._sync(state)
            return popped is not None
        job, task = found
        if task.judged is not None and not self._engine.is_due(job, task, need):
            # Something has changed since it was put there, and then it was put there again.
            self._sync(state)
            return True
        if self._engine.fail_if_stopped(job, task, self._kills):
            self._sync(state)
            return True
        pull = state.pull
        assert pull is not None, "a device without a pull has no slots"
        number = len(task.attempts) + 1
        try:
            token = self._token(state, job, task, number)
        except PermissionDenied as error:
            # Revoked or expired since the job was submitted: no attempt is given out, and none would be later.
            refusal = tasks.Reject(PERMISSION_DENIED, error.message)
            self._engine.apply(job, task.id, tasks.decide(task, refusal))
            self._sync(state)
            return True
        if pull.bytes + _bytes_of(task) + len(token) > PULL_REPLY_BYTES_MAX:
            # Room for its input comes with the executor's next pull, or another device has it now.
            pull.sealed = True
            self._sync(state)
            self._engine.queue.push(priority, need, job.id, task.id)
            return True
        self._assign(state, pull, job, task, picked, token)
        return True

    def _queue_of(self, priority: str, need: Need) -> Queue:
        queue = self._engine.queue
        first = queue.peek(priority, need)
        found = None if first is None else self._engine.find_task(first)
        return Queue(None if found is None else self._engine.usual.ms(found[1].agent), len(queue))

    def _token(self, state: _Executor, job: JobState, task: TaskState, attempt: int) -> str:
        agent = job.agents[task.agent]
        self._catalogue.signers.require(agent)
        if is_plain(agent):
            return ""
        return self._permits.token(state.id, job, task, attempt, self._permits.of_task(job, task))

    def _assign(
        self, state: _Executor, pull: _Pull, job: JobState, task: TaskState, picked: Picked, token: str
    ) -> None:
        assert state.session is not None
        self.on_assign(state.id, job, task)
        known = self._catalogue.executors[state.id]
        command = tasks.Assign(
            executor=state.id,
            session=state.session,
            lease_ms=self._lease_ms,
            now_us=self._engine.now_us(),
            placement=picked.placement,
            device=known.capabilities.device,
            owner=known.owner,
        )
        number = len(task.attempts) + 1
        self.hold(state.id, state.session, task, number)
        assignment = self._assignment(job, task, number, token)
        first = not pull.assignments
        pull.assignments.append(assignment)
        pull.bytes += _size_of(assignment)
        state.slots_free -= 1
        PLACEMENTS.inc()
        effect = (lambda _: self._answer(state, pull)) if first else None
        self._engine.apply(job, task.id, tasks.decide(task, command), effect=effect)

    def seal(self) -> None:
        """Let no more work into pulls that will be answered when the batch that is cut now is committed."""
        for state_id, pull in self._pulls.items():
            if pull.assignments and not pull.sealed:
                pull.sealed = True
                self._sync(self._executors[state_id])

    def _sync(self, state: _Executor) -> None:
        """Tell the fleet what is known of an executor. Without an open pull it has no slots."""
        known = self._catalogue.executors.get(state.id)
        if known is None:
            return
        takes = state.pull is not None and not state.pull.sealed
        # Those that wait there come last in it.
        run = islice(state.live.values(), known.capabilities.slots)
        self._fleet.upsert(
            Device(
                executor=state.id,
                name=known.name,
                owner=known.owner,
                capabilities=known.capabilities,
                slots_free=state.slots_free if takes else 0,
                memory_free_bytes=state.memory_free_bytes,
                running=len(state.live),
                drained=known.drained or state.draining,
                online=state.id in self._leases,
                revoked=known.revoked,
                killed=self._kills.verifier.stopped.executor(state.id) is not None,
                standing=self.standing_of(state.id),
                ahead=state.ahead,
                pace=self._engine.usual.pace(live.agent for live in run),
                given=state.pull is not None and bool(state.pull.assignments),
            )
        )

    def _assignment(self, job: JobState, task: TaskState, attempt: int, token: str) -> Assignment:
        agent = job.agents[task.agent]
        assert task.input is not None
        return Assignment(
            task=task.id,
            attempt=attempt,
            job=job.id,
            step=task.step,
            agent=self._sent(agent),
            input=task.input,
            timeout_ms=task.timeout_ms,
            memory_bytes=agent.memory_bytes,
            fuel=agent.fuel,
            index=task.index,
            pin=job.pin,
            counts_only=job.counts_only,
            token=token,
        )

    def _sent(self, agent: AgentRef) -> AgentRef:
        """Return what executors get of an agent: what it may do stands in the token, and nowhere else."""
        found = self._refs.get(agent.digest)
        if found is None:
            plain = with_permissions(agent, NONE)
            found = msgspec.structs.replace(plain, input_schema={}, output_schema={})
            self._refs[agent.digest] = found
        return found

    # --- what the engine tells ---

    def hold(self, executor: str, session: str, task: TaskState, attempt: int) -> None:
        """Count an attempt as live: assigned now, or by an earlier leader."""
        state = self._executors.get(executor)
        if state is None:
            state = self._executors[executor] = _Executor(executor)
        started = attempt in task.attempts and task.attempts[attempt].status == "running"
        grace_ms = OVERTIME_MS if started else OVERTIME_MS + START_GRACE_MS
        now_ms = self._clock.boot_ms()
        until_ms = now_ms + task.timeout_ms + grace_ms
        state.live[task.id, attempt] = _Live(session, task.timeout_ms, until_ms, task.agent)
        if executor not in self._leases:
            self._renew(state, now_ms)

    def attempt_started(self, executor: str, task: str, attempt: int) -> None:
        """Count the attempt's time from now (engine.Listener)."""
        live = self._executors[executor].live
        known = live.get((task, attempt))
        if known is not None:
            until_ms = self._clock.boot_ms() + known.timeout_ms + OVERTIME_MS
            live[task, attempt] = known._replace(until_ms=until_ms)

    def waits(self, executor: str, task: str, attempt: int) -> None:
        """Count an attempt's time anew: it waits for a person, or has waited until now."""
        state = self._executors.get(executor)
        known = None if state is None else state.live.get((task, attempt))
        if state is not None and known is not None:
            # It may not have started yet; and it asks again well within this time.
            until_ms = self._clock.boot_ms() + known.timeout_ms + OVERTIME_MS + START_GRACE_MS
            state.live[task, attempt] = known._replace(until_ms=until_ms)

    def attempt_ended(self, executor: str, session: str, task: str, attempt: int) -> None:
        """Forget an attempt (engine.Listener)."""
        state = self._executors.get(executor)
        if state is None or state.live.pop((task, attempt), None) is None:
            return
        # One that its pull still counted: it has one more slot than that says.
        takes = state.pull is not None and not state.pull.sealed and state.slots_free > 0
        if takes and state.ahead and (task, attempt) in state.held:
            state.ahead -= 1
            self._sync(state)

    def attempt_cancelled(self, executor: str, session: str, task: str, attempt: int) -> None:
        """Tell the executor to stop an attempt, once that is committed (engine.Listener)."""
        state = self._executors.get(executor)
        if state is None or state.live.pop((task, attempt), None) is None or session != state.session:
            return
        self._cancel_after_commit(state, [(task, attempt)])

    def executor_changed(self, executor: str) -> None:
        """Take over what the log says newly of an executor (Catalogue)."""
        state = self._executors.setdefault(executor, _Executor(executor))
        known = self._catalogue.executors.get(executor)
        if known is not None and known.revoked:
            before = self._fleet.get(executor)
            self._shut_out(state, before is None or not before.revoked)
        self._sync(state)
        if known is not None and known.drained and state.pull is not None and not state.pull.sealed:
            self._answer_after_commit(state, state.pull)

    def standing_changed(self, executor: str) -> None:
        """Take over what is thought of an executor now (Reputation)."""
        state = self._executors.get(executor)
        if state is not None:
            self._sync(state)

    def _shut_out(self, state: _Executor, newly: bool) -> None:
        """Give to others what a revoked executor has, at once: what it will say does not count any more.

        Where it is `newly` out, tasks that wait for one like it may have to do without.
        """
        self._leases.pop(state.id, None)
        pull, state.pull = state.pull, None
        if pull is not None:
            self._pulls.pop(state.id, None)
            if not pull.answered.done():
                pull.answered.set_exception(refused(state.id))
        lost = list(state.live)
        for key in lost:
            self._lose(key, "revoked")
        # Before others are looked for: the fleet must not offer it for what it has lost.
        self._sync(state)
        if newly:
            self._engine.look_again()
        if lost or newly:
            self._engine.settle()

    # --- time ---

    def freeze(self) -> None:
        """This process lost NATS: leases stand still, since nobody could renew them."""
        self._frozen = True

    def thaw(self) -> None:
        """NATS is back: everybody gets one fresh lease."""
        self._frozen = False
        self._refresh()

    def _refresh(self) -> None:
        until_ms = self._clock.boot_ms() + self._lease_ms
        for executor in self._leases:
            self._executors[executor].lease_until_ms = until_ms

    def tick(self) -> None:
        """Answer pulls that have waited long enough, and give up what ran out of time."""
        now_ms = self._clock.boot_ms()
        if now_ms - self._last_tick_ms > STALL_MS:
            self._refresh()
        self._last_tick_ms = now_ms
        due = takewhile(lambda item: now_ms - item[1].arrived_ms >= self._answer_after_ms, self._pulls.items())
        for executor, pull in list(due):
            if not pull.sealed:
                self._answer_after_commit(self._executors[executor], pull)
        if not self._frozen:
            self._expire(now_ms)
        if now_ms >= self._next_check_ms:
            self._next_check_ms = now_ms + 1_000
            self._give_up_overtime(now_ms)
            self._measure()

    def _expire(self, now_ms: int) -> None:
        while self._leases:
            executor = next(iter(self._leases))
            state = self._executors[executor]
            if state.lease_until_ms > now_ms:
                return
            del self._leases[executor]
            for key in list(state.live):
                self._lose(key, "lease_expired")
            self._sync(state)

    def _give_up_overtime(self, now_ms: int) -> None:
        for state in self._executors.values():
            over = [key for key, live in state.live.items() if live.until_ms <= now_ms]
            for key in over:
                self._lose(key, "overtime")
            self._cancel_after_commit(state, over)

    def _lose(self, key: Key, reason: str) -> None:
        LOST.labels(reason).inc()
        log.info("attempt %d of task %s is lost: %s", key[1], key[0], reason)
        self._engine.lose(key[0], key[1], reason)

    def _measure(self) -> None:
        PULLS.set(len(self._pulls))
        QUEUE_DEPTH.set(len(self._engine.queue))
        EXECUTORS_ONLINE.set(len(self._leases))
        ATTEMPTS_LIVE.set(sum(len(state.live) for state in self._executors.values()))

    def present(self) -> Iterable[tuple[str, int, int, int, bool]]:
        """Yield (executor, last seen in µs UTC, live attempts, free slots, online) of everybody who has pulled."""
        for state in self._executors.values():
            if state.last_seen_us:
                online = state.id in self._leases
                yield state.id, state.last_seen_us, len(state.live), state.slots_free, online


def refused(executor: str) -> PermissionDenied:
    """Return the error for a revoked executor; `reason` says so to programs."""
    return PermissionDenied(f"executor {executor} was revoked, for ever", reason="revoked")


def _bytes_of(task: TaskState) -> int:
    assert task.input is not None
    raw = task.input.raw
    return ASSIGNMENT_BYTES + (0 if raw is None else len(raw))


def _size_of(assignment: Assignment) -> int:
    raw = assignment.input.raw
    return ASSIGNMENT_BYTES + len(assignment.token) + (0 if raw is None else len(raw))
