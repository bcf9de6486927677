"""Models are found by name, get what they ask for, and are tried before training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.user_code import user_file
from training.data_stats import DataStats
from training.models.mean import MeanLinear
from training.registry import (
    BUILT_IN,
    build_model,
    check_model,
    count_parameters,
    options_of,
)

GIVEN = DataStats.neutral(dim=8, n_genres=3, frames=4)

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, dim, genres, width=5):
        super().__init__()
        self.linear = torch.nn.Linear(dim, genres)
        self.width = width

    def forward(self, features, mask):
        return RESULT
"""

MASKED_MEAN = "self.linear((features * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))"


def own(folder: Path, result: str) -> str:
    file = folder / "net.py"
    file.write_text(NET.replace("RESULT", result))
    return f"{file}:Net"


def tried(folder: Path, result: str) -> None:
    model = build_model(own(folder, result), {}, GIVEN)
    features = torch.randn(2, 4, 8)
    check_model(model, features, torch.ones(2, 4, dtype=torch.bool), 3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_needs_no_options(name: str) -> None:
    model = build_model(name, {}, GIVEN)
    check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)


def test_ones_own_model_gets_only_what_it_asks_for(tmp_path: Path) -> None:
    name = own(tmp_path, MASKED_MEAN)
    model = build_model(name, {"width": 7}, GIVEN)
    assert model.width == 7
    assert count_parameters(model) == 8 * 3 + 3
    source = user_file(name)
    assert source is not None
    assert source.sha256 == hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()


def test_an_installed_model_has_no_source_to_keep() -> None:
    assert user_file(BUILT_IN[0]) is None


def test_a_mistyped_option_gets_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"MaskedLSTM has no option 'hiden'; did you mean 'hidden'\?"
    ):
        build_model("training.models.lstm:MaskedLSTM", {"hiden": 3}, GIVEN)


def test_an_option_far_from_all_gets_the_list() -> None:
    with pytest.raises(ConfigError, match="'zzz'; options: dropout, unit_rows"):
        build_model("training.models.mean:MeanLinear", {"zzz": 3}, GIVEN)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import torch\nimport no_such_thing\n", "at line 2: ModuleNotFoundError: No module"),
        ("class Net(:\n", "at line 1: SyntaxError"),
    ],
)
def test_a_model_file_that_fails_is_told_with_its_line(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "net.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^model.class: {file} fails on import, {told}"):
        build_model(f"{file}:Net", {}, GIVEN)


def test_a_model_that_cannot_be_built_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET.replace("self.width = width", "self.width = {}['no']"))
    with pytest.raises(ConfigError, match=r"net.py:Net refuses them: KeyError: 'no'"):
        build_model(f"{file}:Net", {}, GIVEN)


def test_what_the_data_give_is_no_option() -> None:
    with pytest.raises(ConfigError, match="'dim' is given by the data, leave it out"):
        build_model("training.models.mean:MeanLinear", {"dim": 3}, GIVEN)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("MeanLinear", r"got 'MeanLinear', want 'pkg.mod:Name' or './file.py:Name'"),
        ("no.such:Net", r"no module 'no' for 'no.such'"),
        ("training.models.mean:MeanLinea", r"has no 'MeanLinea'; did you mean 'MeanLinear'\?"),
        ("training.models.rows:masked_mean", r"want a class derived from nn.Module"),
        ("/no/such/net.py:Net", r"no file '/no/such/net.py'"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_one_line(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.class: .*{told}"):
        build_model(name, {}, GIVEN)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("features", r"Net returns \[2, 4, 8\], want logits \[2, 3\]"),
        ("None", r"Net returns NoneType, want logits \[2, 3\]"),
        ("self.linear(features.mean(1)) / 0", "no numbers on real movies"),
        ("self.linear(features.mean(2))", r"Net fails on features \[2, 4, 8\]"),
        ("self.linear(features.mean(1)).detach()", "logits of Net lead back to no parameter"),
        ("self.linear.bias.expand(2, 3)", "does not use its parameter 'linear.weight'"),
    ],
)
def test_a_model_that_cannot_work_is_told_before_training(
    tmp_path: Path, result: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        tried(tmp_path, result)


def test_a_model_that_reads_padding_is_refused_unless_it_says_so(tmp_path: Path) -> None:
    tried(tmp_path, MASKED_MEAN)
    with pytest.raises(ConfigError, match=r"Net reads rows outside the mask: padding changes its"):
        tried(tmp_path, "self.linear(features.mean(1))")
    model = build_model(own(tmp_path, "self.linear(features.mean(1))"), {}, GIVEN)
    model.reads_padding = True  # type: ignore[assignment]
    check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)


def test_options_are_listed_with_their_defaults() -> None:
    assert options_of("training.models.mean:MeanLinear") == {"dropout": 0.3, "unit_rows": True}


def test_statistics_reach_the_model_and_come_back_from_a_checkpoint() -> None:
    again = DataStats.from_tensors(GIVEN.tensors())
    assert again.frames == 4
    torch.testing.assert_close(again.prior, GIVEN.prior)
    assert again.rows.unit.scale == GIVEN.rows.unit.scale
    model = build_model("training.models.mean:MeanLinear", {}, again)
    assert isinstance(model, MeanLinear)
