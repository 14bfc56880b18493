"""Metrics of a log's writer; metrics and readiness of a projection."""

from prometheus_client import Gauge

from hive_common.eventlog.projection import ProjectionRunner
from hive_common.eventlog.writer import LogWriter
from hive_common.ops.log_metrics import LOG_HEAD, PROJECTION_LAG, PROJECTION_POSITION
from hive_common.ops.telemetry import Health

LAG_EVENTS_MAX = 10_000
"""A view further behind than this does not answer for its service."""

_QUEUE = Gauge("hive_append_queue_events", "Events that wait for their commit")


def observe_projection(
    runner: ProjectionRunner, name: str, health: Health, lag_events_max: int = LAG_EVENTS_MAX
) -> None:
    """Show a projection in the metrics of this process, and let its readiness depend on it."""
    LOG_HEAD.set_function(lambda: runner.head)
    PROJECTION_POSITION.labels(name).set_function(lambda: runner.position)
    PROJECTION_LAG.labels(name).set_function(lambda: runner.lag)

    def check() -> str | None:
        if runner.failure is not None:
            return f"the projection {name} has stopped: {runner.failure}"
        return f"the view is {runner.lag} events behind the log" if runner.lag > lag_events_max else None

    health.add(f"projection {name}", check)


def observe_writer(writer: LogWriter) -> None:
    """Show how much waits to be appended in the metrics of this process."""
    _QUEUE.set_function(lambda: writer.queued_events)
