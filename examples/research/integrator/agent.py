"""Makes one list of what explorers found and critics let pass: best first, nothing twice, with its place."""

from hive import log

NOTES_MAX = 3


def run(input: dict) -> dict:
    """Take the fork's `results`; return `notes`, and their quotes as one `text`."""
    found = [(result["score"], result["value"]) for result in input["results"] if result["status"] == "succeeded"]
    notes, seen = [], set()
    for score, note in sorted(found, key=lambda one: -one[0] * one[1]["relevance"]):
        if note["quote"] not in seen:
            seen.add(note["quote"])
            notes.append({**note, "score": score})
    left = input["size"] - len(found)
    log.info(f"{len(notes)} notes of {input['size']} readings; {left} were not let pass")
    text = " ".join(note["quote"] for note in notes[:NOTES_MAX])
    return {"notes": notes, "text": text, "size": input["size"], "passed": len(found), "partial": input["partial"]}
