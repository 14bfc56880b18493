"""Prometheus metrics of the scheduler."""

from prometheus_client import Counter, Gauge, Histogram

TASKS = Gauge("hive_tasks", "Tasks of open jobs, by state", ["state"])
JOBS_OPEN = Gauge("hive_jobs_open", "Jobs that have not ended")
QUEUE_DEPTH = Gauge("hive_queue_depth", "Ready tasks that wait for a device")
HEDGES = Counter("hive_hedges_total", "Second attempts beside slow ones, made or over the budget", ["outcome"])
MARKS = Counter("hive_progress_marks_total", "Reports of how far attempts are that may get another beside them")
PULLS = Gauge("hive_pulls_pending", "Pulls of executors that wait for work")
ATTEMPTS_LIVE = Gauge("hive_attempts_live", "Attempts that executors hold")
EXECUTORS_ONLINE = Gauge("hive_executors_online", "Executors whose lease has not run out")
PLACEMENTS = Counter("hive_placements_total", "Attempts given to an executor")
REPORTS = Counter("hive_reports_total", "Reports of attempts, by verdict", ["verdict"])
LOST = Counter("hive_attempts_lost_total", "Attempts given up, by reason", ["reason"])
EVENTS = Counter("hive_events_appended_total", "Events this process has committed")
APPEND_SECONDS = Histogram(
    "hive_append_seconds",
    "Time to commit a batch of decisions",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
)
LEADER = Gauge("hive_leader", "1 while this process leads, 0 while it stands by")
