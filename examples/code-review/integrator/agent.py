"""Ranks what the critics kept into one report."""

from collections import Counter

WEIGHTS = {
    "syntax-error": 100,
    "bare-except": 20,
    "deep-nesting": 8,
    "many-branches": 5,
    "long-function": 3,
    "missing-docstring": 1,
}
LIMITS = {"long-function": 40, "deep-nesting": 4, "many-branches": 10}
SHOWN = 15


def run(input: dict) -> dict:
    """Take `reviews`, one {kept, dropped, files} a group; return the ranked report."""
    kept = [finding for review in input["reviews"] for finding in review["kept"]]
    dropped = [finding for review in input["reviews"] for finding in review["dropped"]]
    ranked = sorted(kept, key=lambda finding: (-severity(finding), finding["path"], finding["line"]))
    files: Counter[str] = Counter()
    for finding in kept:
        files[finding["path"]] += WEIGHTS[finding["rule"]]
    return {
        "files": sum(review["files"] for review in input["reviews"]),
        "findings": len(kept),
        "rules": dict(Counter(finding["rule"] for finding in kept).most_common()),
        "ranked": [{**finding, "severity": round(severity(finding), 1)} for finding in ranked[:SHOWN]],
        "heaviest_files": [{"path": path, "weight": weight} for path, weight in files.most_common(5)],
        "dropped": dropped,
    }


def severity(finding: dict) -> float:
    """Weigh a finding by its rule and by how far it goes beyond the limit."""
    over = finding["value"] / LIMITS[finding["rule"]] if finding["rule"] in LIMITS else 1
    return WEIGHTS[finding["rule"]] * over
