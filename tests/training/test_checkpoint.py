"""Checkpoints: complete, self-contained, and refused in one line if corrupt or inconsistent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.errors import ConfigError, StateError
from configs.schema import Config
from tests.damage import damaged, reads_or_reports
from tests.training.conftest import MakeConfig
from tests.training.launched import attempt, run_alone, same, train, train_logged, weights
from training.checkpoint import copy_to_cpu, find, load_trained, recipe

pytestmark = pytest.mark.slow


def test_previous_checkpoints_are_kept_and_a_run_can_resume_from_them(
    make_config: MakeConfig,
) -> None:
    keeping = {"checkpoint_steps": 3, "keep_checkpoints": 3}
    undisturbed = make_config("undisturbed", training=keeping)
    train(undisturbed)
    checkpoints = undisturbed.run_dir / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["best", "last", "step-00000008", "step-00000009"]
    shutil.rmtree(checkpoints / "last")
    log = train_logged(undisturbed)
    assert "last: missing, using step-00000009" in log
    fresh = make_config("fresh", training=keeping)
    train(fresh)
    same(undisturbed, fresh)


def test_the_error_of_a_corrupt_checkpoint_names_the_previous_one(make_config: MakeConfig) -> None:
    config = make_config(training={"keep_checkpoints": 2})
    train(config)
    (config.run_dir / "checkpoints/last/state.json").write_bytes(b"{")
    with pytest.raises(StateError, match="to corrupt-last, to resume from step-00000008"):
        train(config)


def test_folders_that_the_user_made_are_kept(make_config: MakeConfig) -> None:
    config = make_config(training={"keep_checkpoints": 2, "checkpoint_steps": 1, "epochs": 1})
    checkpoints = config.run_dir / "checkpoints"
    mine = ["step-00000002-for-the-paper", "step-2", "last.old", "best-good", ".tmp-mine"]
    for name in mine:
        (checkpoints / name).mkdir(parents=True)
    train(config)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {*mine, "best", "last", "step-00000003"}


def test_a_run_that_starts_again_without_last_keeps_its_best_model_and_its_metrics(
    make_config: MakeConfig, finished: Config
) -> None:
    config = make_config("finished")
    shutil.copytree(finished.run_dir, config.run_dir, symlinks=True)
    best, metrics = config.run_dir / "checkpoints/best", config.run_dir / "metrics.jsonl"
    before = (best / "state.json").read_bytes(), metrics.read_bytes()
    shutil.rmtree(config.run_dir / "checkpoints/last")
    log = train_logged(config)
    kept, copy = best.with_name("best-1"), metrics.with_name("metrics-1.jsonl")
    assert ((kept / "state.json").read_bytes(), copy.read_bytes()) == before
    assert "restarts at step 0; its later 'best' is now" in log
    assert "restarts at step 0; its later metrics are in" in log
    same(config, finished)


def test_the_error_of_a_corrupt_best_names_last(make_config: MakeConfig, finished: Config) -> None:
    config = make_config("finished")
    shutil.copytree(finished.run_dir, config.run_dir, symlinks=True)
    (config.run_dir / "checkpoints/best/state.json").write_bytes(b"{")
    line = r"best: corrupt \(.*\); use 'last': set eval.checkpoint=last for"
    with pytest.raises(StateError, match=line):
        load_trained(config.run_dir, "best")


def test_a_loaded_checkpoint_is_not_mapped_so_its_folder_can_be_deleted(finished: Config) -> None:
    saved = find(finished.run_dir, "last")
    assert saved is not None
    model = saved.build()
    optimizer = torch.optim.AdamW(model.parameters())
    saved.load_optimizer(optimizer)
    assert str(saved.folder) not in Path("/proc/self/maps").read_text()
    assert saved.identity.data_stats.dim == 8


def test_tensors_of_a_gpu_are_copied_to_the_cpu_so_a_save_needs_no_gpu_memory() -> None:
    with FakeTensorMode():  # tensors of a GPU without one
        weight = torch.nn.Parameter(torch.empty(3, 2, device="cuda"))
        copies = copy_to_cpu({"tied": weight, "weight": weight, "view": weight.T})
    assert {str(copy.device) for copy in copies.values()} == {"cpu"}


def test_copies_of_tied_weights_and_views_are_independent_and_contiguous() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    copies = copy_to_cpu({"tied": weight, "weight": weight, "view": weight.T})
    assert len({tensor.data_ptr() for tensor in (weight, *copies.values())}) == 4
    assert all(copy.is_contiguous() for copy in copies.values())
    assert torch.equal(copies["view"], weight.T)


def test_a_recipe_is_that_of_all_seeds_and_of_nothing_else(finished: Config) -> None:
    saved = find(finished.run_dir, "last")
    assert saved is not None
    identity = saved.identity

    def changed(section: str, **values: Any) -> str:
        part = getattr(identity.config, section).model_copy(update=values)
        return recipe(replace(identity, config=identity.config.model_copy(update={section: part})))

    assert changed("training") == recipe(identity)
    assert changed("training", seed=7, run_name="other", threads=3) == recipe(identity)
    assert changed("stream", seed=7, features_url="elsewhere") == recipe(identity)
    others = [
        changed("training", epochs=99),
        changed("training", lr=0.5),
        changed("stream", window=3),
        changed("model", options={"width": 3}),
    ]
    assert recipe(identity) not in others
    assert recipe(replace(identity, data="0" * 64)) != recipe(identity)


def test_a_trained_model_is_loaded_with_everything_that_scoring_requires(finished: Config) -> None:
    trained = load_trained(finished.run_dir, "last")
    assert (trained.epoch, trained.step, trained.dim) == (3, 12, 8)
    assert trained.genres == ("Drama", "Comedy", "Western")
    assert trained.config == finished
    assert trained.provenance["import"] == {"from": "test"}
    assert not trained.model.training
    state = trained.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(finished).items())


def test_the_error_of_a_missing_checkpoint_names_the_existing_one(make_config: MakeConfig) -> None:
    config = make_config(training={"holdout": 0}, eval={"checkpoint": "last"})
    train(config)
    with pytest.raises(StateError, match=r"no checkpoint 'best'; use 'last': set eval\.checkpoint"):
        load_trained(config.run_dir, "best")


@pytest.mark.parametrize(
    "name",
    [
        *("state.json", "movies.json", "data_stats.safetensors"),
        *("model.safetensors", "optimizer.safetensors"),
    ],
)
def test_a_corrupt_checkpoint_is_reported_in_one_line(
    make_config: MakeConfig, finished: Config, name: str
) -> None:
    config = make_config("finished", training={"epochs": 4})
    shutil.copytree(finished.run_dir, config.run_dir, symlinks=True)
    (config.run_dir / "checkpoints" / "last" / name).write_bytes(b"{")
    line = r"last: corrupt \(.*\); rename this folder, e.g. to corrupt-last, to start from step 0"
    with pytest.raises(StateError, match=line):
        train(config)


def test_a_checkpoint_of_another_version_is_refused(make_config: MakeConfig) -> None:
    config = make_config(training={"epochs": 1})
    train(config)
    file = config.run_dir / "checkpoints/last/state.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2', 1))
    line = r"last: got checkpoint version 2, want 1; use the release that wrote it, or"
    with pytest.raises(StateError, match=line):
        find(config.run_dir, "last")


def test_the_file_of_a_custom_model_is_stored_in_the_checkpoint(
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
    ("section", "message"),
    [
        ({"training": {"lr": 0.5}}, r"got training.lr 0.5, want 0.01 as in its checkpoint"),
        ({"model": {"options": {"hidden": 8}}}, r"got model.options.hidden 8, want 4 as"),
        (
            {"model": {"class": "mine:MaskedLSTM"}},
            r"got model.class 'mine:MaskedLSTM', want 'training.models.lstm:MaskedLSTM' as",
        ),
        ({"stream": {"window": 5}}, r"got stream.window 5, want 6 as in its checkpoint"),
        ({"eval": {"windows": 9}}, r"got eval.windows 9, want \d as in its checkpoint"),
    ],
)
def test_a_run_does_not_resume_with_another_configuration(
    make_config: MakeConfig, section: dict[str, Any], message: str
) -> None:
    train(make_config(training={"epochs": 1}))
    for epochs in (1, 2):  # a finished run must not pass for one of this configuration either
        more = {**section, "training": {"epochs": epochs, **section.get("training", {})}}
        line = f"{message}.*; restore the value, or choose another training.run_name"
        with pytest.raises(StateError, match=line):
            train(make_config(**more))


CUSTOM = """
import torch

