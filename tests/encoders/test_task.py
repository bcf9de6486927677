"""One encode task from start to end: resume, stop, split into tasks, extend."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError, DataError, Interrupted, MachineError
from configs.runtime.attempt import last_attempt, task_dir
from configs.runtime.signals import StopRequest
from configs.schema import Config
from encoders.__main__ import main
from encoders.extract import EncodeStats
from encoders.frame_source import open_frame_source
from encoders.registry import pick_device
from encoders.seal import seal, wanted_plan
from encoders.task import carry_on, open_stage, run_task, until
from sharding.build import extend_published, plan_dump, publish_plan
from sharding.features import open_features
from sharding.storage.open import open_storage
from tests.disks import small_disk
from tests.encoders.conftest import Build, Configure, build_frames, digest, files, inodes, jpeg

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]


def test_a_rerun_skips_every_shard_and_changes_nothing(config: Config) -> None:
    first = run_task(config)
    tars = {path: path.stat().st_mtime_ns for path in Path(config.features_dir).iterdir()}
    second = run_task(config)
    assert second.encoded.shards == 0
    assert second.skipped == first.encoded.shards
    assert digest(second) == digest(first)
    assert {path: path.stat().st_mtime_ns for path in Path(config.features_dir).iterdir()} == tars


def test_another_number_of_decode_threads_continues_the_set(
    config: Config, configure: Configure
) -> None:
    want = digest(run_task(config))
    (Path(config.features_dir) / "features-00001.tar").unlink()
    outcome = run_task(configure("encoder.decode_threads=3"))
    assert (outcome.encoded.shards, digest(outcome)) == (1, want)


def test_only_a_lost_shard_is_encoded_again_to_the_same_bytes(config: Config) -> None:
    first = run_task(config)
    lost = Path(config.features_dir) / "features-00001.tar"
    data = lost.read_bytes()
    lost.unlink()
    second = run_task(config)
    assert second.encoded.shards == 1
    assert digest(second) == digest(first)
    assert lost.read_bytes() == data


def test_temporary_files_of_a_killed_task_are_removed(config: Config) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = f".tmp-features-00000.tar-{socket.gethostname()}-{ended.pid}-0123abcd"
    abandoned = Path(config.features_dir) / name
    abandoned.parent.mkdir(parents=True)
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    run_task(config)
    assert not abandoned.exists()


def test_two_tasks_give_the_set_of_one_task(config: Config, configure: Configure) -> None:
    want = digest(run_task(config))
    other = configure("encoder.name=shared")
    first = run_task(other, task=(1, 2))
    assert first.manifest is None
    assert first.missing
    assert digest(run_task(other, task=(0, 2))) == want


def test_different_weights_are_not_mixed_into_a_set(config: Config, configure: Configure) -> None:
    run_task(config)
    with pytest.raises(ConfigError, match=r"encoder\.seed was 0, is 1; encoder\.weights was"):
        run_task(configure("encoder.seed=1"))


def test_replace_encodes_again_what_no_longer_matches(config: Config, configure: Configure) -> None:
    first = run_task(config)
    other = configure("encoder.seed=1")
    second = run_task(other, replace=True)
    assert second.encoded.shards == first.encoded.shards
    assert digest(second) != digest(first)
    assert run_task(other).encoded.shards == 0


def test_features_beyond_a_smaller_frame_set_are_removed(
    config: Config, configure: Configure, build: Build, tmp_path: Path, capsys: Any
) -> None:
    run_task(config)
    other = configure("sharding.shard_bytes=1MB")
    frames = Path(config.frames_dir)
    publish_plan(open_storage(config.frames_dir), plan_dump(other), replace=True)
    for path in frames.glob("frames-*"):
        path.unlink()
    build(other)
    assert main(["status", "--config", str(tmp_path / "config.yaml")]) == 1
    assert "planned for frames" in capsys.readouterr().err
    run_task(other, replace=True)
    assert [path.name for path in Path(config.features_dir).glob("*.tar")] == ["features-00000.tar"]


def test_shards_of_another_encoder_are_refused_even_without_their_plan(
    config: Config, configure: Configure
) -> None:
    run_task(config)
    (Path(config.features_dir) / "plan.json").unlink()
    before = sorted(path.name for path in Path(config.features_dir).iterdir())
    with pytest.raises(DataError, match="--replace"):
        run_task(configure("encoder.normalize=true"))
    assert sorted(path.name for path in Path(config.features_dir).iterdir()) == before


def test_two_ranks_through_accelerate_give_the_manifest_of_one(
    config: Config, configure: Configure, tmp_path: Path
) -> None:
    want = digest(run_task(config))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(REPOSITORY / "configs" / "accelerate" / "cpu-2.yaml")),
        *("-m", "encoders", "run", "--config", str(tmp_path / "config.yaml"), "encoder.name=two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("read by Pillow") == 2, "both ranks had work"
    assert open_features(configure("encoder.name=two").features_dir).digest == want


def recorded(config: Config, task: tuple[int, int] = (0, 1)) -> tuple[int, str, int | None]:
    """Number, outcome and images of the newest attempt."""
    attempt = last_attempt(task_dir(config, "encode", task))
    assert attempt is not None
    return attempt.attempt, attempt.outcome, attempt.step


def test_a_task_keeps_a_record_of_each_attempt(config: Config, configure: Configure) -> None:
    run_task(config)
    assert recorded(config) == (1, "done", 93)
    run_task(config)
    assert recorded(config) == (2, "done", 93)
    with pytest.raises(ConfigError):
        run_task(configure("encoder.seed=1"))
    assert recorded(config) == (3, "failed", None)


def test_a_task_stopped_before_its_start_encodes_no_shard_and_is_interrupted(
    config: Config,
) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match=r"SIGUSR1: rank 0 of 1 has 0 of its 5 shards; rerun"):
            run_task(config, stop=stop)
    assert recorded(config) == (1, "interrupted", 0)
    assert sorted(path.name for path in Path(config.features_dir).iterdir()) == ["plan.json"]


def test_after_a_stop_the_current_shard_is_completed_and_none_is_started() -> None:
    with StopRequest() as stop:
        numbers = until(stop, [0, 1, 2])
        assert [next(numbers), next(numbers)] == [0, 1]  # the second is only read ahead
        assert carry_on(EncodeStats(images=10, seconds=1), stop, 60)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(numbers) == []
        assert carry_on(EncodeStats(images=8, seconds=1, left=2), stop, 60)
        assert not carry_on(EncodeStats(images=10, seconds=1), stop, 60)
        assert carry_on(EncodeStats(images=11, seconds=1, left=9), stop, 60), "the second has begun"


def test_after_a_stop_a_current_shard_that_takes_too_long_is_dropped() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not carry_on(EncodeStats(images=4, seconds=1, left=996), stop, 60)
        assert carry_on(EncodeStats(images=990, seconds=1, left=10), stop, 60)


def test_only_encodes_the_listed_shards(config: Config) -> None:
    outcome = run_task(config, only=["3", "features-00001"])
    assert outcome.encoded.shards == 2
    assert outcome.missing == (0, 2, 4)
    attempt = last_attempt(task_dir(config, "encode", (0, 1), ("3", "features-00001")))
    assert attempt is not None
    assert attempt.outcome == "done"


def add_movies(dump: Path) -> None:
    """Add two labelled movies, one of them before the others in the order of ids."""
    for movie, seed in (("tt0000000", 71), ("tt0000009", 72)):
        (dump / movie).mkdir()
        for image in range(3):
            (dump / movie / f"shot_0000_img_{image}.jpg").write_bytes(jpeg(64, 48, seed + image))
    labels = json.loads((dump.parent / "meta.json").read_text())
    labels |= {"tt0000000": ["Drama"], "tt0000009": ["Comedy"]}
    (dump.parent / "meta.json").write_text(json.dumps(labels))


def test_new_movies_become_an_extension_and_existing_shards_stay_untouched(
    config: Config, dump: Path
) -> None:
    first = run_task(config).manifest
    assert first is not None
    old = inodes(config)
    add_movies(dump)
    extend_published(open_storage(config.frames_dir), config)
    build_frames(config)
    outcome = run_task(config)
    assert (outcome.encoded.shards, outcome.skipped) == (1, 5)
    assert outcome.manifest is not None
    assert outcome.manifest.parent == first.digest
    assert outcome.manifest.shards[:5] == first.shards
    new = inodes(config)
    shards = [name for name in old if name.startswith("features-")]
    assert [new[name] for name in shards] == [old[name] for name in shards]
    features = open_features(config.features_dir)
    assert features.movie_ids[5:] == ("tt0000000", "tt0000009")
    assert run_task(config).manifest == outcome.manifest


def test_an_extension_with_another_precision_or_encoder_is_refused(
    config: Config, configure: Configure, dump: Path
) -> None:
    run_task(config)
    add_movies(dump)
    extend_published(open_storage(config.frames_dir), config)
    build_frames(config)
    before = files(config)
    for option, differences in (
        (
            "encoder.precision=bf16",
            r'configuration: encoder\.precision was "fp32", is "bf16"; choose',
        ),
        ("encoder.seed=1", r"configuration: encoder\.seed was 0, is 1; encoder\.weights was"),
    ):
        with pytest.raises(ConfigError, match=differences):
            run_task(configure(option))
    assert files(config) == before
    features = open_storage(config.features_dir)
    with pytest.raises(DataError, match=r"planned for frames .* run .*` to encode the new shards"):
        seal(config, features, wanted_plan(features), open_frame_source(config))


def test_an_extension_killed_between_plan_and_seal_is_resumed(config: Config, dump: Path) -> None:
    first = run_task(config).manifest
    add_movies(dump)
    extend_published(open_storage(config.frames_dir), config)
    build_frames(config)
    old = {name: Path(config.features_dir, name).read_bytes() for name in ("manifest.json",)}
    open_stage(config, pick_device("cpu"))  # as after a kill: new plan, old manifest
    for name, data in old.items():
        Path(config.features_dir, name).write_bytes(data)
    manifest = run_task(config).manifest
    assert manifest is not None
    assert first is not None
    assert (manifest.parent, len(manifest.shards)) == (first.digest, 6)


def test_a_set_too_large_for_the_disk_is_refused_before_the_first_shard(
    config: Config,
) -> None:
    folder = Path(config.features_dir)
    with small_disk(folder, "64k"):
        line = r"features/tiny: got .* free, want .* for the features; free some"
        with pytest.raises(MachineError, match=line):
            run_task(config)
        assert [path.name for path in folder.iterdir()] == ["plan.json"]
        subprocess.run(["mount", "-o", "remount,size=1m", str(folder)], check=True)
        assert run_task(config).manifest
