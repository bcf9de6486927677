"""Killed with -9 again and again, on one, two and four ranks: every epoch is whole, in order."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.ranks import Job, batches, rank_server, told
from training.stream.epoch_plan import SamplingOrder, plan_epoch

N_ROWS = [5 + (movie * 53) % 61 for movie in range(210)]
FRAMES, GLOBAL_BATCH, EPOCHS, KILLS = 16, 6, 3, 20
STREAM = {"window": FRAMES, "global_batch": GLOBAL_BATCH, "seed": 11, "prefetch": 4, "threads": 2}


def planned(films: Any, epochs: int) -> dict[tuple[int, int], list[Any]]:
    """Return the windows of each global batch, with digests of the rows that were published."""
    found: dict[tuple[int, int], list[Any]] = {}
    for epoch in range(epochs):
        order = SamplingOrder(11, FRAMES, 1, GLOBAL_BATCH)
        plan = plan_epoch(order, films.movies, np.array(N_ROWS), epoch=epoch)
        for number, movie in enumerate(plan.movie.tolist()):
            start = int(plan.start[number])
            digest = hashlib.sha256(films.window(movie, start, FRAMES).tobytes()).hexdigest()
            step = (epoch, number // GLOBAL_BATCH)
            found.setdefault(step, []).append(
                [movie, int(plan.window_index[number]), start, digest]
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_killed_at_twenty_random_steps_the_epochs_are_whole_and_in_order(
    make_films: Callable[..., Any], tmp_path: Path, *, cached: bool
) -> None:
    films, draw = make_films(N_ROWS, folder=tmp_path / "set"), random.Random(7)
    cache = tmp_path / "cache"
    stream = STREAM | (
        {"cache_dir": str(cache), "cache_bytes": 100_000} if cached else {"cache": "off"}
    )
    (tmp_path / "run").mkdir()

    def job(attempt: int, kill: list[Any] | None) -> Job:
        folder, source = str(tmp_path / "run"), str(tmp_path / "set")
        return Job(folder, source, stream, (1, 2, 4)[attempt % 3], EPOCHS, attempt, kill=kill)

    with rank_server() as ranks:
        for attempt in range(KILLS):
            rank = draw.randrange((1, 2, 4)[attempt % 3])
            kill = [rank, draw.randrange(6), draw.choice(["before", "after", "saved"])]
            assert ranks.run(job(attempt, kill))[rank] == -signal.SIGKILL, told(job(attempt, kill))
        reached = json.loads((tmp_path / "run" / "position.json").read_text())
        assert 0 < reached["epoch"] < EPOCHS
        last = job(KILLS, None)
        assert ranks.run(last) == [0] * last.world, told(last)
    assert batches(tmp_path / "run", attempts=KILLS + 1) == planned(films, EPOCHS)
    entries = list(cache.iterdir()) if cached else []
    for entry in entries:  # whole shards alone: no lock, nothing half
        assert hashlib.sha256(entry.read_bytes()).hexdigest() == entry.stem
    assert bool(entries) == cached
