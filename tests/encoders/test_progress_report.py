"""A task is one tracked run over all its attempts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from configs.schema import Config
from encoders.progress_report import task_dir
from encoders.task import run_task
from tests.encoders.conftest import Configure


def test_a_task_is_one_wandb_run_over_its_attempts_with_the_totals(
    config: Config, configure: Configure
) -> None:
    offline = configure("tracking.wandb=offline")
    for only in (["0"], []):
        run_task(offline, only=only)
    folder = task_dir(config, (0, 1))
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
