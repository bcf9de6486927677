"""A run that was stopped, killed and resumed is one run in wandb and TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from configs.runtime.attempt import read_attempts
from configs.runtime.wandb_files import is_synced, offline_segments, segments_to_sync
from configs.schema import Config
from tests.training.conftest import config_of
from tests.training.launched import (
    ROOT,
    TIMEOUT_S,
    TIMING,
    attempt,
    finish,
    history,
    last_step,
    launched,
    run_alone,
    send,
    wait_for_step,
)
from tests.wandb_server import wandb_server
from training.checkpoint import find

pytestmark = pytest.mark.slow

TRAINING = {"epochs": 60, "validate_epochs": 20, "checkpoint_steps": 20}
"""240 steps."""


def wandb(*words: str) -> str:
    """Run wandb's command line and return its output."""
    command = [str(Path(sys.executable).with_name("wandb")), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return done.stdout


@cache
def inspected(segment: Path) -> tuple[Any, ...]:
    """Return the content of a ``.wandb`` file, read by wandb itself."""
    return tuple(map(json.loads, wandb("leet", "inspect", "--json", str(segment)).splitlines()))


def records(segment: Path, kind: str) -> list[Any]:
    """Return the records of one kind."""
    return [record[kind] for record in inspected(segment) if record["type"] == kind]


def steps(segment: Path) -> list[int]:
    """Return the steps (our own axis) of the training records in a segment."""
    items = [record["item"] for record in records(segment, "history")]
    assert all(item["_step"] == item["step"] for item in items)  # the default axis of charts
    return [item["step"] for item in items if "train/loss" in item]


@pytest.fixture(scope="module")
def thrice(film_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run stopped by a signal, resumed, killed, and resumed to its end."""
    config = config_of(
        film_folder,
        tmp_path_factory.mktemp("tracked"),
        training=TRAINING,
        tracking={"wandb": "offline", "tensorboard": True},
    )
    for step, number in ((25, signal.SIGUSR1), (90, signal.SIGKILL)):
        with launched(config, 1) as process:
            wait_for_step(config, step)
            send(number, process.pid)
            process.wait(timeout=TIMEOUT_S)
    finish(config, 1)
    return config


def test_each_attempt_is_a_segment_of_one_run_in_order(thrice: Config) -> None:
    assert [attempt(thrice, number)[0] for number in (1, 2, 3)] == [
        "interrupted",
        "running",
        "done",
    ]
    segments = offline_segments(thrice.run_dir)
    assert len(segments) == 3
    runs = [records(segment, "run")[0] for segment in segments]
    assert len({run["run_id"] for run in runs}) == 1
    assert {(run["run_group"], run["job_type"]) for run in runs} == {("run", "training")}
    began = [record.from_step or 0 for record in read_attempts(thrice.run_dir)]
    assert began[:2] == [0, attempt(thrice, 1)[1]]
    assert began[2] >= 80, "killed after step 90, saved every 20"
    # Steps that a stop or a kill has lost are sent again, those that were stored are not.
    assert [step for segment in segments for step in steps(segment)] == list(range(1, 241))
    assert [record["step"] for record in history(thrice) if record["kind"] == "train"] == list(
        range(1, 241)
    )


def test_each_requeued_attempt_sends_an_alert(thrice: Config) -> None:
    alerts = [records(segment, "alert") for segment in offline_segments(thrice.run_dir)]
    assert alerts[0] == []
    step = attempt(thrice, 1)[1]
    (alert,) = alerts[1]
    assert (alert["title"], alert["text"]) == ("run requeued", f"attempt 2 resumes at step {step}")
    assert len(alerts[2]) == 1


def test_each_validation_is_tracked_with_genres_and_curves(thrice: Config) -> None:
    tracked: set[str] = set()
    for segment in offline_segments(thrice.run_dir):
        for record in records(segment, "history"):
            tracked |= {key.partition(".")[0] for key in record["item"]}
    expected = {"train/loss", "train/lr", "train/grad_norm", "val/map", "val/genres"}
    expected |= {f"workload/{name}" for name in TIMING}
    assert expected | {"val/precision-recall_table"} <= tracked
    plots = sorted(thrice.run_dir.rglob("val/precision-recall_table_*.json"))
    assert len(plots) == 3  # 60 epochs, every 20
    plot = json.loads(plots[0].read_text())
    assert plot["columns"] == ["class", "recall", "precision"]
    assert {row[0] for row in plot["data"]} == {"Drama", "Comedy", "Western"}


def test_leet_follows_the_newest_segment(thrice: Config) -> None:
    folder = str(thrice.run_dir / "wandb")
    text = wandb("leet", "inspect", "--summary", folder)
    assert "state    finished (exit code 0)" in text
    assert "train/loss" in text


def test_sync_uploads_the_segments_in_order_and_reports_a_failed_upload(
    thrice: Config, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "training", "sync", str(thrice.run_dir)]
    alone = {"HOME": str(tmp_path), "PATH": "", "WANDB_API_KEY": ""}

    def sync(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options],
            cwd=ROOT,
            env=alone,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )

    dry = sync("--dry-run")
    *named, total = dry.stdout.splitlines()
    assert named == [str(part) for part in offline_segments(thrice.run_dir)]
    assert total == f"{thrice.run_dir}: 3 of 3 segments to upload"
    refused = sync()
    assert refused.returncode == 1
    assert "No API key" in refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert last.startswith(f"error: {named[0]}: not uploaded, wandb exited with code 1")
    assert refused.stdout.splitlines() == named[:1]  # the others wait for it


ONLINE = """
import sys
from pathlib import Path
from configs.load import load_config
from configs.runtime.tracking import start_tracking
config = load_config(Path(sys.argv[1]), [])
tracker = start_tracking(
    config, run_dir=Path(sys.argv[2]), job_type="training", name="run", run_id=sys.argv[3], rank=0
)
for step in range(200, 251):
    tracker.log({"train/loss": 1.0}, step=step)
tracker.finish()
"""
"""A further attempt, online, that logs the last steps of the earlier ones again."""


def test_on_a_server_all_attempts_are_one_finished_run_with_each_step_once(
    thrice: Config, tmp_path: Path
) -> None:
    copy = tmp_path / "run"  # uploaded segments are marked
    shutil.copytree(thrice.run_dir, copy, symlinks=True)
    # An online run whose end did not reach the server leaves the same file in a folder run-….
    newest = offline_segments(copy)[-1].parent
    newest.rename(newest.with_name(newest.name.removeprefix("offline-")))
    with wandb_server(tmp_path / "server") as server:
        command = [sys.executable, "-m", "training", "sync", str(copy)]
        own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        # The user stays offline; an upload on request is no contradiction.
        environment = own | server.environment | {"WANDB_MODE": "offline"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("3 of 3 segments uploaded\n")
        ((run_id, name, state),) = server.query("SELECT run_id, display_name, state FROM runs")
        assert (name, state) == ("run", "finished")
        assert run_id == records(offline_segments(thrice.run_dir)[0], "run")[0]["run_id"]
        losses = server.query("SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step")
        assert [step for (step,) in losses] == list(range(1, 241))
        subprocess.run(
            [sys.executable, "-c", ONLINE, str(ROOT / "configs/demo.yaml"), str(copy), run_id],
            cwd=tmp_path,
            env=own | server.environment | {"PYTHONPATH": str(ROOT)},
            check=True,
        )
        losses = server.query("SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step")
        assert [step for (step,) in losses] == list(range(1, 251))
        maps = server.query("SELECT step FROM metrics WHERE key = 'val/map' ORDER BY step")
        assert [step for (step,) in maps] == [80, 160, 240]
        panels = {key.partition("/")[0] for (key,) in server.query("SELECT key FROM metrics")}
        assert sorted(panels) == ["holdout", "step", "train", "val", "workload"]
    segments = segments_to_sync(copy, active=False)
    assert [is_synced(segment) for segment in segments] == [True] * 3


def test_an_online_run_records_its_page_and_sends_the_steps_before_its_start(
    film_folder: Path, tmp_path: Path
) -> None:
    config = config_of(film_folder, tmp_path, tracking={"wandb": "online"})
    with wandb_server(tmp_path / "server") as server:
        done = run_alone(config, **server.environment)
        assert done.returncode == 0, done.stderr
        (record,) = read_attempts(config.run_dir)
        assert record.link is not None
        assert record.link.startswith(server.url)
        assert done.stderr.count(f"tracking: {record.link}\n") == 2  # at its start and at the end
        sent = server.query("SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step")
    assert [step for (step,) in sent] == list(range(1, last_step(config) + 1))


def test_tensorboard_contains_each_step_once(thrice: Config) -> None:
    for package in ("tensorboardX", "tensorboard"):
        pytest.importorskip(package, reason="the extra [tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(thrice.run_dir / "tensorboard"))
    board.Reload()
    losses = board.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 241))
    recorded = [record["loss"] for record in history(thrice) if record["kind"] == "train"]
    assert [event.value for event in losses] == pytest.approx(recorded)
    assert "val/genres/text_summary" in board.Tags()["tensors"]


def test_a_loss_of_nan_sends_an_alert(film_folder: Path, tmp_path: Path) -> None:
    config = config_of(
        film_folder,
        tmp_path,
        model={"options": {"hidden": 4, "dropout": 0.0}},
        training={"lr": 1e30},
        tracking={"wandb": "offline"},
    )
    done = run_alone(config)
    assert done.returncode == 1
    (alert,) = records(offline_segments(config.run_dir)[0], "alert")
    assert alert["title"] == "run failed"
    assert "training: the loss is" in alert["text"]
    assert last_step(config) < 12
    assert find(config.run_dir, "last") is None
