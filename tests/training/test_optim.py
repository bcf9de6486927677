"""Learning rates are functions of the step alone."""

from __future__ import annotations

import math

import pytest
import torch

from configs.schema import TrainingConfig
from training.optim import lr_at, make_optimizer, set_lr


def config(**keys: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"run": "r", "lr": 0.1, "epochs": 4, **keys})


def rates(settings: TrainingConfig, steps: range) -> list[float]:
    return [lr_at(step, settings, steps_per_epoch=10) for step in steps]


def test_a_constant_rate_stays() -> None:
    assert set(rates(config(), range(40))) == {0.1}


def test_warm_up_climbs_in_equal_steps_to_the_peak() -> None:
    got = rates(config(warmup_steps=4), range(6))
    assert got == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_the_step_schedule_drops_at_epochs() -> None:
    got = rates(config(schedule="step", step_epochs=2, gamma=0.5), range(0, 40, 10))
    assert got == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_cosine_falls_from_the_peak_to_zero() -> None:
    got = rates(config(schedule="cosine"), range(0, 41, 10))
    half = [0.1 * 0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert got == pytest.approx(half)
    assert got[-1] == 0.0


@pytest.mark.parametrize(
    ("name", "cls"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_the_optimiser_is_torchs_own(name: str, cls: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model.parameters(), config(optimizer=name, weight_decay=0.3))
    assert type(optimizer) is cls
    set_lr(optimizer, 0.7)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.7, 0.3)]
