"""Training speed of the default model, reads included, compared with the original trainer's step.

    python tests/bench/bench_training.py [--quick] [--json FILE] [--scratch FOLDER]

Both use windows of 256 rows of 512 values, 32 per step, on one thread in float32. The original's
step is implemented below and takes its batches from memory at no cost. Ours is the product's
training loop on a sealed feature set on disk: plan, reads, augmentation, step, metrics. Two ranks
under ``accelerate launch``, one thread each, process the same global batches as one rank that is
started in the same way. The start of ``movienet-train run``, with tracking and without, is compared
with a script that imports torch and accelerate, builds the same model and takes one step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turns import Measured, Row, Turn, main, median_of, take_turns

if TYPE_CHECKING:
    from configs.schema import Config

CHECKOUT = Path(__file__).resolve().parents[2]
FRAMES, DIM, GENRES, BATCH = 256, 512, 21, 32
ROWS = 600
"""Rows per movie."""

Run = Callable[[], Mapping[str, float]]


# --- the data -------------------------------------------------------------------------------------


def make_features(folder: Path, *, movies: int) -> None:
    """Seal a feature set of random rows, with all movies in train."""
    import numpy as np

    from configs.schema import GENRES as NAMES
    from sharding.features import MovieFeatures, publish_feature_shard, seal_features
    from sharding.labels import Labels, make_labels
    from sharding.storage.local import DiskStorage

    values = np.random.default_rng(0)

    def labels_for(ids: Sequence[str]) -> Labels:
        genres = {movie: [NAMES[number % GENRES]] for number, movie in enumerate(ids)}
        return make_labels(ids, NAMES, genres, dict.fromkeys(ids, "train"))[0]

    storage, per_shard = DiskStorage(folder), 16
    for shard in range(movies // per_shard):
        content = [
            MovieFeatures(
                f"tt{shard * per_shard + number:07d}",
                values.standard_normal((ROWS, DIM)).astype(np.float16),
                np.full(ROWS, -1, np.int32),
                ROWS,
            )
            for number in range(per_shard)
        ]
        publish_feature_shard(storage, shard, content, input_digest="bench")
    provenance = {"import": {"from": "bench"}, "dim": DIM}
    seal_features(
        storage, n_shards=movies // per_shard, provenance=provenance, labels_for=labels_for
    )


def _config(data: Path, out: Path, run: str) -> Config:
    from configs.schema import Config

    return Config.model_validate(
        {
            "version": 1,
            "data": {"root": str(out), "runs": str(out)},
            "encoder": {"name": "bench"},
            "stream": {
                "features_url": str(data),
                "window": FRAMES,
                "global_batch": BATCH,
                "windows_per_movie": 8,
            },
            "training": {
                "run_name": run,
                "epochs": 2,
                "validate_epochs": 0,
                "holdout": 0,
                "monitor_split": None,
                "device": "cpu",
                "threads": 1,
            },
            "eval": {"checkpoint": "last"},
            "tracking": {"wandb": "off"},
        }
    )


def _speed(config: Config) -> dict[str, float]:
    """Return the metrics of the second epoch; the first one is a warm-up."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    speeds = [record for record in map(json.loads, lines) if record["kind"] == "speed"]
    return {name: speeds[-1][name] for name in ("windows_per_s", "wait_share", "memory_mb")}


# --- the ways -------------------------------------------------------------------------------------


def ours(data: Path, out: Path) -> Run:
    """Return the product's training loop with default model and options."""
    from itertools import count

    from configs.runtime.launch import start
    from training.loop import train

    numbers = count()

    def run() -> Mapping[str, float]:
        config = _config(data, out, f"run-{next(numbers)}")
        distributed = start(
            device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
        )
        try:
            train(config, distributed)
        finally:
            distributed.close()
        return _speed(config)

    return run


