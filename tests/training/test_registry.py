"""Models are built by name with the arguments they request, and checked before training."""

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

DATA_STATS = DataStats.neutral(dim=8, n_genres=3, frames=4)

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


def custom_model(folder: Path, result: str) -> str:
    file = folder / "net.py"
    file.write_text(NET.replace("RESULT", result))
    return f"{file}:Net"


def check(folder: Path, result: str) -> None:
    model = build_model(custom_model(folder, result), {}, DATA_STATS)
    features = torch.randn(2, 4, 8)
    check_model(model, features, torch.ones(2, 4, dtype=torch.bool), 3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_needs_no_options(name: str) -> None:
    model = build_model(name, {}, DATA_STATS)
    check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)


def test_a_custom_model_receives_only_the_arguments_it_requests(tmp_path: Path) -> None:
    name = custom_model(tmp_path, MASKED_MEAN)
    model = build_model(name, {"width": 7}, DATA_STATS)
    assert model.width == 7
    assert count_parameters(model) == 8 * 3 + 3
    source = user_file(name, key="model.class")
    assert source is not None
    assert source.sha256 == hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()


def test_a_file_that_does_not_exist_is_reported_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^model\.class: no file '/absent/net\.py'$"):
        user_file("/absent/net.py:Net", key="model.class")


def test_an_installed_model_has_no_file_to_store() -> None:
    assert user_file(BUILT_IN[0], key="model.class") is None


def test_the_error_of_a_mistyped_option_suggests_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"MaskedLSTM has no option 'hiden'; did you mean 'hidden'\?"
    ):
        build_model("training.models.lstm:MaskedLSTM", {"hiden": 3}, DATA_STATS)


def test_the_error_of_an_unknown_option_lists_all_options() -> None:
    with pytest.raises(ConfigError, match="'zzz'; options: dropout, unit_rows"):
        build_model("training.models.mean:MeanLinear", {"zzz": 3}, DATA_STATS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\nimport no_such_thing\n", ":2: ModuleNotFoundError: No module"),
        ("import json\njson.loads('{')\n", ":2: JSONDecodeError"),  # not the line of json
        ("class Net(:\n", ":1: SyntaxError"),
    ],
)
def test_an_error_in_a_model_file_is_reported_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "net.py"
    file.write_text(text)
    with pytest.raises(
        ConfigError, match=rf"^model.class: {file} fails on import: {file}{message}"
    ):
        build_model(f"{file}:Net", {}, DATA_STATS)


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ("self.width = {}['no']", "KeyError: 'no'"),
        ("torch.nn.Linear(dim, -1)", "RuntimeError: "),  # raised by a line of torch
    ],
)
def test_an_error_in_a_constructor_names_the_line_of_the_model(
    tmp_path: Path, mistake: str, reason: str
) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET.replace("self.width = width", mistake))
    message = rf"^model.class: {file}:Net cannot be constructed: {file}:8: {reason}"
    with pytest.raises(ConfigError, match=message):
        build_model(f"{file}:Net", {}, DATA_STATS)
    with pytest.raises(ConfigError, match=r"cannot be constructed with model.options {'width': 3}"):
        build_model(f"{file}:Net", {"width": 3}, DATA_STATS)


def test_only_a_signature_refuses_options(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET.replace("width=5", "width"))
    with pytest.raises(ConfigError) as caught:
        build_model(f"{file}:Net", {}, DATA_STATS)
    refusal = (
        f"model.options: got {{}}, {file}:Net refuses them: missing a required argument: 'width'"
    )
    assert str(caught.value) == refusal


def test_an_error_in_a_helper_next_to_a_model_names_the_line_of_the_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models" / "__init__.py").touch()
    helper = tmp_path / "my_models" / "layers.py"
    helper.write_text("import torch\n\ndef head(dim):\n    return torch.nn.Linear(dim, -1)\n")
    net = NET.replace("import torch", "import torch\nfrom my_models.layers import head", 1)
    net = net.replace("torch.nn.Linear(dim, genres)", "head(dim)")
    (tmp_path / "my_models" / "nets.py").write_text(net)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"cannot be constructed: {helper}:4: RuntimeError"):
        build_model("my_models.nets:Net", {}, DATA_STATS)


