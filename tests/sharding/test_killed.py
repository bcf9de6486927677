"""A killed build leaves no partial shard that counts as complete; a rerun gives the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.__main__ import main
from sharding.format.names import MANIFEST
from sharding.frames import open_frame_storage
from sharding.shard import read_sidecar
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from tests.sharding.conftest import Run, contents, write_config
from tests.sharding.films import Killed, Mortal, build_all, film, write_dump, write_tar

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]


def steps_of_a_build(dump: Path, files: dict[str, bytes], *, replace: bool = False) -> int:
    long = 10_000
    storage = Mortal(dict(files), long)
    build_all(storage, dump, replace=replace)
    return long - storage.life


def check_only_intact_shards_count(files: dict[str, bytes], complete: dict[str, bytes]) -> None:
    storage = Mortal(files, 0)
    for number in range(10):
        sidecar = read_sidecar(storage, "frames", number)
        if sidecar is not None:
            assert hashlib.sha256(files[sidecar.name]).hexdigest() == sidecar.sha256
    if MANIFEST in files:
        assert files == complete
    else:
        with pytest.raises(DataError, match="not sealed"):
            open_frame_storage(storage)


def test_a_build_killed_between_any_two_steps_is_completed_by_a_rerun_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    write_dump(tmp_path)
    complete = MemoryStorage()
    build_all(complete, tmp_path)
    steps = steps_of_a_build(tmp_path, {})
    assert steps > 3 * 3
    for life in range(steps):
        files: dict[str, bytes] = {}
        with pytest.raises(Killed):
            build_all(Mortal(files, life), tmp_path)
        check_only_intact_shards_count(files, complete.files)
        build_all(Mortal(files, steps), tmp_path)
        assert files == complete.files


@settings(max_examples=30, deadline=None)
@given(lives=st.lists(st.integers(0, 8), max_size=8))
def test_a_repeatedly_killed_build_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lives: list[int]
) -> None:
    dump = tmp_path_factory.mktemp("dump")
    write_dump(dump)
    complete = MemoryStorage()
    build_all(complete, dump)
    files: dict[str, bytes] = {}
    for life in lives:
        try:
            build_all(Mortal(files, life), dump)
        except Killed:
            check_only_intact_shards_count(files, complete.files)
    build_all(Mortal(files, 10_000), dump)
    assert files == complete.files


def test_a_replacement_killed_at_any_step_never_counts_a_mixture_as_complete(
    tmp_path: Path,
) -> None:
    write_dump(tmp_path)
    old = MemoryStorage()
    build_all(old, tmp_path)
    changed = {name: data[:-2] + b"\x00\xff\xd9" for name, data in film("tt0000001", 3).items()}
    write_tar(tmp_path, "tt0000001", changed, mtime=10**18 + 1)
    new = MemoryStorage()
    build_all(new, tmp_path)
    assert new.files != old.files
    steps = steps_of_a_build(tmp_path, old.files, replace=True)
    for life in range(steps):
        files = dict(old.files)
        with pytest.raises(Killed):
            build_all(Mortal(files, life), tmp_path, replace=True)
        check_only_intact_shards_count(files, old.files if life == 0 else new.files)
        build_all(Mortal(files, steps), tmp_path, replace=True)
        assert files == new.files


def test_a_build_process_killed_by_signal_9_is_completed_by_a_rerun(
    tmp_path: Path,
) -> None:
    dump, root = tmp_path / "dump", tmp_path / "root"
    for k in range(40):
        write_tar(dump, f"tt{k:07d}", film(f"tt{k:07d}", shots=40, size=4_000))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"version: 1\ndata: {{dump: {dump}, root: {root}}}\nsharding: {{shard_bytes: 500kB}}\n"
        "encoder: {name: x}\ntraining: {run_name: x}\n"
    )
    command = [sys.executable, "-m", "sharding", "build", "--config", str(config)]
    frames = root / "frames"
    kills = 0
    for n_sidecars in itertools.count(2, 6):
        process = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(frames.glob("*.json"))) < n_sidecars:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        assert not (frames / MANIFEST).exists()
        storage = DiskStorage(frames)
        for number in range(40):
            sidecar = read_sidecar(storage, "frames", number)
            if sidecar is not None:
                assert hashlib.sha256(storage.read(sidecar.name)).hexdigest() == sidecar.sha256
    assert kills >= 2
    complete = DiskStorage(tmp_path / "complete")
    build_all(complete, dump, shard_bytes=500_000)
    rebuilt = DiskStorage(frames)
    assert rebuilt.names() == complete.names()
    assert all(rebuilt.read(name) == complete.read(name) for name in complete.names())


def start(tmp_path: Path, *args: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "sharding",
        "build",
        "--config",
        f"{tmp_path}/root.yaml",
        *args,
    ]
    return subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def test_twenty_kills_at_random_and_a_rerun_give_the_same_bytes(
    run: Run, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    draw = random.Random(11)
    frames = tmp_path / "root" / "frames"
    for kill in range(20):
        process = start(tmp_path, "sharding.workers=3")
        # Kill after a random number of files, from the first imports to the seal.
        files, deadline = draw.randrange(len(expected)), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if frames.is_dir() and len(list(frames.iterdir())) >= files:
                break
        time.sleep(draw.random() * 0.05)
        workers = children(process.pid)
        victims = [process.pid] if kill % 2 or not workers else [draw.choice(workers)]
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _, error = process.communicate()
        if process.returncode == 1:
            assert b"was killed by signal 9" in error.splitlines()[-1]
        # Two shards remain for the next run.
        for shard in draw.sample(sorted(name for name in expected if name.endswith(".tar")), 2):
            (frames / shard).with_suffix(".json").unlink(missing_ok=True)
    assert run("build", "sharding.workers=3")[0] == 0
    left = {name: data for name, data in contents(frames).items() if not name.startswith(".tmp-")}
    assert left == expected


def test_a_build_killed_before_any_disk_change_is_completed_by_a_rerun_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    write_dump(tmp_path / "dump", 2)
    for root in ("complete", "root"):
        config = write_config(tmp_path, root=root)
        config.write_text(config.read_text().replace("6000", "3000"))
    assert main(["build", "--config", str(tmp_path / "complete.yaml")]) == 0
    files = len(list((tmp_path / "complete" / "frames").iterdir()))
    script = Path(__file__).with_name("kill_at_every_call.py")
    arguments = [script, tmp_path / "root.yaml", tmp_path / "complete" / "frames"]
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": "."}, cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Three changes per file: sync its data, rename it, sync the folder.
    assert files == 9
    assert int(done.stdout.split()[-1]) > 3 * files
