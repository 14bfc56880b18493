"""Metrics and readiness of a projection."""

from prometheus_client import Gauge

from hive_common.eventlog.projection import ProjectionRunner
from hive_common.ops.telemetry import Health

LAG_EVENTS_MAX = 10_000
"""A view further behind than this does not answer for its service."""

_HEAD = Gauge("hive_log_head", "The last position of the log that this process has seen")
_POSITION = Gauge("hive_projection_position", "The log is projected up to here", ["projection"])
_LAG = Gauge("hive_projection_lag_events", "Positions the view is behind the head", ["projection"])


def observe_projection(
    runner: ProjectionRunner, name: str, health: Health, lag_events_max: int = LAG_EVENTS_MAX
) -> None:
    """Show a projection in the metrics of this process, and let its readiness depend on it."""
    _HEAD.set_function(lambda: runner.head)
    _POSITION.labels(name).set_function(lambda: runner.position)
    _LAG.labels(name).set_function(lambda: runner.lag)

    def check() -> str | None:
        if runner.failure is not None:
            return f"the projection {name} has stopped: {runner.failure}"
        return f"the view is {runner.lag} events behind the log" if runner.lag > lag_events_max else None

    health.add(f"projection {name}", check)
