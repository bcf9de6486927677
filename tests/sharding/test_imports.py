"""Sharding runs without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_no_module_of_sharding_imports_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, sharding\n"
        "for module in pkgutil.walk_packages(sharding.__path__, 'sharding.'):\n"
        "    importlib.import_module(module.name)\n"
        "print({'torch', 'webdataset', 'open_clip'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
