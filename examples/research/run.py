"""`make example-research`: answer a question from documents, with a small local model that is not to be trusted."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from installation import ROOT, Installation, arguments, files, installation  # noqa: E402

QUESTION = "How long is a lease, and what happens to a guest when it runs out?"
DOCUMENTS = str(ROOT / "docs" / "adr" / "*.md")
AGENTS = ("planner", "explorer", "critic", "integrator")


def main() -> None:
    """Ask, and show what was found, how it came about, and how one reading was decided."""
    parser = arguments("Answer a question from documents: plan, explore in parallel, criticise, integrate.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("documents", nargs="*", default=[DOCUMENTS], help="files or patterns; else docs/adr/*.md")
    parser.add_argument("--readings", type=int, default=6, help="passages to read, each of another document")
    parser.add_argument("--model", default="", help="one of `hive model list`; else the first one that is served")
    parser.add_argument(
        "--model-url", default="", help="serve a scratch home's models from there (`hive up --model-url`)"
    )
    chosen = parser.parse_args()
    documents = files(chosen.documents)
    served = ("--model-url", chosen.model_url) if chosen.model_url else ("--with-model",)
    with installation(chosen, *served) as hive:
        hive.push(*(HERE / agent for agent in AGENTS))
        asked = {"question": chosen.question, "readings": chosen.readings, "model": chosen.model}
        result = hive.run(HERE / "job.yaml", documents=documents, **asked)
        show(hive, chosen.question, result["output"])
        hive.tree(result["job_id"])
        readings = [reading["path"] for reading in result["output"]["readings"]]
        best = next((readings.index(note["path"]) for note in result["output"]["found"]["notes"]), 0)
        decided = hive.tasks(result["job_id"], "explore")[best]["task_id"]
        hive.decision(decided)
        hive.finish({**result, "decided": decided})


def show(hive: Installation, question: str, output: dict[str, Any]) -> None:
    """Print the answer, what it rests on, and where nothing was found."""
    say, found = hive.console.print, output["found"]
    shorter = {reading["path"]: reading["path"].removeprefix(f"{ROOT}/") for reading in output["readings"]}
    say(f"\n[bold]{question}[/bold]")
    if found["notes"]:
        say(found["notes"][0]["quote"], markup=False, style="green")
    else:
        say("no answer: nothing that the model chose passed the critic", style="yellow")
    say(f"\nfound in {found['passed']} of {found['size']} passages that were read:")
    for note in found["notes"]:
        say(f"  {note['score']:.2f}  {shorter[note['path']]}:{note['line']}", markup=False, style="cyan")
        say(f"        {note['quote']}", markup=False)
    quoted = {note["path"] for note in found["notes"]}
    for reading in output["readings"]:
        if reading["path"] not in quoted:
            say(
                f"  ----  {shorter[reading['path']]}:{reading['line']}  nothing that the critic let pass",
                markup=False,
            )
    models = ", ".join(sorted({note["model"] for note in found["notes"] if note["model"]}))
    if models:
        say(f"quotes are word for word; {models} chose them, and a critic checked it", style="dim")


if __name__ == "__main__":
    main()
