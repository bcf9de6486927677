"""Log lines on stderr: the time when written to a file, the rank when there are several."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from configs.errors import ConfigError
from configs.one_line import one_line
from configs.redaction import redact_urls
from configs.runtime.world import World, world_from_environment

PACKAGES = (
    "configs",
    "sharding",
    "encoders",
    "training",
    "eval",
    "slurm",
    "movienet_stream",
    "__main__",
)
"""Loggers that ``start_logging`` sets up."""


def start_logging(*, quiet: bool = False, debug: bool = False) -> None:
    """Send the log records of all packages to stderr, one line each.

    In a log file a line begins with the local time (``2026-03-01 14:05:09``). On a terminal it does
    not.

    Args:
        quiet: Warnings only.
        debug: Debug records too.
    """
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    time = "" if sys.stderr.isatty() else "%(asctime)s "
    handler = _StderrHandler()
    handler.setFormatter(_LineFormatter(f"{time}{rank_prefix()}%(level)s%(message)s"))
    is_first = _world().rank == 0
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.propagate = False
        # All ranks log the same progress: rank 0's is enough. A warning may concern one rank only.
        logger.setLevel(level if is_first else max(level, logging.WARNING))


def rank_prefix() -> str:
    """Return what marks a line as this rank's, e.g. ``[rank 3] ``; empty in a world of one."""
    world = _world()
    return "" if world.size == 1 else f"[rank {world.rank}] "


def _world() -> World:
    try:
        return world_from_environment()
    except ConfigError:  # reported by the commands that need other ranks
        rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        is_known = rank.isdecimal() and size.isdecimal()
        return World(int(rank), int(size)) if is_known else World()


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Handler that looks up ``sys.stderr`` for each record.

    While a progress bar is drawn, rich replaces ``sys.stderr`` by a file that prints above the bar.
    A handler that held the original would write into the bar.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _LineFormatter(logging.Formatter):
    def __init__(self, fmt: str) -> None:
        super().__init__(fmt, datefmt="%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.level = "warning: " if record.levelno >= logging.WARNING else ""
        text = redact_urls(super().format(record))
        # A traceback has several lines. Any other record may quote names of files and movies.
        return text if record.exc_info or record.stack_info else one_line(text)
