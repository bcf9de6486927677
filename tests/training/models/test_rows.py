"""Rows are normalized with the statistics of the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.models.small import DIM, batch, normalized, small, statistics
from training.models.mean import MeanLinear
from training.models.rows import RowNormalizer


@pytest.mark.parametrize("unit_rows", [True, False])
def test_mean_and_projection_equal_those_of_individually_normalized_rows(unit_rows: bool) -> None:
    rows, linear = RowNormalizer(statistics(), unit_rows=unit_rows), nn.Linear(DIM, 4)
    features, mask = batch(3, 8, 1)
    raw = statistics().raw
    want = normalized(features) if unit_rows else (features - raw.mean_D) / raw.scale
    torch.testing.assert_close(rows(features).project(linear), linear(want))
    means = torch.stack([row[:n].mean(0) for row, n in zip(want, (3, 8, 1), strict=True)])
    torch.testing.assert_close(rows(features).mean(mask), means)


def test_unit_rows_do_not_depend_on_the_length_of_a_row() -> None:
    rows = RowNormalizer(statistics(), unit_rows=True)
    features, mask = batch(8)
    torch.testing.assert_close(rows(features * 7).mean(mask), rows(features).mean(mask))


def test_a_zero_row_and_a_window_without_rows_give_finite_values() -> None:
    rows = RowNormalizer(statistics(), unit_rows=True)
    features, mask = batch(8, 0)
    features[0, 2] = 0.0
    assert rows(features).project(nn.Linear(DIM, 4)).isfinite().all()
    assert rows(features).mean(mask)[1].tolist() == [0.0] * DIM


def test_statistics_are_part_of_the_state_dict() -> None:
    state = small(MeanLinear).state_dict()
    torch.testing.assert_close(state["rows.mean_row"], torch.linspace(0, 0.1, DIM))
    assert state["rows.scale"].item() == pytest.approx(0.3)
