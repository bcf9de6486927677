"""A run may begin with the weights of another."""

from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import Config
from tests.training.conftest import MakeConfig
from tests.training.launched import train, weights


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
