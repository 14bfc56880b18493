"""A row of the table of goals, and how its figures are written."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A line of the table of goals; `reached` is None where the run has no figure for it."""

    what: str
    goal: str
    figure: str
    reference: str
    reached: bool | None
    unfair: str

    def text(self) -> str:
        """Return it as a line of Markdown."""
        verdict = {True: "reached", False: "**missed**", None: "not measured"}[self.reached]
        return f"| {self.what} | {self.goal} | {self.figure} | {self.reference} | {verdict} | {self.unfair} |"


def span(figure: dict[str, float], unit: str = "") -> str:
    """Return a median with its extremes."""
    return f"{number(figure['median'])}{unit} ({number(figure['min'])} to {number(figure['max'])})"


def number(value: float) -> str:
    """Return a figure with no more digits than it deserves."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def when(section: dict[str, Any]) -> str:
    """Return of which run a section is that says its own date; nothing where it is the run of all."""
    if "about" not in section:
        return ""
    about = section["about"]
    return (
        f"A run of its own: {about['date'][:16].replace('T', ' ')} UTC, tree {about['tree']}, load "
        f"{about['load_average_before'][0]} before and {about['load_average_after'][0]} after it. "
    )
