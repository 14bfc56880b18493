import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hive_common.ops import ports
from hive_common.ops.ports import GIVEN_S, HOST, free_port, is_free

ASK = "from hive_common.ops.ports import free_port; print(*(free_port() for _ in range(20)))"


@pytest.fixture(autouse=True)
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"hivefabric-ports-{os.getuid()}.json"


def test_processes_that_ask_at_once_are_given_different_ports(given: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(given.parent)}
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [port for process in asking for port in process.communicate(timeout=60)[0].split()]
    assert len(told) == 60
    assert len(set(told)) == 60


def test_a_free_port_is_none_that_an_outgoing_connection_may_take() -> None:
    assert all(10_240 <= free_port() < 32_768 for _ in range(50))


def test_a_seed_does_not_choose_the_port() -> None:
    random.seed(7)
    first = free_port()
    random.seed(7)
    assert free_port() != first


def test_a_port_may_be_given_again_after_a_while(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(ports, "is_free", lambda port, host=HOST: True)
    monkeypatch.setattr(ports, "_LOWEST", port)
    monkeypatch.setattr(ports, "_outgoing", lambda: port + 2)
    monkeypatch.setattr(ports, "_TRIES", 2)
    assert free_port() == port + 1
    given.write_text(json.dumps({str(port): time.time() - 1, str(port + 1): time.time() + GIVEN_S / 2}))
    assert free_port() == port


@pytest.mark.parametrize("text", ["", "{", "[]", '{"1": "x"}', '{"20000": 99999999999}'])
def test_what_somebody_left_there_keeps_nobody_from_a_port(given: Path, text: str) -> None:
    given.write_text(text)
    assert is_free(free_port(), HOST)
    assert len(json.loads(given.read_text())) == 1


def test_without_a_place_to_note_it_ports_are_given_all_the_same(
    given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = given.parent / "elsewhere"
    elsewhere.write_text("")
    given.symlink_to(elsewhere)
    assert is_free(free_port())
    assert elsewhere.read_text() == ""


def test_what_is_given_away_already_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(ports, "is_free", lambda port, host=HOST: True)
    monkeypatch.setattr(ports, "_LOWEST", port + 1)
    monkeypatch.setattr(ports, "_outgoing", lambda: port + 3)
    monkeypatch.setattr(ports, "_TRIES", 2)
    assert free_port(but=[port + 1]) == port + 2
