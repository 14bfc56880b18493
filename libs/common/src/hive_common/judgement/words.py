"""A rule of judgement in words, for people who look at a decision."""

from hive_common.contracts.judgement import (
    CanonicalJson,
    Embedding,
    Equality,
    Exact,
    Numeric,
    PairCritic,
    Rule,
)


def rule_in_words(rule: Rule) -> str:
    """Return one line that says what makes a result of a task the result."""
    return "; ".join(filter(None, (_chosen(rule), _valid(rule), _otherwise(rule))))


def equality_in_words(equal: Equality) -> str:
    """Return when two results are the same."""
    match equal:
        case Exact():
            return "the same bytes"
        case CanonicalJson():
            return "the same JSON"
        case Numeric():
            parts = [f"{equal.absolute:g}"] if equal.absolute else []
            parts += [f"{equal.relative * 100:g} %"] if equal.relative else []
            return f"the same numbers within {' or '.join(parts) or '0'}"
        case Embedding():
            return f"alike in meaning, with a cosine of {equal.min:g} at least"
        case PairCritic():
            return "the same in the eyes of a critic"


def _chosen(rule: Rule) -> str:
    apart = "" if rule.distinct == "none" or rule.of == 1 else f" of distinct {rule.distinct}s"
    if rule.keep == "all":
        least = f", {rule.k} at least" if rule.k > 1 else ""
        return f"all valid results{apart} of {rule.of} attempts are kept{least}"
    if rule.k > 1:
        vote = "each attempt" if rule.distinct == "none" else f"each {rule.distinct}"
        return f"{rule.k} of {rule.of} results that are {equality_in_words(rule.equal)}, one vote for {vote}"
    return "the result, if it is valid" if rule.of == 1 else f"the first valid one of {rule.of} results{apart}"


def _valid(rule: Rule) -> str:
    filters = [f"a critic gives it {rule.min_score:g} at least"] if rule.min_score is not None else []
    filters += ["it passes a test"] if rule.tested else []
    return f"valid is one if {' and '.join(filters)}" if filters else ""


def _otherwise(rule: Rule) -> str:
    match rule.on_none:
        case "extend":
            return f"otherwise up to {rule.extend_to} attempts" if rule.extend_to > rule.of else ""
        case "escalate":
            return "otherwise a senior agent chooses"
        case "fail":
            return ""
