"""The pages of sphinx-click without what all commands have in common, and with their examples.

``docs/reference/commands.md`` describes the common options and ``KEY=VALUE`` once.
"""

from __future__ import annotations

from itertools import groupby

import click
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

_COMMON = ("--config", "--print-config", "--quiet", "--debug")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect to the events of sphinx-click, each with the lines that it will parse."""
    app.setup_extension("sphinx_click")
    app.connect("sphinx-click-process-options", _drop_common_options)
    app.connect("sphinx-click-process-arguments", _drop_arguments)
    app.connect("sphinx-click-process-epilog", _print_example_as_code)
    return {"parallel_read_safe": True}


def _drop_common_options(app: Sphinx, context: click.Context, lines: list[str]) -> None:  # noqa: ARG001  # Sphinx's form
    if all(parameter.name != "overrides" for parameter in context.command.params):
        return
    blocks = groupby(lines, key=_OptionOfLine())
    lines[:] = [line for option, block in blocks if option not in _COMMON for line in block]


class _OptionOfLine:
    """The option that a line describes: that of the last directive ``option``."""

    option = ""

    def __call__(self, line: str) -> str:
        if line.startswith(".. option:: "):
            self.option = line.split()[2].rstrip(",")
        return self.option


def _drop_arguments(app: Sphinx, context: click.Context, lines: list[str]) -> None:  # noqa: ARG001
    # The usage contains them. Click has no help for arguments, so the description explains them.
    lines.clear()


def _print_example_as_code(app: Sphinx, context: click.Context, lines: list[str]) -> None:  # noqa: ARG001
    text = [line.removeprefix("| ") for line in lines if line.strip()]
    if text:
        code = [f"    {line.removeprefix('Example: ')}" for line in text]
        lines[:] = [".. rubric:: Example", "", ".. code-block:: bash", "", *code, ""]
