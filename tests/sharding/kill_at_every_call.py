"""Builds a set on disk, killed before every system call that changes it; what a test starts.

``python kill_at_every_call.py CONFIG WHOLE`` builds at CONFIG's root again and again. The n-th time
a signal 9 ends the process before its n-th change; a rerun must then end in the bytes that lie in
WHOLE. Prints how many kills that were. Processes are forked from this one, which has no threads.
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
    """Build in a process that lives for so many changes; return how it ended."""
    pid = os.fork()
    if pid == 0:
        if life is not None:
            left = [life]
            for name in CHANGES:
                setattr(os, name, mortal(getattr(os, name), left))
        os._exit(main(["build", "--quiet", "--config", str(config)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    """What has a final name."""
    there = folder.iterdir() if folder.is_dir() else ()
    return {path.name: path.read_bytes() for path in there if not path.name.startswith(".tmp-")}


def check_what_is_left(frames: Path, whole: dict[str, bytes]) -> None:
    """Whatever carries a sidecar is whole, and a manifest stands on a whole set only."""
    left = files(frames)
    for name in left:
        if name.startswith("frames-") and name.endswith(".json"):
            sidecar = json.loads(left[name])
            assert hashlib.sha256(left[sidecar["name"]]).hexdigest() == sidecar["sha256"], name
    assert "manifest.json" not in left or left == whole


def kills(config: Path, whole: dict[str, bytes]) -> int:
    root = Path(load_config(config).root)
    main(["build", "--quiet", "--config", str(config)])  # imports what the others then have
    life = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        code = build(config, life)
        if code == 0:
            return life
        assert code == -signal.SIGKILL, code
        check_what_is_left(root / "frames", whole)
        assert build(config, None) == 0
        assert files(root / "frames") == whole
        life += 1


if __name__ == "__main__":
    print(kills(Path(sys.argv[1]), files(Path(sys.argv[2]))))
