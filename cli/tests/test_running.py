"""What `hive status` reads is what is, also after the disk was full."""

import asyncio
import errno
import os
import signal

from hive_cli.home import Home
from hive_cli.supervisor import running, state
from hive_cli.supervisor.running import Running
from hive_cli.supervisor.state import read_state


class Nothing(Running):
    """An installation without a process."""

    async def _start(self, session):
        return "ready"

    def _stop_order(self):
        return []


async def test_a_state_that_the_disk_had_no_room_for_is_written_when_there_is_some(tmp_path, monkeypatch):
    home = Home(tmp_path)
    home.state_file.parent.mkdir(parents=True)
    refused = []
    write, is_full = state.write_config, True

    def on_this_disk(path, value):
        if is_full:
            refused.append(value.state)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, value)

    monkeypatch.setattr(state, "write_config", on_this_disk)
    monkeypatch.setattr(running, "SAVE_AGAIN_S", 0.01)
    ran = asyncio.create_task(Nothing(home, lambda report: None).run())
    async with asyncio.timeout(10):
        while len(refused) < 3:
            await asyncio.sleep(0.01)
        assert read_state(home) is None
        is_full = False
        while (found := read_state(home)) is None:
            await asyncio.sleep(0.01)
        assert found.state == "ready"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await ran == 0
    assert set(refused) == {"ready"}
