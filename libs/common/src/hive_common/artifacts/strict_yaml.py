"""YAML without what JSON cannot say: the reader behind `documents.load_yaml`, loaded when there is one to read."""

from collections.abc import Hashable
from typing import Any

import yaml

from hive_common.artifacts.documents import refuse

DEPTH_MAX = 64
"""Deepest nesting of a document. People write five levels; parsers recurse."""

_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, duplicate keys, dates, or depth beyond `DEPTH_MAX`."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEPTH_MAX} levels", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a string (put it in quotes)", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# Dates stay the text that was written: JSON has none.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, file: str) -> Any:
    """Return what the YAML document `text` says.

    Raises:
        InvalidArgument: not YAML, or one of the things that are not taken, with line and column.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - the loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
        refuse(file, where, error.problem or error.context or "is not YAML")
    except (yaml.YAMLError, ValueError) as error:
        refuse(file, "", f"is not YAML: {error}")
