"""A checkpoint is whole, kept with what it needs, or refused in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import StateError
from configs.schema import Config
from tests.training.conftest import MakeConfig
from tests.training.launched import attempt, run_alone, same, train, train_logged, weights
from training.checkpoint import find, load_trained


def test_the_last_checkpoints_stay_and_the_one_before_may_be_gone_on_from(
    make_config: MakeConfig,
) -> None:
    kept = {"checkpoint_steps": 3, "keep_checkpoints": 3}
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
    config = make_config(training={"keep_checkpoints": 2})
    train(config)
    (config.run_dir / "checkpoints/last/state.json").write_bytes(b"{")
    with pytest.raises(StateError, match="remove it to go on from step-00000008"):
        train(config)


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
    config = make_config("whole", training={"epochs": 4})
    shutil.copytree(whole.run_dir, config.run_dir, symlinks=True)
    (config.run_dir / "checkpoints" / "last" / name).write_bytes(b"{")
    with pytest.raises(StateError, match=r"last: damaged \(.*\); remove it to begin anew"):
        train(config)


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
        ({"stream": {"window": 5}}, r"checkpoint has stream.window 6, the configuration 5"),
        ({"eval": {"windows": 9}}, r"checkpoint has eval.windows \d, the configuration 9"),
    ],
)
def test_a_run_that_began_otherwise_is_not_gone_on_with(
    make_config: MakeConfig, section: dict[str, Any], told: str
) -> None:
    train(make_config(training={"epochs": 1}))
    for epochs in (1, 2):  # a run that is done would else pass for one of this configuration
        more = {**section, "training": {"epochs": epochs, **section.get("training", {})}}
        line = f"{told}.*; choose another training.run_name, or set it back"
        with pytest.raises(StateError, match=line):
            train(make_config(**more))


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
