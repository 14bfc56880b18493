"""How far a process has followed the log. Apart from `telemetry`: who reads no log shows no head of 0."""

from prometheus_client import Gauge

LOG_HEAD = Gauge("hive_log_head", "The last position of the log that this process has seen")
PROJECTION_POSITION = Gauge("hive_projection_position", "The log is projected up to here", ["projection"])
PROJECTION_LAG = Gauge("hive_projection_lag_events", "Positions the view is behind the head", ["projection"])
