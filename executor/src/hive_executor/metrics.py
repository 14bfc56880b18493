"""What an executor counts; served at `/metrics`."""

from prometheus_client import Counter, Gauge, Histogram

ATTEMPTS = Counter("hive_executor_attempts_total", "Attempts ended, by status and code", ["status", "code"])
ATTEMPT_DURATION = Histogram(
    "hive_executor_attempt_duration_seconds",
    "Time of a guest in its runner",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
HELD = Gauge("hive_executor_attempts_held", "Attempts that wait or run here")
RUNNING = Gauge("hive_executor_slots_busy", "Attempts whose guest runs")
SLOTS = Gauge("hive_executor_slots", "Guests that may run at the same time")
SANDBOX_LAYERS = Gauge(
    "hive_executor_sandbox_layer", "Whether all runners have this layer around the engine: 1 or 0", ["layer"]
)
SPOOL_REPORTS = Gauge("hive_executor_spool_reports", "Outcomes that are not yet committed")
SPOOL_BYTES = Gauge("hive_executor_spool_bytes", "Size of those outcomes")
SPOOL_QUARANTINED = Counter("hive_executor_spool_quarantined_total", "Spool files set aside as damaged")
PULLS = Counter("hive_executor_pulls_total", "Pulls, by how they ended", ["result"])
PULL_DURATION = Histogram(
    "hive_executor_pull_duration_seconds",
    "Time from a pull to its answer; a long poll, so up to a third of the lease is normal",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 2.5, 5),
)
ASSIGNMENTS = Counter("hive_executor_assignments_total", "Assignments received, by what was done", ["result"])
REPORTS = Counter("hive_executor_reports_total", "Outcomes answered by the scheduler, by verdict", ["verdict"])
REPORT_DURATION = Histogram(
    "hive_executor_report_duration_seconds",
    "Time from a report to its answer, which means committed",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
BLOBS = Counter("hive_executor_blobs_total", "Blob transfers, by direction and result", ["direction", "result"])
LOG_LINES_DROPPED = Counter("hive_executor_live_log_lines_dropped_total", "Live log lines that were not sent")
MODEL_CALLS_TAKEN = Counter("hive_executor_model_calls_total", "Model calls of the pool, by their end", ["code"])
MODEL_CALLS_RUNNING = Gauge("hive_executor_model_calls_running", "Model calls of the pool that run here")
MODEL_REPORTS = Counter(
    "hive_executor_model_reports_total",
    "Calls that this device served itself, by what became of their report",
    ["result"],
)
MODEL_REPORTS_WAITING = Gauge("hive_executor_model_reports_waiting", "Those that are not committed yet")
