"""`make example-self-consistency`: a model that is mostly wrong is asked several times, and the answers vote."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from installation import Installation, arguments, installation  # noqa: E402

QUESTIONS = HERE / "questions.json"


def main() -> None:
    """Ask, and show the votes, how they came about, and one decision."""
    parser = arguments(
        "Ask a question several times and take what most samples say; else eight, with a quorum each."
    )
    parser.add_argument("question", nargs="?", help="a word problem; without it those of questions.json")
    parser.add_argument("--temperature", type=float, default=0.5, help="how much samples differ")
    parser.add_argument("--model", default="", help="one of `hive model list`; else the first one that is served")
    parser.add_argument(
        "--model-url", default="", help="serve a scratch home's models from there (`hive up --model-url`)"
    )
    chosen = parser.parse_args()
    served = ("--model-url", chosen.model_url) if chosen.model_url else ("--with-model",)
    settings = {"temperature": chosen.temperature, "model": chosen.model}
    with installation(chosen, *served) as hive:
        hive.push(HERE / "solver")
        if chosen.question:
            result = hive.run(HERE / "job.yaml", question=chosen.question, **settings)
            hive.console.print(f"\n{chosen.question}\n[green]{result['output']['answer']}[/green]")
        else:
            questions = json.loads(QUESTIONS.read_text())
            asked = [{"question": one["question"]} for one in questions]
            result = hive.run(HERE / "questions.yaml", questions=asked, **settings)
        tasks = hive.tasks(result["job_id"], "solve")
        decided = tasks[0]["task_id"] if chosen.question else show(hive, questions, result["output"], tasks)
        hive.tree(result["job_id"])
        hive.decision(decided)
        hive.finish({**result, "decided": decided})


def show(
    hive: Installation, questions: list[dict[str, Any]], outputs: list[dict[str, Any]], tasks: list[dict[str, Any]]
) -> str:
    """Print what was voted beside what is right, and what single samples gave; return the task most disputed."""
    disputes: dict[str, int] = {}
    table = Table()
    for column in ("question", "right", "voted", "votes", "samples"):
        table.add_column(column, justify="left" if column == "question" else "right")
    samples = single = 0
    for question, output, task in zip(questions, outputs, tasks, strict=True):
        decision = hive.ask("job", "decision", task["task_id"])
        right = digest_of({"answer": question["expected"]})
        # A sample that was no calculation at all has no candidate: it is spent.
        made = len(decision["candidates"]) + decision["spent"]
        samples += made
        single += sum(candidate["digest"] == right for candidate in decision["candidates"])
        disputes[task["task_id"]] = len(decision["candidates"]) - len(decision["votes"])
        voted = output["answer"]
        colour = "green" if voted == question["expected"] else "yellow" if voted is None else "red"
        shown = f"[{colour}]{'none' if voted is None else voted}[/{colour}]"
        row = (question["question"], str(question["expected"]), shown, str(len(decision["votes"])), str(made))
        table.add_row(*row)
    hive.console.print()
    hive.console.print(table)
    voted_right = sum(one["expected"] == output["answer"] for one, output in zip(questions, outputs, strict=True))
    abstained = sum(output["answer"] is None for output in outputs)
    hive.console.print(
        f"voted right: {voted_right} of {len(questions)}, no quorum: {abstained}; "
        f"single samples that were right: {single} of {samples} ({single / max(1, samples):.0%})"
    )
    return max(disputes, key=disputes.__getitem__)


def digest_of(output: dict[str, Any]) -> str:
    """Return how the log names an output."""
    return "sha256:" + hashlib.sha256(json.dumps(output, separators=(",", ":")).encode()).hexdigest()


if __name__ == "__main__":
    main()
