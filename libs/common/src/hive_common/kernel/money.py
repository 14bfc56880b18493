"""Money as whole nano-USD, and prices as whole pico-USD for each token. Nothing here is a float."""

from decimal import Decimal, InvalidOperation
from typing import Final

import msgspec

from hive_common.kernel.errors import InvalidArgument

NANO_PER_USD: Final = 10**9
USD_MAX: Final = 1_000_000_000
"""No amount is larger; sums of such amounts fit into 64 bits many times."""

PRICE_USD_MAX: Final = 100_000
"""Of a million tokens."""

_PICO_PER_NANO: Final = 1_000
_PLACES: Final = 9
_PRICE_PLACES: Final = 6


class Price(msgspec.Struct, frozen=True):
    """What tokens cost, in pico-USD each, which is micro-USD for a million of them."""

    input_pico_usd: int
    output_pico_usd: int

    def nano_usd(self, input_tokens: int, output_tokens: int) -> int:
        """Return what a call costs, rounded up."""
        pico = input_tokens * self.input_pico_usd + output_tokens * self.output_pico_usd
        return -(-pico // _PICO_PER_NANO)


def pico_usd_per_token(usd_per_million: Decimal, path: str) -> int:
    """Return a price as it is counted. Raises InvalidArgument where it is none, or finer than micro-USD."""
    return _scaled(usd_per_million, _PRICE_PLACES, PRICE_USD_MAX, path)


def parse_usd(text: str, path: str) -> int:
    """Return an amount such as `0.50` in nano-USD. Raises InvalidArgument where it is none."""
    try:
        amount = Decimal(text.strip().removeprefix("$"))
    except InvalidOperation:
        raise InvalidArgument(
            f"{path}: got {text[:40]!r}; expected an amount in USD such as 0.50", path=path
        ) from None
    return _scaled(amount, _PLACES, USD_MAX, path)


def show_usd(nano_usd: int) -> str:
    """Return an amount for people: at least cents, and all places that are not zero."""
    sign, whole = ("-", -nano_usd) if nano_usd < 0 else ("", nano_usd)
    usd, rest = divmod(whole, NANO_PER_USD)
    places = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${usd}.{places}"


def _scaled(amount: Decimal, places: int, most: int, path: str) -> int:
    if not amount.is_finite() or not 0 <= amount <= most:
        raise InvalidArgument(f"{path}: got {amount}; expected 0 to {most} USD", path=path)
    scaled = amount.scaleb(places)
    if scaled != int(scaled):
        raise InvalidArgument(f"{path}: got {amount}; expected at most {places} decimal places", path=path)
    return int(scaled)
