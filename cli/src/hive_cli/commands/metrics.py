"""A few figures of each process for `hive status`, read from its metrics."""

from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families

from hive_cli.home import Home
from hive_cli.supervisor.names import ops_port

SHOWN = {
    "hive_log_head": "head",
    "hive_projection_lag_events": "lag",
    "hive_jobs_open": "open jobs",
    "hive_queue_depth": "waiting tasks",
    "hive_attempts_live": "live attempts",
    "hive_append_queue_events": "queued events",
    "hive_executor_slots_busy": "busy slots",
    "hive_executor_spool_reports": "spooled",
    "hive_requests_total": "calls",
}
"""Metrics that are shown, summed over their labels, and what they are called there."""

_ANSWER_S = 1.0


def read_figures(home: Home, processes: list[str]) -> dict[str, str]:
    """Return one line of figures for each process that answers."""
    ports = home.ports()
    asked = {name: ports[ops_port(name)] for name in processes if ops_port(name) in ports}
    with httpx.Client(timeout=_ANSWER_S, trust_env=False) as client, ThreadPoolExecutor(len(asked) or 1) as pool:
        texts = pool.map(lambda port: _fetch(client, port), asked.values())
        return {name: _figures(text) for name, text in zip(asked, texts, strict=True) if text}


def _fetch(client: httpx.Client, port: int) -> str:
    try:
        return client.get(f"http://127.0.0.1:{port}/metrics").text
    except httpx.HTTPError:
        return ""


def _figures(text: str) -> str:
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in SHOWN:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return "  ".join(f"{title} {totals[name]:g}" for name, title in SHOWN.items() if name in totals)
