"""A run can start from the weights of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import Config
from tests.training.conftest import MakeConfig
from tests.training.launched import train, weights
from training.export import export


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
