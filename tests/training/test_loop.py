"""Runs train, stop and resume with the result of an uninterrupted run, on one rank and on two."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.errors import DataError, Interrupted, MovieNetError
from configs.load import dump_config
from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.schema import Config
from sharding.features import open_features, read_rows
from tests import forked
from tests.disks import network_disk
from tests.training.conftest import MakeConfig, MakeFilms, config_of
from tests.training.launched import (
    ROOT,
    TIMEOUT_S,
    at_step,
    attempt,
    command,
    curve,
    history,
    launched,
    same,
    train,
    weights,
)
from training import loop
from training.checkpoint import find, load_trained
from training.scoring import Scores

pytestmark = pytest.mark.slow


def test_a_run_writes_metrics_configuration_and_two_checkpoints(finished: Config) -> None:
    kinds = [
        (r["kind"], r["step"]) for r in history(finished) if r["kind"] in ("train", "validation")
    ]
    steps = [("train", step) for step in range(1, 13)]
    for end in (12, 8, 4):
        steps.insert(end, ("validation", end))
    assert kinds == steps
    assert {"val/map", "val/micro_ap", "holdout/map", "holdout/micro_ap"} < history(finished)[
        -3
    ].keys()
    assert attempt(finished, 1) == ("done", 12)
    assert (finished.run_dir / "config.yaml").read_text() == dump_config(finished)
    names = {path.name for path in (finished.run_dir / "checkpoints").glob("*/*")}
    assert names == {
        *("model.safetensors", "data_stats.safetensors", "optimizer.safetensors"),
        *("state.json", "movies.json"),
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [5, 7])  # in the middle of an epoch, and at its end
def test_a_stopped_run_resumes_with_the_same_result(
    make_config: MakeConfig, finished: Config, number: signal.Signals, step: int
) -> None:
    config = make_config("stopped")
    with (
        at_step(step, lambda: signal.raise_signal(number)),
        pytest.raises(
            Interrupted, match=f"stopped by {number.name} at step {step + 1}, state saved"
        ),
    ):
        train(config)
    assert attempt(config, 1) == ("interrupted", step + 1)
    train(config)
    assert attempt(config, 2) == ("done", 12)
    same(config, finished)


def test_a_run_resumes_where_deleted_files_stay_as_long_as_they_are_open(
    tmp_path: Path, film_folder: Path, finished: Config
) -> None:
    with network_disk(tmp_path / "disk"):
        config = config_of(film_folder, tmp_path / "disk", "resumed")
        with at_step(3, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
            train(config)
        # As a notebook that has loaded the checkpoint does.
        with (config.run_dir / "checkpoints" / "last" / "model.safetensors").open("rb"):
            train(config)
        assert attempt(config, 2) == ("done", 12)
        same(config, finished)


def test_a_failed_run_resumes_from_its_last_checkpoint(make_config: MakeConfig) -> None:
    steps = {"checkpoint_steps": 3}
    undisturbed = make_config("undisturbed", training=steps)
    train(undisturbed)
    config = make_config("failed", training=steps)

    def fail() -> None:
        raise RuntimeError("the node failed")

    for step in (2, 7):  # before the first checkpoint; one step after the second
        with at_step(step, fail), pytest.raises(RuntimeError):
            train(config)
    assert attempt(config, 2) == ("failed", 7)
    unfinished = config.run_dir / "checkpoints/.tmp-last-host-1-01234567"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"truncated")
    train(config)
    same(config, undisturbed)
    assert not unfinished.exists()


def test_a_checkpoint_is_saved_after_the_configured_minutes(make_config: MakeConfig) -> None:
    config = make_config(
        training={"checkpoint_minutes": 1e-9, "validate_epochs": 0, "keep_checkpoints": 99}
    )
    train(config)
    # Every one of the 12 steps is saved: 11 previous checkpoints and ``last``.
    assert len(list(config.run_dir.glob("checkpoints/step-*"))) == 11


def test_a_stop_requested_before_the_start_takes_effect_after_one_step(
    make_config: MakeConfig, finished: Config
) -> None:
    config = make_config("early")
    distributed = start(
        device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
    )
    with closing(distributed), StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Interrupted, match="SIGUSR1 at step 1, state saved"):
            loop.train(config, distributed, stop)
    train(config)
    same(config, finished)


def test_bf16_takes_nearly_the_same_steps(make_config: MakeConfig) -> None:
    still = {"class": "training.models.mean:MeanLinear", "options": {"dropout": 0.0}}
    full = make_config("fp32", model=still)
    half = make_config("bf16", model=still, training={"precision": "bf16"})
    train(full)
    train(half)
    assert curve(half) != curve(full)
    np.testing.assert_allclose(curve(half), curve(full), rtol=0.02)


def test_a_compiled_model_takes_the_same_steps_and_its_checkpoint_fits_the_plain_one(
    make_config: MakeConfig,
) -> None:
    still = {"class": "training.models.mean:MeanLinear", "options": {"dropout": 0.0}}
    once = {"epochs": 1, "holdout": 0, "monitor_split": None}  # every new shape is compiled again
    shared = {"model": still, "eval": {"checkpoint": "last"}, "stream": {"global_batch": 9}}
    plain = make_config("plain", training=once, **shared)
    compiled = make_config("compiled", training={**once, "compile": True}, **shared)
    train(plain)
    train(compiled)
    np.testing.assert_allclose(curve(compiled), curve(plain), rtol=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()
    load_trained(compiled.run_dir, "last")


def test_gradient_accumulation_changes_only_rounding(make_config: MakeConfig) -> None:
    still = {"options": {"hidden": 4, "dropout": 0.0, "input_dropout": 0.0}}
    single = make_config("single", model=still)
    accumulated = make_config("accumulated", model=still, training={"grad_accumulation": 3})
    train(single)
    train(accumulated)
    np.testing.assert_allclose(curve(accumulated), curve(single), rtol=1e-5)


def test_the_published_recipe_trains_the_published_model(make_config: MakeConfig) -> None:
    config = make_config(
        model={"class": "training.models.lstm:OriginalLSTM", "options": {"hidden": 4}},
        training={
            "optimizer": "adam",
            "schedule": "step",
            "loss": "weighted_bce",
            "epochs": 6,
            "weight_decay": 0,
            "feature_noise": 0,
            "frame_dropout": 0,
            "holdout": 0,
        },
        eval={"checkpoint": "last"},
    )
    train(config)
    assert curve(config)[-1] < curve(config)[0]
    assert not (config.run_dir / "checkpoints/best").exists()


def test_the_best_checkpoint_is_the_best_on_the_holdout(finished: Config) -> None:
    scored = {r["step"]: r["holdout/map"] for r in history(finished) if r["kind"] == "validation"}
    best = find(finished.run_dir, "best")
    assert best is not None
    assert scored[best.position.step] == max(scored.values()) == best.position.best


def test_the_average_of_weights_is_saved_scored_and_resumed(make_config: MakeConfig) -> None:
    averaged = {"ema": 0.9}
    undisturbed, config = (make_config(name, training=averaged) for name in ("calm", "stopped"))
    train(undisturbed)
    with at_step(5, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(config)
    train(config)
    same(config, undisturbed)
    average = load_file(config.run_dir / "checkpoints/last/ema.safetensors")
    other = load_file(undisturbed.run_dir / "checkpoints/last/ema.safetensors")
    assert all(torch.equal(average[name], other[name]) for name in average)
    assert any(not torch.equal(average[name], value) for name, value in weights(config).items())
    state = load_trained(config.run_dir, "last").model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in average.items())


def test_training_ends_when_the_holdout_no_longer_improves(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.6, 0.6, 0.5, 0.7])
    monkeypatch.setattr(Scores, "summary", lambda _: {"map": next(values), "micro_ap": 0.5})
    config = make_config(training={"epochs": 9, "patience": 2, "monitor_split": None})
    assert train(config).epoch == 4
    assert attempt(config, 1) == ("done", 16)
    assert train(config).epoch == 4  # the run is finished, not interrupted
    more = make_config(training={"epochs": 9, "patience": 3, "monitor_split": None})
    # A longer patience resumes until the values run out; a failed validation costs no epoch.
    with pytest.raises(StopIteration):
        train(more)
    assert find(config.run_dir, "last").position.epoch == 6  # type: ignore[union-attr]


def test_the_thresholds_tuned_on_the_holdout_are_saved_with_the_model(
    make_config: MakeConfig, finished: Config
) -> None:
    best = load_trained(finished.run_dir, "best")
    tuned = best.threshold
    assert 0 < tuned < 1
    assert tuned != 0.5
    # Each genre has fewer than ten positive movies in this holdout.
    assert best.genre_thresholds == (tuned, tuned, tuned)
    configured = make_config("configured", training={"threshold": 0.2, "epochs": 1})
    train(configured)
    model = load_trained(configured.run_dir, "best")
    assert (model.threshold, model.genre_thresholds) == (0.2, None)
    without = make_config(
        "without", training={"holdout": 0, "epochs": 1}, eval={"checkpoint": "last"}
    )
    train(without)
    last = load_trained(without.run_dir, "last")
    assert (last.threshold, last.genre_thresholds) == (0.5, None)


def test_of_equally_good_checkpoints_the_later_one_is_best(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 1.0, 1.0, 0.75])
    monkeypatch.setattr(Scores, "summary", lambda _: {"map": next(values), "micro_ap": 0.5})
    config = make_config(training={"epochs": 4, "monitor_split": None})
    train(config)
    best = find(config.run_dir, "best")
    assert best is not None
    assert (best.position.epoch, best.position.best) == (3, 1.0)


def test_a_loss_of_nan_or_infinity_stops_the_run(make_config: MakeConfig) -> None:
    config = make_config(training={"lr": 1e30}, model={"options": {"hidden": 4, "dropout": 0.0}})
    with pytest.raises(
        MovieNetError, match=r"the loss is (nan|inf) at step \d+; lower training.lr"
    ):
        train(config)
    assert attempt(config, 1)[0] == "failed"


@pytest.mark.parametrize(("n_rows", "seen_by"), [(4, "the measuring"), (40, "a step")])
def test_damaged_rows_of_a_train_movie_are_named_and_not_blamed_on_the_model(
    make_films: MakeFilms, tmp_path: Path, n_rows: int, seen_by: str
) -> None:
    folder = tmp_path / "films" / "features"
    films = make_films([n_rows] * 8, folder=folder)
    (folder.parent / "split.json").write_text(
        json.dumps({"train": [f"tt{number:07d}" for number in range(8)]})
    )
    good = films.rows[5].tobytes()
    bad = films.rows[5].copy()
    bad[:15] = np.float16("nan")  # of 40 rows only the middle window of 6 is measured
    (shard,) = [path for path in folder.glob("*.tar") if good in path.read_bytes()]
    shard.write_bytes(shard.read_bytes().replace(good, bad.tobytes()))
    config = config_of(
        folder.parent,
        tmp_path / "runs",
        training={"holdout": 0, "monitor_split": None, "epochs": 20, "validate_epochs": 0},
        stream={"features_url": str(folder), "global_batch": 4},
        eval={"checkpoint": "last"},
    )
    with pytest.raises(DataError) as refused:
        train(config)
    assert re.fullmatch(
        rf"{shard}: NaN or infinite numbers in the rows of tt0000005; "
        r"run `movienet-encode verify --repair.*`",
        str(refused.value),
    )
    assert (attempt(config, 1)[1] is None) == (seen_by == "the measuring")


def test_a_movie_of_nan_in_val_is_named_and_costs_no_epoch(
    make_config: MakeConfig, film_folder: Path, finished: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    shutil.copytree(film_folder / "features", folder)
    features = open_features(str(folder))
    rows = read_rows(features, 35).tobytes()
    shard = next(path for path in folder.glob("*.tar") if rows in path.read_bytes())
    good = shard.read_bytes()
    shard.write_bytes(good.replace(rows, np.float16("nan").tobytes() + rows[2:]))
    config = make_config(stream={"features_url": str(folder)})
    with pytest.raises(DataError, match=r"1 of 12 movies have logits .* finite \(tt0000035\)"):
        train(config)
    assert attempt(config, 1) == ("failed", 4)
    shard.write_bytes(good)
    train(config)
    assert curve(config) == curve(finished)


# --------------------------------------------------------------------- real processes


DIE_AT_STEP = """
import os, signal, sys
from training import __main__, loop
fatal, original = int(sys.argv.pop(1)), loop.optimizer_step
def step(run, batches):
    if run.position.step == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, batches)
