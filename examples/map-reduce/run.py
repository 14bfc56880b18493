"""`make example-map-reduce`: an index of a repository's own Python, and the names that nothing else names."""

import sys
from pathlib import Path
from typing import Any

from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from installation import Installation, arguments, files, installation  # noqa: E402

AGENTS = ("splitter", "mapper", "reducer")


def main() -> None:
    """Index, and show the index, how it came about, and how one part was decided."""
    parser = arguments("Index source files: split, map each part on two executors that have to agree, reduce.")
    parser.add_argument("files", nargs="*", default=["**/*.py"], help="files or patterns; else **/*.py")
    parser.add_argument("--shown", type=int, default=15, help="rows of each table")
    chosen = parser.parse_args()
    sources = files(chosen.files)
    with installation(chosen) as hive:
        hive.push(*(HERE / agent for agent in AGENTS))
        result = hive.run(HERE / "job.yaml", files=sources)
        show(hive, result["output"], chosen.shown)
        hive.tree(result["job_id"])
        decided = hive.tasks(result["job_id"], "map")[0]["task_id"]
        hive.decision(decided)
        hive.finish({**result, "decided": decided})


def show(hive: Installation, index: dict[str, Any], shown: int) -> None:
    """Print the index in short."""
    say = hive.console.print
    say(
        f"\n{index['files']} files, {index['lines']} lines, {index['names']} names, {index['defined']} defined here"
    )
    used = ", ".join(f"{one['name']} {one['count']}" for one in index["most_used"][:shown])
    say(f"mentioned most: {used}", markup=False)
    table = Table(title=f"defined, and named nowhere else: {len(index['named_once'])}", title_justify="left")
    table.add_column("name")
    table.add_column("where", overflow="fold")
    for one in index["named_once"][:shown]:
        table.add_row(one["name"], one["where"])
    say(table)


if __name__ == "__main__":
    main()
