"""What machines say for placement, as options name it: their tier and labels."""

from collections.abc import Iterable, Mapping
from typing import Annotated

import typer
from hive_common.contracts.events import TIERS, Tier
from hive_common.kernel.errors import InvalidArgument

TierOption = Annotated[
    str | None,
    typer.Option(
        "--tier", metavar="|".join(TIERS), help="Class of this machine, for placement; else worker. Kept."
    ),
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="Label for placement; NAME= takes it away. Kept."),
]


def chosen_tier(tier: str | None) -> Tier | None:
    """Return what `--tier` says. Raises InvalidArgument where it is none."""
    found = next((one for one in TIERS if one == tier), None)
    if tier is not None and found is None:
        raise InvalidArgument(f"--tier: got {tier!r}; expected one of {', '.join(TIERS)}")
    return found


def chosen_labels(given: Iterable[str] | None) -> dict[str, str] | None:
    """Return what `--label` says, None where it is not given; empty values are of labels to take away.

    Raises:
        InvalidArgument: one of them is not `NAME=VALUE`.
    """
    if not given:
        return None
    labels = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name.strip() or not equals:
            raise InvalidArgument(f"--label: got {text!r}; expected NAME=VALUE")
        labels[name.strip()] = value.strip()
    return labels


def with_labels(known: Mapping[str, str], wished: Mapping[str, str] | None) -> dict[str, str]:
    """Return labels after a wish."""
    return {name: value for name, value in {**known, **(wished or {})}.items() if value}
