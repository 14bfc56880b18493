"""Prometheus metrics of the router."""

import functools
from typing import Final

from hive_common.kernel.errors import CATALOGUE
from prometheus_client import Counter, Gauge, Histogram

from hive_router.fleet import Fleet

CALLS: Final = Counter("hive_router_calls_total", "Model calls that ended", ["model", "route", "outcome"])
FIRST_BYTE: Final = Histogram(
    "hive_router_first_byte_seconds",
    "From a call to the first byte of its answer, the back end's time included",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
TOKENS: Final = Counter("hive_router_tokens_total", "Tokens as back ends count them", ["model", "kind"])
IN_FLIGHT: Final = Gauge("hive_router_in_flight", "Calls that run at back ends")
QUEUED: Final = Gauge("hive_router_queued", "Calls that wait for a free back end")
BREAKERS: Final = Gauge("hive_router_breakers_open", "Back ends that are left alone because they failed")
BACK_ENDS: Final = Gauge("hive_router_back_ends", "Back ends that are known and present", ["route"])
RETRIES: Final = Counter("hive_router_retries_total", "Calls tried at a further back end, by code", ["code"])
BLOCKS: Final = Counter("hive_router_budget_blocks_total", "Blocks of money that were set aside in the log")
COST: Final = Counter(
    "hive_router_cost_nano_usd_total", "What calls to providers have cost, in nano-USD", ["provider"]
)
RECORDS_WAITING: Final = Gauge("hive_router_records_waiting", "Finished calls that wait for the log")
RECORDS_DROPPED: Final = Counter(
    "hive_router_records_dropped_total", "Finished calls that the log never got, by reason", ["reason"]
)
CHUNKS_REFUSED: Final = Counter(
    "hive_router_chunks_refused_total", "Messages of devices that fit no call, by reason", ["reason"]
)

ASKED: Final = Counter("hive_router_executor_calls_total", "Model calls that executors asked for", ["code"])

TOKENS_REFUSED: Final = Counter(
    "hive_router_capability_tokens_refused_total", "Calls of guests whose capability token was no good"
)

_OUTCOMES: Final = frozenset({*CATALOGUE, "cancelled"})
"""Devices name codes too, in what they report; only these become series."""

# Finding the series of some labels takes longer than counting; there are as many as series.
_calls = functools.cache(CALLS.labels)
_tokens = functools.cache(TOKENS.labels)
first_byte = functools.cache(FIRST_BYTE.labels)

MODELS_NAMED_MAX: Final = 200
_named: set[str] = set()
CACHED: Final = Counter("hive_router_cache_total", "What became of asking the cache of answers", ["outcome"])


def observe_fleet(fleet: Fleet) -> None:
    """Show the back ends in the metrics of this process."""
    BREAKERS.set_function(lambda: sum(one.breaker.state != "closed" for one in fleet))
    BACK_ENDS.labels("local").set_function(lambda: sum(one.is_host for one in fleet))
    BACK_ENDS.labels("pool").set_function(
        lambda: sum(one.online and not one.is_host and not one.provider for one in fleet)
    )
    BACK_ENDS.labels("cloud").set_function(lambda: sum(bool(one.provider) for one in fleet))


def label_of(model: str) -> str:
    """Return the model's name as a label. Callers choose names, so only so many of them become series."""
    if model not in _named:
        if len(_named) >= MODELS_NAMED_MAX:
            return "other"
        _named.add(model)
    return model


def count(model: str, route: str, code: str, prompt_tokens: int, completion_tokens: int) -> None:
    """Count a call that has ended."""
    # A name that nobody serves is whatever a caller typed.
    label = label_of(model) if route else "unknown"
    _calls(label, route, code if code in _OUTCOMES else "succeeded" if not code else "other").inc()
    if prompt_tokens:
        _tokens(label, "prompt").inc(prompt_tokens)
    if completion_tokens:
        _tokens(label, "completion").inc(completion_tokens)
