"""Commands that messages suggest: they repeat the user's own ``--config`` and overrides.

A hint is pasted, so it must name the program that is installed, the user's file and every override:
without them it would work on other data.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextvars import ContextVar

_arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=("--config", "FILE"))


def remember_arguments(config: str | None, overrides: Sequence[str]) -> None:
    """Keep the ``--config`` and the overrides of this process's command for later hints."""
    _arguments.set(("--config", config or "FILE", *overrides))


def hint(command: str, *overrides: str) -> str:
    """Return a suggested command in backticks, ready to be pasted into a shell.

    Args:
        command: Program, command and options, e.g. ``movienet-shard plan --replace``.
        overrides: Further overrides, e.g. ``data.limit=20``; each replaces the user's own value of
            its key.
    """
    keys = {override.partition("=")[0] for override in overrides}
    remaining = [word for word in _arguments.get() if word.partition("=")[0] not in keys]
    return f"`{command} {shlex.join([*remaining, *overrides])}`"
