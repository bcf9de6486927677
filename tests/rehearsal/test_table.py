"""The table of the rehearsal comes from the records of the stages."""

from __future__ import annotations

from typing import Any

from tests.rehearsal.memory import label_of
from tests.rehearsal.table import Measured, Records, last_line, lines, seconds_of, whole


def attempt(outcome: str, started: int, ended: int | None) -> dict[str, Any]:
    """Return a record of an attempt; times are seconds of one minute."""
    times = [None if s is None else f"2026-01-01T00:00:{s:02d}+00:00" for s in (started, ended)]
    return {"outcome": outcome, "started": times[0], "ended": times[1]}


SHARD: Records = [
    [attempt("running", 0, None), attempt("done", 10, 20)],
    [attempt("done", 0, 16)],
]
ENCODE: Records = [
    [attempt("interrupted", 0, 9), attempt("interrupted", 12, 20), attempt("done", 22, 40)]
]
TRAIN: Records = [[attempt("done", 40, 50)]]


def measured(*, is_identical: bool = True) -> Measured:
    return Measured(
        films=110,
        films_in_dump=112,
        shots=160_000,
        images=480_000,
        n_bytes=720_000_000,
        dirt={"twice": 2, "thin_shots": 240},
        wall_s={"shard, undisturbed": 24.0, "encode, undisturbed": 240.0},
        attempts={"shard": SHARD, "encode": ENCODE, "train": TRAIN},
        decoded_per_s=1000.0,
        digest="0123456789abcdef",
        is_identical=is_identical,
        peaks_mb={"movienet-train run rank 0": 512.0},
    )


def test_killed_and_interrupted_attempts_are_counted_and_the_verdict_is_the_last_line() -> None:
    assert last_line(measured()) == (
        "features 0123456789ab · 2 requeues · 1 lost workers · identical to undisturbed: yes"
    )
    assert last_line(measured(is_identical=False)).endswith("identical to undisturbed: NO")


def test_a_stage_takes_from_its_first_start_to_its_last_end() -> None:
    assert seconds_of(SHARD) == 20.0
    assert seconds_of(ENCODE) == 40.0


def test_all_of_movienet_takes_longer_to_pack_than_the_disk_and_less_per_gpu_to_encode() -> None:
    one, eight, many = list(whole(measured()))[1:4]
    # 161 GB at 500 MB/s; 4,798,413 images at 2,500 /s per GPU; ten times ten seconds of training.
    assert one.split()[2:] == ["00:05:22", "00:31:59", "00:01:40", "00:39:01"]
    assert eight.split()[2:] == ["00:05:22", "00:04:00", "00:01:40", "00:11:02"]
    assert many.split()[2:] == ["00:05:22", "00:00:30", "00:01:40", "00:07:32"]


def test_the_table_has_rates_restarts_and_the_peak_of_each_process() -> None:
    text = "\n".join(lines(measured()))
    assert text.startswith("films 110 of 112   shots 160,000   images 480,000   bytes 0.72 GB")
    assert "thin_shots 240   twice 2" in text
    assert "encode, undisturbed                 240      2,000" in text
    assert "encode, restarts included            40     12,000         3         2     0" in text
    assert "      512   movienet-train run rank 0" in text


def test_processes_are_named_by_program_task_and_rank() -> None:
    encode = ["python", "-m", "encoders", "run", "--task", "0/1", "--config", "films.yaml"]
    assert label_of(encode, ["RANK=1"]) == "movienet-encode run --task 0/1 rank 1"
    assert label_of(["python", "-m", "training", "run"], []) == "movienet-train run"
    assert label_of(["/bin/accelerate-launch", *encode], []) == "accelerate launch"
    assert label_of(["bash", "slurm_script"], []) is None
