"""Kill orders on this device: verified, obeyed at once, and written down, so that no older one is ever obeyed."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from hive_common.contracts.messages import KILL_SUBJECT, KillOrder
from hive_common.control.orders import Stopped, in_words
from hive_common.control.verifier import Verifier
from hive_common.kernel.errors import HiveError
from hive_common.ops.files import replace_file
from nats.aio.msg import Msg

from hive_executor.link import Link

log = logging.getLogger(__name__)

FILE: Final = "kill-order.json"
_decode = msgspec.json.Decoder(KillOrder).decode


class KillSwitch:
    """Knows what is stopped.

    Args:
        executor_id: of this executor.
        key: public key of the orders; without one none is obeyed.
        state_dir: where the newest order is kept.
        on_order: called after each order that is obeyed, with what is stopped now. It MUST stop it at once.

    Raises:
        InvalidArgument: the key is none.
    """

    def __init__(self, executor_id: str, key: str, state_dir: Path, on_order: Callable[[Stopped], None]) -> None:
        self._executor_id = executor_id
        self._verifier = Verifier(key)
        self._file = state_dir / FILE
        self._on_order = on_order
        self._heard = 0
        self._news = asyncio.Event()

    @property
    def epoch(self) -> int:
        """Return the epoch of the newest order that is obeyed, 0 before the first."""
        return self._verifier.epoch

    @property
    def stopped(self) -> Stopped:
        """Return what is stopped now."""
        return self._verifier.stopped

    @property
    def stops_device(self) -> str | None:
        """Return the entry by which this device is stopped, None where it is not."""
        return self.stopped.executor(self._executor_id)

    def load(self) -> None:
        """Take up what was written down. Raises OSError where the file cannot be read."""
        try:
            kept = _decode(self._file.read_bytes())
        except FileNotFoundError:
            return
        except msgspec.DecodeError as error:
            log.error("%s: %s; the control plane will say what is stopped", self._file, error)
            return
        self._take(kept)
        self._heard = self.epoch

    async def open(self, link: Link) -> None:
        """Listen to orders, once the link is open."""
        await link.client.subscribe(KILL_SUBJECT, cb=self._receive)

    async def run(self) -> None:
        """Write each new order down. Ends only by being cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            signed = self._verifier.signed
            try:
                await asyncio.to_thread(replace_file, self._file, msgspec.json.encode(signed))
            except OSError as error:
                # It is obeyed all the same; after a restart the control plane says it again.
                log.error("%s: %s: the kill order is obeyed but not written down", self._file, error.strerror)

    def told(self, signed: KillOrder | None) -> None:
        """Obey what the scheduler or the registry says is the newest order; they may say it again and again."""
        if signed is not None and signed != self._verifier.signed and self._take(signed):
            self._news.set()

    async def _receive(self, message: Msg) -> None:
        try:
            signed = _decode(message.data)
        except msgspec.DecodeError as error:
            signed = KillOrder(order="", signature="")
            log.warning("%s: %s", message.subject, error)
        if signed == self._verifier.signed and self.epoch > self._heard:
            # A pull was faster: this is the order itself, and not one that somebody plays again.
            self._heard = self.epoch
        elif self._take(signed):
            self._heard = self.epoch
            self._news.set()

    def _take(self, signed: KillOrder) -> bool:
        try:
            order = self._verifier.take(signed)
        except HiveError as error:
            log.warning("a kill order is refused: %s", error.message)
            return False
        log.warning("kill order %d: %s %s", order.epoch, order.action, in_words(order.entry))
        self._on_order(self.stopped)
        return True
