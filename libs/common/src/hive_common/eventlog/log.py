"""The log's interface: what a service imports.

writer = await LogWriter.open(dsn)
position = await writer.append(Append((NewEvent(...),)))
events = await LogReader(dsn).read(after=0)
"""

from hive_common.eventlog.connection import Connect
from hive_common.eventlog.envelope import (
    EVENTS_PER_CALL_MAX,
    PAYLOAD_BYTES_MAX,
    Append,
    Envelope,
    NewEvent,
    Stored,
    envelope_of,
    leaf_hash,
    payload_commit,
)
from hive_common.eventlog.genesis import create_log
from hive_common.eventlog.reader import LogReader, Scan
from hive_common.eventlog.writer import LogWriter

__all__ = [
    "EVENTS_PER_CALL_MAX",
    "PAYLOAD_BYTES_MAX",
    "Append",
    "Connect",
    "Envelope",
    "LogReader",
    "LogWriter",
    "NewEvent",
    "Scan",
    "Stored",
    "create_log",
    "envelope_of",
    "leaf_hash",
    "payload_commit",
]
