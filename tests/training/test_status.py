"""``movienet-train status``: state, progress and next command of runs, from their files."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from configs.errors import StateError
from configs.load import dump_config
from configs.runtime.attempt import Attempt, AttemptRecord
from configs.schema import Config
from tests.training.conftest import MakeConfig
from tests.training.launched import train
from tests.training.test_main import hinted
from training.__main__ import main
from training.metrics_file import MetricsFile
from training.status import current_attempt

pytestmark = pytest.mark.slow


def record(
    number: int, outcome: Literal["running", "done", "interrupted", "failed"], ended: str | None
) -> AttemptRecord:
    return AttemptRecord(number, outcome, 0, "", f"2026-01-01T0{number}:00", ended, "node1", 7)


def end(
    config: Config, outcome: Literal["done", "interrupted", "failed"], message: str = ""
) -> None:
    """Write the files of a run that ended after 2 of 3 epochs."""
    attempt = Attempt.begin(config.run_dir)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    metrics = MetricsFile(config.run_dir / "metrics.jsonl", from_step=0)
    for epoch, holdout in ((1, 0.75), (2, 0.5)):
        metrics.append("train", step=4 * epoch, epoch=epoch - 1, loss=1 / epoch)
        scores = {"val/map": 0.25 * epoch, "holdout/map": holdout}
        metrics.append("validation", step=4 * epoch, epoch=epoch, **scores)
    metrics.close()
    attempt.record_start(0, "https://wandb.example/ada/runs/1")
    attempt.finish(outcome, 8, message)


def test_the_runs_of_a_folder_are_a_table_with_the_reason_and_the_link_below(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end(make_config("first"), "done")
    assert main(["status", str(tmp_path)]) == 0
    capsys.readouterr()
    end(make_config("second"), "failed", "training: the loss is nan at step 9; lower training.lr")
    assert main(["status", str(tmp_path)]) == 1, "not all runs are done"
    assert capsys.readouterr().out.splitlines() == [
        "run      state    attempt   epochs   step   best mAP",
        "first    done           1      2/3      8   holdout 0.750 (epoch 1)",
        "    https://wandb.example/ada/runs/1",
        "second   failed         1      2/3      8   holdout 0.750 (epoch 1)",
        "    training: the loss is nan at step 9; lower training.lr",
        "    https://wandb.example/ada/runs/1",
    ]


def test_one_run_is_shown_with_its_plot_its_attempts_and_the_command_that_resumes_it(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    end(config, "interrupted", "stopped by SIGTERM at step 8")
    assert main(["status", str(config.run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        f"{config.run_dir}: interrupted, attempt 1",
        "epochs       2/3, step 8",
        "best mAP     holdout 0.750, val 0.250 (epoch 1)",
        f"plot         {config.run_dir / 'learning_curve.png'}",
        "link         https://wandb.example/ada/runs/1",
    ]
    assert lines[5].startswith("attempt 1    interrupted  steps 0 to 8, 20")
    assert lines[6:] == [
        "    stopped by SIGTERM at step 8",
        f"next: `movienet-train run --config {config.run_dir / 'config.yaml'}`",
    ]
    assert (config.run_dir / "learning_curve.png").is_file(), "runs of earlier versions get one"


def test_a_moved_run_is_continued_where_it_is(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    end(config, "done")
    moved = config.run_dir.rename(tmp_path / "moved")
    assert main(["status", str(moved)]) == 0
    arguments = hinted(capsys.readouterr().out, "movienet-eval")
    assert arguments[3:] == [f"data.runs={tmp_path}", "training.run_name=moved"]


def test_a_moved_run_on_a_few_movies_is_continued_only_in_a_folder_of_that_limit(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data={"limit": 4})
    config.run_dir.parent.mkdir(parents=True)
    end(config, "done")
    run = config.run_dir
    for place, runs in (("limit-4/moved", [f"data.runs={tmp_path}"]), ("elsewhere/moved", None)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        run = run.rename(tmp_path / place)
        assert main(["status", str(run)]) == 0
        printed = capsys.readouterr().out
        if runs is None:
            assert "next:" not in printed
        else:
            assert hinted(printed, "movienet-eval")[3:4] == runs


def test_a_run_without_a_living_process_is_killed_not_running(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    script = (
        "import pathlib, sys\n"
        "from configs.runtime.attempt import Attempt\n"
        "attempt = Attempt.begin(pathlib.Path(sys.argv[1]))\n"
        "print('begun', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = ["status", "--json", str(config.run_dir)]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(config.run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        assert main(command) == 1
        (run,) = json.loads(capsys.readouterr().out)
        assert (run["state"], run["step"], run["command"]) == ("running", 0, None)
        process.send_signal(signal.SIGKILL)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    assert main(command) == 1
    (run,) = json.loads(capsys.readouterr().out)
    assert run["state"] == "killed"
    resume = ["movienet-train", "run", "--config", str(config.run_dir / "config.yaml")]
    assert shlex.split(run["command"]) == resume


@pytest.mark.parametrize(
    ("attempts", "active", "expected"),
    [
        ([(1, "done", "01:30")], False, (1, "done")),
        ([(1, "running", None), (2, "interrupted", "02:30")], False, (2, "interrupted")),
        ([(1, "interrupted", "01:30"), (2, "running", None)], False, (2, "killed")),
        # Attempt 2 was refused, since attempt 1 was running.
        ([(1, "running", None), (2, "failed", "02:30")], True, (1, "running")),
        ([(1, "done", "03:30"), (2, "failed", "02:30")], False, (1, "done")),
    ],
)
def test_the_state_is_that_of_the_attempt_that_runs_or_ended_last(
    attempts: list[tuple[int, Literal["running", "done", "interrupted", "failed"], str | None]],
    active: bool,
    expected: tuple[int, str],
) -> None:
    records = [
        record(n, outcome, ended and f"2026-01-01T{ended}") for n, outcome, ended in attempts
    ]
    attempt, state = current_attempt(records, active=active)
    assert (attempt.attempt, state) == expected


@pytest.mark.parametrize("outcome", ["failed", "interrupted", "running"])
def test_a_finished_run_stays_done_after_an_attempt_that_ended_before_training(
    outcome: Literal["running", "interrupted", "failed"],
) -> None:
    first, refused = record(1, "done", "2026-01-01T01:30"), record(2, outcome, "2026-01-01T02:30")
    assert current_attempt([first, refused], active=False) == (first, "done")
    # A run that was extended, and then failed, is no longer done.
    extended = replace(record(2, "failed", "2026-01-01T02:30"), from_step=8)
    refused = replace(refused, attempt=3, started="2026-01-01T03:00", ended="2026-01-01T03:30")
    attempt, state = current_attempt([first, extended, refused], active=False)
    assert (attempt.attempt, state) == (3, "killed" if outcome == "running" else outcome)


def test_a_refused_command_on_a_finished_run_leaves_its_status(
    make_config: MakeConfig, finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / finished.training.run_name
    shutil.copytree(finished.run_dir, run)
    refused = make_config(run.name, training={"lr": 0.5})
    with pytest.raises(StateError, match=r"got training\.lr 0\.5, want 0\.01"):
        train(refused)
    assert main(["status", str(run)]) == 0
    head, *lines, following = capsys.readouterr().out.splitlines()
    assert head == f"{run}: done, attempt 1"
    assert any(line.startswith("attempt 2    failed ") for line in lines)
    assert following.startswith("next: `movienet-eval report ")


def test_damaged_metrics_of_one_run_are_named_and_hide_no_other(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        end(make_config(name), "done")
    (tmp_path / "first" / "metrics.jsonl").write_bytes(b"\0\0\n")
    assert main(["status", str(tmp_path)]) == 0
    _, first, *problem, _, second, _ = capsys.readouterr().out.splitlines()
    assert first.split() == ["first", "done", "1", "0/3", "0", "-"]
    assert "first/metrics.jsonl: line 1: corrupt" in " ".join(" ".join(problem).split())
    assert second.endswith("holdout 0.750 (epoch 1)")


def test_a_corrupt_attempt_record_is_the_problem_of_its_run_and_hides_no_other(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        end(make_config(name), "done")
    (tmp_path / "first" / "attempt-1.json").write_bytes(b"{")
    assert main(["status", str(tmp_path)]) == 1
    _, first, *problem, second, _ = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "first",
        "unknown",
        "-",
        "2/3",
        "8",
        "holdout",
        "0.750",
        "(epoch",
        "1)",
    ]
    assert "first/attempt-1.json:corrupt" in "".join("".join(problem).split()), "wrapped anywhere"
    assert second.endswith("holdout 0.750 (epoch 1)")
    assert main(["status", "--json", str(tmp_path)]) == 1
    runs = json.loads(capsys.readouterr().out)
    assert [(run["state"], run["attempt"]) for run in runs] == [("unknown", None), ("done", 1)]


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no run, want the folder of a run, or one that contains runs\n"
    )
    assert main(["status"]) == 2
