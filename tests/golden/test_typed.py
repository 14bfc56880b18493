"""What the documents tell people to type with `make`, or of an example's `run.py`, is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
TYPED = re.compile(r"(?:`|^ {4})make ((?:[A-Z]+=\S+ )*[a-z][a-z-]*)", re.MULTILINE)
PROGRAM = re.compile(r"^ {4}python (examples/\S+\.py)(.*)$", re.MULTILINE)


def test_every_target_that_a_document_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    typed = {(found.split()[-1], file.name) for file in DOCUMENTS for found in TYPED.findall(file.read_text())}
    assert {("demo", "README.md"), ("example-research", "README.md"), ("chaos", "RELIABILITY.md")} <= typed
    assert [one for one in sorted(typed) if one[0] not in targets] == []


PROGRAMS = sorted({found for file in DOCUMENTS for found in PROGRAM.findall(file.read_text())})


@pytest.mark.parametrize("program", sorted({program for program, _ in PROGRAMS}))
def test_programs_of_examples_take_the_options_that_documents_show(program: str) -> None:
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    shown = {option for name, rest in PROGRAMS if name == program for option in re.findall(r"(--[a-z-]+)", rest)}
    assert shown <= set(re.findall(r"--[a-z-]+", done.stdout))
