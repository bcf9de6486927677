"""Temporary frames give the features of persistent ones, in little more space than the dump."""

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
from configs.runtime.attempt import last_attempt, task_dir
from configs.runtime.signals import StopRequest
from configs.schema import Config
from encoders.__main__ import main as encode
from encoders.task import run_task
from encoders.temporary_frames import PREFIX, scratch_folder
from sharding.__main__ import main as build
from sharding.build import extend_published, plan_dump, publish_plan
from sharding.features import open_features
from sharding.storage.open import open_storage
from tests.encoders.conftest import Configure, build_frames, jpeg
from tests.sharding.films import write_tar
from tests.sharding.servers import faulty_server, log, nginx, request, rule

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
MOVIES = 32


def write_large_dump(folder: Path) -> Path:
    """Write movies of equal size, so that each is a known fraction of the dump."""
    ids = [f"tt{number:07d}" for number in range(MOVIES)]
    images = [jpeg(480, 270, seed) for seed in range(12)]
    for number, movie in enumerate(ids):
        (folder / "dump" / movie).mkdir(parents=True)
        for image in range(len(images)):
            path = folder / "dump" / movie / f"shot_{image // 3:04d}_img_{image % 3}.jpg"
            path.write_bytes(images[(number + image) % len(images)])
    (folder / "meta.json").write_text(json.dumps({movie: ["Drama"] for movie in ids}))
    (folder / "split.json").write_text(json.dumps({"train": ids, "val": [], "test": []}))
    return folder / "dump"


def sizes_of(*folders: Path) -> dict[Path, int]:
    sizes: dict[Path, int] = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):  # ignores folders that have just been removed
            for path in (Path(parent, name) for name in names):
                with suppress(FileNotFoundError):
                    sizes[path] = path.stat().st_size
    return sizes


def size_of(*folders: Path) -> int:
    return sum(sizes_of(*folders).values())


@contextmanager
def watching(dump: Path, *others: Path) -> Iterator[list[int]]:
    """Measure the bytes of all folders continuously; the dump does not change."""
    n_bytes, ended = size_of(dump), threading.Event()
    sizes = [n_bytes]

    def watch() -> None:
        while not ended.wait(0.001):
            before, after = sizes_of(*others), sizes_of(*others)
            if before.keys() == after.keys():  # else the files did not exist at the same time
                sizes.append(n_bytes + sum(before.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        ended.set()
        watcher.join()


@pytest.fixture
def temporary(configure: Configure, tmp_path: Path) -> Config:
    """Like ``config``, but with temporary frames."""
    return with_temporary_frames(configure, tmp_path)


def with_temporary_frames(configure: Configure, folder: Path, *more: str) -> Config:
    folders = (f"encoder.scratch_dir={folder / 'scratch'}", f"data.root={folder / 'lean'}")
    return configure("encoder.frame_storage=temporary", *folders, *more)


def published(config: Config) -> dict[str, bytes]:
    """Files that a reader of the feature set opens."""
    names = ("features-*.tar", "index.npz", "labels.npz", "manifest.json")
    folder = Path(config.features_dir)
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def test_the_features_equal_those_of_persistent_frames(config: Config, temporary: Config) -> None:
    first, second = run_task(config), run_task(temporary)
    assert second.manifest == first.manifest
    assert published(temporary) == published(config)
    folder = Path(temporary.features_dir) / "frames"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"frames-0000{k}.json" for k in range(5)), "manifest.json", "rejected.jsonl"]
    frames = Path(config.frames_dir)
    assert (folder / "manifest.json").read_bytes() == (frames / "manifest.json").read_bytes()
    assert not list((folder.parents[2] / "scratch").glob("*"))
    rerun = run_task(temporary)
    assert (rerun.encoded.shards, rerun.skipped) == (0, 5)


