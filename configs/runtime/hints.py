"""Suggested commands in messages, with the user's own ``--config`` and overrides.

Users paste a hint into their shell. It must therefore contain the installed program, the config
file and every override: without them the command would run on other data.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from configs.redaction import redact_urls

# A list, not a context variable: hints are also printed by threads, which inherit no context.
_arguments = ["--config", "FILE"]


def remember_arguments(config: str | None, overrides: Sequence[str]) -> None:
    """Store the ``--config`` and the overrides of this process's command for later hints."""
    _arguments[:] = ["--config", config or "FILE", *overrides]


def remembered_arguments() -> tuple[str, ...]:
    """Return ``--config``, its file and the overrides, e.g. to pass them to a worker process."""
    return tuple(_arguments)


def hint(command: str, *overrides: str) -> str:
    """Return a suggested command in backticks, quoted for a shell.

    Passwords and signatures of URLs are replaced by ``…``: hints are printed to logs.

    Args:
        command: Program, command and options, e.g. ``movienet-shard plan --replace``.
        overrides: Further overrides, e.g. ``data.limit=20``. Each one replaces the user's own
            override of the same key.
    """
    keys = {override.partition("=")[0] for override in overrides}
    remaining = [word for word in _arguments if word.partition("=")[0] not in keys]
    return redact_urls(f"`{command} {shlex.join([*remaining, *overrides])}`")