def original(data: Path, out: Path) -> Run:  # noqa: ARG001  # every way gets both
    """Return the original's step: layer norm, full BiLSTM, last step, BCE on probabilities."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    norm = nn.LayerNorm([FRAMES, DIM])
    lstm = nn.LSTM(DIM, 128, batch_first=True, bidirectional=True)
    pool, head = nn.MaxPool1d(4), nn.Linear(64, GENRES)
    parameters = [*norm.parameters(), *lstm.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    loss = nn.BCELoss()
    rows_BTD = torch.randn(BATCH, FRAMES, DIM)
    labels_BG = (torch.rand(BATCH, GENRES) < 0.1).float()
    steps = 4

    def run() -> Mapping[str, float]:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            last_BH = lstm(norm(rows_BTD))[0][:, -1]
            loss(torch.sigmoid(head(pool(last_BH))), labels_BG).backward()
            optimizer.step()
        return {"windows_per_s": steps * BATCH / (time.perf_counter() - started)}

    return run


def ranks(size: int) -> Callable[[Path, Path], Run]:
    """Return runs of ``size`` ranks under ``accelerate launch``."""

    def prepare(data: Path, out: Path) -> Run:
        def run() -> Mapping[str, float]:
            from configs.load import dump_config

            config = _config(data, out, f"ranks-{size}")
            file = out / "config.yaml"
            file.write_text(dump_config(config))
            command = ["-m", "accelerate.commands.launch", "--config_file"]
            command += [str(CHECKOUT / "configs" / "accelerate" / "cpu-2.yaml")]
            command += ["--num_processes", str(size), "-m", "training", "run"]
            command += ["--config", str(file), "--expected-world-size", str(size), "--quiet"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(
                [sys.executable, *command],
                cwd=CHECKOUT,
                env=environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return _speed(config)

        return run

    return prepare


def start_of_run(wandb: str) -> Callable[[Path, Path], Run]:
    """Return starts of the command; each turn ends after the first step.

    Args:
        wandb: ``tracking.wandb``.
    """

    def prepare(data: Path, out: Path) -> Run:
        def run() -> Mapping[str, float]:
            from configs.load import dump_config

            config = _config(data, out, "start")
            file, log = out / "config.yaml", out / "log"
            file.write_text(dump_config(config))
            command = [sys.executable, "-m", "training", "run", "--config", str(file)]
            command += [f"tracking.wandb={wandb}"]
            begin = time.perf_counter()
            with (
                log.open("wb") as stderr,
                subprocess.Popen(
                    command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=stderr
                ) as process,
            ):
                first_line = _seconds_until_written(log, process, begin)
                metrics = config.run_dir / "metrics.jsonl"
                first_step = _seconds_until_written(metrics, process, begin)
                process.terminate()
            return {"first_line_s": first_line, "first_step_s": first_step}

        return run

    return prepare


def _seconds_until_written(file: Path, process: subprocess.Popen[bytes], begin: float) -> float:
    while not (file.is_file() and file.stat().st_size):
        if process.poll() is not None:
            raise SystemExit(f"movienet-train run ended without {file}")
        time.sleep(0.005)
    return time.perf_counter() - begin


PLAIN_START = f"""
import torch, accelerate
from training.models.lstm import MaskedLSTM
from training.models.rows import RowStatistics

torch.set_num_threads(1)
accelerator = accelerate.Accelerator(cpu=True)
prior, rows = torch.full(({GENRES},), 0.1), RowStatistics.neutral({DIM})
model = MaskedLSTM(dim={DIM}, prior=prior, rows=rows)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
rows_BTD, mask_BT = torch.randn({BATCH}, {FRAMES}, {DIM}), torch.ones({BATCH}, {FRAMES}).bool()
optimizer.zero_grad()
logits_BG = model(rows_BTD, mask_BT)
loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_BG, logits_BG.detach() * 0)
accelerator.backward(loss)
optimizer.step()
"""


def plain_start(data: Path, out: Path) -> Run:  # noqa: ARG001  # every way gets both
    """Return runs of a script that builds the default model and takes one step."""

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", PLAIN_START], cwd=CHECKOUT, check=True)
        return {"first_step_s": time.perf_counter() - begin}

    return run


WAYS = {
    "original": original,
    "ours": ours,
    "one rank": ranks(1),
    "two ranks": ranks(2),
    "plain start": plain_start,
    "start of run": start_of_run("offline"),
    "untracked start": start_of_run("off"),
}


# --- the table ------------------------------------------------------------------------------------


def measure(quick: bool, scratch: Path) -> Measured:
    """Measure all ways, in alternating turns."""
    movies, repeats = (64, 3) if quick else (128, 5)
    data = scratch / "features"
    make_features(data, movies=movies)
    turns = take_turns(
        {name: (name,) for name in ("original", "ours")},
        data=data,
        scratch=scratch,
        repeats=repeats,
    )
    # These start processes, whose imports take seconds: fewer turns.
    turns |= take_turns(
        {name: (name,) for name in ("one rank", "two ranks")},
        data=data,
        scratch=scratch,
        repeats=1 if quick else 3,
        fresh=True,
    )
    turns |= take_turns(
        {name: (name,) for name in ("plain start", "start of run", "untracked start")},
        data=data,
        scratch=scratch,
        repeats=repeats,
        fresh=True,
    )
    return Measured(
        rows=_rows(turns),
        turns=turns,
        method="windows of 256 x 512, 32 per step, one thread per rank, float32; median of turns",
        title=f"{movies} movies of {ROWS} rows, {repeats} turns",
    )


def _rows(turns: Mapping[str, Sequence[Turn]]) -> list[Row]:
    trained = ("original", "ours", "one rank", "two ranks")
    rate = {name: median_of(turns[name], "windows_per_s") for name in trained}
    shown = {name: f"{value:,.0f} windows/s" for name, value in rate.items()}
    tracked, untracked, plain = (
        median_of(turns[name], "first_step_s")
        for name in ("start of run", "untracked start", "plain start")
    )
    first_line = median_of(turns["start of run"], "first_line_s")
    waits = statistics.median(turn.figures["wait_share"] for turn in turns["ours"])
    return [
        Row("original", shown["original"], "", 1.0, "", None),
        Row.at_least("step_vs_original", rate["ours"] / rate["original"], 10, shown["ours"]),
        Row.at_most("wait_share", waits, 0.05),
        Row(
            "two_ranks_vs_one",
            shown["two ranks"],
            "",
            rate["two ranks"] / rate["one rank"],
            "",
            None,
        ),
        Row("memory_mb", "", "", median_of(turns["ours"], "memory_mb"), "", None),
        Row.at_most("first_line_s", first_line, 1),
        Row.at_most("first_step_vs_plain", tracked / plain, 1.3, f"{tracked:.1f} s"),
        Row("untracked_step_vs_plain", f"{untracked:.1f} s", "", untracked / plain, "", None),
    ]


if __name__ == "__main__":
    main(__doc__, WAYS, measure, ("torch", "accelerate", "numpy"))