@pytest.mark.usefixtures("dump")
def test_commands_of_sharding_point_to_the_encoder_if_frames_are_temporary(
    temporary: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shard(command: str) -> tuple[int, str]:
        overrides = ["encoder.frame_storage=temporary", f"data.root={temporary.data.root}"]
        code = build([command, "--quiet", "--config", str(tmp_path / "config.yaml"), *overrides])
        return code, "".join(capsys.readouterr())

    code, planned = shard("plan")
    assert (code, planned.splitlines()[-1].startswith("next: `movienet-encode run ")) == (0, True)
    assert "space needed up to 2.15 GB of scratch per rank" in planned
    code, before = shard("status")
    assert (code, "missing --array=0-4; next: `movienet-encode run " in before) == (1, True)
    for command in ("seal", "verify"):
        code, refused = shard(command)
        assert (code, f"; run `movienet-encode {command} " in refused) == (1, True)
    run_task(temporary)
    code, after = shard("status")
    assert (code, "shards 5 of 5 done" in after) == (0, True)


def test_the_progress_counter_ends_full_if_images_were_rejected(
    temporary: Config, tmp_path: Path, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dump / "tt0000002" / "shot_0004_img_1.jpg").write_bytes(b"not a picture")
    overrides = [
        "encoder.frame_storage=temporary",
        f"encoder.scratch_dir={temporary.encoder.scratch_dir}",
        f"data.root={temporary.data.root}",
        "sharding.max_bad_fraction=0.5",
    ]
    assert encode(["run", "--config", str(tmp_path / "config.yaml"), *overrides]) == 0
    printed = capsys.readouterr()
    assert "encode: 93/93 images" in printed.err
    assert "encoded 5 shards, 92 images" in printed.out


def test_encoding_a_dump_needs_at_most_a_tenth_more_space_than_the_dump(
    configure: Configure, tmp_path: Path
) -> None:
    dump = write_large_dump(tmp_path)
    n_bytes = size_of(dump)
    config = with_temporary_frames(
        configure,
        tmp_path,
        f"sharding.shard_bytes={n_bytes // MOVIES}",
        f"encoder.scratch_bytes={n_bytes * 7 // 100}",
    )
    folders = (dump, tmp_path / "lean", tmp_path / "scratch")
    with watching(*folders) as sizes:
        run_task(config)
    assert max(sizes) > 1.02 * n_bytes, "a shard in scratch was measured"
    assert max(sizes) <= 1.1 * n_bytes
    assert size_of(*folders) < 1.04 * n_bytes


def test_a_shard_larger_than_scratch_bytes_is_refused_in_one_line(
    configure: Configure, tmp_path: Path, dump: Path
) -> None:
    assert dump.is_dir()
    config = with_temporary_frames(configure, tmp_path, "encoder.scratch_bytes=20KiB")
    with pytest.raises(ConfigError, match=r"encoder\.scratch_bytes: got 20.*, want .* for frame"):
        run_task(config)


def test_an_existing_frame_plan_is_used_and_a_changed_dump_refused(
    temporary: Config, dump: Path
) -> None:
    publish_plan(open_storage(temporary.frames_dir), plan_dump(temporary))
    (dump / "tt0000002" / "shot_0000_img_0.jpg").write_bytes(jpeg(64, 48, 99))
    with pytest.raises(DataError, match="tt0000002: changed since it was planned"):
        run_task(temporary)


def test_new_movies_extend_a_set_with_temporary_frames(
    temporary: Config, configure: Configure, dump: Path
) -> None:
    persistent = configure()
    for config in (persistent, temporary):
        if config is persistent:
            build_frames(persistent)
        before = run_task(config).manifest
    (dump / "tt0000000").mkdir()
    (dump / "tt0000000" / "shot_0000_img_0.jpg").write_bytes(jpeg(64, 48, 98))
    extend_published(open_storage(persistent.frames_dir), persistent)
    build_frames(persistent)
    extend_published(open_storage(temporary.frames_dir), temporary)
    with pytest.raises(DataError, match=r"no sealed frame set to extend; .* `movienet-encode"):
        extend_published(open_storage(temporary.frames_dir), temporary)
    first, second = run_task(persistent), run_task(temporary)
    assert (second.encoded.shards, second.skipped) == (1, 5)
    assert second.manifest == first.manifest
    assert published(temporary) == published(persistent)
    assert before is not None
    former = open_features(f"{temporary.features_dir}@{before.digest[:12]}")
    assert (former.manifest, len(former)) == (before, 5)
    assert former["tt0000005"].features_ND.shape == (12, 16)
    assert len(open_features(temporary.features_dir)) == 6


def test_persistent_and_temporary_frames_are_not_mixed_in_a_set(
    config: Config, configure: Configure, tmp_path: Path
) -> None:
    run_task(config)
    other = configure(
        "encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}"
    )
    with pytest.raises(ConfigError, match=r"configuration: frames was .*; scratch was null"):
        run_task(other)


def test_a_stop_while_a_frame_shard_is_built_publishes_nothing(
    temporary: Config, dump: Path
) -> None:
    assert dump.is_dir()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            run_task(temporary, stop=stop)
    assert not list(Path(temporary.features_dir).glob("features-*"))


def test_folders_of_the_user_with_similar_names_are_kept(tmp_path: Path) -> None:
    mine = [tmp_path / f"{PREFIX}{name}" for name in ("of-mine", "old", "12345678")]
    for folder in mine:
        folder.mkdir()
    with scratch_folder(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_scratch_folders_of_killed_processes_are_removed_and_live_ones_kept(
    tmp_path: Path,
) -> None:
    program = (
        "import pathlib, sys\n"
        "from encoders.temporary_frames import scratch_folder\n"
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


def test_killed_tasks_leave_no_scratch_files_and_need_no_more_space(
    configure: Configure, tmp_path: Path
) -> None:
    dump = write_large_dump(tmp_path)
    n_bytes = size_of(dump)
    options = (
        f"sharding.shard_bytes={n_bytes // MOVIES}",
        f"encoder.scratch_bytes={n_bytes * 7 // 100}",
        "encoder.batch_size=3",
    )
    persistent = configure(f"sharding.shard_bytes={n_bytes // MOVIES}", "encoder.batch_size=3")
    build_frames(persistent)
    run_task(persistent)
    config = with_temporary_frames(configure, tmp_path, *options)
    lean = ("encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}")
    command = [
        *(sys.executable, "-m", "encoders", "run", "--config", str(tmp_path / "config.yaml")),
        *(*lean, f"data.root={tmp_path / 'lean'}", *options),
    ]
    folders = (dump, tmp_path / "lean", tmp_path / "scratch")
    with watching(*folders) as sizes:
        for _ in range(2):
            with subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ) as process:
                wait_for_one_more(config, process)
                process.kill()
            assert list((tmp_path / "scratch").glob("*")), "a killed process leaves files"
        run_task(config)
    assert max(sizes) <= 1.1 * n_bytes
    assert published(config) == published(persistent)
    assert not list((tmp_path / "scratch").glob("*"))


def wait_for_one_more(config: Config, process: subprocess.Popen[bytes]) -> None:
    def count() -> int:
        return len(list(Path(config.features_dir).glob("features-*.json")))

    before, deadline = count(), time.monotonic() + 240
    while count() == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_dump_at_a_url_is_encoded_with_temporary_frames(
    configure: Configure, tmp_path: Path, dump: Path
) -> None:
    for movie in sorted(dump.iterdir()):
        files = {path.name: path.read_bytes() for path in sorted(movie.iterdir())}
        write_tar(tmp_path / "www", movie.name, files)
    names = ",".join(sorted(path.stem for path in (tmp_path / "www").glob("*.tar")))
    with nginx(tmp_path / "nginx", tmp_path / "www") as url:
        at_url = (f"data.dump={url}/{{{names}}}.tar", "sharding.shard_bytes=60_000")
        assert build(["build", "--config", str(tmp_path / "config.yaml"), *at_url]) == 0
        persistent = configure(*at_url)
        config = with_temporary_frames(configure, tmp_path, *at_url)
        run_task(persistent)
        run_task(config)
    assert published(config) == published(persistent)


def test_a_stop_does_not_wait_for_a_server_that_hangs(
    configure: Configure, tmp_path: Path, dump: Path
) -> None:
    movie = dump / "tt0000001"
    files = {path.name: path.read_bytes() for path in sorted(movie.iterdir())}
    write_tar(tmp_path / "www", movie.name, files)
    with faulty_server() as url:
        request(f"{url}/www/{movie.name}.tar", "PUT", (tmp_path / "www/tt0000001.tar").read_bytes())
        at_url = (
            f"data.dump={url}/www/{{{movie.name},{movie.name}}}.tar",
            "encoder.shutdown_grace=0",
        )
        config = with_temporary_frames(configure, tmp_path, *at_url)
        publish_plan(open_storage(config.frames_dir), plan_dump(config))
        rule(url, {"do": "stall", "seconds": 300, "times": 1000, "method": "GET"})
        lean = ("encoder.frame_storage=temporary", f"encoder.scratch_dir={tmp_path / 'scratch'}")
        command = [
            *(sys.executable, "-m", "encoders", "run", "--config", str(tmp_path / "config.yaml")),
            *(*lean, *at_url, f"data.root={tmp_path / 'lean'}", "storage.timeout=250"),
        ]
        with subprocess.Popen(command, cwd=REPOSITORY) as process:
            wait_for_request(url, process)
            start = time.monotonic()
            process.terminate()
            assert process.wait(timeout=200) == 75
            assert time.monotonic() - start < 150, "the read would have taken longer"
    attempt = last_attempt(task_dir(config, "encode", (0, 1)))
    assert attempt is not None
    assert attempt.outcome == "interrupted"


def wait_for_request(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not any(entry["method"] == "GET" for entry in log(url)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_temporary_frames_are_stored_on_the_disk_that_slurm_gives_to_the_job(
    temporary: Config, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk-of-the-job"
    disk.mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(disk))
    encoder = temporary.encoder.model_copy(update={"scratch_dir": None})
    with watching(dump, disk) as sizes:
        run_task(temporary.model_copy(update={"encoder": encoder}))
    assert max(sizes) > size_of(dump)
    assert not list(disk.iterdir())