def test_an_argument_set_from_the_data_is_refused_as_an_option() -> None:
    with pytest.raises(ConfigError, match="'dim' is set from the data; remove this option"):
        build_model("training.models.mean:MeanLinear", {"dim": 3}, DATA_STATS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MeanLinear", r"got 'MeanLinear', want 'pkg.mod:Name' or './file.py:Name'"),
        ("no.such:Net", r"no module 'no' for 'no.such'"),
        ("training.models.mean:MeanLinea", r"has no 'MeanLinea'; did you mean 'MeanLinear'\?"),
        ("training.models.rows:masked_mean", r"want a subclass of nn.Module"),
        ("/no/such/net.py:Net", r"no file '/no/such/net.py'"),
    ],
)
def test_an_unknown_model_is_reported_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.class: .*{message}"):
        build_model(name, {}, DATA_STATS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("features", r"Net returns \[2, 4, 8\], want logits \[2, 3\]"),
        ("None", r"Net returns NoneType, want logits \[2, 3\]"),
        ("self.linear(features.mean(1)) / 0", "logits that are not finite on real movies"),
        (
            "self.linear(features.mean(2))",
            r"Net fails on features \[2, 4, 8\]: \S+net\.py:11: RuntimeError",
        ),
        (
            "self.linear(features.mean(2 if self.training else 1))",
            r"Net fails on features \[2, 4, 8\]: \S+net\.py:11: RuntimeError",
        ),
        (
            "self.linear(features.mean(1)).detach()",
            "logits of Net depend on no trainable parameter",
        ),
        ("self.linear.bias.expand(2, 3)", "does not use its parameter 'linear.weight'"),
    ],
)
def test_a_model_that_cannot_train_is_refused(tmp_path: Path, result: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, result)


def test_a_model_that_reads_padding_is_refused_unless_declared(tmp_path: Path) -> None:
    check(tmp_path, MASKED_MEAN)
    with pytest.raises(ConfigError, match=r"Net reads rows outside the mask: padding changes its"):
        check(tmp_path, "self.linear(features.mean(1))")
    model = build_model(custom_model(tmp_path, "self.linear(features.mean(1))"), {}, DATA_STATS)
    model.reads_padding = True  # type: ignore[assignment]
    check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)


def test_options_are_listed_with_their_defaults() -> None:
    assert options_of("training.models.mean:MeanLinear") == {"dropout": 0.3, "unit_rows": True}


def test_statistics_survive_serialization_and_build_a_model() -> None:
    restored = DataStats.from_tensors(DATA_STATS.tensors())
    assert restored.frames == 4
    torch.testing.assert_close(restored.prior, DATA_STATS.prior)
    assert restored.rows.unit.scale == DATA_STATS.rows.unit.scale
    model = build_model("training.models.mean:MeanLinear", {}, restored)
    assert isinstance(model, MeanLinear)


@pytest.mark.parametrize(
    ("extra", "result", "problem"),
    [
        ("", f"torch.sigmoid({MASKED_MEAN})", "returns values between 0 and 1 only"),
        ("LazyLinear(2)", MASKED_MEAN, "is lazy; construct it with its size"),
        ("Parameter(torch.randn(3, dtype=torch.complex64))", MASKED_MEAN, "is complex"),
        ("Parameter(torch.randn(4, 6)[:, ::2])", MASKED_MEAN, "construct it from a copy"),
        ("Parameter(torch.zeros(1).expand(3))", MASKED_MEAN, "construct it from a copy"),
    ],
)
def test_a_model_that_cannot_be_trained_as_it_is_gets_one_line(
    tmp_path: Path, extra: str, result: str, problem: str
) -> None:
    name = custom_model(tmp_path, result)
    if extra:
        file = tmp_path / "net.py"
        line = f"self.width = width\n        self.more = torch.nn.{extra}"
        file.write_text(file.read_text().replace("self.width = width", line))
    model = build_model(name, {}, DATA_STATS)
    with pytest.raises(ConfigError, match=problem):
        check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)


def test_a_last_layer_of_zeros_is_not_taken_for_a_sigmoid() -> None:
    model = build_model("training.models.mean:MeanLinear", {}, DATA_STATS)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)


@pytest.mark.parametrize("where", ["import", "constructor", "forward"])
def test_a_custom_file_that_exits_ends_with_an_error(tmp_path: Path, where: str) -> None:
    name = custom_model(tmp_path, "exit(0)" if where == "forward" else MASKED_MEAN)
    file = tmp_path / "net.py"
    if where == "import":
        file.write_text(f"{file.read_text()}\nexit(0)\n")
    elif where == "constructor":
        file.write_text(file.read_text().replace("self.width = width", "exit(0)"))

    def build_and_check() -> None:
        model = build_model(name, {}, DATA_STATS)
        check_model(model, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), 3)

    with pytest.raises(ConfigError, match="model"):
        build_and_check()
