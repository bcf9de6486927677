"""News on stderr: one plain line each, with the rank in front when there are several."""

from __future__ import annotations

import logging
import os
import sys

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


def start_logging(*, quiet: bool = False, debug: bool = False) -> None:
    """Send the rooms' news to stderr; ``quiet`` leaves warnings, ``debug`` adds detail."""
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    rank = os.environ.get("RANK", "0")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain(f"[rank {rank}] " if several else ""))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.propagate = False
        # Every rank does the same: the news of one are enough, the warnings of all count.
        logger.setLevel(level if rank == "0" else max(level, logging.WARNING))


class _Plain(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "warning: " if record.levelno >= logging.WARNING else ""
        return f"{self._prefix}{level}{super().format(record)}"
