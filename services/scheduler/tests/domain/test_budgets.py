"""Budgets in job files: read strictly, each refusal with its path."""

from typing import Any

import msgspec
import pytest
from hive_common.contracts.budgets import TOKENS_MAX, SharedBudget, shared
from hive_common.contracts.jobdocument import Budget
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.jobfile import parse_job

JOB: dict[str, Any] = {"apiVersion": "hive/v1", "kind": "Job", "name": "j"}
TASK: dict[str, Any] = {"id": "a", "agent": "a@1.0.0"}


def job(budget: str = "null", task: str = "null") -> bytes:
    """Return a document with budgets as they were written: JSON has more numbers than Python has floats."""
    document = {**JOB, "limits": {"budget": "JOB"}, "tasks": [{**TASK, "budget": "TASK"}]}
    return msgspec.json.encode(document).replace(b'"JOB"', budget.encode()).replace(b'"TASK"', task.encode())


def test_budgets_are_read() -> None:
    spec = parse_job(job('{"usd": 0.1, "tokens": 500}', '{"tokens": 0}'))
    assert spec.budget == Budget(0.1, 500)
    assert spec.steps[0].budget == Budget(None, 0)
    assert parse_job(job()).budget is None
    # As it was written, and not as its float is.
    assert shared("job:x", Budget(0.1, 500)) == SharedBudget("job:x", 100_000_000, 500)
    assert shared("job:x", Budget(1e-9)) == SharedBudget("job:x", 1, None)


@pytest.mark.parametrize(
    ("budget", "path", "says"),
    [
        ("{}", "", "`usd`, `tokens` or both"),
        ('{"usd": null}', "", "nothing is limited"),
        ('{"usd": -0.01}', ".usd", "expected 0 to 1000000000 USD"),
        ('{"usd": 1000000000.01}', ".usd", "expected 0 to 1000000000 USD"),
        ('{"usd": 1e300}', ".usd", "expected 0 to 1000000000 USD"),
        ('{"usd": 0.0000000001}', ".usd", "at most 9 decimal places"),
        ('{"usd": NaN}', None, ""),
        ('{"usd": 1e999}', None, ""),
        ('{"usd": "5"}', None, ""),
        ('{"usd": true}', None, ""),
        ('{"tokens": -1}', ".tokens", f"0 to {TOKENS_MAX}"),
        ('{"tokens": 1000000000000001}', ".tokens", f"0 to {TOKENS_MAX}"),
        ('{"tokens": 1.5}', None, ""),
        ('{"euros": 5}', None, ""),
    ],
)
@pytest.mark.parametrize("where", ["limits.budget", "tasks[0].budget"])
def test_what_is_no_budget_is_refused_with_its_path(budget: str, path: str | None, says: str, where: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_job(job(budget) if where == "limits.budget" else job(task=budget))
    if path is not None:
        assert refused.value.fields["path"] == where + path
        assert says in refused.value.message
