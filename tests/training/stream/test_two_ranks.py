"""Two ranks in two processes: together they read exactly the windows of the plan."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.stream.epoch_plan import SamplingOrder, plan_epoch

pytestmark = pytest.mark.slow

N_ROWS = [5 + (movie * 53) % 61 for movie in range(31)]
WINDOW, GLOBAL_BATCH = 16, 9

RANK = """
import hashlib, json, sys
import numpy as np
from configs.schema import StreamConfig
from sharding.features import open_features
from training.stream.loader import FeatureStream

folder, rank, world, accumulation, n_steps, state = json.loads(sys.argv[1])
features = open_features(folder)
config = StreamConfig(window=16, global_batch=9, seed=11, prefetch=4)
stream = FeatureStream(
    features, np.arange(31), config, rank=rank, world_size=world, accumulation=accumulation
)
if state:
    stream.load_state_dict(state)
windows, done = [], 0
while done < n_steps:
    for batch in stream:
        for row in range(len(batch.movie)):
            digest = hashlib.sha256(batch.features[row].numpy().tobytes()).hexdigest()
            place = [int(batch.movie[row]), int(batch.window_index[row]), int(batch.start[row])]
            windows.append([batch.epoch, batch.step, *place, float(batch.weight[row]), digest])
        done += batch.last_micro
        if done == n_steps:
            break
print(json.dumps({"windows": windows, "state": stream.state_dict()}))
"""


@pytest.fixture(scope="module")
def folder(make_films: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    make_films(N_ROWS, folder=folder)
    return folder


def run_ranks(
    folder: Path, world: int, n_steps: int, state: Any = None, accumulation: int = 1
) -> tuple[list[list[Any]], Any]:
    """Run ``world`` processes concurrently; return their windows in order, and the state."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                json.dumps([str(folder), rank, world, accumulation, n_steps, state]),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    answers = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    states = [answer["state"] for answer in answers]
    assert all(each == states[0] for each in states)
    windows = [window for answer in answers for window in answer["windows"] if window[5] > 0]
    return sorted(windows), states[0]


def planned(films: Any, epochs: int) -> list[list[Any]]:
    """Return the windows of the plan, with digests of the published rows."""
    windows = []
    for epoch in range(epochs):
        order = SamplingOrder(11, WINDOW, 1, GLOBAL_BATCH)
        plan = plan_epoch(order, films.movies, np.array(N_ROWS), epoch=epoch)
        columns = (plan.movie.tolist(), plan.window_index.tolist(), plan.start.tolist())
        for number, (movie, window_index, start) in enumerate(zip(*columns, strict=True)):
            rows = films.window(movie, start, WINDOW)
            digest = hashlib.sha256(rows.tobytes()).hexdigest()
            windows.append([epoch, number // GLOBAL_BATCH, movie, window_index, start, 1.0, digest])
    return sorted(windows)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_together_read_the_windows_of_the_plan_for_two_epochs(
    folder: Path, make_films: Callable[..., Any], accumulation: int
) -> None:
    windows, state = run_ranks(folder, 2, 8, accumulation=accumulation)
    assert windows == planned(make_films(N_ROWS), 2)
    assert (state["epoch"], state["step"]) == (2, 0)


def test_two_ranks_interrupted_mid_epoch_resume_on_three_and_on_one_with_the_same_windows(
    folder: Path, make_films: Callable[..., Any]
) -> None:
    head, state = run_ranks(folder, 2, 3)
    assert (state["epoch"], state["step"]) == (0, 3)
    middle, state = run_ranks(folder, 3, 2, state)
    tail, state = run_ranks(folder, 1, 3, state)
    assert sorted(head + middle + tail) == planned(make_films(N_ROWS), 2)
    assert (state["epoch"], state["step"]) == (2, 0)
