"""A run trains, stops, goes on and ends as if nothing had happened; on one rank or two."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.errors import ConfigError, DataError, Interrupted, MovieNetError, StateError
from configs.load import dump_config
from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.schema import Config
from tests.training.conftest import MakeConfig, MakeFilms
from tests.training.launched import (
    ROOT,
    TIMEOUT_S,
    attempt,
    command,
    curve,
    history,
    launched,
    run_alone,
    same,
    wait_for_step,
    weights,
)
from training import loop
from training.checkpoint import Position, find, load_trained
from training.movies import choose_movies, hold_out
from training.score import Scores


def train(config: Config) -> Position:
    training = config.training
    launch = start(
        device="cpu",
        precision=training.precision,
        accumulation=training.accumulation,
        expect_world=1,
        threads=1,
        compiled=training.compile,
    )
    try:
        return loop.train(config, launch)
    finally:
        launch.close()


def train_logged(config: Config) -> str:
    """What a run says, and its log."""
    logger, said = logging.getLogger("training"), io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    train(config)
    logger.removeHandler(handler)
    return said.getvalue()


@contextmanager
def at_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Act once, in the middle of the optimiser step that follows ``step`` whole ones."""
    original = loop.optimizer_step

    def wrapped(run: Any, batches: Any) -> dict[str, float]:
        if run.at.step == step:
            act()
        return original(run, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", wrapped)
        yield


@pytest.fixture
def whole(make_config: MakeConfig) -> Config:
    """A run that nobody disturbed."""
    config = make_config("whole")
    train(config)
    return config


def test_a_run_leaves_its_record_its_config_and_two_checkpoints(whole: Config) -> None:
    kinds = [(r["kind"], r["step"]) for r in history(whole) if r["kind"] in ("train", "validation")]
    steps = [("train", step) for step in range(1, 13)]
    for end in (12, 8, 4):
        steps.insert(end, ("validation", end))
    assert kinds == steps
    assert {"val/map", "val/micro_ap", "holdout/map", "holdout/micro_ap"} < history(whole)[
        -3
    ].keys()
    assert attempt(whole, 1) == ("done", 12)
    assert (whole.run_dir / "config.yaml").read_text() == dump_config(whole)
    names = {path.name for path in (whole.run_dir / "checkpoints").glob("*/*")}
    assert names == {
        *("model.safetensors", "given.safetensors", "optimizer.safetensors", "state.json")
    }


def test_a_finished_run_is_done(whole: Config) -> None:
    assert train(whole).step == 12
    assert not (whole.run_dir / "attempt-2.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [5, 7])  # in the middle of an epoch, and at its end
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    make_config: MakeConfig, whole: Config, number: signal.Signals, step: int
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
    same(config, whole)


def test_a_run_that_died_goes_on_from_its_last_checkpoint(make_config: MakeConfig) -> None:
    steps = {"checkpoint_steps": 3}
    undisturbed = make_config("undisturbed", training=steps)
    train(undisturbed)
    config = make_config("died", training=steps)

    def die() -> None:
        raise RuntimeError("the node is gone")

    for step in (2, 7):  # before the first checkpoint; two steps behind one
        with at_step(step, die), pytest.raises(RuntimeError):
            train(config)
    assert attempt(config, 2) == ("failed", 7)
    half = config.run_dir / "checkpoints/.tmp-last-host-1-0"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    train(config)
    same(config, undisturbed)
    assert not half.exists()


def test_the_last_checkpoints_stay_and_the_one_before_may_be_gone_on_from(
    make_config: MakeConfig,
) -> None:
    kept = {"checkpoint_steps": 3, "keep": 3}
    undisturbed = make_config("undisturbed", training=kept)
    train(undisturbed)
    checkpoints = undisturbed.run_dir / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["best", "last", "step-00000008", "step-00000009"]
    shutil.rmtree(checkpoints / "last")
    log = train_logged(undisturbed)
    assert "last: missing, step-00000009 is taken" in log
    fresh = make_config("fresh", training=kept)
    train(fresh)
    same(undisturbed, fresh)


def test_a_damaged_checkpoint_names_the_one_before_it(make_config: MakeConfig) -> None:
    config = make_config(training={"keep": 2})
    train(config)
    (config.run_dir / "checkpoints/last/state.json").write_bytes(b"{")
    with pytest.raises(StateError, match="remove it to go on from step-00000008"):
        train(config)


def test_a_checkpoint_is_saved_when_so_many_minutes_have_passed(make_config: MakeConfig) -> None:
    config = make_config(training={"checkpoint_minutes": 1e-9, "validate_epochs": 0, "keep": 99})
    train(config)
    assert len(list(config.run_dir.glob("checkpoints/step-*"))) == 11  # and ``last``: each step


def test_a_stop_that_was_asked_for_before_the_start_comes_after_one_step(
    make_config: MakeConfig, whole: Config
) -> None:
    config = make_config("early")
    launch = start(device="cpu", precision="fp32", accumulation=1, expect_world=1, threads=1)
    with closing(launch), StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Interrupted, match="SIGUSR1 at step 1, state saved"):
            loop.train(config, launch, stop)
    train(config)
    same(config, whole)


def test_bf16_takes_nearly_the_same_steps(make_config: MakeConfig) -> None:
    still = {"class": "training.models.mean:MeanLinear", "options": {"dropout": 0.0}}
    full = make_config("fp32", model=still)
    half = make_config("bf16", model=still, training={"precision": "bf16"})
    train(full)
    train(half)
    assert curve(half) != curve(full)
    np.testing.assert_allclose(curve(half), curve(full), rtol=0.02)


def test_an_lstm_trains_in_bf16_or_is_refused_in_one_line(make_config: MakeConfig) -> None:
    config = make_config(training={"precision": "bf16", "epochs": 1})
    told = ""
    try:
        train(config)
    except ConfigError as error:  # most CPUs have no such arithmetic for LSTMs
        told = str(error)
    line = r"training\.precision: MaskedLSTM does not run in bf16 on this cpu: .+; want 'fp32'"
    assert not told or re.match(line, told)
    assert attempt(config, 1)[0] == ("failed" if told else "done")


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps_and_its_checkpoint_fits_the_plain_one(
    make_config: MakeConfig,
) -> None:
    still = {"class": "training.models.mean:MeanLinear", "options": {"dropout": 0.0}}
    once = {"epochs": 1, "holdout": 0, "watch": None}  # each other shape is compiled anew
    shared = {"model": still, "eval": {"checkpoint": "last"}, "stream": {"global_batch": 9}}
    plain = make_config("plain", training=once, **shared)
    compiled = make_config("compiled", training={**once, "compile": True}, **shared)
    train(plain)
    train(compiled)
    np.testing.assert_allclose(curve(compiled), curve(plain), rtol=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()
    load_trained(compiled.run_dir, "last")


def test_accumulation_changes_nothing_but_the_last_digits(make_config: MakeConfig) -> None:
    still = {"options": {"hidden": 4, "dropout": 0.0, "input_dropout": 0.0}}
    whole = make_config("at-once", model=still)
    parts = make_config("in-parts", model=still, training={"accumulation": 3})
    train(whole)
    train(parts)
    np.testing.assert_allclose(curve(parts), curve(whole), rtol=1e-5)


def test_an_optimiser_of_the_published_recipe_trains_the_original(make_config: MakeConfig) -> None:
    config = make_config(
        model={"class": "training.models.lstm:OriginalLSTM", "options": {"hidden": 4}},
        training={
            "optimizer": "adam",
            "schedule": "step",
            "loss": "weighted_bce",
            "epochs": 6,
            "weight_decay": 0,
            "noise": 0,
            "hide_frames": 0,
            "holdout": 0,
        },
        eval={"checkpoint": "last"},
    )
    train(config)
    assert curve(config)[-1] < curve(config)[0]
    assert not (config.run_dir / "checkpoints/best").exists()


def test_the_best_checkpoint_is_the_best_on_the_holdout(whole: Config) -> None:
    scored = {r["step"]: r["holdout/map"] for r in history(whole) if r["kind"] == "validation"}
    best = find(whole.run_dir, "best")
    assert best is not None
    assert scored[best.position.step] == max(scored.values()) == best.position.best


def test_the_average_of_weights_is_saved_scored_and_gone_on_with(make_config: MakeConfig) -> None:
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
    config = make_config(training={"epochs": 9, "patience": 2, "watch": None})
    assert train(config).epoch == 4
    assert attempt(config, 1) == ("done", 16)
    assert train(config).epoch == 4  # it is done, not merely stopped
    more = make_config(training={"epochs": 9, "patience": 3, "watch": None})
    with pytest.raises(StopIteration):  # a longer patience goes on, until the values are used up
        train(more)
    assert find(config.run_dir, "last").position.epoch == 5  # type: ignore[union-attr]


def test_the_threshold_of_the_best_holdout_is_kept_with_the_model(
    make_config: MakeConfig, whole: Config
) -> None:
    tuned = load_trained(whole.run_dir, "best").threshold
    assert 0 < tuned < 1
    assert tuned != 0.5
    wanted = make_config("wanted", training={"threshold": 0.2, "epochs": 1})
    train(wanted)
    assert load_trained(wanted.run_dir, "best").threshold == 0.2
    without = make_config(
        "without", training={"holdout": 0, "epochs": 1}, eval={"checkpoint": "last"}
    )
    train(without)
    assert load_trained(without.run_dir, "last").threshold == 0.5


@pytest.mark.parametrize("place", ["", "checkpoints/last", "checkpoints/last/model.safetensors"])
def test_a_run_may_begin_with_the_weights_of_another(
    make_config: MakeConfig, whole: Config, place: str
) -> None:
    begun = make_config(
        "begun",
        model={"options": {"hidden": 4}, "init_from": str(whole.run_dir / place)},
        training={"epochs": 1, "lr": 1e-12, "weight_decay": 0},
    )
    train(begun)
    source = weights(whole, "last" if place else "best")
    for name, value in weights(begun).items():
        torch.testing.assert_close(value, source[name], rtol=0, atol=1e-9)


def test_weights_of_another_shape_are_left_out_and_named(
    make_config: MakeConfig, whole: Config, caplog: pytest.LogCaptureFixture
) -> None:
    wider = {"options": {"hidden": 5}, "init_from": str(whole.run_dir)}
    with caplog.at_level("INFO"):
        train(make_config("wider", model=wider, training={"epochs": 1}))
    assert "MaskedLSTM begins from" in caplog.text
    assert "head.weight" in caplog.text.partition("fresh: ")[2]


def test_weights_that_fit_nowhere_are_told_in_one_line(make_config: MakeConfig) -> None:
    train(make_config("lstm", training={"epochs": 1}))
    start = str(make_config("lstm").run_dir)
    original = {"class": "training.models.lstm:OriginalLSTM", "init_from": start}
    for model, told in (
        ({**original, "options": {"hidden": 6}}, "none of its .* tensors fits .* OriginalLSTM"),
        ({"init_from": "no/such/run"}, "no/such/run: no weights there"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.init_from: .*{told}"):
            train(make_config("other", model=model))


def test_of_equally_good_checkpoints_the_later_is_kept(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 1.0, 1.0, 0.75])
    monkeypatch.setattr(Scores, "summary", lambda _: {"map": next(values), "micro_ap": 0.5})
    config = make_config(training={"epochs": 4, "watch": None})
    train(config)
    best = find(config.run_dir, "best")
    assert best is not None
    assert (best.position.epoch, best.position.best) == (3, 1.0)


def test_a_trained_model_is_loaded_with_what_scoring_must_know(whole: Config) -> None:
    trained = load_trained(whole.run_dir, "last")
    assert (trained.epoch, trained.step, trained.dim) == (3, 12, 8)
    assert trained.genres == ("Drama", "Comedy", "Western")
    assert trained.config == whole
    assert trained.provenance["import"] == {"from": "test"}
    assert not trained.model.training
    state = trained.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(whole).items())


def test_a_run_without_the_checkpoint_asked_for_says_which_it_has(make_config: MakeConfig) -> None:
    config = make_config(training={"holdout": 0}, eval={"checkpoint": "last"})
    train(config)
    with pytest.raises(StateError, match="no checkpoint 'best'; there is 'last'"):
        load_trained(config.run_dir, "best")


@pytest.mark.parametrize(
    "name", ["state.json", "given.safetensors", "model.safetensors", "optimizer.safetensors"]
)
def test_a_damaged_checkpoint_is_told_in_one_line(
    make_config: MakeConfig, whole: Config, name: str
) -> None:
    (whole.run_dir / "checkpoints" / "last" / name).write_bytes(b"{")
    with pytest.raises(StateError, match=r"last: damaged \(.*\); remove it to begin anew"):
        train(make_config("whole", training={"epochs": 4}))


def test_ones_own_model_is_kept_with_the_checkpoint(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, dim, genres):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(dim, genres)\n"
        "    def forward(self, features, mask):\n"
        "        return self.linear(features * mask.unsqueeze(-1)).amax(1)\n"
    )
    config = make_config(model={"class": f"{file}:Net", "options": {}})
    train(config)
    file.unlink()
    trained = load_trained(config.run_dir, "last")
    assert type(trained.model).__name__ == "Net"


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"training": {"lr": 0.5}}, r"checkpoint has training.lr 0.01, the configuration 0.5"),
        ({"model": {"options": {"hidden": 8}}}, r"checkpoint has model.options.hidden 4"),
        ({"model": {"class": "mine:MaskedLSTM"}}, r"'training.models.lstm:MaskedLSTM', the"),
        ({"stream": {"frames": 5}}, r"checkpoint has stream.frames 6, the configuration 5"),
        ({"eval": {"windows": 9}}, r"checkpoint has eval.windows \d, the configuration 9"),
    ],
)
def test_a_run_that_began_otherwise_is_not_gone_on_with(
    make_config: MakeConfig, section: dict[str, Any], told: str
) -> None:
    train(make_config(training={"epochs": 1}))
    for epochs in (1, 2):  # a run that is done would else pass for one of this configuration
        more = {**section, "training": {"epochs": epochs, **section.get("training", {})}}
        line = f"{told}.*; choose another training.run, or set it back"
        with pytest.raises(StateError, match=line):
            train(make_config(**more))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder": {"name": "longer"}}, r"data digest: .*: the feature set is another one"),
        ({"training": {"split": "fold:1/3"}}, r"plan digest: .*: the train movies"),
        ({"stream": {"seed": 1}}, r"checkpoint has stream.seed 0, the configuration 1"),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])  # done, and with an epoch to go
