"""Who gets the lead, and how it is taken from one that vanishes."""

from hive_common.kernel.clock import SystemClock
from hive_scheduler import leadership


class Cursor:
    def __init__(self, row):
        self.row = row

    async def fetchone(self):
        return self.row


class Connection:
    """Gets the lock at the second try."""

    def __init__(self):
        self.said = []

    async def execute(self, query, parameters=()):
        self.said.append(query)
        if query == leadership._LOCK:
            return Cursor((self.said.count(query) == 2,))
        return Cursor((7,))


async def test_a_session_that_may_get_the_lock_has_its_idle_limit_before(monkeypatch):
    """One that vanishes the moment after it got the lock would else keep it for hours."""
    monkeypatch.setattr(leadership, "POLL_S", 0)
    conn, stood_by = Connection(), []
    assert await leadership.contend(conn, SystemClock(), stood_by.append) == 7
    limit = f"SET idle_session_timeout = {leadership.SESSION_IDLE_MAX_MS}"
    assert conn.said == [limit, leadership._LOCK, leadership._LOCK, leadership._EPOCH]
    assert stood_by == [True, False]
