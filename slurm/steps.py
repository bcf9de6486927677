"""The steps of the chain, in order; a module without imports, for command lines that start fast."""

from __future__ import annotations

from typing import Literal

STEPS = ("plan", "shard", "encode", "train", "eval")
"""Values of ``--from`` and ``--only``. The gates belong to ``shard`` and ``encode``."""

Step = Literal["plan", "shard", "encode", "train", "eval"]
