"""Looks again at every finding, with eyes of its own, and keeps what holds."""

import ast

from hive import log

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FORKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.BoolOp, ast.match_case)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*DEFINITIONS, ast.ClassDef, ast.Lambda)


def run(input: dict) -> dict:
    """Take `files` and `findings`; return those that hold as `kept` and the others as `dropped`."""
    trees = {file["path"]: parse(file["text"]) for file in input["files"]}
    kept, dropped = [], []
    for finding in input["findings"]:
        (kept if holds(finding, trees.get(finding["path"])) else dropped).append(finding)
    for finding in dropped:
        log.warning(f"does not hold: {finding['rule']} at {finding['path']}:{finding['line']}")
    return {"kept": kept, "dropped": dropped, "files": len(input["files"])}


def parse(text: str) -> ast.Module | None:
    """Return the tree, or None where there is none."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def holds(finding: dict, tree: ast.Module | None) -> bool:
    """Say whether the place exists and the value measured there is the one that was claimed."""
    if finding["rule"] == "syntax-error":
        return tree is None
    if tree is None:
        return False
    if finding["rule"] == "bare-except":
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        return any(node.type is None and node.lineno == finding["line"] for node in handlers)
    name = finding["function"].rsplit(".", 1)[-1]
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and node.name == name and node.lineno == finding["line"]:
            return claim(node, finding["rule"]) == finding["value"]
    return False


def claim(node: ast.FunctionDef | ast.AsyncFunctionDef, rule: str) -> int:
    """Measure one function by one rule."""
    if rule == "long-function":
        return (node.end_lineno or 0) - node.lineno + 1
    if rule == "missing-docstring":
        return int(ast.get_docstring(node) is None)
    inside = list(visible(node))
    if rule == "many-branches":
        return sum(isinstance(child, FORKS) for child, _ in inside)
    return max((depth for _, depth in inside), default=0)


def visible(function: ast.AST) -> list[tuple[ast.AST, int]]:
    """Return (node, depth of blocks at it) for what belongs to a function itself."""
    found, queue = [], [(function, 0)]
    while queue:
        parent, depth = queue.pop()
        chained = set()
        if isinstance(parent, ast.If) and len(parent.orelse) == 1 and isinstance(parent.orelse[0], ast.If):
            chained.add(id(parent.orelse[0]))
        for child in ast.iter_child_nodes(parent):
            if not isinstance(child, SCOPES):
                inner = depth + (isinstance(child, BLOCKS) and id(child) not in chained)
                found.append((child, inner))
                queue.append((child, inner))
    return found
