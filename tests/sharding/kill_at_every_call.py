"""Script of a test: builds a set on disk, killed before every system call that changes it.

``python kill_at_every_call.py CONFIG EXPECTED`` builds repeatedly at CONFIG's root. The n-th build
is killed by signal 9 before its n-th change; a rerun must then produce the files in the folder
EXPECTED. Prints the number of kills. Processes are forked from this one, which has no threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.load import load_config
from sharding.__main__ import main

CHANGES = ("mkdir", "fsync", "rename", "unlink")


def mortal(change: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return change(*args, **options)

    return call


def build(config: Path, life: int | None) -> int:
    """Build in a process that is killed after ``life`` changes; return its exit code."""
    pid = os.fork()
    if pid == 0:
        if life is not None:
            left = [life]
            for name in CHANGES:
                setattr(os, name, mortal(getattr(os, name), left))
        os._exit(main(["build", "--quiet", "--config", str(config)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder without temporary ones."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name: path.read_bytes() for path in paths if not path.name.startswith(".tmp-")}


def check_remains(frames: Path, expected: dict[str, bytes]) -> None:
    """Check that every shard with a sidecar is intact, and that only a complete set is sealed."""
    left = files(frames)
    for name in left:
        if name.startswith("frames-") and name.endswith(".json"):
            sidecar = json.loads(left[name])
            assert hashlib.sha256(left[sidecar["name"]]).hexdigest() == sidecar["sha256"], name
    assert "manifest.json" not in left or left == expected


def kills(config: Path, expected: dict[str, bytes]) -> int:
    root = Path(load_config(config).root)
    main(
        ["build", "--quiet", "--config", str(config)]
    )  # imports the modules that the forked processes need
    life = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        code = build(config, life)
        if code == 0:
            return life
        assert code == -signal.SIGKILL, code
        check_remains(root / "frames", expected)
        assert build(config, None) == 0
        assert files(root / "frames") == expected
        life += 1


if __name__ == "__main__":
    print(kills(Path(sys.argv[1]), files(Path(sys.argv[2]))))
