"""`${…}` in job files: JMESPath over `input`, `tasks`, `item` and `index`.

A string that is one `${…}` becomes the value itself; inside a longer string the value is written into it
(strings as they are, everything else as JSON); `$${` stands for a literal `${`. Unlike plain JMESPath, a path
that is not there is an error and not null, so that a misspelt name cannot run a job on nothing. Where absence
is meant, `a || b`, `not_null(a, b)` and filter conditions take it.

Source: JMESPath specification, https://jmespath.org/specification.html.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jmespath
import jmespath.exceptions
import msgspec
from hive_common.kernel.errors import InvalidArgument
from jmespath.visitor import TreeInterpreter

Scope = Mapping[str, Any]
_Node = Any  # jmespath's syntax tree: dictionaries with `type`, `children` and `value`


class ExpressionError(InvalidArgument):
    """An expression that does not compile, names what it may not, or finds nothing. `fields`: `path`."""


class _Missing(Exception):
    """A field or an index that is not there."""


class _Strict(TreeInterpreter):
    def visit_field(self, node: _Node, value: Any) -> Any:
        name = node["value"]
        if not isinstance(value, dict):
            raise _Missing(f"`{name}` is asked of {_kind(value)}, which has no fields")
        if name not in value:
            known = ", ".join(sorted(value)[:10]) or "none"
            raise _Missing(f"there is no `{name}` (there: {known})")
        return value[name]

    def visit_index(self, node: _Node, value: Any) -> Any:
        index = node["value"]
        if not isinstance(value, list):
            raise _Missing(f"[{index}] is asked of {_kind(value)}, which is no list")
        if not -len(value) <= index < len(value):
            raise _Missing(f"there is no [{index}] in a list of {len(value)}")
        return value[index]

    def visit_projection(self, node: _Node, value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, list):
            raise _Missing(f"[*] needs a list and got {_kind(base)}")
        found = (self.visit(node["children"][1], element) for element in base)
        return [element for element in found if element is not None]

    def visit_filter_projection(self, node: _Node, value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, list):
            raise _Missing(f"[?…] needs a list and got {_kind(base)}")
        condition = node["children"][2]
        chosen = (element for element in base if not _is_false(self._or_null(condition, element)))
        found = (self.visit(node["children"][1], element) for element in chosen)
        return [element for element in found if element is not None]

    def visit_or_expression(self, node: _Node, value: Any) -> Any:
        left = self._or_null(node["children"][0], value)
        return self.visit(node["children"][1], value) if _is_false(left) else left

    def visit_function_expression(self, node: _Node, value: Any) -> Any:
        if node["value"] != "not_null":
            return super().visit_function_expression(node, value)
        found = (self._or_null(child, value) for child in node["children"])
        return next((element for element in found if element is not None), None)

    def _or_null(self, node: _Node, value: Any) -> Any:
        try:
            return self.visit(node, value)
        except _Missing:
            return None


class _Expression(NamedTuple):
    source: str
    ast: _Node

    def value(self, scope: Scope) -> Any:
        return _Strict().visit(self.ast, scope)


_Compiled = Any  # a plain value, an _Expression, a list of text and _Expressions, or a dict or list of those


class _Joined(NamedTuple):
    parts: tuple[str | _Expression, ...]


class Template:
    """A JSON value with expressions in it, compiled once.

    Attributes:
        path: where it stands in the job file.
        steps: ids of the tasks whose output it reads.
        forked: those of them of which it may read more than their `output`: what they forked.
        roots: which of `input`, `tasks`, `item`, `index` it reads.
        whole_output_of: the task id where the template is exactly `${tasks.<id>.output}`, else None; such a
            value can be passed on without being looked at.
        constant: it has no expression.
    """

    def __init__(self, compiled: _Compiled, path: str, expressions: tuple[_Expression, ...]) -> None:
        self.path = path
        self._compiled = compiled
        reads = [read for expression in expressions for read in _reads(expression.ast)]
        self.roots = frozenset(root for root, _, _ in reads)
        self.steps = frozenset(step for _, step, _ in reads if step is not None)
        self.forked = frozenset(step for _, step, field in reads if step is not None and field != "output")
        self.constant = not expressions
        self.whole_output_of = _whole_output(compiled)

    def resolve(self, scope: Scope) -> Any:
        """Return the value with every expression replaced.

        Raises:
            ExpressionError: a path is not there, or a function got what it cannot take.
        """
        return _resolve(self._compiled, scope, self.path)


def compile_template(value: Any, path: str, allowed: frozenset[str]) -> Template:
    """Compile every `${…}` in `value`.

    Args:
        value: a plain JSON value.
        path: where it stands, for messages, such as `tasks[0].input`.
        allowed: the roots that may be read here, a part of {input, tasks, item, index}.

    Raises:
        ExpressionError: an expression does not compile, is not closed, or reads another root.
    """
    found: list[_Expression] = []
    compiled = _compile(value, path, allowed, found)
    return Template(compiled, path, tuple(found))


def _compile(value: Any, path: str, allowed: frozenset[str], found: list[_Expression]) -> _Compiled:
    if isinstance(value, str):
        parts = [part if literal else _expression(part, path, allowed) for literal, part in _split(value, path)]
        expressions = [part for part in parts if isinstance(part, _Expression)]
        found.extend(expressions)
        if not expressions:
            return "".join(str(part) for part in parts)
        return expressions[0] if len(parts) == 1 else _Joined(tuple(parts))
    if isinstance(value, dict):
        return {key: _compile(item, f"{path}.{key}", allowed, found) for key, item in value.items()}
    if isinstance(value, list):
        return [_compile(item, f"{path}[{index}]", allowed, found) for index, item in enumerate(value)]
    return value


def _split(text: str, path: str) -> Iterator[tuple[bool, str]]:
    """Yield (is literal, part) of a string. Braces and quotes inside an expression are balanced."""
    start = 0
    while (at := text.find("${", start)) >= 0:
        if at > 0 and text[at - 1] == "$":
            yield True, text[start : at - 1] + "${"
            start = at + 2
            continue
        if at > start:
            yield True, text[start:at]
        end = _closing_brace(text, at + 2)
        if end < 0:
            raise ExpressionError(f"{path}: `${{` is not closed by `}}` in {text[at : at + 60]!r}", path=path)
        yield False, text[at + 2 : end]
        start = end + 1
    if start < len(text) or not text:
        yield True, text[start:]


def _closing_brace(text: str, start: int) -> int:
    depth, quote, at = 0, "", start
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "'\"`":
            quote = char
        elif char == "{":
            depth += 1
        elif char == "}":
            if depth == 0:
                return at
            depth -= 1
        at += 1
    return -1


def _expression(source: str, path: str, allowed: frozenset[str]) -> _Expression:
    try:
        expression = _Expression(source, jmespath.compile(source).parsed)
    except jmespath.exceptions.JMESPathError as error:
        reason = str(error).splitlines()[0].removesuffix(":")
        raise ExpressionError(f"{path}: `${{{source}}}` does not compile: {reason}", path=path) from error
    for root, step, _ in _reads(expression.ast):
        if root not in allowed:
            names = ", ".join(sorted(allowed))
            raise ExpressionError(
                f"{path}: `${{{source}}}` reads `{root}`; what can be read here: {names}", path=path
            )
        if root == "tasks" and step is None:
            raise ExpressionError(f"{path}: `${{{source}}}` must name a task: `${{tasks.<id>.output}}`", path=path)
    return expression


_FIRST_CHILD_ONLY = frozenset(
    {"subexpression", "index_expression", "projection", "filter_projection", "value_projection", "flatten", "pipe"}
)
"""Nodes whose first child sees the scope and whose other children see what that child gave."""


def _reads(node: _Node) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield (root, task id, field of that task) for everything an expression reads of its scope."""
    kind, children = node["type"], node.get("children", [])
    if kind == "field":
        yield node["value"], None, None
    elif kind == "current":
        yield "@", None, None
    elif kind == "subexpression" and children[0] == {"type": "field", "children": [], "value": "tasks"}:
        step = children[1]["value"] if children[1]["type"] == "field" else None
        yield "tasks", step, children[2].get("value") if len(children) > 2 else None
    elif kind in _FIRST_CHILD_ONLY:
        yield from _reads(children[0])
    elif kind not in {"expref", "slice"}:
        for child in children:
            yield from _reads(child)


