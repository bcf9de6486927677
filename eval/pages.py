"""Templates and terminal tables, the common parts of all forms."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
"""Columns of a terminal, by default."""


def render_template(
    template: str, filters: Mapping[str, Callable[..., object]], **values: Any
) -> str:
    """Return a template of ``templates/`` filled with values; HTML is escaped.

    Args:
        template: Name of the file, e.g. ``report.html.j2``.
        filters: Further filters by name.
        values: Values by their name in the template; a missing one is an error.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_read_template),
        undefined=StrictUndefined,
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)


def _read_template(name: str) -> str:
    return files("eval").joinpath("templates", name).read_text("utf-8")


def table_text(table: Table, width: int) -> str:
    """Return a table as text without trailing spaces; no line is longer than ``width``."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
