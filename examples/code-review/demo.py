"""`make demo`: a scratch installation, five agents, one job over this repository's own Python files."""

import os
import sys
import time
from pathlib import Path

from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from installation import ROOT, Installation, arguments, files, installation  # noqa: E402

AGENTS = ("planner", "reviewer", "critic", "integrator", "proofreader")


def planted(files: list[str]) -> list[tuple[str, str, str]]:
    """Return what the reviewer of the first group plants, as (path, function, rule); see reviewer/agent.py."""
    first = min(files)
    return [
        (first, "", "bare-except"),
        (first, "planted_deep_function", "deep-nesting"),
        (first, "planted_long_function", "long-function"),
    ]


def show(hive: Installation, report: dict) -> None:
    """Print the report as a table."""
    console = hive.console
    table = Table(
        title=f"Code review: {report['files']} files, {report['findings']} findings", title_justify="left"
    )
    for column in ("#", "severity", "rule", "value", "where"):
        table.add_column(column, justify="left" if column in ("rule", "where") else "right", overflow="fold")
    for rank, finding in enumerate(report["ranked"], 1):
        where = f"{finding['path']}:{finding['line']}  {finding['function']}".rstrip()
        table.add_row(str(rank), str(finding["severity"]), finding["rule"], str(finding["value"]), where)
    console.print(table)
    console.print("by rule: " + ", ".join(f"{rule} {count}" for rule, count in report["rules"].items()))


def check(hive: Installation, report: dict, paths: list[str]) -> None:
    """Fail unless the critics dropped exactly the planted findings."""
    dropped = sorted((one["path"], one["function"], one["rule"]) for one in report["dropped"])
    if dropped != sorted(planted(paths)):
        raise SystemExit(f"demo: the critics dropped {dropped}, and should have dropped {sorted(planted(paths))}")
    hive.console.print(f"the critics dropped the {len(dropped)} planted findings and nothing else")


def run(hive: Installation, patterns: list[str]) -> None:
    """Run the job and check everything that the demo promises."""
    start = time.monotonic()
    hive.push(*(HERE / agent for agent in AGENTS))
    sources = files(patterns)
    result = hive.run(HERE / "job.yaml", files=sources)
    show(hive, result["output"])
    check(hive, result["output"], [file["path"] for file in sources])
    hive.tree(result["job_id"])
    # The group with the planted findings: two critics, who had to drop the same.
    decided = hive.tasks(result["job_id"], "criticise")[0]["task_id"]
    hive.decision(decided)
    decisions = hive.ask("audit", "verify", "--decisions", result["job_id"])
    audit = hive.ask("audit", "verify")
    if not (decisions["ok"] and audit["ok"]):
        raise SystemExit(f"demo: the log does not verify: {audit['reason'] or decisions}")
    hive.console.print(
        f"\n{result['tasks']['total']} tasks, {result['attempts']} attempts, {time.monotonic() - start:.1f} s, "
        f"{audit['events']} events, log verified, {decisions['counts']['same']} decisions recomputed"
    )
    hive.finish({**result, "decided": decided})


def main() -> None:
    """Start, run, stop; whatever happens, nothing stays behind."""
    parser = arguments("Review source files: agents, critics that have to agree, and a proofreader.")
    parser.add_argument("files", nargs="*", default=["**/*.py"], help="files or patterns; else **/*.py")
    chosen = parser.parse_args()
    os.chdir(ROOT)
    with installation(chosen) as hive:
        run(hive, chosen.files)


if __name__ == "__main__":
    main()
