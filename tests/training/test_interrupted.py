"""A run that is killed and stopped at random steps, on any world size, reaches the same result.

Real processes started by ``(trap '' USR1; exec accelerate-launch …)``, real signals, seeded steps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import Interrupted
from configs.schema import Config
from tests.sharding.servers import rule
from tests.training.conftest import MakeConfig, config_of
from tests.training.launched import (
    TIMEOUT_S,
    at_step,
    attempt,
    curve,
    finish,
    finish_forked,
    history,
    last_step,
    launched,
    same,
    send,
    train,
    wait_for_step,
    wait_until,
    weights,
    workers,
)
from tests.training.stream.test_faults import http_set
from training.checkpoint import find

USR1, TERM, KILL = signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL

Strike = Callable[[int, list[int], random.Random], None]

SOFT: dict[str, Strike] = {
    "USR1 to launcher and ranks": lambda top, ranks, _: send(USR1, top, *ranks),
    "TERM to the launcher": lambda top, _ranks, _: send(TERM, top),
    "USR1 to one rank": lambda _top, ranks, draw: send(USR1, draw.choice(ranks)),
}
HARD: dict[str, Strike] = {
    "KILL to one rank": lambda _top, ranks, draw: send(KILL, draw.choice(ranks)),
    "KILL to launcher and ranks": lambda top, ranks, _: send(KILL, top, *ranks),
}

LONG: dict[str, Any] = {
    "epochs": 100,
    "validate_epochs": 50,
    "checkpoint_steps": 10,
    "mixup": 0.4,
    "ema": 0.9,
}
"""400 steps: five interruptions take about 70."""


def saved_step(config: Config) -> int:
    saved = find(config.run_dir, "last")
    return 0 if saved is None else saved.position.step


def strike(config: Config, ranks: int, number: int, fault: str, draw: random.Random) -> None:
    """Start attempt ``number``, inject the fault at a random step, and check the outcome."""
    target = saved_step(config) + draw.randrange(30)  # 0: during the start
    with launched(config, ranks) as process:
        wait_until(lambda: (config.run_dir / f"attempt-{number}.json").exists(), config)
        wait_for_step(config, target)
        pids = workers(process)
        (SOFT | HARD)[fault](process.pid, pids, draw)
        code = process.wait(timeout=TIMEOUT_S)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), config)
    assert code != 0
    outcome, step = attempt(config, number)
    if fault in SOFT:
        assert (outcome, step) == ("interrupted", saved_step(config)), fault
    else:
        assert outcome in ("running", "failed"), fault
    assert saved_step(config) <= last_step(config)


@pytest.mark.slow
def test_kills_and_stops_at_random_steps_change_no_bit(make_config: MakeConfig) -> None:
    undisturbed, struck = (make_config(name, training=LONG) for name in ("calm", "struck"))
    finish_forked(undisturbed, 2)
    draw = random.Random(14)
    faults = [*SOFT, *HARD]
    draw.shuffle(faults)
    for number, fault in enumerate(faults, 1):
        strike(struck, 2, number, fault, draw)
    finish_forked(struck, 2)
    assert attempt(struck, len(faults) + 1)[0] == "done"
    same(struck, undisturbed)


def stable_step(config: Config) -> int:
    """Return the last step once the run has taken no further one for a while."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 3:
        if last_step(config) != seen:
            seen, since = last_step(config), time.monotonic()
        time.sleep(0.05)
    return seen


@pytest.mark.slow
def test_a_stop_while_the_data_source_is_silent_saves_the_last_step(
    make_config: MakeConfig, film_folder: Path, tmp_path: Path
) -> None:
    with http_set(film_folder / "features", tmp_path) as (proxy, location, storage):
        config = make_config(
            training=LONG,
            stream={"features_url": location, "cache_dir": "off"},
            storage=storage | {"timeout": 300.0},
        )
        with launched(config, 1) as process:
            wait_for_step(config, 5)
            rule(proxy, {"do": "stall", "seconds": 120, "times": 10**9})
            step = stable_step(config)
            send(TERM, process.pid)
            assert process.wait(timeout=TIMEOUT_S) == Interrupted.exit_code
    assert attempt(config, 1) == ("interrupted", step)
    assert saved_step(config) == step


