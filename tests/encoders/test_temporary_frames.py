"""Straight from the dump, one frame shard at a time: the same features, and hardly more space."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError, Interrupted
from configs.runtime.attempt import last_attempt
from configs.runtime.signals import StopRequest
from configs.schema import Config
from encoders.progress_report import task_dir
from encoders.task import run_task
from encoders.temporary_frames import PREFIX, scratch_folder
from sharding.__main__ import main as build
from sharding.build import extend_published, plan_dump, publish_plan
from sharding.storage.open import open_storage
from tests.encoders.conftest import Configure, build_frames, jpeg
from tests.sharding.films import write_tar
from tests.sharding.servers import faulty_server, log, nginx, request, rule

REPOSITORY = Path(__file__).parents[2]
FILMS = 32


def write_large_dump(folder: Path) -> Path:
    """Films of equal size, one of which is a known part of the dump."""
    ids = [f"tt{number:07d}" for number in range(FILMS)]
    images = [jpeg(480, 270, seed) for seed in range(12)]
    for number, film in enumerate(ids):
        (folder / "dump" / film).mkdir(parents=True)
        for image in range(len(images)):
            path = folder / "dump" / film / f"shot_{image // 3:04d}_img_{image % 3}.jpg"
            path.write_bytes(images[(number + image) % len(images)])
    (folder / "meta.json").write_text(json.dumps({film: ["Drama"] for film in ids}))
    (folder / "split.json").write_text(json.dumps({"train": ids, "val": [], "test": []}))
    return folder / "dump"


def sizes_of(*folders: Path) -> dict[Path, int]:
    found: dict[Path, int] = {}
    for folder in folders:
        for place, _, names in os.walk(folder):  # goes on where a folder has just vanished
            for path in (Path(place, name) for name in names):
                with suppress(FileNotFoundError):
                    found[path] = path.stat().st_size
    return found


def size_of(*folders: Path) -> int:
    return sum(sizes_of(*folders).values())


@contextmanager
def watching(dump: Path, *others: Path) -> Iterator[list[int]]:
    """Collect the bytes of all folders, as often as this machine can; the dump stays as it is."""
    n_bytes, over = size_of(dump), threading.Event()
    sizes = [n_bytes]

    def watch() -> None:
        while not over.wait(0.001):
            before, after = sizes_of(*others), sizes_of(*others)
            if before.keys() == after.keys():  # else some were never there at one time
                sizes.append(n_bytes + sum(before.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        over.set()
        watcher.join()


@pytest.fixture
def scratch(configure: Configure, tmp_path: Path) -> Config:
    """The config of ``config``, without frames: they are built when their turn comes."""
    return in_scratch(configure, tmp_path)


def in_scratch(configure: Configure, folder: Path, *more: str) -> Config:
    place = (f"encoder.scratch_dir={folder / 'scratch'}", f"data.root={folder / 'lean'}")
    return configure("encoder.frame_storage=temporary", *place, *more)


def published(config: Config) -> dict[str, bytes]:
    """What a reader of the feature set sees."""
    names = ("features-*.tar", "index.npz", "labels.npz", "manifest.json")
    folder = Path(config.features_dir)
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def test_the_features_are_those_of_frames_that_are_kept(config: Config, scratch: Config) -> None:
    kept, dropped = run_task(config), run_task(scratch)
    assert dropped.manifest == kept.manifest
    assert published(scratch) == published(config)
    folder = Path(scratch.features_dir) / "frames"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"frames-0000{k}.json" for k in range(5)), "manifest.json", "rejected.jsonl"]
    frames = Path(config.frames_dir)
    assert (folder / "manifest.json").read_bytes() == (frames / "manifest.json").read_bytes()
    assert not list((folder.parents[2] / "scratch").glob("*"))
    again = run_task(scratch)
    assert (again.encoded.shards, again.skipped) == (0, 5)


def test_a_dump_goes_through_in_a_tenth_more_than_its_own_space(
    configure: Configure, tmp_path: Path
) -> None:
    dump = write_large_dump(tmp_path)
    n_bytes = size_of(dump)
    config = in_scratch(
        configure,
        tmp_path,
        f"sharding.shard_bytes={n_bytes // FILMS}",
        f"encoder.scratch_bytes={n_bytes * 7 // 100}",
    )
    places = (dump, tmp_path / "lean", tmp_path / "scratch")
    with watching(*places) as sizes:
        run_task(config)
    assert max(sizes) > 1.02 * n_bytes, "it saw a shard in scratch"
    assert max(sizes) <= 1.1 * n_bytes
    assert size_of(*places) < 1.04 * n_bytes


def test_a_shard_larger_than_scratch_may_be_is_refused_in_one_line(
    configure: Configure, tmp_path: Path, dump: Path
) -> None:
    assert dump.is_dir()
    config = in_scratch(configure, tmp_path, "encoder.scratch_bytes=20KiB")
    with pytest.raises(ConfigError, match=r"encoder\.scratch_bytes: got 20.*, want .* for frame"):
        run_task(config)


def test_an_older_plan_of_the_frames_is_followed_and_a_changed_dump_refused(
    scratch: Config, dump: Path
) -> None:
    publish_plan(open_storage(scratch.frames_dir), plan_dump(scratch))
    (dump / "tt0000002" / "shot_0000_img_0.jpg").write_bytes(jpeg(64, 48, 99))
    with pytest.raises(DataError, match="tt0000002: changed since it was planned"):
        run_task(scratch)


def test_new_movies_become_a_part_of_a_set_whose_frames_were_dropped(
    scratch: Config, configure: Configure, dump: Path
) -> None:
    kept = configure()
    for config in (kept, scratch):
        if config is kept:
            build_frames(kept)
        run_task(config)
    (dump / "tt0000000").mkdir()
    (dump / "tt0000000" / "shot_0000_img_0.jpg").write_bytes(jpeg(64, 48, 98))
    extend_published(open_storage(kept.frames_dir), kept)
    build_frames(kept)
    extend_published(open_storage(scratch.frames_dir), scratch)
    with pytest.raises(DataError, match=r"no sealed frame set to extend; .* `movienet-encode"):
        extend_published(open_storage(scratch.frames_dir), scratch)
    first, second = run_task(kept), run_task(scratch)
    assert (second.encoded.shards, second.skipped) == (1, 5)
    assert second.manifest == first.manifest
    assert published(scratch) == published(kept)


def test_keeping_and_scratch_are_not_mixed_in_a_set(
    config: Config, configure: Configure, tmp_path: Path
) -> None:
    run_task(config)
    other = configure(
        "encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}"
    )
    with pytest.raises(ConfigError, match=r"planned otherwise: frames was .*; scratch was null"):
        run_task(other)


def test_a_stop_while_a_frame_shard_is_built_leaves_nothing(scratch: Config, dump: Path) -> None:
    assert dump.is_dir()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            run_task(scratch, stop=stop)
    assert not list(Path(scratch.features_dir).glob("features-*"))


def test_what_a_killed_process_left_in_scratch_is_removed_and_what_lives_stays(
    tmp_path: Path,
) -> None:
    program = (
        "import pathlib, sys\n"
        "from encoders.scratch import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'frames-00000.tar').write_bytes(b'half')\n"
        "    print(folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().decode().strip())
        with scratch_folder(tmp_path) as mine:
            assert sorted(tmp_path.glob(f"{PREFIX}*")) == sorted([mine, theirs])
        other.kill()
    assert theirs.is_dir()
    with scratch_folder(tmp_path) as mine:
        assert list(tmp_path.glob(f"{PREFIX}*")) == [mine]
    assert not list(tmp_path.glob(f"{PREFIX}*"))


@pytest.mark.slow
def test_killed_again_and_again_the_dump_still_goes_through_in_its_space(
    configure: Configure, tmp_path: Path
) -> None:
    dump = write_large_dump(tmp_path)
    n_bytes = size_of(dump)
    options = (
        f"sharding.shard_bytes={n_bytes // FILMS}",
        f"encoder.scratch_bytes={n_bytes * 7 // 100}",
        "encoder.batch_size=3",
    )
    kept = configure(f"sharding.shard_bytes={n_bytes // FILMS}", "encoder.batch_size=3")
    build_frames(kept)
    run_task(kept)
    config = in_scratch(configure, tmp_path, *options)
    lean = ("encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}")
    command = [
        *(sys.executable, "-m", "encoders", "run", "--config", str(tmp_path / "config.yaml")),
        *(*lean, f"data.root={tmp_path / 'lean'}", *options),
    ]
    places = (dump, tmp_path / "lean", tmp_path / "scratch")
    with watching(*places) as sizes:
        for _ in range(2):
            with subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ) as process:
                wait_for_one_more(config, process)
                process.kill()
            assert list((tmp_path / "scratch").glob("*")), "a kill leaves something"
        run_task(config)
    assert max(sizes) <= 1.1 * n_bytes
    assert published(config) == published(kept)
    assert not list((tmp_path / "scratch").glob("*"))


def wait_for_one_more(config: Config, process: subprocess.Popen[bytes]) -> None:
    def count() -> int:
        return len(list(Path(config.features_dir).glob("features-*.json")))

    before, deadline = count(), time.monotonic() + 240
    while count() == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_dump_behind_a_url_goes_through_scratch(
    configure: Configure, tmp_path: Path, dump: Path
) -> None:
    for film in sorted(dump.iterdir()):
        files = {path.name: path.read_bytes() for path in sorted(film.iterdir())}
        write_tar(tmp_path / "www", film.name, files)
    names = ",".join(sorted(path.stem for path in (tmp_path / "www").glob("*.tar")))
    with nginx(tmp_path / "nginx", tmp_path / "www") as url:
        there = (f"data.dump={url}/{{{names}}}.tar", "sharding.shard_bytes=60_000")
        assert build(["build", "--config", str(tmp_path / "config.yaml"), *there]) == 0
        kept, config = configure(*there), in_scratch(configure, tmp_path, *there)
        run_task(kept)
        run_task(config)
    assert published(config) == published(kept)


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_server_that_hangs(
    configure: Configure, tmp_path: Path, dump: Path
) -> None:
    film = dump / "tt0000001"
    files = {path.name: path.read_bytes() for path in sorted(film.iterdir())}
    write_tar(tmp_path / "www", film.name, files)
    with faulty_server() as url:
        request(f"{url}/www/{film.name}.tar", "PUT", (tmp_path / "www/tt0000001.tar").read_bytes())
        there = (f"data.dump={url}/www/{{{film.name},{film.name}}}.tar", "encoder.shutdown_grace=0")
        config = in_scratch(configure, tmp_path, *there)
        publish_plan(open_storage(config.frames_dir), plan_dump(config))
        rule(url, {"do": "stall", "seconds": 300, "times": 1000, "method": "GET"})
        lean = ("encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}")
        command = [
            *(sys.executable, "-m", "encoders", "run", "--config", str(tmp_path / "config.yaml")),
            *(*lean, *there, f"data.root={tmp_path / 'lean'}", "storage.timeout=250"),
        ]
        with subprocess.Popen(command, cwd=REPOSITORY) as process:
            wait_for_request(url, process)
            began = time.monotonic()
            process.terminate()
            assert process.wait(timeout=200) == 75
            assert time.monotonic() - began < 150, "the read would have taken longer"
    attempt = last_attempt(task_dir(config, (0, 1)))
    assert attempt is not None
    assert attempt.outcome == "interrupted"


def wait_for_request(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not any(asked["method"] == "GET" for asked in log(url)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
