"""A range of the log, checked apart from what stands before it, and joined to it afterwards.

A range is checked from the hash that stands before its first event. That this hash is right, and where the streams
stood that go on in the range, is not known there; `join` holds it against what was found before the range. Both
together are what `Verifier` checks in one go: whoever finds that a range does not hold or does not fit checks again
with a `Verifier` from the end of what is joined, and gets position and reason from it.
"""

import msgspec

from hive_audit.verifier import Head, Verifier


class Range(msgspec.Struct, frozen=True, array_like=True):
    """The positions `after < position <= until` of one log."""

    after: int
    until: int
    log_id: str


class Checked(msgspec.Struct, frozen=True, array_like=True):
    """What was found in a range.

    Attributes:
        holds: each event holds and follows the one before it, the first one `start_hash`.
        start_hash: the hash that stands before the range.
        end_hash: the hash of its last event.
        begun: where the streams stand that begin in it, as in `StreamHeads.states`.
        continued: for streams that go on in it: after which version, and where they stand; whether they had ended
            before is not in it.
    """

    holds: bool
    start_hash: bytes = b""
    end_hash: bytes = b""
    begun: dict[str, int] = {}
    continued: dict[str, tuple[int, int]] = {}


DOES_NOT_HOLD = Checked(False)


class RangeCheck:
    """Checks one range; rows go in as into a `Verifier`."""

    def __init__(self, range_: Range, start_hash: bytes) -> None:
        self._range = range_
        self._start_hash = start_hash
        self._verifier = Verifier(Head(range_.after, start_hash), log_id=range_.log_id, assume=True)
        self.feed = self._verifier.feed

    def finish(self) -> Checked:
        """Return what was found."""
        verifier = self._verifier
        if verifier.broken is not None or verifier.position != self._range.until:
            return DOES_NOT_HOLD
        states = verifier.heads.states
        continued = {stream: (after, states.pop(stream)) for stream, after in (verifier.assumed or {}).items()}
        return Checked(True, self._start_hash, verifier.head_hash, states, continued)


def join(verifier: Verifier, range_: Range, checked: Checked) -> bool:
    """Take over into `verifier` what was found in the range behind it. Says whether it fits.

    The streams of the range that `verifier.heads` does not know MUST have been learnt. Where it does not fit,
    nothing is changed.
    """
    states = verifier.heads.states
    fits = (
        checked.holds
        and range_.after == verifier.position
        and range_.log_id == verifier.log_id
        and checked.start_hash == verifier.head_hash
    )
    if not fits or any(states[stream] for stream in states.keys() & checked.begun.keys()):
        return False
    continued: dict[str, int] = {}
    for stream, (after, state) in checked.continued.items():
        before = states.get(stream, 0)
        if before >> 1 != after or before & state & 1:
            return False
        continued[stream] = state | before & 1
    states.update(checked.begun)
    states.update(continued)
    verifier.position = range_.until
    verifier.head_hash = checked.end_hash
    return True