loop.optimizer_step = step
sys.exit(__main__.main(sys.argv[1:]))
"""
"""The training command, which kills itself after this number of completed steps; -1: never."""


def test_a_killed_run_resumes_exactly_from_its_last_checkpoint(make_config: MakeConfig) -> None:
    steps = {"checkpoint_steps": 3}
    undisturbed, killed = (make_config(name, training=steps) for name in ("calm", "killed"))

    script = undisturbed.run_dir.with_suffix(".py")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(DIE_AT_STEP)

    def run(config: Config, fatal: int) -> int:
        words = [str(script), str(fatal), *command(config)[3:]]
        return forked.run(words, folder=ROOT, environment=os.environ).returncode

    assert run(undisturbed, -1) == 0
    for number, fatal in ((1, 2), (2, 7)):  # before the first checkpoint; one step after the second
        assert run(killed, fatal) == -signal.SIGKILL
        assert attempt(killed, number) == ("running", None)
        assert max(record["step"] for record in history(killed)) == fatal
    assert run(killed, -1) == 0
    same(killed, undisturbed)


def test_a_failure_of_rank_0_ends_all_ranks_without_a_traceback(
    make_config: MakeConfig,
) -> None:
    config = make_config("unwritable")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "checkpoints").write_text("a file in the place of the folder of rank 0")
    with launched(config, 2) as process:
        assert process.wait(timeout=TIMEOUT_S) != 0
    log = (config.run_dir / "log").read_text()
    assert "checkpoints/best: not saved: File exists; fix this and rerun the command" in log
    # Rank 1 logs its error, unless the launcher terminates it first after the exit of rank 0.
    error = re.search(r"error: rank 1: lost another rank \(.+\); see the error of that rank", log)
    assert error or re.search(r"rank +: 1 .*\n.*exitcode +: -15", log), log
    assert "[rank1]: Traceback" not in log
    assert attempt(config, 1) == ("failed", 4)


def test_the_training_loop_does_not_import_scikit_learn_before_the_first_step() -> None:
    code = "import sys, training.loop; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"False\n"
