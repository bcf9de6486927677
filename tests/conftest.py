"""What several rooms' tests need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline measures the machine, not the code: other work runs beside the tests.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def real_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 878 real films as published: ``ProcessedTensor/``, pickles, split, ``meta/``."""
    unpack = SHARED / "movienet-clip-features" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("the real features do not lie beside this checkout")
    out = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, str(unpack), str(out), "--meta"], check=True)
    return out
