"""The same bytes however a set is built: shares, workers, orders, kills, repairs, parts."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.__main__ import main
from sharding.build import build_shards
from sharding.format import tar
from sharding.format.manifest import Manifest
from sharding.frames import open_frame_storage, read_plan
from sharding.pack import build_shard
from sharding.storage.local import DiskStorage
from tests.disks import small_disk
from tests.sharding.films import film, jpeg, write_dump, write_folder, write_tar

CHECKOUT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


def write_config(tmp_path: Path, *, root: str = "root", dump: str = "dump") -> Path:
    config = tmp_path / f"{root}.yaml"
    config.write_text(
        f"version: 1\ndata:\n  dump: {tmp_path}/{dump}\n  root: {tmp_path}/{root}\n"
        "sharding: {shard_bytes: 6000}\nencoder: {name: x}\ntraining: {run: x}\n"
        "tracking: {wandb: 'off'}\n"
    )
    return config


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    write_dump(tmp_path / "dump", 12)
    write_config(tmp_path)

    def call(*args: str, config: str = "root") -> tuple[int, str, str]:
        code = main([*args, "--config", str(tmp_path / f"{config}.yaml")])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set, temporary ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def wanted(run: Run, tmp_path: Path) -> dict[str, bytes]:
    """The set as one process builds it at once."""
    write_config(tmp_path, root="alone")
    assert run("build", config="alone")[0] == 0
    return contents(tmp_path / "alone" / "frames")


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize("workers", [1, 4])
def test_shares_and_workers_give_the_same_bytes(
    run: Run, tmp_path: Path, wanted: dict[str, bytes], shares: int, workers: int
) -> None:
    for share in reversed(range(shares)):
        code, _, err = run("build", "--share", f"{share}/{shares}", f"sharding.workers={workers}")
        assert (code, "error" in err) == (0, False)
    assert contents(tmp_path / "root" / "frames") == wanted


def test_another_order_of_listing_gives_the_same_bytes(
    run: Run, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    # A folder lists in an order of its own, which depends on how it was filled.
    write_config(tmp_path, root="other", dump="copy")
    (tmp_path / "copy").mkdir()
    for source in sorted((tmp_path / "dump").iterdir(), reverse=True):
        if source.is_file():
            subprocess.run(["cp", "-p", source, tmp_path / "copy"], check=True)
            continue
        (tmp_path / "copy" / source.name).mkdir()
        for image in sorted(source.iterdir(), reverse=True):
            subprocess.run(["cp", "-p", image, tmp_path / "copy" / source.name], check=True)
    assert run("build", config="other")[0] == 0
    assert contents(tmp_path / "other" / "frames") == wanted


@pytest.mark.parametrize("bad", [(), (0,), (1, 2), (5,), (0, 1, 2, 3, 4, 5)])
def test_a_tar_read_in_long_rows_gives_the_bytes_of_a_folder(
    tmp_path: Path, bad: tuple[int, ...]
) -> None:
    images = film("tt1", shots=2, size=5_000)
    for position, name in enumerate(images):
        if position in bad:
            images[name] = images[name][:-2]
    for form, write in (("tars", write_tar), ("folders", write_folder)):
        write(tmp_path / form, "tt1", images)
        write(tmp_path / form, "tt2", film("tt2"))
        write_config(tmp_path, root=f"set-{form}", dump=form)
        config = str(tmp_path / f"set-{form}.yaml")
        assert main(["build", "--config", config, "sharding.max_bad_fraction=1"]) == 0
    tars, folders = (contents(tmp_path / f"set-{form}" / "frames") for form in ("tars", "folders"))
    for name in ("frames-00000.tar", "frames-00000.index.npz", "manifest.json", "rejected.jsonl"):
        assert tars[name] == folders[name]
    assert tars["rejected.jsonl"].count(b"\n") == len(bad)


# --- killed ---------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_twenty_kills_at_random_and_a_rerun_give_the_same_bytes(
    run: Run, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    draw = random.Random(11)
    frames = tmp_path / "root" / "frames"
    for kill in range(20):
        process = start(tmp_path, "sharding.workers=3")
        # From the first imports to the seal: files appear one by one.
        files, patience = draw.randrange(len(wanted)), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < patience:
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
            assert b"ended by signal 9" in error.splitlines()[-1]
        # So that the next run has something to do.
        for shard in draw.sample(sorted(name for name in wanted if name.endswith(".tar")), 2):
            (frames / shard).with_suffix(".json").unlink(missing_ok=True)
    assert run("build", "sharding.workers=3")[0] == 0
    left = {name: data for name, data in contents(frames).items() if not name.startswith(".tmp-")}
    assert left == wanted


def test_killed_before_any_change_of_the_disk_a_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    write_dump(tmp_path / "dump", 2)
    for root in ("whole", "root"):
        config = write_config(tmp_path, root=root)
        config.write_text(config.read_text().replace("6000", "3000"))
    assert main(["build", "--config", str(tmp_path / "whole.yaml")]) == 0
    files = len(list((tmp_path / "whole" / "frames").iterdir()))
    script = Path(__file__).with_name("kill_at_every_call.py")
    places = [script, tmp_path / "root.yaml", tmp_path / "whole" / "frames"]
    command = [sys.executable, *map(str, places)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": "."}, cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Of each file: made durable, put in its place, made durable there.
    assert files == 9
    assert int(done.stdout.split()[-1]) > 3 * files


# --- full disks -----------------------------------------------------------------------------------


def test_a_set_that_does_not_fit_is_refused_before_its_first_shard(
    run: Run, tmp_path: Path
) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "64k"):
        code, _, err = run("build")
        assert code == 1
        assert " free, want " in err.splitlines()[-1]
        assert sorted(path.name for path in frames.iterdir()) == ["plan.json"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(frames)], check=True)
        assert run("build")[1].startswith("sealed: movies 12")


def test_a_disk_without_files_left_is_refused(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "4m,nr_inodes=6"):
        code, _, err = run("build")
        assert (code, " files free, want " in err.splitlines()[-1]) == (1, True)


def test_a_disk_that_fills_leaves_nothing_half_written(
    run: Run, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "4m"):
        assert run("plan")[0] == 0
        storage = DiskStorage(frames)
        plan = read_plan(storage)
        assert plan is not None
        # Somebody else fills the disk after the check.
        subprocess.run(["mount", "-o", "remount,size=48k", str(frames)], check=True)
        done: list[int] = []

        def build_one_by_one() -> None:
            for number in range(len(plan.shards)):
                build_shard(storage, tmp_path / "dump", plan, number, max_bad_fraction=0)
                done.append(number)

        with pytest.raises(OSError, match="No space left") as told:
            build_one_by_one()
        assert told.value.filename.startswith(str(frames))
        for name, data in contents(frames).items():
            assert data == wanted[name]
        assert 0 < len(done) < len(plan.shards)
        subprocess.run(["mount", "-o", "remount,size=4m", str(frames)], check=True)
        assert run("build")[0] == 0
        assert contents(frames) == wanted


@contextmanager
def small_quota(tmp_path: Path, limit: str) -> Iterator[Path]:
    """A folder on btrfs, which keeps quotas without options of the kernel."""
    image, disk = tmp_path / "disk.img", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(128 * 2**20)
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("no btrfs-progs")
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        subprocess.run(["btrfs", "-q", "quota", "enable", disk], check=True)
        subprocess.run(["btrfs", "-q", "subvolume", "create", disk / "mine"], check=True)
        subprocess.run(["btrfs", "-q", "qgroup", "limit", limit, disk / "mine"], check=True)
        yield disk / "mine"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_quota_that_is_used_up_leaves_nothing_half_written(tmp_path: Path, run: Run) -> None:
    for k in range(12):
        write_tar(tmp_path / "large", f"tt{k:07d}", film(f"tt{k:07d}", size=50_000))
    large = [f"data.dump={tmp_path}/large", "sharding.shard_bytes=300kB"]
    assert run("build", *large)[0] == 0
    wanted = contents(tmp_path / "root" / "frames")
    with small_quota(tmp_path, "2M") as mine:
        code, _, err = run("build", *large, f"data.root={mine}")
        line = err.splitlines()[-1]
        assert code == 1
        assert re.fullmatch(rf"error: {mine}/frames/\S+: Disk quota exceeded", line), line
        left = contents(mine / "frames")
        assert 3 < len(left) < len(wanted)
        assert all(data == wanted[name] for name, data in left.items())
        subprocess.run(["btrfs", "-q", "qgroup", "limit", "none", mine], check=True)
        assert run("build", *large, f"data.root={mine}")[0] == 0
        assert contents(mine / "frames") == wanted


def test_a_folder_that_may_not_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "4m"):
        assert run("plan")[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(frames)], check=True)
        code, _, err = run("build")
        assert code == 1
        assert err.splitlines()[-1].startswith(f"error: {frames}: may not be written")


def test_the_plan_says_what_is_needed_and_free(run: Run) -> None:
    line = run("plan")[1].splitlines()[1]
    assert line.startswith("space needed ")
    assert " in 27 files   free " in line


# --- dirt -----------------------------------------------------------------------------------------


def test_decoding_finds_what_markers_cannot(run: Run) -> None:
    # These bytes begin and end like a JPEG, and are none.
    assert run("build")[0] == 0
    code, _, err = run("build", "sharding.validate=decode")
    assert (code, "planned for sharding.validate markers, got decode" in err) == (1, True)
    assert run("plan", "--replace", "sharding.validate=decode")[0] == 0
    code, _, err = run("build", "--replace", "sharding.validate=decode", "sharding.workers=2")
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith("error: movie tt000000")
    assert "want at most 1.0% (sharding.max_bad_fraction)" in line


def test_too_many_bad_images_of_the_dump_are_not_sealed(run: Run, tmp_path: Path) -> None:
    images = film("tt9", shots=4)
    images["shot_0001_img_1.jpg"] = b""
    write_tar(tmp_path / "dump", "tt9", images)
    code, _, err = run("build")
    assert code == 1
    assert "movie tt9: got 1 bad of 12 images, want at most 1.0%" in err.splitlines()[-1]
    assert run("build", "sharding.max_bad_fraction=0.1")[0] == 0
    code, _, err = run("seal", "sharding.max_bad_fraction=0.001")
    assert code == 1
    line = err.splitlines()[-1]
    assert "images in all, want at most 0.1% (sharding.max_bad_fraction)" in line
    assert "most in movie tt9 (1)" in line


# --- parts ----------------------------------------------------------------------------------------


def test_new_movies_become_a_part_behind_the_old_shards(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    assert run("build")[0] == 0
    before, stats = contents(frames), {p.name: p.stat() for p in frames.glob("frames-*")}
    parent = open_frame_storage(DiskStorage(frames)).digest
    assert run("plan", "--extend")[1].splitlines()[-1].startswith("unchanged: ")
    assert contents(frames) == before

    write_tar(tmp_path / "dump", "tt0000000x", film("new"))  # among the old ones by its name
    code, _, err = run("plan")
    assert (code, "plan --extend to add" in err.splitlines()[-1]) == (1, True)
    assert run("plan", "--extend")[1].splitlines()[-1].startswith("wrote ")
    assert run("build")[1].startswith("sealed: movies 13 ")
    after = open_frame_storage(DiskStorage(frames))
    assert after.manifest.parent == parent
    old = Manifest.from_bytes(before["manifest.json"], "manifest")
    assert after.manifest.shards[: len(old.shards)] == old.shards
    assert after.shard_movies(len(old.shards)) == ("tt0000000x",)
    for name, stat in stats.items():
        assert (frames / name).stat() == stat
    assert run("verify")[0] == 0
    assert run("plan")[1].splitlines()[-1].startswith("unchanged: ")


def test_a_damaged_movie_is_left_out_and_comes_as_a_part_once_it_is_whole(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "dump" / "tt000000x.tar"
    write_tar(tmp_path / "dump", "tt000000x", film("new"))
    whole = path.read_bytes()
    path.write_bytes(whole[:1400])
    code, _, err = run("build")
    assert (code, "go on without it: data.exclude=[tt000000x]" in err) == (1, True)
    assert run("build", "data.exclude=[tt000000x]")[1].startswith("sealed: movies 12 ")
    path.write_bytes(whole)
    assert run("plan", "--extend")[1].splitlines()[-1].startswith("wrote ")
    assert run("build")[1].startswith("sealed: movies 13 ")


def test_a_part_is_refused_where_an_old_movie_changed_or_nothing_is_sealed(
    run: Run, tmp_path: Path
) -> None:
    code, _, err = run("plan", "--extend")
    assert (code, "no sealed frame set to extend" in err) == (1, True)
    assert run("build")[0] == 0
    write_tar(tmp_path / "dump", "tt0000001", film("other"), mtime=10**18 + 1)
    code, _, err = run("plan", "--extend")
    assert (code, "1 movies changed since they were planned (tt0000001, …)" in err) == (1, True)


# --- verify and repair ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "3"])
def test_repair_marks_damaged_shards_as_missing_and_build_makes_the_same_bytes(
    run: Run, tmp_path: Path, wanted: dict[str, bytes], workers: str
) -> None:
    frames = tmp_path / "root" / "frames"
    assert run("build")[0] == 0
    damaged = bytearray((frames / "frames-00001.tar").read_bytes())
    damaged[700] ^= 1
    (frames / "frames-00001.tar").write_bytes(damaged)
    (frames / "frames-00003.json").unlink()
    (frames / "frames-00004.index.npz").write_bytes(b"x")
    code, out, _ = run("verify", f"sharding.workers={workers}")
    assert (code, len(out.splitlines())) == (1, 4)
    code, out, _ = run("verify", "--repair", f"sharding.workers={workers}")
    marked = "marked 3 shards as missing (1,3-4); next: `movienet-shard build`"
    assert (code, out.splitlines()[-1]) == (1, marked)
    assert run("status")[0] == 1
    assert run("build", f"sharding.workers={workers}")[0] == 0
    assert contents(frames) == wanted
    assert run("status")[0] == run("verify")[0] == 0


def test_a_changed_source_is_not_repaired_into_a_set(run: Run, tmp_path: Path) -> None:
    assert run("build")[0] == 0
    write_tar(tmp_path / "dump", "tt0000001", film("other"), mtime=10**18 + 1)
    storage = DiskStorage(tmp_path / "root" / "frames")
    plan = read_plan(storage)
    assert plan is not None
    storage.remove("frames-00000.json")
    with pytest.raises(DataError, match="changed since it was planned"):
        build_shards(storage, tmp_path / "dump", plan, range(len(plan.shards)), max_bad_fraction=0)


# --- memory and tracking --------------------------------------------------------------------------

MANY = 20_000
BUILD_AND_TELL = """
import re, sys
from pathlib import Path
from sharding.__main__ import main
code = main(["build", "--config", sys.argv[1]])
loaded = {"torch", "webdataset", "open_clip"} & set(sys.modules)
# Not getrusage: its peak is at least that of the process that started this one.
peak = re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())
print(code, int(peak[1]) // 1024, sorted(loaded))
"""


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_shard_of_20_000_images_is_built_within_150_mb_and_without_torch(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    write(tmp_path / "dump", "tt1", film("tt1", shots=MANY // 10, images=10, size=400))
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("6000", "64MiB"))
    command = [sys.executable, "-c", BUILD_AND_TELL, str(config)]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    sealed, told = done.stdout.splitlines()
    assert sealed.startswith("sealed: movies 1   images 20,000 ")
    code, peak_mb, loaded = told.split(maxsplit=2)
    assert (code, loaded) == ("0", "[]")
    assert int(peak_mb) < 150


@pytest.mark.slow
def test_a_million_tiny_images_are_sharded_within_the_same_memory(tmp_path: Path) -> None:
    image = jpeg("tiny", 64)
    (tmp_path / "dump").mkdir()
    for movie in range(100):
        with (tmp_path / "dump" / f"tt{movie:07d}.tar").open("wb") as file:
            for shot in range(10_000):
                file.write(tar.header(f"shot_{shot:04d}_img_0.jpg", len(image)) + image)
                file.write(bytes(tar.padding(len(image))))
            file.write(tar.end(file.tell()))
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("6000", "16MiB"))
    command = [sys.executable, "-c", BUILD_AND_TELL, str(config)]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    sealed, told = done.stdout.splitlines()
    assert sealed.startswith("sealed: movies 100   images 1,000,000   shards 4 ")
    assert int(told.split()[1]) < 150


def test_each_task_is_a_run_of_its_own_on_the_tracker(run: Run, tmp_path: Path) -> None:
    for share in ("0/2", "1/2"):
        assert run("build", "--share", share, "tracking.wandb=offline")[0] == 0
    runs = list((tmp_path / "root" / "runs" / "shard" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    for path in runs:
        data = path.read_bytes()
        assert b"shard" in data
        assert b"movies_left" in data
