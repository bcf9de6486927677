"""What a task does beside encoding: stop in time, keep its record, share, grow, tell, verify."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError, Interrupted, MachineError
from configs.runtime.attempt import TaskAttempt, last_attempt
from configs.runtime.signals import StopRequest
from configs.schema import Config
from encoders.__main__ import main
from encoders.extract import Encoded, Extractor
from encoders.follow import share_dir
from encoders.frames import frames_of
from encoders.registry import pick_device
from encoders.run import carry_on, open_stage, run_task, until
from encoders.seal import seal, wanted_plan
from sharding.build import extend_published
from sharding.features import open_features
from sharding.format.names import MANIFEST
from sharding.frames import open_frames
from sharding.storage.open import open_storage
from tests.disks import small_disk
from tests.encoders.conftest import Configure, build_frames, jpeg

Tell = Callable[[str], None]


def says(config: Config, share: tuple[int, int] = (0, 1)) -> tuple[int, str, int | None]:
    """Number, outcome and images of the newest attempt."""
    attempt = last_attempt(share_dir(config, share))
    assert attempt is not None
    return attempt.attempt, attempt.outcome, attempt.step


def files(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.features_dir).glob("*.*")}


# --- stopping


def test_a_task_keeps_a_record_of_each_attempt(config: Config, configure: Configure) -> None:
    run_task(config)
    assert says(config) == (1, "done", 93)
    run_task(config)
    assert says(config) == (2, "done", 93)
    with pytest.raises(ConfigError):
        run_task(configure("encoder.seed=1"))
    assert says(config) == (3, "failed", None)


def test_a_task_that_was_asked_to_stop_begins_no_shard_and_says_so(config: Config) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match=r"SIGUSR1: rank 0 of 1 has 0 of its 5 shards; run"):
            run_task(config, stop=stop)
    assert says(config) == (1, "interrupted", 0)
    assert sorted(path.name for path in Path(config.features_dir).iterdir()) == ["plan.json"]


def test_after_a_stop_the_shard_in_hand_is_finished_and_none_behind_it() -> None:
    with StopRequest() as stop:
        numbers = until(stop, [0, 1, 2])
        assert [next(numbers), next(numbers)] == [0, 1]  # the second is only read ahead
        assert carry_on(Encoded(images=10, seconds=1), stop, 60)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(numbers) == []
        assert carry_on(Encoded(images=8, seconds=1, left=2), stop, 60)
        assert not carry_on(Encoded(images=10, seconds=1), stop, 60)
        assert carry_on(Encoded(images=11, seconds=1, left=9), stop, 60), "the second has begun"


def test_the_last_line_advises_the_side_that_is_the_limit() -> None:
    starved = Encoded(images=10, seconds=10, waited=4, in_tower=5).line()
    assert (
        "waited for data 40%, in the tower 50% of the time: the tower waited; more cores" in starved
    )
    busy = Encoded(images=10, seconds=10, waited=1.2, in_tower=8).line()
    assert "in the tower 80% of the time: data waited for the tower; more devices" in busy


def test_a_shard_in_hand_that_would_take_too_long_is_dropped() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not carry_on(Encoded(images=4, seconds=1, left=996), stop, 60)
        assert carry_on(Encoded(images=990, seconds=1, left=10), stop, 60)


def test_nothing_of_a_dropped_shard_is_published(config: Config) -> None:
    stage = open_stage(config, pick_device("cpu"))
    extractor = Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=stage.features,
    )
    extractor.run([1, 0], lambda _images: False)
    assert not list(Path(config.features_dir).glob("*.tar"))


def test_the_worst_end_that_a_rank_tells_stands(tmp_path: Path) -> None:
    first = TaskAttempt.begin(tmp_path)
    second = TaskAttempt(tmp_path, first.number)
    told = (("done", "done"), ("interrupted", "interrupted"), ("done", "interrupted"))
    for say, stands in (*told, ("failed", "failed"), ("interrupted", "failed")):
        second.tell(say, 7)  # type: ignore[arg-type]
        record = last_attempt(tmp_path)
        assert record is not None
        assert record.outcome == stands
    assert TaskAttempt.begin(tmp_path).number == 2


# --- several tasks


def test_of_two_live_attempts_at_a_shard_the_first_to_publish_wins_whole(config: Config) -> None:
    stage = open_stage(config, pick_device("cpu"))
    extractor = Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=stage.features,
    )
    there: dict[str, tuple[int, int]] = {}

    def other_is_faster(_images: int) -> bool:
        if not there:
            run_task(config)
            there.update(inodes(config))
        return True

    extractor.run(range(stage.plan.n_shards), other_is_faster)
    assert extractor.done.shards == 0
    assert inodes(config) == there
    assert open_features(config.features_dir)


def inodes(config: Config) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in Path(config.features_dir).iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_only_encodes_the_shards_that_it_names(config: Config) -> None:
    outcome = run_task(config, only=["3", "features-00001"])
    assert outcome.encoded.shards == 2
    assert outcome.missing == (0, 2, 4)
    assert says(config)[1] == "done"


def test_status_tells_each_task_and_what_is_missing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_task(config, share=(1, 2))
    assert main(["status", "--config", str(tmp_path / "config.yaml")]) == 1
    whole, share, missing = capsys.readouterr().out.splitlines()
    assert "shards 3 of 5   images 45 of 93" in whole
    assert whole.endswith("not sealed")
    assert share.startswith("share 1/2   shards 3 of 3   images 45 of 45")
    assert "attempt 1 done" in share
    assert missing.startswith("missing: --array=")
    TaskAttempt.begin(share_dir(config, (0, 2))).tell("running", 0, ended=False)
    main(["status", "--config", str(tmp_path / "config.yaml")])
    assert "share 0/2   shards 0 of 2" in (said := capsys.readouterr().out)
    assert "attempt 1 running" in said
    run_task(config)
    assert main(["status", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "shards 5 of 5   images 93 of 93   sealed" in capsys.readouterr().out


def test_status_exits_with_1_until_a_set_without_missing_shards_is_sealed(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["status", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 1, "there is no plan"
    run_task(config)
    (Path(config.features_dir) / MANIFEST).unlink()
    assert main(command) == 1
    assert "shards 5 of 5   images 93 of 93   not sealed" in capsys.readouterr().out
    assert main(["seal", *command[1:]]) == 0
    assert main(command) == 0


def test_verify_reads_every_byte_and_repair_marks_damaged_shards_as_missing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_task(config)
    whole = files(config)
    command = ["verify", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 0
    assert capsys.readouterr().out.strip().endswith(": ok")
    tar = Path(config.features_dir) / "features-00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    assert main(command) == 1
    assert "features-00001.tar: got" in capsys.readouterr().out
    assert main([*command, "--repair"]) == 1
    marked = "marked 1 shards as missing (1); next: `movienet-encode run`"
    assert capsys.readouterr().out.splitlines()[-1] == marked
    assert main(["status", *command[1:]]) == 1
    assert "missing: --array=1 " in capsys.readouterr().out
    assert run_task(config).encoded.shards == 1
    assert files(config) == whole


def test_a_task_is_one_wandb_run_over_its_attempts_with_the_totals(
    config: Config, configure: Configure
) -> None:
    offline = configure("tracking.wandb=offline")
    for only in (["0"], []):
        run_task(offline, only=only)
    folder = share_dir(config, (0, 1))
    run_id = (folder / "wandb-id").read_text()
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in parts] == [f"run-{run_id}.wandb"] * 2
    wandb = Path(sys.executable).with_name("wandb")
    inspected = subprocess.run(
        [str(wandb), "leet", "inspect", "--summary", str(parts[-1])],
        capture_output=True,
        text=True,
        check=True,
    )
    for metric in ("rank/images_s", "rank/waiting_share", "rank/tower_share", "set/images"):
        assert metric in inspected.stdout


# --- parts


def add_movies(dump: Path) -> None:
    """Two new films, labelled, one of them before the others in the order of ids."""
    for film, seed in (("tt0000000", 71), ("tt0000009", 72)):
        (dump / film).mkdir()
        for image in range(3):
            (dump / film / f"shot_0000_img_{image}.jpg").write_bytes(jpeg(64, 48, seed + image))
    labels = json.loads((dump.parent / "meta.json").read_text())
    labels |= {"tt0000000": ["Drama"], "tt0000009": ["Comedy"]}
    (dump.parent / "meta.json").write_text(json.dumps(labels))


def test_new_movies_become_a_part_and_old_shards_stay_untouched(config: Config, dump: Path) -> None:
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


def test_another_precision_or_encoder_does_not_come_in_with_a_part(
    config: Config, configure: Configure, dump: Path
) -> None:
    run_task(config)
    add_movies(dump)
    extend_published(open_storage(config.frames_dir), config)
    build_frames(config)
    whole = files(config)
    for option, told in (
        ("encoder.precision=bf16", r'otherwise: encoder\.precision was "fp32", is "bf16"; choose'),
        ("encoder.seed=1", r"otherwise: encoder\.seed was 0, is 1; encoder\.weights was"),
    ):
        with pytest.raises(ConfigError, match=told):
            run_task(configure(option))
    assert files(config) == whole
    features = open_storage(config.features_dir)
    with pytest.raises(DataError, match=r"planned for frames .* run` to add what is new"):
        seal(config, features, wanted_plan(features), frames_of(config))


def test_a_kill_between_plan_and_seal_of_a_part_is_gone_on_from(config: Config, dump: Path) -> None:
    first = run_task(config).manifest
    add_movies(dump)
    extend_published(open_storage(config.frames_dir), config)
    build_frames(config)
    old = {name: Path(config.features_dir, name).read_bytes() for name in ("manifest.json",)}
    open_stage(config, pick_device("cpu"))  # a kill right behind its plan left the old manifest
    for name, data in old.items():
        Path(config.features_dir, name).write_bytes(data)
    manifest = run_task(config).manifest
    assert manifest is not None
    assert first is not None
    assert (manifest.parent, len(manifest.shards)) == (first.digest, 6)


# --- space


def test_a_set_that_does_not_fit_is_refused_before_the_first_shard_in_one_line(
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


def test_a_disk_that_fills_ends_the_task_and_leaves_nothing_half_written(config: Config) -> None:
    folder = Path(config.features_dir)
    with small_disk(folder, "1m"):
        stage = open_stage(config, pick_device("cpu"))
        subprocess.run(["mount", "-o", "remount,size=20k", str(folder)], check=True)
        extractor = Extractor(
            *(config.encoder, stage.plan, stage.tower, stage.device),
            frames=open_frames(config.frames_dir),
            features=stage.features,
        )
        with pytest.raises(OSError, match=r"No space left on device.*features-0000"):
            extractor.run(range(stage.plan.n_shards))
        left = {path.name for path in folder.iterdir()} - {"plan.json"}
        assert all(name.startswith("features-0000") for name in left), "no temporary files"
        subprocess.run(["mount", "-o", "remount,size=1m", str(folder)], check=True)
        assert run_task(config).manifest
