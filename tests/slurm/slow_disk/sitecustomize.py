"""A slow disk: with this folder on PYTHONPATH, an open below SLOW_FOLDER takes SLOW_OPEN_S."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

_FOLDER = os.environ.get("SLOW_FOLDER", "/240P/")
_SECONDS = float(os.environ.get("SLOW_OPEN_S", "0"))


def _wait(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _FOLDER in str(arguments[0]):
        time.sleep(_SECONDS)


if _SECONDS:
    sys.addaudithook(_wait)