def test_a_run_is_neither_done_nor_gone_on_with_on_other_data(
    make_films: MakeFilms,
    make_config: MakeConfig,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    told: str,
    epochs: int,
) -> None:
    for name, n_rows in (("films", 9), ("longer", 11)):
        make_films([n_rows] * 14, folder=tmp_path / "features" / name)
    began: dict[str, dict[str, Any]] = {
        "data": {"root": str(tmp_path)},
        "stream": {"source": None},
        "training": {"epochs": 1, "split": "fold:0/3"},
    }
    train(make_config(**began))
    began["training"]["epochs"] = epochs
    other = {name: {**began.get(name, {}), **change.get(name, {})} for name in began | change}
    with pytest.raises(StateError, match=told):
        train(make_config(**other))


@pytest.mark.parametrize(
    ("genres", "told"),
    [
        (("Drama", "Comedy"), "got 2, 'none' as number 3; .* has 3, 'Western' there"),
        (("Drama", "Western", "Comedy"), "got 3, 'Western' as number 2; .* has 3, 'Comedy' there"),
        (("Drama", "Comedy", "Western", "War"), "got 4, 'War' as number 4; .* has 3, 'none' there"),
    ],
)
def test_genres_that_the_feature_set_does_not_have_are_told_in_one_line(
    make_config: MakeConfig, genres: tuple[str, ...], told: str
) -> None:
    line = rf"^data\.genres: {told}; set data.genres to the set's, or give the set yours by "
    with pytest.raises(ConfigError, match=line):
        train(make_config(data={"genres": genres}))


