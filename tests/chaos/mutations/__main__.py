"""Take out each safeguard in a copy of the tree, and see that its tests, and with --storms its storm, fail.

Exit code 1 where something was not missed, where the text has moved, or where the tests fail without any mutation.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.chaos.mutations.catalogue import MUTATIONS, Mutation, Storm

ROOT = Path(__file__).resolve().parents[3]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "results", "node_modules")
DOCUMENT = ROOT / "docs" / "RELIABILITY.md"
TEST_S = 400
STORM_S = 600
NO_SHRINKING = """\
from hypothesis import Phase, settings

settings.register_profile("find", phases=[Phase.explicit, Phase.generate])
settings.load_profile("find")
"""
"""That something is found is enough here; to make the finding small takes minutes."""
SEEDS = (1, 2, 3)
"""A storm is drawn from a seed: one that happens to miss the moment gets another."""


def main() -> int:
    """Run what was asked for, and print a line for each mutation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutations", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the tests that take a second each")
    parser.add_argument("--only", default="", help="only those with this in their name")
    parser.add_argument("--storms", action="store_true", help="the storms too, some minutes each")
    parser.add_argument("--check", action="store_true", help="only see that all texts are where they should be")
    parser.add_argument("--table", action="store_true", help="print the table of docs/RELIABILITY.md")
    given = parser.parse_args()
    if given.table:
        print(table())
        return 0
    chosen = [one for one in MUTATIONS if given.only in one.name]
    if given.quick:
        chosen = [replace(one, tests=one.quick_tests) for one in chosen if one.quick_tests]
    moved = [f"{one.name}: {problem}" for one in MUTATIONS if (problem := misplaced(ROOT, one))]
    if table() not in DOCUMENT.read_text():
        moved.append(f"{DOCUMENT.name}: has another table than `python -m tests.chaos.mutations --table` prints")
    if moved or given.check:
        print("\n".join(moved) or f"{len(MUTATIONS)} mutations fit the tree")
        return bool(moved)
    with tempfile.TemporaryDirectory(prefix="hive-mutations-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        (tree / "conftest.py").write_text(NO_SHRINKING)
        tests = sorted({test for one in chosen for test in one.tests})
        whole = run_tests(tree, tests)
        if whole.returncode != 0:
            print(f"the tests fail without any mutation:\n{whole.stdout[-4000:]}{whole.stderr[-2000:]}")
            return 1
        missed = [missing for one in chosen for missing in unnoticed(tree, one, given.storms)]
    print(f"{len(chosen)} mutations, {len(missed)} not noticed")
    return bool(missed)


def table() -> str:
    """Return the catalogue as the document shows it."""
    lines = ["| law | what is taken out | noticed by |", "|---|---|---|"]
    for one in MUTATIONS:
        # A file's name, or that of the one test in it.
        tests = [f"`{test.partition('::')[2] or Path(test).stem}`" for test in one.tests]
        storm = [f"a storm: {one.storm.finding}"] if one.storm else []
        lines.append(f"| {one.law} | {one.name} | {', '.join([*tests, *storm])} |")
    return "\n".join(lines)


def misplaced(tree: Path, mutation: Mutation) -> str:
    """Say what is wrong with where a mutation wants to be; empty where nothing is."""
    counts = {file: file.read_text().count(mutation.old) for file in tree.glob(mutation.file)}
    if not any(counts.values()):
        return f"not found in {mutation.file}: {mutation.old!r}"
    twice = [file.name for file, count in counts.items() if count > 1]
    return f"more than once in {twice}" if twice else ""


@contextmanager
def mutated(tree: Path, mutation: Mutation) -> Iterator[None]:
    """Change the copy, and change it back."""
    files = {file: text for file in tree.glob(mutation.file) if mutation.old in (text := file.read_text())}
    try:
        for file, text in files.items():
            file.write_text(text.replace(mutation.old, mutation.new))
        yield
    finally:
        for file, text in files.items():
            file.write_text(text)


def unnoticed(tree: Path, mutation: Mutation, storms: bool) -> Iterator[str]:
    """Yield what should have failed and did not."""
    with mutated(tree, mutation):
        for test in mutation.tests:
            start = time.monotonic()
            done = run_tests(tree, [test])
            # 1 is "some tests failed"; a tree that cannot even be imported ends with another code.
            found = done.returncode == 1 and " error" not in done.stdout.splitlines()[-1]
            say(found, mutation, test, time.monotonic() - start, "" if found else done.stdout[-2000:])
            if not found:
                yield test
        if storms and mutation.storm is not None:
            start = time.monotonic()
            line = run_storms(tree, mutation.storm)
            found = bool(line.get(mutation.storm.finding))
            what = f"storm {' '.join(mutation.storm.arguments)}: {mutation.storm.finding}"
            say(found, mutation, what, time.monotonic() - start, json.dumps(line))
            if not found:
                yield what


def say(found: bool, mutation: Mutation, by: str, seconds: float, detail: str) -> None:
    """Print one line, and what was seen instead."""
    print(f"{'noticed' if found else 'MISSED '}  law {mutation.law:<2}  {mutation.name}  [{by}, {seconds:.0f} s]")
    if detail:
        print(detail)
    sys.stdout.flush()


def run_tests(tree: Path, tests: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run tests of the copy on the code of the copy, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return _run(tree, command, TEST_S * max(1, len(tests) // 4))


def run_storms(tree: Path, storm: Storm) -> dict[str, object]:
    """Run a storm, with another seed while nothing is found; return the last line."""
    line: dict[str, object] = {}
    for seed in SEEDS:
        command = [sys.executable, "-m", "tests.chaos.storm", "--seed", str(seed), "--json", *storm.arguments]
        done = _run(tree, command, STORM_S)
        line = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"problems": done.stderr[-2000:]}
        if line.get(storm.finding):
            break
    return line


def _run(tree: Path, command: list[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    # The members are installed editable from the original; what stands here comes first.
    sources = [str(tree), str(tree / "proto"), *(str(path) for path in sorted(tree.glob("**/src")))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


if __name__ == "__main__":
    sys.exit(main())