def _whole_output(compiled: _Compiled) -> str | None:
    if not isinstance(compiled, _Expression) or compiled.ast["type"] != "subexpression":
        return None
    names = [child.get("value") for child in compiled.ast["children"] if child["type"] == "field"]
    if len(names) == len(compiled.ast["children"]) == 3 and names[0] == "tasks" and names[2] == "output":
        return str(names[1])
    return None


def _resolve(compiled: _Compiled, scope: Scope, path: str) -> Any:
    match compiled:
        case _Expression():
            return _value(compiled, scope, path)
        case _Joined():
            return "".join(_text(part, scope, path) for part in compiled.parts)
        case dict():
            return {key: _resolve(item, scope, f"{path}.{key}") for key, item in compiled.items()}
        case list():
            return [_resolve(item, scope, f"{path}[{index}]") for index, item in enumerate(compiled)]
    return compiled


def _value(expression: _Expression, scope: Scope, path: str) -> Any:
    try:
        return expression.value(scope)
    except _Missing as missing:
        raise ExpressionError(f"{path}: `${{{expression.source}}}`: {missing}", path=path) from missing
    except (jmespath.exceptions.JMESPathError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ExpressionError(f"{path}: `${{{expression.source}}}`: {reason}", path=path) from error


def _text(part: str | _Expression, scope: Scope, path: str) -> str:
    if isinstance(part, str):
        return part
    value = _value(part, scope, path)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _is_false(value: Any) -> bool:
    """JMESPath's falsehood, in which 0 is true."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
