"""The component that Python agents run on is built at a first start, and nobody waits for it at the next."""

import asyncio
from pathlib import Path

import pytest
from hive_cli.supervisor import runtime
from hive_common.kernel.errors import FailedPrecondition


async def test_where_there_is_one_no_process_is_started_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(asyncio, "create_subprocess_exec", lambda *command, **_: started.append(command))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "python-abc-def.cwasm").touch()
    await runtime.prepare(tmp_path, lambda line: None)
    assert started == []


async def test_where_it_cannot_be_built_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MODULE", "hive_executor.no_such_module")
    with pytest.raises(FailedPrecondition, match="no_such_module"):
        await runtime.prepare(tmp_path, lambda line: None)