def test_a_finished_run_may_be_given_more_epochs(make_config: MakeConfig, whole: Config) -> None:
    for epochs in (1, 3):
        train(make_config(training={"epochs": epochs}))
    assert curve(make_config()) == curve(whole)


def test_a_loss_that_is_no_number_stops_the_run(make_config: MakeConfig) -> None:
    config = make_config(training={"lr": 1e30}, model={"options": {"hidden": 4, "dropout": 0.0}})
    with pytest.raises(
        MovieNetError, match=r"the loss is (nan|inf) at step \d+; lower training.lr"
    ):
        train(config)
    assert attempt(config, 1)[0] == "failed"


def test_the_parts_of_a_run_have_no_movie_in_common(make_config: MakeConfig) -> None:
    from sharding.features import open_features

    config = make_config()
    movies = choose_movies(open_features(config.features_source), config.training)
    assert (len(movies.train), len(movies.holdout), len(movies.watch)) == (27, 3, 12)
    together = np.concatenate([movies.train, movies.holdout, movies.watch])
    assert sorted(together.tolist()) == list(range(42))


def test_a_split_without_train_movies_is_told(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text('{"val": ["tt0000001"]}')
    config = make_config(training={"split": str(tmp_path / "empty.json")})
    with pytest.raises(DataError, match="no movie of its 'train' has features and labels"):
        train(config)


@pytest.mark.parametrize("part", ["train", "holdout"])
def test_watching_what_a_run_learns_or_chooses_from_is_refused(
    make_config: MakeConfig, part: str
) -> None:
    with pytest.raises(ConfigError, match=rf"training\.watch: got '{part}'"):
        train(make_config(training={"watch": part}))


def test_a_movie_stays_in_the_holdout_when_others_leave() -> None:
    ids = [f"tt{number}" for number in range(200)]
    held = hold_out(ids, 0.1, seed=0)
    assert held.sum() == 20
    assert (held != hold_out(ids, 0.1, seed=1)).any()
    rest = [movie for movie, out in zip(ids, held, strict=True) if not out]
    kept = [movie for movie, out in zip(ids, held, strict=True) if out]
    again = hold_out([*kept, *rest[:90]], 20 / 110, seed=0)
    assert again.tolist() == [True] * 20 + [False] * 90


def test_no_holdout_holds_nothing() -> None:
    assert not hold_out(["a", "b"], 0.0, seed=0).any()


# --------------------------------------------------------------------- real processes


DIE_AT_STEP = """
import os, signal, sys
from training import __main__, loop
fatal, original = int(sys.argv.pop(1)), loop.optimizer_step
def step(run, batches):
    if run.at.step == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, batches)
loop.optimizer_step = step
sys.exit(__main__.main(sys.argv[1:]))
"""
"""`training run` that kills itself in the step that follows so many whole ones; -1: never."""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_exactly(make_config: MakeConfig) -> None:
    steps = {"checkpoint_steps": 3}
    undisturbed, killed = (make_config(name, training=steps) for name in ("calm", "killed"))

    def run(config: Config, fatal: int) -> int:
        file = config.run_dir.with_suffix(".yaml")
        file.write_text(dump_config(config))
        command = [sys.executable, "-c", DIE_AT_STEP, str(fatal), "run", "--config", str(file)]
        return subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S, check=False).returncode

    assert run(undisturbed, -1) == 0
    for number, fatal in ((1, 2), (2, 7)):  # before the first checkpoint; one step behind one
        assert run(killed, fatal) == -signal.SIGKILL
        assert attempt(killed, number) == ("running", None)
        assert max(record["step"] for record in history(killed)) == fatal
    assert run(killed, -1) == 0
    same(killed, undisturbed)


