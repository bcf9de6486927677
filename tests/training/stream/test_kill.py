"""After repeated kills with SIGKILL, on 1, 2 and 4 ranks, every epoch is complete and in order."""

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

from tests.training.ranks import Job, batches, errors, rank_server
from training.stream.epoch_plan import SamplingOrder, plan_epoch

N_ROWS = [5 + (movie * 53) % 61 for movie in range(210)]
WINDOW, GLOBAL_BATCH, EPOCHS, KILLS = 16, 6, 3, 20
STREAM = {"window": WINDOW, "global_batch": GLOBAL_BATCH, "seed": 11, "prefetch": 4, "threads": 2}


def planned(films: Any, epochs: int) -> dict[tuple[int, int], list[Any]]:
    """Return the windows of each global batch, with digests of the published rows."""
    batches: dict[tuple[int, int], list[Any]] = {}
    for epoch in range(epochs):
        order = SamplingOrder(11, WINDOW, 1, GLOBAL_BATCH)
        plan = plan_epoch(order, films.movies, np.array(N_ROWS), epoch=epoch)
        for number, movie in enumerate(plan.movie.tolist()):
            start = int(plan.start[number])
            digest = hashlib.sha256(films.window(movie, start, WINDOW).tobytes()).hexdigest()
            step = (epoch, number // GLOBAL_BATCH)
            batches.setdefault(step, []).append(
                [movie, int(plan.window_index[number]), start, digest]
            )
    return batches


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_after_kills_at_twenty_random_steps_the_epochs_are_complete_and_in_order(
    make_films: Callable[..., Any], tmp_path: Path, *, cached: bool
) -> None:
    films, generator = make_films(N_ROWS, folder=tmp_path / "set"), random.Random(7)
    cache = tmp_path / "cache"
    stream = STREAM | (
        {"cache_dir": str(cache), "cache_bytes": 100_000} if cached else {"cache_dir": "off"}
    )
    (tmp_path / "run").mkdir()

    def job(attempt: int, kill: list[Any] | None) -> Job:
        folder, source = str(tmp_path / "run"), str(tmp_path / "set")
        return Job(folder, source, stream, (1, 2, 4)[attempt % 3], EPOCHS, attempt, kill=kill)

    with rank_server() as ranks:
        for attempt in range(KILLS):
            rank = generator.randrange((1, 2, 4)[attempt % 3])
            kill = [rank, generator.randrange(6), generator.choice(["before", "after", "saved"])]
            assert ranks.run(job(attempt, kill))[rank] == -signal.SIGKILL, errors(
                job(attempt, kill)
            )
        reached = json.loads((tmp_path / "run" / "position.json").read_text())
        assert 0 < reached["epoch"] < EPOCHS
        last = job(KILLS, None)
        assert ranks.run(last) == [0] * last.world, errors(last)
    assert batches(tmp_path / "run", attempts=KILLS + 1) == planned(films, EPOCHS)
    entries = list(cache.iterdir()) if cached else []
    for entry in entries:  # complete shards only: no lock, no partial download
        assert hashlib.sha256(entry.read_bytes()).hexdigest() == entry.stem
    assert bool(entries) == cached
