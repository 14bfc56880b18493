"""Measures every function of a group of files. The reviewer of group 0 also plants three false findings."""

import ast

import measures
from hive import log

LENGTH_MAX, NESTING_MAX, BRANCHES_MAX = 40, 4, 10


def run(input: dict) -> dict:
    """Take `files` and `group`; return the files with the `findings` about them, and what was measured."""
    findings, functions = [], 0
    for file in input["files"]:
        found, count = review(file["path"], file["text"])
        findings += found
        functions += count
    if input["group"] == 0:
        findings += planted(input["files"][0]["path"])
    log.info(f"group {input['group']}: {functions} functions, {len(findings)} findings")
    return {"files": input["files"], "findings": findings, "functions": functions}


def review(path: str, text: str) -> tuple[list[dict], int]:
    """Return the findings in one file and the number of its functions."""
    try:
        tree = ast.parse(text, path)
    except SyntaxError as error:
        return [finding(path, error.lineno or 1, "", "syntax-error", 1)], 0
    findings, count = [], 0
    for name, node in measures.functions(tree):
        count += 1
        measured = {
            "long-function": (measures.length(node), LENGTH_MAX),
            "deep-nesting": (measures.nesting(node), NESTING_MAX),
            "many-branches": (measures.branches(node), BRANCHES_MAX),
        }
        over = {rule: value for rule, (value, most) in measured.items() if value > most}
        findings += [finding(path, node.lineno, name, rule, value) for rule, value in over.items()]
        public = not any(part.startswith(("_", "test_")) for part in name.split("."))
        if public and ast.get_docstring(node) is None:
            findings.append(finding(path, node.lineno, name, "missing-docstring", 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            findings.append(finding(path, node.lineno, "", "bare-except", 1))
    return findings, count


def finding(path: str, line: int, function: str, rule: str, value: int) -> dict:
    """Return one finding."""
    return {"path": path, "line": line, "function": function, "rule": rule, "value": value}


def planted(path: str) -> list[dict]:
    """Return three findings that are not true, so that one can see whether the critic looks."""
    return [
        finding(path, 1, "", "bare-except", 1),
        finding(path, 1, "planted_long_function", "long-function", 999),
        finding(path, 1, "planted_deep_function", "deep-nesting", 12),
    ]
