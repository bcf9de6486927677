"""YAML whose aliases and nesting cannot make a small file large.

Ten lines can name a billion values: each list contains the one before it ten times, by an alias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

MAX_BYTES = 16 * 1024**2
"""Largest YAML file; one with all ids of a large dump in ``data.exclude`` has a few megabytes."""

MAX_VALUES = 1_000_000
"""Values of a file, each alias counted with all values that it refers to."""

MAX_DEPTH = 20
"""Levels of nested lists and sections."""

_LIMIT = f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, aliases included"


class BoundedLoader(yaml.SafeLoader):
    """Safe loader that refuses a file beyond the limits before any value is made."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """By id of a complete node: its values and its levels, aliases included."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return a node; the limits are checked before its children are parsed, and after.

        Raises:
            yaml.YAMLError: the document is no YAML.
            ValueError: it exceeds a limit, or the node contains itself.
        """
        is_alias, before = self.check_event(yaml.AliasEvent), self._values
        self._depth += 1
        self._values += 1
        self._check_limits(1)
        node = super().compose_node(parent, index)
        if not is_alias:
            levels = 1 + max((self._sizes[id(part)][1] for part in _parts(node)), default=0)
            self._sizes[id(node)] = self._values - before, levels
        elif id(node) not in self._sizes:
            raise ValueError(_LIMIT)  # it is an alias of a list that contains it
        values, levels = self._sizes[id(node)]
        self._values = before + values
        self._check_limits(levels)
        self._depth -= 1
        return node

    def _check_limits(self, levels: int) -> None:
        if self._values > MAX_VALUES or self._depth + levels > MAX_DEPTH + 2:
            raise ValueError(_LIMIT)


def _parts(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield the items of a list, or the keys and values of a section."""
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from child if isinstance(child, tuple) else (child,)