@pytest.mark.slow
def test_a_stop_while_a_validation_waits_for_a_silent_source_costs_neither_epoch_nor_validation(
    make_config: MakeConfig, film_folder: Path, finished: Config, tmp_path: Path
) -> None:
    with http_set(film_folder / "features", tmp_path) as (proxy, location, storage):
        config = make_config(
            stream={"features_url": location, "cache_dir": "off"},
            storage=storage | {"timeout": 300.0},
        )

        def stop_at_the_last_step_of_the_epoch() -> None:
            rule(proxy, {"do": "stall", "seconds": 120, "times": 10**9})
            signal.raise_signal(TERM)

        with at_step(3, stop_at_the_last_step_of_the_epoch), pytest.raises(Interrupted):
            train(config)
        assert attempt(config, 1) == ("interrupted", 4)
        rule(proxy)
        train(config)
    validated = [record["epoch"] for record in history(config) if record["kind"] == "validation"]
    assert validated == [1, 2, 3]
    same(config, finished)


STILL: dict[str, Any] = {"options": {"hidden": 4, "dropout": 0.0, "input_dropout": 0.0}}


def assert_close(first: Config, second: Config) -> None:
    """Assert that two runs took the same steps except for rounding.

    Tolerance: 1e-5 of the loss at each step and 1e-4 of each weight (1e-5 near 0). The sum over
    the slices of a batch is rounded differently from the sum over the batch, at each step.
    """
    np.testing.assert_allclose(curve(first), curve(second), rtol=1e-5)
    for key, value in weights(first).items():
        torch.testing.assert_close(weights(second)[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_dropout_a_run_can_resume_on_another_world_size_each_time(
    make_config: MakeConfig, trained_alone: Config
) -> None:
    config = make_config("moved", model=STILL, training=SHORT)
    draw = random.Random(3)
    for number, (ranks, fault) in enumerate(
        [
            (2, "KILL to launcher and ranks"),
            (1, "USR1 to launcher and ranks"),
            (3, "KILL to one rank"),
        ],
        1,
    ):
        strike(config, ranks, number, fault, draw)
    log = finish_forked(config, 2)
    assert "saved with world size" in log
    assert_close(trained_alone, config)


SHORT: dict[str, Any] = {
    "epochs": 25,
    "validate_epochs": 12,
    "checkpoint_steps": 5,
    "lr": 1e-3,
    "mixup": 0.4,
    "feature_dropout": 0.1,
    "ema": 0.9,
}
"""100 steps, the last of each epoch padded: 27 windows in batches of 7."""

ACROSS_MACHINES = 1e-4
"""Relative tolerance of the loss to the golden curve: other processors round differently."""

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curve.json"


def golden_curve() -> list[float]:
    losses: list[float] = json.loads(GOLDEN.read_text())
    return losses


@pytest.fixture(scope="module")
def trained_alone(film_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An uninterrupted run of one rank."""
    runs = tmp_path_factory.mktemp("alone")
    config = config_of(film_folder, runs, "alone", model=STILL, training=SHORT)
    finish_forked(config, 1)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "finish"), [(2, finish), (3, finish_forked)])
def test_without_dropout_any_world_size_takes_the_same_steps_as_one_rank(
    make_config: MakeConfig, trained_alone: Config, ranks: int, finish: Callable[..., str]
) -> None:
    config = make_config("ranks", model=STILL, training={**SHORT, "grad_accumulation": 2})
    log = finish(config, ranks)
    assert "Warning" not in log
    assert_close(trained_alone, config)
    np.testing.assert_allclose(curve(config), golden_curve(), rtol=ACROSS_MACHINES)


@pytest.mark.slow
def test_the_loss_curve_of_one_rank_is_golden(trained_alone: Config) -> None:
    """A changed curve requires an entry in the CHANGELOG."""
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        losses = [round(loss, 7) for loss in curve(trained_alone)]
        GOLDEN.write_text(json.dumps(losses, indent=0) + "\n")
    np.testing.assert_allclose(curve(trained_alone), golden_curve(), rtol=ACROSS_MACHINES)
