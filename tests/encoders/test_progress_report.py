"""Progress of a task: its counter, and one wandb run across all its attempts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.runtime.attempt import task_dir
from configs.runtime.progress import Progress
from configs.runtime.tracking import Tracker
from configs.schema import Config
from encoders.decode import Preprocessing
from encoders.extract import EncodeStats
from encoders.input_pipeline import InputPipeline
from encoders.progress_report import ProgressReporter, Tally
from encoders.task import run_task
from sharding.frames import open_frames
from sharding.storage.local import DiskStorage
from tests.encoders.conftest import Configure

pytestmark = pytest.mark.slow


def test_a_shard_that_is_read_again_after_an_error_counts_once(
    config: Config, configure: Configure
) -> None:
    frames = open_frames(config.frames_dir)
    planned = [shard.samples for shard in frames.manifest.shards]
    bar = Progress(93, "encode", "images")
    reporter = ProgressReporter(planned, 93, EncodeStats(), bar, Tracker())
    size = Preprocessing(32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pipeline = InputPipeline(configure("encoder.batch_size=4").encoder, size, frames)
    reporter.watch(next(pipeline.batches([0])))
    for batch in pipeline.batches(range(frames.n_shards)):
        reporter.watch(batch)
    assert bar.line().startswith("encode: 93/93 images")


def test_a_count_that_fails_does_not_stop_the_work(tmp_path: Path) -> None:
    features = tmp_path / "features"
    features.touch()  # listing it fails, as on a stale NFS handle
    bar = Progress(93, "encode", "images")
    reporter = ProgressReporter([93], 93, EncodeStats(), bar, Tracker())
    reporter.count(Tally(DiskStorage(features), [93], frozenset({0})), ["set"])
    reporter.finish()
    features.unlink()
    features.mkdir()
    (features / "features-00000.json").touch()
    reporter.finish()
    assert bar.line().startswith("encode: 0/93 images")


def test_a_task_is_one_wandb_run_across_its_attempts_with_totals(
    config: Config, configure: Configure
) -> None:
    offline = configure("tracking.wandb=offline")
    run_task(offline)
    (Path(offline.features_dir) / "features-00000.json").unlink()
    run_task(offline)
    folder = task_dir(config, "encode", (0, 1))
    run_id = (folder / "wandb-id").read_text()
    segments = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in segments] == [f"run-{run_id}.wandb"] * 2
    wandb = Path(sys.executable).with_name("wandb")
    inspected = subprocess.run(
        [str(wandb), "leet", "inspect", "--json", str(segments[-1])],
        capture_output=True,
        text=True,
        check=True,
    )
    for metric in ("rank/images_s", "rank/waiting_share", "rank/tower_share", "set/images"):
        assert metric in inspected.stdout
    # The group is that of the configuration, so an array of tasks is one group.
    run = next(r["run"] for r in map(json.loads, inspected.stdout.splitlines()) if "run" in r)
    assert (run["run_group"], run["job_type"]) == (offline.training.run_name, "encode")
