"""What was decided over a task, told to people."""

from typing import Any

from rich.markup import escape

from hive_cli.commands.drawing import outcome_in_words, place
from hive_cli.output import clean, out, print_table


def print_decision(found: dict[str, Any], owners: dict[str, str]) -> None:
    """Print a decision as the gateway tells it.

    Args:
        owners: names of owners by pseudonym, as far as they are known.
    """
    out.print(f"[bold]{escape(place(found))}[/bold]   {found['task']}")
    out.print(f"[bold]{escape(outcome_in_words(found, found['trust']))}[/bold]")
    out.print(f"rule: {escape(found['rule_words'])}", style="dim")
    print_table(
        ("attempt", "executor", "device", "owner", "result", "score", "test", "what became of it", "equal to it"),
        [
            *(_candidate(one, found, owners) for one in found["candidates"]),
            *((*_place(one, owners), "", "", "", "ran, and was cancelled", "") for one in found["running"]),
        ],
    )
    if found["judges"]:
        out.print("judges", style="bold")
        print_table(
            ("kind", "agent", "judged", "executor", "device", "owner", "task"),
            (
                (one["kind"], one["agent"], _numbers(one["judged"]), *_place(one["by"], owners)[1:], one["task"])
                for one in found["judges"]
            ),
        )
    if found["pairs"]:
        said = (f"#{one['a']} {'=' if one['equal'] else '≠'} #{one['b']}" for one in found["pairs"])
        out.print(f"pairs: {', '.join(said)}", style="dim")
    for line in _notes(found):
        out.print(escape(clean(line)), style="yellow")


def _candidate(one: dict[str, Any], found: dict[str, Any], owners: dict[str, str]) -> tuple[str, ...]:
    return (
        *_place(one, owners),
        one["digest"].removeprefix("sha256:")[:12],
        "" if one["score"] is None else f"{one['score']:g}",
        {True: "passed", False: "failed", None: ""}[one["passed"]],
        _became(one, found),
        _numbers(one["votes"]),
    )


def _place(one: dict[str, Any], owners: dict[str, str]) -> tuple[str, str, str, str]:
    owner = owners.get(one["owner"], one["owner"][:8])
    return f"#{one['attempt']}", one["name"] or one["executor"][:8], one["device"][:12], owner


def _became(one: dict[str, Any], found: dict[str, Any]) -> str:
    if one["attempt"] == found["winner"]:
        return "the winner"
    if one["attempt"] in found["votes"]:
        return {"kept": "kept", "escalated": "given to the senior agent"}.get(found["outcome"], "voted for it")
    return str(one["why_not"] or "another answer")


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    if found["spent"]:
        notes.append(f"{found['spent']} more ended without a result")
    if coming := found["coming"] - found["gone"]:
        notes.append(f"{coming} more were planned and had no executor yet")
    if found["gone"]:
        notes.append(f"{found['gone']} more were planned, and no executor was left for them: some were revoked")
    return notes + [
        f"{one['agent']} judged attempt #{one['attempt']} where it had run, which `distinct: none` allows"
        for one in found["self_judged"]
    ]


def _numbers(attempts: list[int]) -> str:
    return " ".join(f"#{one}" for one in attempts)
