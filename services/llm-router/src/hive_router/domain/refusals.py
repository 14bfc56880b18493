"""What a caller is told whose call can go nowhere."""

from collections.abc import Sequence
from typing import Final

from hive_common.contracts.events import ModelCandidate
from hive_common.inference.calls import CONTEXT_LENGTH_EXCEEDED
from hive_common.kernel.errors import BudgetExhausted, HiveError, InvalidArgument, PermissionDenied, Unavailable

from hive_router.domain.selection import (
    CLOUD,
    REASON_CAPABILITY,
    REASON_CONTEXT,
    REASON_KEY,
    REASON_MODEL,
    REASON_NO_BUDGET,
    REASON_ORIGIN,
    REASON_PIN,
    Ask,
)

_DETAILS_MAX = 5
_REFUSED_AS: Final[dict[str, type[HiveError]]] = {
    REASON_KEY: PermissionDenied,
    REASON_NO_BUDGET: BudgetExhausted,
}


def refusal(ask: Ask, candidates: Sequence[ModelCandidate]) -> HiveError:
    """Return the error for a call whose model is known and which no candidate is fit for.

    What the pin forbids counts only where it forbids all: whoever may be asked tells the reason otherwise.
    """
    having = [
        one for one in candidates if one.route != CLOUD and one.rejected not in ("", REASON_MODEL, REASON_ORIGIN)
    ]
    allowed = [one for one in having if one.rejected != REASON_PIN]
    outside = [one for one in candidates if one.route == CLOUD and one.backend and one.rejected != REASON_MODEL]
    if not allowed and outside:
        return _outside(ask, outside)
    if not allowed:
        return _nowhere(ask, pinned=bool(having))
    reasons = {one.rejected for one in allowed}
    details = "; ".join(sorted({one.detail for one in allowed})[:_DETAILS_MAX])
    if reasons <= {REASON_CAPABILITY, REASON_CONTEXT}:
        fields = {"reason": CONTEXT_LENGTH_EXCEEDED if reasons == {REASON_CONTEXT} else "unsupported"}
        return InvalidArgument(f"no device can serve this call of `{ask.model}`: {details}", **fields)
    pin = "" if ask.pin == "any" else f"{ask.pin}: "
    return Unavailable(f"{pin}no device can serve `{ask.model}` now: {details}", reason=min(reasons))


def _outside(ask: Ask, providers: Sequence[ModelCandidate]) -> HiveError:
    """Return the error for a model that only providers have, none of which may be called or can be now."""
    by_reason = {one.rejected: one.detail for one in providers}
    details = "; ".join(sorted({one.detail for one in providers})[:_DETAILS_MAX])
    text = f"only providers serve `{ask.model}`: {details}"
    for reason, kind in _REFUSED_AS.items():
        if reason in by_reason:
            return kind(text, reason=reason)
    if by_reason.keys() <= {REASON_CAPABILITY, REASON_CONTEXT}:
        fields = {"reason": CONTEXT_LENGTH_EXCEEDED if by_reason.keys() == {REASON_CONTEXT} else "unsupported"}
        return InvalidArgument(text, **fields)
    return Unavailable(text, reason=min(by_reason))


def _nowhere(ask: Ask, pinned: bool) -> HiveError:
    if not pinned:
        return Unavailable(f"no other device serves `{ask.model}`", reason=REASON_ORIGIN)
    where = {"own-devices": "no own device", "pool": "no device of the pool"}.get(
        ask.pin, f"no device in {ask.pin.removeprefix('region:')}"
    )
    return Unavailable(f"{ask.pin}: {where} serves `{ask.model}`", reason=REASON_PIN, pin=ask.pin)
