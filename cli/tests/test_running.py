"""What supervisors of every kind of home have in common, with processes that end as told."""

import sys

import pytest
from hive_cli.home import Home
from hive_cli.supervisor.probes import Answer, Probed
from hive_cli.supervisor.process import EXECUTOR_FINALS, ProcessSpec
from hive_cli.supervisor.running import Running
from hive_executor.bootstrap import REVOKED_EXIT_CODE


async def silent() -> Probed:
    return Probed(Answer.SILENT, "not there yet")


class One(Running):
    """A home with one process, without which it has no purpose, or with others beside it."""

    def __init__(self, home, said, code, is_all):
        super().__init__(home, self._told)
        self._said, self._code, self._is_all = said, code, is_all

    def _told(self, line):
        self._said.append(line)
        if line.kind == "ready":
            self._stop.set()

    async def _start(self):
        command = [sys.executable, "-c", f"raise SystemExit({self._code})"]
        spec = ProcessSpec("one", command, self._home.log_file("one"), silent, finals=EXECUTOR_FINALS)
        await self._ready(self._add(spec), "one")
        return "welcome"

    def _ended_for_good(self, child):
        super()._ended_for_good(child)
        if self._is_all:
            self._failure = child.snapshot().problem
            self._stop.set()

    def _stop_order(self):
        yield ["one"]


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    for folder in (home.logs_dir, home.run_dir):
        folder.mkdir(parents=True)
    return home


async def test_a_home_whose_only_executor_was_revoked_does_not_come_up(home):
    said = []
    assert await One(home, said, REVOKED_EXIT_CODE, is_all=True).run() == 1
    assert [line.kind for line in said if line.kind in ("ready", "failed")] == ["failed"]
    assert "was revoked" in said[-1].text


async def test_an_installation_goes_on_without_a_revoked_executor_and_says_so(home):
    said = []
    assert await One(home, said, REVOKED_EXIT_CODE, is_all=False).run() == 0
    assert [line.kind for line in said if line.kind in ("ready", "failed")] == ["ready"]
    assert any(line.kind == "note" and "was revoked" in line.text for line in said)


async def test_a_process_that_ends_again_and_again_fails_the_start(home):
    said = []
    assert await One(home, said, 1, is_all=False).run() == 1
    assert said[-1].kind == "failed" and "does not start: exit code 1" in said[-1].text
