from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given

from configs.errors import DataError, Interrupted, MachineError
from configs.load import load_config
from configs.runtime.attempt import (
    Attempt,
    Outcome,
    TaskAttempt,
    last_attempt,
    read_attempt,
    task_dir,
)
from configs.runtime.signals import StopRequest
from tests.damage import damaged, reads_or_reports
from tests.disks import small_disk


def read(run_dir: Path, number: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / f"attempt-{number}.json").read_text())
    return content


def test_an_attempt_is_recorded_as_running_from_its_start(tmp_path: Path) -> None:
    attempt = Attempt.begin(tmp_path / "runs" / "first")
    record = read(tmp_path / "runs" / "first", 1)
    started = record.pop("started")
    assert attempt.number == 1
    assert record == {
        "attempt": 1,
        "outcome": "running",
        "step": None,
        "message": "",
        "ended": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "token": None,
        "job": None,
        "task": None,
        "restarts": 0,
        "from_step": None,
        "link": None,
    }
    attempt.record_start(20, "https://wandb.example/ada/runs/1")
    record = read(tmp_path / "runs" / "first", 1)
    assert (record["outcome"], record["from_step"]) == ("running", 20)
    assert record["link"] == "https://wandb.example/ada/runs/1"
    attempt.finish("done", 0)
    assert datetime.fromisoformat(started).utcoffset() is not None


@pytest.mark.parametrize("outcome", ["done", "interrupted", "failed"])
def test_the_final_record_contains_outcome_step_and_reason_in_one_line(
    tmp_path: Path, outcome: Literal["done", "interrupted", "failed"]
) -> None:
    Attempt.begin(tmp_path).finish(outcome, 40, "disk\n  full")
    record = read(tmp_path, 1)
    assert (record["outcome"], record["step"], record["message"]) == (outcome, 40, "disk full")
    assert record["ended"] >= record["started"]


def test_a_disk_that_is_full_at_the_end_leaves_the_record_running_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "small", "64k"):
        attempt = Attempt.begin(tmp_path / "small")
        with suppress(OSError):
            (tmp_path / "small" / "data").write_bytes(bytes(100_000))
        attempt.finish("failed", 40, "the first error")
        assert read(tmp_path / "small", 1)["outcome"] == "running"
        assert [path.name for path in (tmp_path / "small").glob(".tmp-*")] == []
        reason = "(No space left on device), as after a kill"
        assert f"attempt-1.json: not updated to 'failed' {reason}" in caplog.text
        (tmp_path / "small" / "data").unlink()
        Attempt.begin(tmp_path / "small").finish("done", 40)


def test_the_next_attempt_takes_the_number_after_the_highest(tmp_path: Path) -> None:
    for name in ("attempt-2.json", "attempt-10.json", "attempt-x.json", "attempt-11.json.tmp"):
        (tmp_path / name).write_text("{}")
    for number in (11, 12):
        attempt = Attempt.begin(tmp_path)
        assert attempt.number == number
        attempt.finish("failed", None)


def test_a_concurrent_attempt_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from configs.runtime.attempt import Attempt\n"
        "attempt = Attempt.begin(pathlib.Path(sys.argv[1]))\n"
        "print('begun', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"begun\n"
        with pytest.raises(MachineError, match=r"another process .* attempt-1.json; wait until"):
            Attempt.begin(tmp_path)
        other.kill()
    Attempt.begin(tmp_path).finish("done", 0)
    assert [read(tmp_path, number)["outcome"] for number in (1, 2, 3)] == [
        *("running", "failed", "done")
    ]


