"""What pip installs is what the projects ask for: the files of pins were exported, and not edited by hand."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MEMBERS = sorted(path.parent for path in ROOT.glob("**/pyproject.toml") if ".venv" not in path.parts)


def blocks(name: str) -> dict[str, str]:
    """Return each pin of a file, with its hashes, by the name of its project."""
    text = (ROOT / name).read_text()
    found = {}
    for block in re.split(r"\n(?=\S)", text.strip()):
        requirement = Requirement(block.split("\\\n")[0].strip())
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", block), f"{name}: {requirement.name} has no hash"
        found[_plain(requirement.name)] = block
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _asked(folder: Path, extras: tuple[str, ...]) -> list[Requirement]:
    project = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {})
    texts = list(project.get("dependencies", []))
    texts += [text for extra in extras for text in project.get("optional-dependencies", {}).get(extra, [])]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-setup.txt"])
def test_what_is_pinned_for_people_is_pinned_alike_for_tests(name: str) -> None:
    dev = blocks("requirements-dev.txt")
    for project, block in blocks(name).items():
        assert dev.get(project) == block, f"{project}; mend it with: make requirements"


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_pins_are_what_the_projects_ask_for(member: Path) -> None:
    pins = blocks("requirements.txt")
    for asked in _asked(member, ("cache",)):
        project = _plain(asked.name)
        if project.startswith("hivefabric-"):
            continue
        pin = Requirement(pins[project].split("\\\n")[0].strip())
        (version,) = pin.specifier
        assert asked.specifier.contains(version.version, prereleases=True), (
            f"{member.name} asks for {asked}, the pin is {pin}; mend it with: make requirements"
        )
