"""YAML whose aliases and nesting cannot make a small file large.

Ten lines can name a billion values: each list contains the one before it ten times, by an alias.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 1024**2
"""Largest YAML file; a configuration has a few kilobytes."""

MAX_VALUES = 100_000
"""Values of a file, each alias counted with all values that it refers to."""

MAX_DEPTH = 20
"""Levels of nested lists and sections."""

_LIMIT = f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, aliases included"


class BoundedLoader(yaml.SafeLoader):
    """Safe loader that refuses a file beyond the limits before any value is made."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return a node; nesting is checked first, since the parser is slow on thousands of levels.

        Raises:
            ValueError: it is nested too deeply.
        """
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise ValueError(_LIMIT)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        """Return the root of the document.

        Raises:
            yaml.YAMLError: the document is no YAML.
            ValueError: it exceeds a limit.
        """
        root = super().get_single_node()
        _check_size(root)
        return root


def _check_size(root: yaml.Node | None) -> None:
    stack, values = [(root, 0)], 0
    while stack:
        node, depth = stack.pop()
        values += 1
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(_LIMIT)
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            # A section contains pairs of key and value, a list its items.
            parts = child if isinstance(child, tuple) else (child,)
            stack.extend((part, depth + 1) for part in parts)