def test_the_record_of_a_killed_attempt_remains_running(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys\n"
        "from configs.runtime.attempt import Attempt\n"
        "Attempt.begin(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read(tmp_path, 1)["outcome"] == "running"
    attempt = Attempt.begin(tmp_path)
    assert attempt.number == 2
    attempt.finish("done", 0)


def test_the_record_of_a_task_keeps_the_worst_outcome_that_any_rank_reported(
    tmp_path: Path,
) -> None:
    first = TaskAttempt.begin(tmp_path)
    second = TaskAttempt(tmp_path, first.number)
    reports: list[tuple[Outcome, Outcome]] = [
        ("done", "done"),
        ("interrupted", "interrupted"),
        ("done", "interrupted"),
        ("failed", "failed"),
        ("interrupted", "failed"),
    ]
    for reported, recorded in reports:
        second.report(reported, 7)
        record = last_attempt(tmp_path)
        assert record is not None
        assert record.outcome == recorded
    assert TaskAttempt.begin(tmp_path).number == 2


def test_a_corrupt_record_is_reported_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "attempt-1.json").write_text('{"attempt": 1')
    with pytest.raises(DataError, match=rf"^{tmp_path}/attempt-1.json: corrupt \(.*\); delete it$"):
        last_attempt(tmp_path)


def in_job(monkeypatch: pytest.MonkeyPatch, token: str, job: str = "7") -> None:
    monkeypatch.setenv("MOVIENET_LIFE", token)
    monkeypatch.setenv("SLURM_JOB_ID", job)


def test_a_record_holds_token_job_and_restarts_of_the_life_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, "a")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    TaskAttempt.begin(tmp_path, task="3/8")
    record = read(tmp_path, 1)
    assert {name: record[name] for name in ("token", "job", "task", "restarts")} == {
        "token": "a",
        "job": "5_3",
        "task": "3/8",
        "restarts": 2,
    }


def test_a_run_that_an_older_life_of_the_same_job_holds_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, "old")
    old = Attempt.begin(tmp_path)
    assert not old.superseded()
    in_job(monkeypatch, "new")

    def old_life() -> None:
        while not old.superseded():
            time.sleep(0.01)
        old.finish("interrupted", 4)

    thread = threading.Thread(target=old_life)
    thread.start()
    new = Attempt.begin(tmp_path, wait_s=60)
    thread.join()
    assert (new.number, new.superseded()) == (2, False)
    new.finish("done", 5)


def test_a_signal_ends_the_wait_for_an_older_life_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, "old")
    old = Attempt.begin(tmp_path)
    in_job(monkeypatch, "new")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match=r"^SIGTERM: stopped while waiting for an older life"):
            Attempt.begin(tmp_path, wait_s=300, stop=stop)
    assert read(tmp_path, 2)["outcome"] == "interrupted"
    old.finish("done", 1)


@pytest.mark.parametrize(("token", "job"), [("old", "7"), ("new", "8")])
def test_another_job_and_a_second_process_of_the_same_life_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, job: str
) -> None:
    in_job(monkeypatch, "old")
    old = Attempt.begin(tmp_path)
    in_job(monkeypatch, token, job)
    start = time.monotonic()
    with pytest.raises(MachineError, match="another process works on this run"):
        Attempt.begin(tmp_path, wait_s=300)
    assert time.monotonic() - start < 90
    assert not old.superseded()
    old.finish("done", 1)


def test_a_corrupt_record_stops_neither_a_run_nor_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_job(monkeypatch, "old")
    run, task = Attempt.begin(tmp_path / "run"), TaskAttempt.begin(tmp_path / "task")
    (tmp_path / "run/attempt-2.json").write_bytes(b"[1]")
    assert not run.superseded()
    (tmp_path / "task/attempt-1.json").write_bytes(b"\0")
    task.report("done", 7)
    assert "attempt-1.json: not updated to 'done'" in caplog.text
    run.finish("done", 1)


def test_a_task_limited_to_some_shards_keeps_its_records_apart(tmp_path: Path) -> None:
    config = load_config(Path("demo"), [f"data.root={tmp_path}"])
    folders = {task_dir(config, "encode", (0, 1), only) for only in ((), ("1",), ("1", "2"))}
    assert len(folders) == 3
    assert task_dir(config, "encode", (0, 1), ("2", "1")) in folders


def test_a_damaged_record_is_read_or_a_one_line_error(tmp_path: Path) -> None:
    Attempt.begin(tmp_path).finish("done", 40, "message")
    path = tmp_path / "attempt-1.json"
    intact = path.read_bytes()

    @given(damaged(intact))
    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        assert reads_or_reports(partial(read_attempt, path))

    check()
