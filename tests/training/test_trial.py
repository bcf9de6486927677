"""A model whose checkpoint, export or resumed step differs from it is refused before training."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import ConfigError, MachineError
from configs.schema import Config
from tests.training.conftest import MakeConfig
from training.checkpoint import Identity
from training.data_stats import DataStats
from training.registry import BUILT_IN
from training.split_selection import SplitSelection
from training.trial import Sample, check_imports, try_model

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, *, dim, genres):
        super().__init__()
        self.head = torch.nn.Linear(dim, genres)
        {state}

    def forward(self, features, mask):
        real = mask.unsqueeze(-1).float()
        return {result}
"""

MEAN = "self.head((features * real).sum(1) / real.sum(1))"

Try = Callable[..., None]


@pytest.fixture
def trial(make_config: MakeConfig, make_films: Callable[..., Any], tmp_path: Path) -> Try:
    """A function that tries a model, given its class, or a state and a result of a ``Net``."""
    features = make_films([6, 4, 9]).features

    def run(state: str = "pass", result: str = MEAN, *, name: str = "", **options: Any) -> None:
        if not name:
            (tmp_path / "net.py").write_text(NET.format(state=state, result=result))
            name = f"{tmp_path / 'net.py'}:Net"
        config: Config = make_config(model={"class": name, "options": options})
        data_stats = DataStats.neutral(dim=8, n_genres=3, frames=6)
        nothing = np.zeros(0, np.int64)
        movies = SplitSelection(np.arange(3), nothing, nothing)
        identity = Identity.of(config, features, movies, data_stats, world_size=1)
        mask_BT = torch.ones(2, 6, dtype=torch.bool)
        mask_BT[1, 4:] = False
        features_BTD = torch.linspace(-2, 2, 2 * 6 * 8).sin().view(2, 6, 8)
        try_model(identity, Sample(features_BTD, mask_BT), tmp_path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_passes_and_leaves_no_file(trial: Try, tmp_path: Path, name: str) -> None:
    before = torch.random.get_rng_state()
    trial(name=name)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "result", "message"),
    [
        ("self.scale = torch.rand(genres)", f"self.scale * {MEAN}", "its checkpoint changes its"),
        ("pass", f"{MEAN} + torch.rand(1)", "a second call in evaluation mode changes its logits"),
        (
            "self.register_buffer('scale', torch.rand(genres), persistent=False)",
            f"self.scale * {MEAN}",
            "state outside its parameters and buffers",
        ),
        ("self.calls = 0", f"self.count() * {MEAN}", "has no attribute 'count'"),
    ],
)
def test_state_that_is_not_saved_is_refused(
    trial: Try, state: str, result: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        trial(state, result)
    assert str(refused.value).startswith("model.class: Net")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("state", "result"),
    [
        (
            "self.more = torch.nn.Parameter(torch.randn(genres, dim).t())",
            "features.mean(1) @ self.more",
        ),
        (
            "self.more = torch.nn.Parameter(torch.randn(genres, dim).t())\n"
            "        self.head.weight = torch.nn.Parameter(self.more.t())",
            "features.mean(1) @ self.more",
        ),
        (
            "self.head.weight = torch.nn.Parameter(torch.randn(dim, genres).t())\n"
            "        self.tied = torch.nn.Linear(dim, genres)\n"
            "        self.tied.weight = self.head.weight",
            "self.tied(features.mean(1))",
        ),
        (
            "both = torch.randn(2, genres)\n"
            "        self.a, self.b = torch.nn.Parameter(both[0]), torch.nn.Parameter(both[1])",
            "self.a * features.mean((1, 2))[:, None] + self.b",
        ),
        (
            "self.more = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)",
            "self.more(features.mean(1).reshape(-1, 2, 2, 2)).flatten(1)",
        ),
    ],
    ids=["transposed", "tied-transposed", "tied-not-contiguous", "views", "channels-last"],
)
def test_tied_parameters_and_those_in_another_memory_layout_resume_to_the_same_bits(
    trial: Try, monkeypatch: pytest.MonkeyPatch, state: str, result: str
) -> None:
    """The trial saves, loads, exports and resumes; it raises if a number differs."""
    monkeypatch.setattr("training.trial._MOST_CHANGE", 5e-324)  # the smallest number above 0
    trial(state, f"{MEAN} + {result}")


def test_a_parameter_whose_numbers_share_one_place_is_refused_in_one_line(trial: Try) -> None:
    buffer = "self.register_buffer('more', torch.randn(1).expand(genres))"
    with pytest.raises(ConfigError, match=r"named \"more\".* Please clone\(\)") as refused:
        trial(buffer, f"{MEAN} + self.more")
    assert "\n" not in str(refused.value)


def test_parameter_groups_in_another_order_are_refused(trial: Try) -> None:
    groups = """
    def parameter_groups(self):
        torch.calls = getattr(torch, "calls", 0) + 1
        values = list(self.parameters())
        return [{"params": values if torch.calls % 2 else values[::-1]}]
"""
    with pytest.raises(ConfigError, match=r"got a moment of shape \[3, 8\], want .* \[3\]"):
        trial("pass", MEAN + groups)


def test_a_full_disk_is_not_blamed_on_the_model(
    trial: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_folder: Path, _which: str, out: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    monkeypatch.setattr("training.trial.export", fail)
    line = rf"^{tmp_path}/\.tmp-trial-\S+: No space left on device; free disk space and rerun the"
    with pytest.raises(MachineError, match=line):
        trial()


def test_a_file_that_a_model_does_not_find_is_reported_with_the_line_of_the_model(
    trial: Try,
) -> None:
    opened = f"{MEAN} if self.training else open('absent.txt')"
    with pytest.raises(ConfigError, match=r"^model\.class: Net .*net\.py:12: FileNotFoundError"):
        trial("pass", opened)


@pytest.mark.parametrize("code", ["import helper", "from helper import size", "import helper.deep"])
def test_a_file_that_imports_its_neighbour_is_refused_by_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (tmp_path / "helper.py").write_text("size = 3\n")
    (tmp_path / "net.py").write_text(f"import torch\n{code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"net.py: imports 'helper' from .*helper.py, but a run"):
        check_imports(f"{tmp_path / 'net.py'}:Net")
    sys.modules.pop("helper", None)


def test_a_file_may_import_installed_packages_and_ours(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import json, torch\nfrom training.models.lstm import MaskedLSTM\nimport not_installed\n"
    )
    check_imports(f"{tmp_path / 'net.py'}:Net")
    check_imports("training.models.lstm:MaskedLSTM")