@pytest.mark.slow
def test_where_rank_0_alone_fails_both_end_and_no_rank_shows_a_traceback(
    make_config: MakeConfig,
) -> None:
    config = make_config("no-room")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "checkpoints").write_text("where only rank 0 would write")
    with launched(config, 2) as process:
        assert process.wait(timeout=TIMEOUT_S) != 0
    log = (config.run_dir / "log").read_text()
    assert "checkpoints/best: not saved: File exists; put that right and run" in log
    # Rank 1 tells its line unless the launcher, which sees rank 0 end, is faster to end it.
    told = re.search(r"error: rank 1: lost another rank \(.+\); its own line tells why", log)
    assert told or re.search(r"rank +: 1 .*\n.*exitcode +: -15", log), log
    assert "[rank1]: Traceback" not in log
    assert attempt(config, 1) == ("failed", 4)


@pytest.mark.slow
def test_an_interrupted_command_exits_with_75(make_config: MakeConfig) -> None:
    config = make_config("alone", training={"epochs": 500, "validate_epochs": 0})
    process = subprocess.Popen(command(config), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_step(config, 5)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75
    assert "stopped by SIGUSR1 at step" in told.splitlines()[-1]
    assert attempt(config, 1)[0] == "interrupted"


def test_a_launch_of_worlds_of_one_is_refused_by_an_option(make_config: MakeConfig) -> None:
    done = run_alone(make_config(), "--expect-world", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: expect_world: launched 1 rank, want 2; start them with")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_whole(
    make_config: MakeConfig, small_disk: Path
) -> None:
    shared: dict[str, Any] = {
        "model": {"options": {"hidden": 72}},  # 1.4 MB with its moments: one has room, two have not
        "training": {"checkpoint_steps": 3, "holdout": 0},
        "eval": {"checkpoint": "last"},
    }
    undisturbed = make_config("undisturbed", **shared)
    train(undisturbed)
    config = make_config("full", data={"runs": str(small_disk)}, **shared)
    done = run_alone(config)
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(
        "checkpoints/last: not saved: .*No space left.*; make room and run the same command again, "
        "the checkpoint before is whole",
        told,
    )
    assert "Traceback" not in done.stderr
    assert attempt(config, 1) == ("failed", 5)
    saved = find(config.run_dir, "last")
    assert saved is not None
    assert saved.position.step == 3
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    train(config)
    same(config, undisturbed)
