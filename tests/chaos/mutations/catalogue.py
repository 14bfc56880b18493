"""Which safeguards are taken out, and which tests or storms have to notice.

Where two layers keep a law, each layer is taken out alone: a test of the one must not hide that the other is gone.
"""

from dataclasses import dataclass

TASK = "services/scheduler/src/hive_scheduler/domain/task.py"
SUBMISSION = "services/scheduler/src/hive_scheduler/submission.py"
REPORTS = "services/scheduler/src/hive_scheduler/reports.py"
DISPATCH = "services/scheduler/src/hive_scheduler/dispatch.py"
COMMITS = "services/scheduler/src/hive_scheduler/commits.py"
LEADERSHIP = "services/scheduler/src/hive_scheduler/leadership.py"
WRITER = "libs/common/src/hive_common/eventlog/writer.py"
SQL = "libs/common/src/hive_common/eventlog/migrations/*.sql"
VERIFIER = "services/audit/src/hive_audit/verifier.py"
REPORTER = "executor/src/hive_executor/reporter.py"
LATTICE = "libs/common/src/hive_common/permissions/lattice.py"
TOKENS = "libs/common/src/hive_common/permissions/tokens.py"
HTTP = "executor/src/hive_executor/host/http.py"
SIGNING = "libs/common/src/hive_common/artifacts/signing.py"
EXECUTOR_AGENTS = "executor/src/hive_executor/agents.py"
REGISTRY_AGENTS = "services/registry/src/hive_registry/agents.py"
KILL_VERIFIER = "libs/common/src/hive_common/control/verifier.py"
EXECUTOR = "executor/src/hive_executor/bootstrap.py"
RESPONDER = "libs/common/src/hive_common/bus/nats.py"
CHUNKS = "libs/common/src/hive_common/inference/chunks.py"
EXECUTOR_CALLS = "services/llm-router/src/hive_router/executor_calls.py"
SELECTION = "services/llm-router/src/hive_router/domain/selection.py"

FENCE = "services/scheduler/tests/domain/test_fence.py"
LAWS = "services/scheduler/tests/domain/test_laws.py"
FAULTS = "services/scheduler/tests/test_faults.py"
ACKNOWLEDGEMENT = "services/scheduler/tests/test_acknowledgement.py"
CONSTRAINTS = "libs/common/tests/eventlog/test_constraints.py"
APPEND = "libs/common/tests/eventlog/test_append.py"
SIGNING_TESTS = "libs/common/tests/artifacts/test_signing.py"
EXECUTOR_SIGNING_TESTS = "executor/tests/service/test_signing.py"
ORDERS = "libs/common/tests/control/test_orders.py"
KILL = "executor/tests/service/test_kill.py"
HTTP_TESTS = "executor/tests/sandbox/test_http.py"
KV_TESTS = "services/registry/tests/test_kv.py"
LATTICE_TESTS = "libs/common/tests/permissions/test_lattice.py"
TOKEN_TESTS = "libs/common/tests/permissions/test_tokens.py"
SELECTION_TESTS = "services/llm-router/tests/domain/test_selection.py"
BUDGETS = "services/llm-router/src/hive_router/domain/budgets.py"
BUDGET_TESTS = "services/llm-router/tests/domain/test_budgets.py"
ROUTER_TOKENS = "services/llm-router/src/hive_router/tokens.py"
ROUTER_TOKEN_TESTS = "services/llm-router/tests/test_tokens.py"
TREASURY = "services/llm-router/src/hive_router/treasury.py"
NEEDS = "services/scheduler/src/hive_scheduler/domain/needs.py"
NEEDS_TESTS = "services/scheduler/tests/domain/test_needs.py"
SHARED_TESTS = "services/llm-router/tests/test_shared_budgets.py"
PERMITS_OF_BUDGETS_TESTS = "services/scheduler/tests/test_budgets.py"
TREASURY_TESTS = "services/llm-router/tests/test_treasury.py"
RESPONSE_CACHE = "services/llm-router/src/hive_router/response_cache.py"
RESPONSE_CACHE_TESTS = "services/llm-router/tests/test_response_cache.py"
MONEY_TESTS = "services/llm-router/tests/test_money.py"
HTTP_CLIENT_TESTS = "libs/common/tests/inference/test_http.py"
KEY_TESTS = "services/api-gateway/tests/test_keys.py"
SEEN_TESTS = "services/scheduler/tests/test_seen_by.py"
APPROVAL = "services/scheduler/src/hive_scheduler/domain/approval.py"
APPROVAL_LAWS = "services/scheduler/tests/domain/test_approvals.py"
APPROVAL_TESTS = "services/scheduler/tests/test_approvals.py"
ACTION_TESTS = "libs/common/tests/permissions/test_actions.py"
APPROVED_CALLS = "services/llm-router/tests/test_approved_calls.py"
DEVICE_APPROVALS = "executor/tests/sandbox/test_approvals.py"
PERMITS_TESTS = "services/scheduler/tests/test_permits.py"
FORK_TESTS = "services/scheduler/tests/test_forks.py"
DELEGATION_TESTS = "services/scheduler/tests/test_delegation.py"


