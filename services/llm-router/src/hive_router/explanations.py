"""Why a call went where it went: from memory while it is recent, from the log later."""

from hive_common.contracts.events import ModelCallFinished, decode
from hive_common.eventlog.log import LogReader
from hive_common.kernel.errors import NotFound

from hive_router.recorder import Recorder


class Explanations:
    """Finds out about calls.

    The log holds each call as a stream of its own, so that one read by its key finds it; a view of them all would
    say the same again and cost a write for each call.

    Args:
        recorder: knows recent ones.
        reader: of the log.
        ns: the namespace.
    """

    def __init__(self, recorder: Recorder, reader: LogReader, ns: str) -> None:
        self._recorder = recorder
        self._reader = reader
        self._ns = ns

    async def of(self, call_id: str) -> ModelCallFinished:
        """Return what is known of a call; `code` is `running` while it runs.

        Raises:
            NotFound: there was no such call, or what is known of it was erased.
            Unavailable: the log cannot be reached.
        """
        recent = self._recorder.recent(call_id)
        if recent is not None:
            return recent
        found = await self._reader.read(0, 1, streams=[call_id])
        for stored in found:
            if stored.ns == self._ns and stored.type == ModelCallFinished.__name__ and stored.payload is not None:
                event = decode(stored.type, stored.schema, stored.payload)
                assert isinstance(event, ModelCallFinished)
                return event
        raise NotFound(f"no model call {call_id}")
