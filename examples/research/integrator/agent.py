"""Makes one list of what explorers found and critics let pass: best first, nothing twice, with its place."""

from hive import log


def run(input: dict) -> dict:
    """Take the fork's `results`; return `notes`: the quotes that were let pass, with their scores."""
    found = [(result["score"], result["value"]) for result in input["results"] if result["status"] == "succeeded"]
    notes, seen = [], set()
    for score, note in sorted(found, key=lambda one: -one[0] * one[1]["relevance"]):
        if note["quote"] not in seen:
            seen.add(note["quote"])
            notes.append({**note, "score": score})
    left = input["size"] - len(found)
    log.info(f"{len(notes)} notes of {input['size']} readings; {left} were not let pass")
    return {"notes": notes, "size": input["size"], "passed": len(found), "partial": input["partial"]}