class Net(torch.nn.Module):
    def __init__(self, dim, genres, hidden=4):
        super().__init__()
        self.linear = torch.nn.Linear(dim, genres)

    def forward(self, features, mask):
        return self.linear(features * mask.unsqueeze(-1)).amax(1)

def loss(logits, labels):
    return (logits - labels).square().mean(1)
"""


def test_a_refused_model_or_loss_is_named_as_in_the_configuration(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "net.py"
    file.write_text(CUSTOM)
    custom: dict[str, Any] = {
        "model": {"class": f"{file}:Net", "options": {"hidden": 5}},
        "training": {"epochs": 1, "loss": f"{file}:loss"},
    }
    train(make_config(**custom))

    def refusal(**changes: dict[str, Any]) -> str:
        sections = {name: {**section, **changes.get(name, {})} for name, section in custom.items()}
        with pytest.raises((ConfigError, StateError)) as refused:
            train(make_config(**sections))
        return str(refused.value)

    path = re.escape(str(file))
    restore = "as in its checkpoint; restore the value, or choose"
    changed = refusal(model={"class": str(file)})
    assert re.search(f"got model.class '{path}', want '{path}:Net' {restore}", changed)
    changed = refusal(training={"loss": "bce"})
    assert re.search(f"got training.loss 'bce', want '{path}:loss' {restore}", changed)
    changed = refusal(model={"options": {"hiden": 5}})
    assert "has no option 'hiden'; did you mean 'hidden'?" in changed
    changed = refusal(model={"options": {}})
    assert f"got model.options.hidden no value, want 5 {restore}" in changed
    file.write_text(f"{CUSTOM}# changed\n")
    changed = refusal()
    assert re.search("got loss.py sha256 .*; restore the file from the copy in its chec", changed)


def test_a_run_resumes_with_another_limit_for_its_wait(make_config: MakeConfig) -> None:
    train(make_config(training={"epochs": 1}))
    assert train(make_config(training={"epochs": 2, "lock_wait": 1.0})).epoch == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk requires root")
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint_intact(
    make_config: MakeConfig, small_disk: Path
) -> None:
    shared: dict[str, Any] = {
        "model": {"options": {"hidden": 72}},  # 1.4 MB with moments: one fits, two do not
        "training": {"checkpoint_steps": 3, "holdout": 0},
        "eval": {"checkpoint": "last"},
    }
    undisturbed = make_config("undisturbed", **shared)
    train(undisturbed)
    config = make_config("full", data={"runs": str(small_disk)}, **shared)
    done = run_alone(config)
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(
        "checkpoints/last: not saved: .*No space left.*; free disk space and rerun the command, "
        "the previous checkpoint is intact",
        message,
    )
    assert "Traceback" not in done.stderr
    assert attempt(config, 1) == ("failed", 5)
    saved = find(config.run_dir, "last")
    assert saved is not None
    assert saved.position.step == 3
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    train(config)
    same(config, undisturbed)


@pytest.mark.parametrize("name", ["state.json", "data_stats.safetensors", "model.safetensors"])
def test_a_damaged_checkpoint_is_loaded_or_a_one_line_error(
    finished: Config, tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished.run_dir / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints/last" / name

    def load() -> None:
        saved = find(tmp_path, "last")
        assert saved is not None
        saved.build()

    @settings(max_examples=40)
    @given(damaged(file.read_bytes()))
    def check(corrupt: bytes) -> None:
        file.write_bytes(corrupt)
        assert reads_or_reports(load)

    check()
