"""``python tests/rehearsal``: see ``rehearse.py``."""

import sys
import types
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    # iterative-stratification installs a package of this name, which would hide the folder.
    tests = types.ModuleType("tests")
    tests.__path__ = [str(CHECKOUT / "tests")]
    sys.modules["tests"] = tests
    from tests.rehearsal.rehearse import main

    sys.exit(main())
