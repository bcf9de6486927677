"""A run can start from the weights of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import ConfigError
from configs.schema import Config
from tests.training.conftest import MakeConfig
from tests.training.launched import train, weights
from training.export import export
from training.init_weights import load_initial_weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("place", ["", "checkpoints/last", "checkpoints/last/model.safetensors"])
def test_a_run_starts_from_the_weights_of_a_run_a_checkpoint_or_a_file(
    make_config: MakeConfig, finished: Config, place: str
) -> None:
    started = make_config(
        "started",
        model={"options": {"hidden": 4}, "init_from": str(finished.run_dir / place)},
        training={"epochs": 1, "lr": 1e-12, "weight_decay": 0},
    )
    train(started)
    source = weights(finished, "last" if place else "best")
    for name, value in weights(started).items():
        torch.testing.assert_close(value, source[name], rtol=0, atol=1e-9)


def test_a_flipped_bit_in_a_checkpoint_or_an_export_is_one_line(
    make_config: MakeConfig, finished: Config, tmp_path: Path
) -> None:
    shutil.copytree(finished.run_dir / "checkpoints/last", tmp_path / "last", symlinks=True)
    out = tmp_path / "finished.safetensors"
    export(finished.run_dir, "last", out)
    for file in (tmp_path / "last/model.safetensors", out):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        started = make_config("started", model={"init_from": str(file)})
        with pytest.raises(ConfigError, match=rf"init_from: {file}: corrupt \(.*sha256\); choose"):
            train(started)


def test_weights_of_another_shape_are_skipped_and_logged(
    make_config: MakeConfig, finished: Config, caplog: pytest.LogCaptureFixture
) -> None:
    wider = {"options": {"hidden": 5}, "init_from": str(finished.run_dir)}
    with caplog.at_level("INFO"):
        train(make_config("wider", model=wider, training={"epochs": 1}))
    assert "MaskedLSTM: loaded" in caplog.text
    assert "head.weight" in caplog.text.partition("fresh: ")[2]


def test_weights_that_match_nothing_are_reported_in_one_line(make_config: MakeConfig) -> None:
    train(make_config("lstm", training={"epochs": 1}))
    start = str(make_config("lstm").run_dir)
    original = {"class": "training.models.lstm:OriginalLSTM", "init_from": start}
    for model, message in (
        ({**original, "options": {"hidden": 6}}, "none of its .* tensors matches .* OriginalLSTM"),
        ({"init_from": "no/such/run"}, "no/such/run: no weights; want"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.init_from: .*{message}"):
            train(make_config("other", model=model))


@pytest.mark.parametrize(
    ("name", "container", "prefix"),
    [
        ("plain.pt", "", ""),
        ("ddp.pth", "", "module."),
        ("lightning.ckpt", "state_dict", "model._orig_mod."),
        ("nested.bin", "model", "net."),
        ("compiled.safetensors", "", "_orig_mod."),
    ],
)
def test_weights_of_other_trainers_are_loaded(
    tmp_path: Path, name: str, container: str, prefix: str
) -> None:
    source, model = (torch.nn.Sequential(torch.nn.Linear(3, 2)) for _ in range(2))
    state = {prefix + key: value for key, value in source.state_dict().items()}
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({container: state, "epoch": 1} if container else state, tmp_path / name)
    load_initial_weights(model, str(tmp_path / name))
    for got, want in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_file_of_two_models_is_reported_in_one_line(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(3, 2), tmp_path / "two.pt"
    torch.save({"student": model.state_dict(), "teacher": model.state_dict()}, path)
    with pytest.raises(
        ConfigError, match=r"^model\.init_from: .*two\.pt: got several models, student\., teacher\."
    ):
        load_initial_weights(model, str(path))