@dataclass(frozen=True)
class Storm:
    """A storm that has to end with `finding` above zero.

    Attributes:
        arguments: of `python -m tests.chaos.storm`.
        finding: a field of its line.
    """

    arguments: tuple[str, ...]
    finding: str


@dataclass(frozen=True)
class Mutation:
    """One safeguard.

    Attributes:
        name: says what is gone.
        law: of docs/ARCHITECTURE.md.
        file: a path, or a pattern; every file with the text is changed.
        old: stands exactly once in the file.
        new: what stands there in the copy.
        tests: each alone has to fail.
        storm: has to find it, too.
    """

    name: str
    law: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    storm: Storm | None = None

    @property
    def quick_tests(self) -> tuple[str, ...]:
        """Those that take no server and no search: seconds."""
        return tuple(test for test in self.tests if test == FENCE)


MUTATIONS = (
    Mutation(
        "fence: anybody reports on any attempt",
        3,
        TASK,
        "if attempt is None or attempt.executor != report.executor or attempt.session != report.session:",
        "if attempt is None:",
        (FENCE, LAWS, f"{FAULTS}::test_a_report_by_somebody_else_is_rejected"),
        Storm(("--tasks", "300", "--strikes", "4", "--faults", "kill runner,cut executors"), "stale_accepted"),
    ),
    Mutation(
        "fence: a session may report on what another session was given",
        3,
        TASK,
        "if attempt is None or attempt.executor != report.executor or attempt.session != report.session:",
        "if attempt is None or attempt.executor != report.executor:",
        (FENCE, LAWS, f"{FAULTS}::test_a_report_by_somebody_else_is_rejected"),
    ),
    Mutation(
        "fence: an attempt that is lost may still decide its task",
        3,
        TASK,
        "if attempt.status in LIVE and not task.ended and not closing:",
        "if not task.ended and not closing:",
        (FENCE, LAWS),
    ),
    Mutation(
        "fence: a late report is noted each time it comes",
        3,
        TASK,
        'case "late" if isinstance(report, Succeed | Fail) and not task.attempts[report.attempt].late:',
        'case "late" if isinstance(report, Succeed | Fail):',
        (LAWS, f"{FAULTS}::test_a_report_from_beyond_the_lease_changes_nothing_and_is_noted_once"),
    ),
    Mutation(
        "one end, the decider: a task that has ended is cancelled once more",
        2,
        TASK,
        "return [] if task.ended else [TaskCancelled(command.reason)]",
        "return [TaskCancelled(command.reason)]",
        (FENCE,),
    ),
    Mutation(
        "one end, the reader: events after the end are taken as they come",
        2,
        TASK,
        "if task.ended and not isinstance(event, AttemptLate):",
        "if False:",
        (FENCE,),
    ),
    Mutation(
        "one end, the database: no unique index on terminal events",
        2,
        SQL,
        "CREATE UNIQUE INDEX events_terminal",
        "CREATE INDEX events_terminal",
        (
            CONSTRAINTS,
            f"{APPEND}::test_second_terminal_event_is_refused_and_only_the_guilty_append_fails",
        ),
    ),
    Mutation(
        "versions, the database: no unique constraint on stream and version",
        2,
        SQL,
        "CONSTRAINT events_stream_version UNIQUE (stream, version)",
        "CONSTRAINT events_stream_version CHECK (version > 0)",
        (CONSTRAINTS,),
    ),
    Mutation(
        "versions, the log's function: preconditions are not looked at",
        2,
        SQL,
        "IF heads[s] <> precondition_versions[p] THEN",
        "IF false THEN",
        (
            f"{APPEND}::test_stream_that_is_only_read_must_stand_at_its_version",
            f"{APPEND}::test_conflict_fails_only_itself",
        ),
    ),
    Mutation(
        "versions, the leader: appends carry no version of their job",
        2,
        COMMITS,
        "last = await self._writer.append(Append(events, expect))",
        "last = await self._writer.append(Append(events, {}))",
        (f"{ACKNOWLEDGEMENT}::test_a_report_on_a_job_that_somebody_else_moved_is_not_written",),
    ),
    Mutation(
        "one leader: the lock is not asked for",
        2,
        LEADERSHIP,
        "return row is not None and bool(row[0])",
        "return row is not None",
        (f"{FAULTS}::test_a_second_scheduler_stands_by_and_takes_over",),
    ),
    Mutation(
        "commit before acknowledgement: submit",
        1,
        SUBMISSION,
        "        await self._engine.committer.settled()\n        return Submitted(job_id, await committed, False)",
        "        return Submitted(job_id, self._engine.committer.position + 1, False)",
        (f"{ACKNOWLEDGEMENT}::test_a_submit_is_not_acknowledged_before_it_is_committed",),
        Storm(("--tasks", "300", "--strikes", "4", "--faults", "kill during commit"), "lost"),
    ),
    Mutation(
        "commit before acknowledgement: cancel",
        1,
        SUBMISSION,
        "            self._engine.settle()\n        await self._engine.committer.settled()\n",
        "            self._engine.settle()\n",
        (f"{ACKNOWLEDGEMENT}::test_a_cancel_is_not_acknowledged_before_it_is_committed",),
    ),
    Mutation(
        "commit before acknowledgement: report",
        1,
        REPORTS,
        "        await self._engine.committer.settled()\n        return ReportReply(results=tuple(results))",
        "        return ReportReply(results=tuple(results))",
        (f"{ACKNOWLEDGEMENT}::test_a_report_is_not_answered_before_it_is_committed",),
    ),
    Mutation(
        "commit before assignment: the pull is answered at once",
        1,
        DISPATCH,
        "        self._engine.apply(job, task.id, tasks.decide(task, command), effect=effect)",
        "        self._engine.apply(job, task.id, tasks.decide(task, command))\n        self._answer(state, pull)",
        (f"{ACKNOWLEDGEMENT}::test_an_attempt_is_not_given_out_before_it_is_committed",),
    ),
    Mutation(
        "one job for one key: every submit is a new job",
        1,
        SUBMISSION,
        "job_id = derive_id(self._ns, request.caller, request.idempotency_key)",
        "job_id = new_id(self._clock.now_us() // 1_000)",
        (f"{FAULTS}::test_a_leader_that_dies_is_replaced_and_the_job_ends_as_if_nothing_had_happened",),
        Storm(("--tasks", "300", "--strikes", "4", "--faults", "kill gateway,kill scheduler"), "duplicated"),
    ),
    Mutation(
        "an answer lost after the commit: what was sent again is taken for a conflict",
        1,
        WRITER,
        "            elif not resent:\n",
        "            elif True:\n",
        ("libs/common/tests/eventlog/test_faults.py::test_answer_lost_after_commit_is_success_and_stored_once",),
    ),
    Mutation(
        "executor: an outcome leaves the disk before anybody has answered for it",
        1,
        REPORTER,
        "        begun = time.perf_counter()\n        subject =",
        "        begun = time.perf_counter()\n        self._spool.settle([spooled.key for spooled in batch])\n"
        "        subject =",
        ("executor/tests/service/test_executor.py::test_a_report_is_repeated_until_it_is_committed",),
    ),
    Mutation(
        "kill order: the signature is not looked at",
        9,
        KILL_VERIFIER,
        "if not is_signed(_signature(signed.signature), signed_bytes(data), self._key):",
        "if not signed_bytes(data):",
        (
            ORDERS,
            f"{KILL}::test_forged_replayed_and_older_orders_are_counted_and_not_obeyed",
            "services/scheduler/tests/test_kills.py::test_an_order_that_nobody_signed_is_not_obeyed_even_from_the_log",
        ),
    ),
    Mutation(
        "permissions: a child has the more of both in tokens",
        6,
        LATTICE,
        "    tokens = min(first.max_tokens, second.max_tokens)\n",
        "    tokens = max(first.max_tokens, second.max_tokens)\n",
        (LATTICE_TESTS, TOKEN_TESTS),
    ),
    Mutation(
        "permissions: names below a host are those that end alike",
        6,
        "libs/common/src/hive_common/permissions/hosts.py",
        'other.name.endswith(f".{self.name}")',
        "other.name.endswith(self.name)",
        (LATTICE_TESTS,),
    ),
    Mutation(
        "grants: nobody looks again when an attempt is given out",
        6,
        DISPATCH,
        "self._permits.of_task(job, task))",
        "agent.permissions)",
        (f"{PERMITS_TESTS}::test_a_grant_that_is_taken_back_keeps_attempts_from_being_given_out",),
    ),
    Mutation(
        "forks: the scheduler makes what a device says was forked",
        6,
        REPORTS,
        "            command = self._allowed(*found, command)\n",
        "            pass\n",
        (f"{FORK_TESTS}::test_a_device_that_lies_gets_no_child_made",),
    ),
    Mutation(
        "forks: a child may do whatever its agent may",
        6,
        LATTICE,
        "    return meet(parent, own)\n",
        "    return own\n",
        (f"{DELEGATION_TESTS}::test_no_token_of_a_child_says_what_its_parents_does_not",),
    ),
    Mutation(
        "forks: each task below one has all that the one was granted",
        6,
        "services/scheduler/src/hive_scheduler/permits.py",
        "if fork is None or below > fork.max:",
        "if fork is None:",
        (
            f"{DELEGATION_TESTS}::test_nobody_forks_more_deeper_or_others_than_any_above_was_granted",
            f"{FORK_TESTS}::test_tasks_share_what_an_ancestor_was_granted_also_in_one_batch_of_reports",
        ),
    ),
    Mutation(
        "approvals: who saw one action approves of whatever it is",
        6,
        APPROVAL,
        "    if hash_ != approval.hash:\n",
        "    if False:\n",
        (APPROVAL_LAWS, f"{APPROVAL_TESTS}::test_a_person_approves_once_and_the_log_says_who"),
    ),
    Mutation(
        "approvals: one ends as often as somebody decides",
        2,
        APPROVAL,
        'if found is None or found.status != "pending":',
        "if found is None:",
        (APPROVAL_LAWS,),
    ),
    Mutation(
        "approvals: with one, everything is approved",
        6,
        "libs/common/src/hive_common/permissions/actions.py",
        "if action.permission in permissions.asks and action.hash not in approved:",
        "if action.permission in permissions.asks and not approved:",
        (ACTION_TESTS, APPROVED_CALLS),
    ),
    Mutation(
        "approvals: the registry believes a device that it asked",
        6,
        "services/registry/src/hive_registry/kv.py",
        "                check_approved(claims.permissions, claims.approved, action)\n",
        "                pass\n",
        (f"{KV_TESTS}::test_where_a_person_is_asked_only_what_was_approved_is_read_or_staged",),
    ),
    Mutation(
        "approvals: the router believes a device that it asked",
        6,
        "services/llm-router/src/hive_router/tokens.py",
        "            check_approved(claims.permissions, claims.approved, action)\n",
        "            pass\n",
        (APPROVED_CALLS,),
    ),
    Mutation(
        "approvals: a device asks nobody",
        6,
        "executor/src/hive_executor/host/approval.py",
        "        if not self.asks(permission):\n",
        "        if True:\n",
        (f"{DEVICE_APPROVALS}::test_the_same_is_asked_once_and_anything_else_anew",),
    ),
    Mutation(
        "approvals: whoever asks again and again has no end",
        4,
        "services/scheduler/src/hive_scheduler/approvals.py",
        '        if approval.status == "pending":\n            self._dispatcher.waits(*key)\n',
        '        self._dispatcher.waits(*key)\n        if approval.status == "pending":\n',
        (f"{APPROVAL_TESTS}::test_who_has_the_answer_gets_no_more_time_by_asking_again",),
    ),
    Mutation(
        "tokens: another executor's is as good",
        6,
        TOKENS,
        "if claims.executor != executor or (key and claims.key != key):",
        "if key and claims.key != key:",
        (
            TOKEN_TESTS,
            "services/llm-router/tests/test_executor_calls.py"
            "::test_a_guest_may_call_what_its_token_says_and_nothing_else",
        ),
    ),
    Mutation(
        "tokens: a block may be signed by a third party",
        6,
        TOKENS,
        "if token.block_external_key(index) is not None:",
        "if False:",
        (TOKEN_TESTS,),
    ),
    Mutation(
        "tokens: that of another attempt of the executor is as good",
        6,
        "executor/src/hive_executor/permits.py",
        "if (claims.job, claims.task, claims.attempt) != (assignment.job, assignment.task, assignment.attempt):",
        "if False:",
        ("executor/tests/service/test_permits.py",),
    ),
    Mutation(
        "tokens: the router does not look at the model",
        6,
        "services/llm-router/src/hive_router/tokens.py",
        "        check_model(claims.permissions, call.model)\n",
        "",
        (
            "services/llm-router/tests/test_executor_calls.py"
            "::test_a_guest_may_call_what_its_token_says_and_nothing_else",
        ),
    ),
    Mutation(
        "http: of the addresses of a name only the first is looked at",
        6,
        HTTP,
        "        for address in found:\n",
        "        for address in found[:1]:\n",
        (
            f"{HTTP_TESTS}::test_a_name_may_not_lead_to_an_address_that_means_something_here_only"
            "[127.0.0.1-loopback]",
        ),
    ),
    Mutation(
        "http: sockets go wherever the library likes",
        6,
        HTTP,
        "    if address[0] not in addresses:\n",
        "    if not address[0]:\n",
        (f"{HTTP_TESTS}::test_a_socket_goes_to_no_address_that_was_not_looked_up",),
    ),
    Mutation(
        "http: a redirect is not checked like a request",
        6,
        HTTP,
        "            self._check(host, request.method)\n",
        "",
        (
            f"{HTTP_TESTS}::test_a_redirect_out_of_the_list_ends_the_attempt[//b.test/]",
            f"{HTTP_TESTS}::test_a_redirect_needs_its_method_granted_too",
        ),
    ),
    Mutation(
        "kv: what another attempt wrote counts when one decides its task",
        3,
        "services/registry/src/hive_registry/kv_views.py",
        "conn.execute(_OF_ATTEMPT, (*task, event.attempt))",
        "conn.execute(_OF_ATTEMPT, (*task, 1))",
        (f"{KV_TESTS}::test_of_an_attempt_that_does_not_decide_its_task_nothing_is_kept[another attempt]",),
    ),
    Mutation(
        "kv: an end between the look at a task and the write leaves what was staged there for ever",
        4,
        "services/registry/src/hive_registry/kv.py",
        "(Entry(stream, state.version, events),), executor, expect)",
        "(Entry(stream, state.version, events),), executor)",
        (f"{KV_TESTS}::test_an_end_between_the_look_at_the_task_and_the_write_is_seen",),
    ),
    Mutation(
        "kv: two attempts give back the same old value",
        4,
        "services/registry/src/hive_registry/domain/kv.py",
        "        touched.update(write.key for write in one.writes)\n",
        "",
        ("services/registry/tests/test_kv_rules.py",),
    ),
    Mutation(
        "kv: success is reported without handing over what was written",
        3,
        "executor/src/hive_executor/attempts.py",
        "                await keep(capabilities)\n",
        "                pass\n",
        (
            "executor/tests/service/test_keep.py"
            "::test_what_an_attempt_wrote_is_staged_before_its_success_is_reported",
        ),
    ),
    Mutation(
        "cloud: nobody looks whether a call may leave",
        7,
        "services/llm-router/src/hive_router/domain/selection.py",
        "    return ask.cloud_refusal if backend.provider else None\n",
        "    return None\n",
        (f"{SELECTION_TESTS}::test_a_call_that_nobody_looked_at_goes_to_no_provider",),
    ),
    Mutation(
        "budget: nothing is reserved before a call",
        7,
        BUDGETS,
        "        self.free, self.held = self.free.minus(need), self.held.plus(need)\n",
        "",
        (f"{BUDGET_TESTS}::TestSpending",),
    ),
    Mutation(
        "budget: a block is more than a limit leaves",
        7,
        BUDGETS,
        "        granted[limit.unit] = min(granted[limit.unit], share, max(room, 0))\n",
        "",
        (f"{BUDGET_TESTS}::TestSpending",),
    ),
    Mutation(
        "budget: an answer that does not say what it used costs nothing",
        7,
        "services/llm-router/src/hive_router/paying.py",
        "            self._end(self._hold.need)\n",
        "            self._end(Amount())\n",
        (f"{MONEY_TESTS}::test_an_answer_that_breaks_off_costs_its_reservation",),
    ),
    Mutation(
        "budget: what a job was submitted with binds nothing",
        7,
        TREASURY,
        "asked = {one.subject: asked_of(one) for one in shared}",
        "asked: dict[str, tuple[BudgetLimit, ...]] = {}",
        (f"{SHARED_TESTS}::test_money_of_a_job_is_spent_once_over_all_its_tasks_and_a_new_router_knows",),
    ),
    Mutation(
        "budget: what a job was submitted with opens the way to providers",
        7,
        TREASURY,
        "any(has_budget(limits_of(subject, self._limits)) for subject in subjects)",
        "any(has_budget(self.limits(subject)) for subject in subjects)",
        (f"{SHARED_TESTS}::test_a_budget_of_the_job_opens_no_way_that_the_owner_has_not_opened",),
    ),
    Mutation(
        "budget: tokens that cost no money are not counted",
        4,
        "services/llm-router/src/hive_router/waterfall.py",
        "                    await self._meter(flight, call, backend)\n",
        "                    pass\n",
        (f"{SHARED_TESTS}::test_tokens_are_counted_where_they_cost_nothing_however_many_call_at_once",),
    ),
    Mutation(
        "budget: what was forked has one of its own",
        6,
        "services/scheduler/src/hive_scheduler/permits.py",
        "*_, root = (task, *ancestors(task, job.tasks))",
        "root = task",
        (f"{PERMITS_OF_BUDGETS_TESTS}::test_attempts_of_a_task_and_what_it_forks_share_its_budget_and_its_jobs",),
    ),
    Mutation(
        "permissions: replicas may send what changes something",
        6,
        "services/scheduler/src/hive_scheduler/permits.py",
        "if own.http is not None and is_replicated(job, task):",
        "if own.http is not None and False:",
        (f"{PERMITS_OF_BUDGETS_TESTS}::test_a_judge_is_on_the_account_of_the_job_and_replicas_only_read",),
    ),
    Mutation(
        "token: where data of a job may go is the device's word",
        7,
        ROUTER_TOKENS,
        "pin=narrowest(narrowest(claims.pin, permission.pin), call.pin),",
        "pin=narrowest(permission.pin, call.pin),",
        (ROUTER_TOKEN_TESTS,),
    ),
    Mutation(
        "token: whether texts of a job are kept is the device's word",
        7,
        ROUTER_TOKENS,
        "counts_only=claims.counts_only or call.counts_only,",
        "counts_only=call.counts_only,",
        (ROUTER_TOKEN_TESTS,),
    ),
    Mutation(
        "token: an attempt has all that it may generate in each call",
        4,
        "services/llm-router/src/hive_router/attempts.py",
        "        self._spent[key] = spent + reserved\n",
        "        self._spent[key] = 0\n",
        (f"{ROUTER_TOKEN_TESTS}::test_calls_of_an_attempt_generate_together_what_was_granted",),
    ),
    Mutation(
        "kill order: what it ended calls models again once it is lifted",
        9,
        ROUTER_TOKENS,
        "        if entry is not None:\n",
        "        if False:\n",
        ("services/llm-router/tests/test_kills.py::test_a_guest_of_what_is_stopped_calls_no_model",),
    ),
    Mutation(
        "kill order: one that comes while a model is looked for is not seen",
        9,
        "services/llm-router/src/hive_router/waterfall.py",
        "        if (refused := self._refused(call)) is not None:\n",
        "        if False:\n",
        ("services/llm-router/tests/test_kills.py::test_an_order_that_comes_while_a_model_is_looked_for_holds",),
    ),
    Mutation(
        "kill order: a stopped device is asked for its models",
        9,
        SELECTION,
        '    ("killed", _killed),\n',
        "",
        (
            "services/llm-router/tests/test_kills.py"
            "::test_what_is_asked_of_a_device_that_is_stopped_ends_and_goes_to_no_such_device_again",
        ),
    ),
    Mutation(
        "budget: a subject is forgotten while a call of it runs",
        7,
        TREASURY,
        "return not busy and self.waiting == NOTHING and self.purse.held == NOTHING",
        "return not busy and self.waiting == NOTHING",
        (f"{TREASURY_TESTS}::test_what_a_call_is_under_way_for_is_not_forgotten",),
    ),
    Mutation(
        "budget: the books of jobs that are over stay",
        4,
        TREASURY,
        "        await self._make_room()\n",
        "",
        (f"{TREASURY_TESTS}::test_what_was_forgotten_is_read_again_and_its_limit_holds",),
    ),
    Mutation(
        "cache: an answer is anybody's who asks the same",
        6,
        RESPONSE_CACHE,
        "(self.tenant, self.endpoint, print_)",
        "(self.endpoint, print_)",
        (
            f"{RESPONSE_CACHE_TESTS}::test_two_callers_never_share_a_key",
            f"{RESPONSE_CACHE_TESTS}::test_nothing_leaks_to_another_key_or_job",
        ),
    ),
    Mutation(
        "cache: what came for another question is an answer",
        6,
        RESPONSE_CACHE,
        "return kept.entry if kept.key == key and kept.entry.body else None",
        "return kept.entry",
        (f"{RESPONSE_CACHE_TESTS}::test_what_somebody_else_wrote_there_is_no_answer",),
    ),
    Mutation(
        "cache: what is pinned, or is not to be kept, is kept there",
        7,
        RESPONSE_CACHE,
        'if call.counts_only or call.pin != PIN_ANY or call.endpoint == "embeddings":',
        'if call.endpoint == "embeddings":',
        (f"{RESPONSE_CACHE_TESTS}::test_what_may_differ_or_may_not_be_kept_is_not",),
    ),
    Mutation(
        "cache: a call waits for it, and fails with it",
        4,
        RESPONSE_CACHE,
        "            self._failed(error)\n            return None\n",
        "            raise\n",
        (f"{RESPONSE_CACHE_TESTS}::test_a_cache_that_goes_away_fails_no_call",),
    ),
    Mutation(
        "paid calls: one that may have come there is sent again",
        7,
        "libs/common/src/hive_common/inference/http_pool.py",
        'if not (repeats or method == "GET") or connection.has_answered',
        "if connection.has_answered",
        (
            f"{HTTP_CLIENT_TESTS}::test_a_request_that_may_cost_something_is_sent_once",
            f"{MONEY_TESTS}::test_a_kept_connection_that_breaks_pays_once_and_sends_nothing_again",
        ),
    ),
    Mutation(
        "paid calls: a kept connection is used without a look whether it was closed",
        7,
        "libs/common/src/hive_common/inference/http1.py",
        "return self.is_open and not self._arrivals.poll(0)",
        "return self.is_open",
        (f"{HTTP_CLIENT_TESTS}::test_a_connection_that_was_closed_before_the_loop_could_notice_is_not_written_to",),
    ),
    Mutation(
        "paid calls: what may have been paid for goes to the next provider",
        7,
        "services/llm-router/src/hive_router/waterfall.py",
        "        if flight.estimated:\n",
        "        if False:\n",
        (f"{MONEY_TESTS}::test_a_call_that_may_have_been_paid_for_is_made_nowhere_else",),
    ),
    Mutation(
        "keys: a key of users may do what one of administrators may",
        6,
        "services/api-gateway/src/hive_gateway/rights.py",
        "    if OpenAI.route(path) or Ollama.route(path) or _USER_PATHS.match(path):\n",
        "    if path:\n",
        (f"{KEY_TESTS}::test_what_is_not_named_a_key_of_users_may_not",),
    ),
    Mutation(
        "keys: the gateway does not say whose jobs a key sees",
        6,
        "services/api-gateway/src/hive_gateway/peers.py",
        '        only = "" if caller.scope == "admin" else caller.pseudonym\n',
        '        only = ""\n',
        (f"{KEY_TESTS}::test_every_call_to_a_peer_says_whose_jobs_its_key_sees",),
    ),
    Mutation(
        "keys: every key sees every job",
        6,
        "services/scheduler/src/hive_scheduler/rpc.py",
        "        if not only:\n",
        "        if only is not None:\n",
        (f"{SEEN_TESTS}::test_another_keys_job_is_one_that_does_not_exist",),
    ),
    Mutation(
        "keys: lists have every job",
        6,
        "services/scheduler/src/hive_scheduler/queries.py",
        "_JOBS_OF if caller else _JOBS",
        "_JOBS",
        (f"{SEEN_TESTS}::test_lists_have_the_jobs_of_the_key_that_asks_and_all_for_the_owner",),
    ),
    Mutation(
        "keys: every key has every call explained",
        6,
        "services/llm-router/src/hive_router/models.py",
        "        if rules.only and found.key != rules.key:\n",
        "        if rules is None:\n",
        ("services/llm-router/tests/test_host_calls.py::test_a_key_of_users_is_told_of_its_own_calls_only",),
    ),
    Mutation(
        "keys: what a caller of gRPC says of its key counts",
        6,
        "services/llm-router/src/hive_router/models.py",
        "        request.key, request.cloud = rules.key, rules.cloud\n",
        "",
        ("services/llm-router/tests/test_money.py::test_what_a_call_itself_says_of_its_key_does_not_count",),
    ),
    Mutation(
        "signature: it counts for any agent",
        6,
        SIGNING,
        "    if payload.digest != digest:\n",
        "    if not payload.digest:\n",
        (f"{SIGNING_TESTS}::test_a_signature_that_is_not_good_is_refused",),
    ),
    Mutation(
        "signature: any key's is as good as a trusted one's",
        6,
        SIGNING,
        "    if signature.signer not in trusted:\n",
        "    if not signature.signer:\n",
        (f"{SIGNING_TESTS}::test_the_key_of_a_stranger_is_named_with_the_remedy",),
    ),
    Mutation(
        "signature: other forms of one are taken",
        6,
        SIGNING,
        "    if found.digest != digest:\n",
        "    if not found.digest:\n",
        (f"{SIGNING_TESTS}::test_other_forms_of_a_good_signature_are_refused",),
    ),
    Mutation(
        "executor: does not ask whether the key is trusted now",
        6,
        EXECUTOR_AGENTS,
        "        if ref.signer not in await self._signers.current():\n",
        "        if await self._signers.current() is None:\n",
        (f"{EXECUTOR_SIGNING_TESTS}::test_a_warm_start_verifies_nothing_again_but_asks_who_is_trusted",),
    ),
    Mutation(
        "registry: reads what a stranger signed",
        6,
        REGISTRY_AGENTS,
        "        signers.require_trusted(await self._signers.state(signature.signer), digest, signature.signer)\n",
        "",
        ("services/registry/tests/test_signing.py::test_of_what_a_stranger_signed_nothing_is_looked_at",),
    ),
    Mutation(
        "scheduler: places what a distrusted key signed",
        6,
        DISPATCH,
        "        self._catalogue.signers.require(agent)\n",
        "",
        (
            "services/scheduler/tests/test_leases.py::test_what_a_distrusted_key_signed_fails_instead_of_being_given_out",
        ),
    ),
    Mutation(
        "kill order: an older one is obeyed again",
        9,
        KILL_VERIFIER,
        "if order.epoch < self.epoch:",
        "if order.epoch < 0:",
        (
            ORDERS,
            f"{KILL}::test_an_older_order_is_not_obeyed_after_a_restart_either",
            "tests/integration/test_kill.py"
            "::test_an_order_that_was_played_again_by_somebody_on_nats_changes_nothing",
        ),
    ),
    Mutation(
        "kill order: a restart forgets the newest one",
        9,
        EXECUTOR,
        "            self._kill.load()\n",
        "",
        (f"{KILL}::test_an_older_order_is_not_obeyed_after_a_restart_either",),
    ),
    Mutation(
        "lease: guests go on without one",
        9,
        EXECUTOR,
        "                self._pool.pause()\n",
        "                pass\n",
        (f"{KILL}::test_guests_stand_still_when_the_lease_runs_out_and_go_on_when_it_is_renewed",),
    ),
    Mutation(
        "append only: no trigger on the events",
        10,
        SQL,
        "ALTER TABLE log.events ENABLE ALWAYS TRIGGER events_append_only;",
        "DROP TRIGGER events_append_only ON log.events;",
        (
            "libs/common/tests/eventlog/test_database.py"
            "::test_triggers_hold_for_the_superuser_in_every_replication_role",
        ),
    ),
    Mutation(
        "auditor: the hash of the event before is not compared",
        10,
        VERIFIER,
        "                    and envelope.prev == prev\n",
        "",
        (
            "services/audit/tests/test_tampering.py"
            "::test_an_event_rewritten_with_its_hash_breaks_the_link_behind_it",
        ),
    ),
    Mutation(
        "reply prefix, services: an answer goes wherever the request says",
        6,
        RESPONDER,
        'if message.reply.startswith(inbox_prefix(executor) + "."):',
        "if message.reply:",
        (
            "libs/common/tests/bus/test_nats.py"
            "::test_a_reply_subject_outside_of_the_callers_inbox_is_never_published_to",
        ),
    ),
    Mutation(
        "reply prefix, router: the answer of a model goes wherever the call says",
        6,
        EXECUTOR_CALLS,
        'if not reply.startswith(inbox_prefix(executor) + "."):',
        "if not reply:",
        ("services/llm-router/tests/test_executor_calls.py::test_a_reply_subject_of_somebody_else_is_dropped",),
    ),
    Mutation(
        "pin: data goes to whatever device has the model",
        7,
        SELECTION,
        "    (REASON_PIN, _pin),\n",
        "",
        (
            "services/llm-router/tests/domain/test_selection.py",
            "services/llm-router/tests/test_pool_calls.py"
            "::test_pinned_to_own_devices_nothing_is_sent_anywhere_without_one",
        ),
    ),
    Mutation(
        "streams: a piece that is missing is not missed",
        8,
        CHUNKS,
        "        if chunk.sequence != self._sequence:\n            return self.fail(",
        "        if False:\n            return self.fail(",
        (
            "libs/common/tests/inference/test_chunks.py"
            "::test_a_gap_ends_the_stream_in_an_error_event_and_tells_the_sender",
            "services/llm-router/tests/test_pool_calls.py::test_a_gap_ends_the_stream_with_an_error",
        ),
    ),
    Mutation(
        "streams: a device sends as far ahead as it likes",
        4,
        CHUNKS,
        "if self._credit < 0 or self._buffered_bytes > BUFFERED_BYTES_MAX:",
        "if False:",
        ("libs/common/tests/inference/test_chunks.py::test_a_sender_that_floods_is_not_heard_any_more",),
    ),
    Mutation(
        "placement: a judge runs where what it judges came from",
        8,
        NEEDS,
        "        apart = apart_from(words.rule.distinct, producers, judges=True)\n",
        "        apart = apart_from('none', producers, judges=True)\n",
        (f"{NEEDS_TESTS}::test_a_critic_keeps_away_from_what_it_judges_and_from_nothing_else",),
        Storm(("--tasks", "200", "--strikes", "2", "--faults", "kill scheduler"), "unjust"),
    ),
    Mutation(
        "placement: results of one machine count as of two",
        8,
        NEEDS,
        'devices=frozenset(one.device for one in known) if distinct == "device" else frozenset(),',
        "devices=frozenset(),",
        (f"{NEEDS_TESTS}::test_distinct_says_what_attempts_must_not_have_in_common",),
    ),
    Mutation(
        "placement: nobody asks what is known of other people's machines",
        8,
        "services/scheduler/src/hive_scheduler/domain/placement.py",
        "    if need.owner and need.owner != device.owner:\n",
        "    if False:\n",
        (
            "services/scheduler/tests/domain/test_placement.py"
            "::test_machines_of_others_have_to_be_known_unless_their_work_is_judged",
        ),
    ),
    Mutation(
        "submit: a quorum is taken that no machines can meet",
        4,
        "services/scheduler/src/hive_scheduler/domain/feasibility.py",
        "    if len(makers) < rule.of:\n",
        "    if False:\n",
        (
            "services/scheduler/tests/domain/test_feasibility.py"
            "::test_a_quorum_needs_as_many_devices_as_results_and_the_message_says_what_helps",
        ),
    ),
)
