"""Holds the report against what it was made of, and scores it: 1 is a report that says nothing else."""

from collections import Counter

from hive import log

PLACE = ("path", "line", "function", "rule", "value")


def run(input: dict) -> dict:
    """Take the report's `input` and `output`; return the share of `checks` that hold as `score`."""
    reviews, report = input["input"]["reviews"], input["output"]
    kept = Counter(place(finding) for review in reviews for finding in review["kept"])
    dropped = Counter(place(finding) for review in reviews for finding in review["dropped"])
    ranked = Counter(place(finding) for finding in report["ranked"])
    severities = [finding["severity"] for finding in report["ranked"]]
    checks = {
        "every finding was kept by a critic": ranked <= kept,
        "nothing that was dropped is in it": not ranked & (dropped - kept),
        "all that was dropped is told": Counter(map(place, report["dropped"])) == dropped,
        "the findings are counted": report["findings"] == kept.total() == sum(report["rules"].values()),
        "the files are counted": report["files"] == sum(review["files"] for review in reviews),
        "the worst comes first": severities == sorted(severities, reverse=True),
    }
    for check, holds in checks.items():
        if not holds:
            log.warning(f"does not hold: {check}")
    return {"score": round(sum(checks.values()) / len(checks), 3), "checks": checks}


def place(finding: dict) -> tuple:
    """Return what makes a finding that one."""
    return tuple(finding[name] for name in PLACE)
