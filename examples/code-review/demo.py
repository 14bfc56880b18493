"""`make demo`: a scratch installation, four agents, one job over this repository's own Python files."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HIVE = Path(sys.executable).with_name("hive")
AGENTS = ("planner", "reviewer", "critic", "integrator")
EXECUTORS = 2

console = Console(highlight=False)


def hive(*arguments: str, home: Path, capture: bool = False) -> str:
    """Run the command against the scratch home. Its progress goes to the terminal as it would for a user."""
    environment = {**os.environ, "HIVE_HOME": str(home)}
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run([HIVE, *arguments], cwd=ROOT, env=environment, stdout=stdout, text=True, check=False)
    if done.returncode != 0:
        if done.stdout:
            console.print(done.stdout, markup=False)
        raise SystemExit(f"demo: `hive {' '.join(arguments)}` ended with exit code {done.returncode}")
    return done.stdout or ""


def planted(files: list[str]) -> list[tuple[str, str, str]]:
    """Return what the reviewer of the first group plants, as (path, function, rule); see reviewer/agent.py."""
    first = min(files)
    return [
        (first, "", "bare-except"),
        (first, "planted_deep_function", "deep-nesting"),
        (first, "planted_long_function", "long-function"),
    ]


def show(report: dict) -> None:
    """Print the report as a table."""
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


def check(report: dict, files: list[str]) -> None:
    """Fail unless the critics dropped exactly the planted findings."""
    dropped = sorted((one["path"], one["function"], one["rule"]) for one in report["dropped"])
    if dropped != sorted(planted(files)):
        raise SystemExit(f"demo: the critics dropped {dropped}, and should have dropped {sorted(planted(files))}")
    console.print(f"the critics dropped the {len(dropped)} planted findings and nothing else")


def run(home: Path) -> None:
    """Run the job and check everything that the demo promises."""
    start = time.monotonic()
    hive("agent", "push", *(str(HERE / agent) for agent in AGENTS), home=home)
    files = [str(path) for path in sorted(Path().glob("**/*.py")) if not any(p.startswith(".") for p in path.parts)]
    result = json.loads(
        hive("run", str(HERE / "job.yaml"), "--input", "files=@**/*.py", "--json", home=home, capture=True)
    )
    show(result["output"])
    check(result["output"], files)
    audit = json.loads(hive("audit", "verify", "--json", home=home, capture=True))
    if not audit["ok"]:
        raise SystemExit(f"demo: the log does not verify: {audit['reason']}")
    console.print(
        f"{result['tasks']['total']} tasks, {EXECUTORS} executors, {result['attempts']} attempts, "
        f"{time.monotonic() - start:.1f} s, {audit['events']} events, log verified"
    )


def main() -> None:
    """Start, run, stop; whatever happens, nothing stays behind."""
    os.chdir(ROOT)
    home = Path(tempfile.mkdtemp(prefix="hive-demo-"))
    try:
        hive("init", "--free-ports", "--executors", str(EXECUTORS), home=home, capture=True)
        hive("up", "--detach", "--executors", str(EXECUTORS), home=home)
        run(home)
    except SystemExit:
        for log in sorted((home / "logs").glob("*.log")):
            last = log.read_text(errors="replace").splitlines()[-5:]
            console.print(f"--- {log.name}", *last, sep="\n", markup=False)
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        subprocess.run([HIVE, "down", "--home", str(home)], check=False)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
