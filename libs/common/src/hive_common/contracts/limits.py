"""Every bound that two members must agree on, each with its reason."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

INLINE_BYTES_MAX: Final = 256 * KIB
"""A value up to this size rides in messages and events; a larger one travels by digest."""

PULL_REPLY_BYTES_MAX: Final = 512 * KIB
"""NATS refuses messages over 1 MiB; half of that leaves room for headers and for one inline value too many."""

REPORT_BYTES_MAX: Final = 512 * KIB
"""A batch of outcomes in one report."""

CHUNK_EVENTS_MAX: Final = 512
"""Tasks created, or cancelled, in one append: keeps an append below the log's limit of 1,000 events."""

BLOB_BYTES_MAX: Final = 256 * MIB
"""The largest blob the artifact store takes."""

JOB_BYTES_MAX: Final = 1 * MIB
"""A job document without its input."""

FAN_OUT_DEFAULT: Final = 1_000
FAN_OUT_MAX: Final = 100_000
"""Tasks that one job may have in all: the default, and the most a job may ask for."""

DEADLINE_DEFAULT_MS: Final = 3_600_000
DEADLINE_MAX_MS: Final = 30 * 24 * 3_600_000
"""From submit to the end of a job."""

TIMEOUT_DEFAULT_MS: Final = 60_000
TIMEOUT_MAX_MS: Final = 24 * 3_600_000
"""Wall time of one attempt."""

MEMORY_DEFAULT_BYTES: Final = 128 * MIB
MEMORY_MAX_BYTES: Final = 4096 * MIB
"""Linear memory of one guest; 4 GiB is where 32-bit WebAssembly ends."""

FUEL_DEFAULT: Final = 1_000_000_000_000
"""Some ten minutes of a busy core: a second line behind wall time, tight only where a manifest asks."""

FUEL_MAX: Final = 1_000 * FUEL_DEFAULT
"""The most a manifest may ask for: more than the longest timeout can burn."""

AGENT_MANIFEST_BYTES_MAX: Final = 64 * KIB
AGENT_SOURCE_BYTES_MAX: Final = 4 * MIB
AGENT_SOURCE_FILES_MAX: Final = 500
"""A manifest; and the Python sources of one agent, which are sent whole to each runner that starts it."""

AGENT_MODULE_BYTES_MAX: Final = 64 * MIB
"""A WebAssembly module. Compiling one costs some seventy times its size in memory."""

TASK_INPUT_BYTES_MAX: Final = 64 * MIB
"""The input of one task: it enters a guest in one piece."""

MODEL_NAMES_MAX: Final = 100
MODEL_TOKENS_MAX: Final = 10_000_000
"""What a manifest may name; and the most that the calls of one attempt may generate."""

JOB_AGENTS_MAX: Final = 1_000
"""Agent versions of one job, with all that its agents may fork."""

HTTP_HOSTS_MAX: Final = 100
KV_QUOTA_BYTES_MAX: Final = 64 * MIB
FORK_AGENTS_MAX: Final = 100
FORK_MAX: Final = 1_000
FORK_DEPTH_MAX: Final = 8
SCRATCH_BYTES_MAX: Final = 1024 * MIB
"""What else a manifest may ask for. What is kept stands in the log, so it is small."""

FORK_STAGED_BYTES_MAX: Final = INLINE_BYTES_MAX
"""Inputs of all the tasks that one attempt forks: they ride in its report, beside an output of the same size."""

KV_KEY_CHARACTERS_MAX: Final = 256
KV_VALUE_BYTES_MAX: Final = 128 * KIB
KV_STAGED_BYTES_MAX: Final = 512 * KIB
KV_KEYS_MAX: Final = 1_000
KV_PENDING_MAX: Final = 1_000
"""One key and one value; what one attempt may write, which travels in one message; keys in one answer; and attempts
that have written to a namespace and are not decided yet."""

CAPABILITY_TOKEN_CHARACTERS_MAX: Final = 128 * KIB
CAPABILITY_TOKEN_BLOCKS_MAX: Final = 16
"""A token is checked before anything else is known of its sender; manifests bound what it has to carry."""

APPROVAL_MS: Final = 60 * 60_000
"""So long a person may take to decide, and so long an approval holds for later attempts of its task."""
APPROVAL_ACTION_BYTES_MAX: Final = 64 * KIB
APPROVALS_PER_TASK_MAX: Final = 32
APPROVALS_OPEN_PER_JOB_MAX: Final = 100
"""One action as it is asked about; actions of one task; and what of one job may wait for people at once."""

OUTPUT_BYTES_MAX: Final = 8 * MIB
LOG_BYTES_MAX: Final = 1 * MIB
DETAIL_BYTES_MAX: Final = 16 * KIB
"""What one attempt may give back: its output, its log, and the traceback of its failure."""

ATTEMPTS_MAX: Final = 100
LOST_ATTEMPTS_MAX: Final = 3
"""Retries a task may ask for; and losses (`lost`, `runner_died`), which do not count against those."""

LEASE_MS: Final = 6_000
PULL_ANSWER_MS: Final = LEASE_MS // 3
"""A pull is answered within a third of the lease, so that two may be lost before the lease runs out."""

STARTED_AFTER_MS: Final = 500
"""An attempt that runs longer than this is reported as started on its own."""

PROGRESS_STEP_PERMILLE: Final = 50
"""What attempts say of how far they are is passed on in steps of a twentieth of the work."""
