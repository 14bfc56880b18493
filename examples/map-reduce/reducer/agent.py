"""Reduces the parts to one index: what is defined where, how often it is used, and what nothing else names."""

from collections import Counter

SHOWN = 20
# Frameworks find these by their names.
CALLED_BY_NAME = ("test_", "Test", "__", "visit_", "pytest_")


def run(input: dict) -> dict:
    """Take the `results` of the parts; return the index."""
    parts = [result["value"] for result in input["results"]]
    names: Counter[str] = Counter()
    defined: dict[str, list[str]] = {}
    for part in parts:
        names.update(part["names"])
        for name, places in part["defined"].items():
            defined.setdefault(name, []).extend(places)
    once = {
        name: places[0]
        for name, places in defined.items()
        if names[name] == 1 and not name.startswith(CALLED_BY_NAME)
    }
    used = Counter({name: names[name] for name in defined if not name.startswith("__")})
    return {
        "files": sum(part["files"] for part in parts),
        "lines": sum(part["lines"] for part in parts),
        "names": len(names),
        "defined": len(defined),
        "most_used": [{"name": name, "count": count} for name, count in used.most_common(SHOWN)],
        "most_defined": sorted(
            ({"name": name, "places": len(places)} for name, places in defined.items()),
            key=lambda one: (-one["places"], one["name"]),
        )[:SHOWN],
        "named_once": [{"name": name, "where": where} for name, where in sorted(once.items(), key=lambda o: o[1])],
    }
