"""Files of weights are read as trainers save them, and no code in them is executed."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import DataError
from configs.tensor_files import matching_tensors, read_tensors

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


class Command:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.file}",)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 2)
        self.other = torch.nn.Parameter(torch.randn(4, 3).half().t())
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x) + self.other.float().sum() + self.count
        return out


def torchscript(model: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():  # torch.jit is deprecated
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        torch.jit.save(trace(model, torch.zeros(1, 3)), path)
    return path


def with_pickle(archive: Path, payload: object, out: Path) -> Path:
    """Copy a TorchScript archive with other contents of ``data.pkl``."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = pickle.dumps(payload) if name.endswith("/data.pkl") else source.read(name)
            target.writestr(name, data)
    return out


@pytest.mark.parametrize("zipped", [True, False])
def test_only_the_tensors_of_the_state_dict_are_read_from_a_training_checkpoint(
    tmp_path: Path, zipped: bool
) -> None:
    checkpoint = {
        "epoch": np.int64(3),
        "best": np.float32(0.5),
        "better": np.bool_(True),
        "args": argparse.Namespace(lr=1e-3, out=Path("logs")),
        "numpy_rng": np.random.default_rng(0).integers(9, size=5),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        "hyper_parameters": {"lr": 0.1},
        "state_dict": WEIGHTS,
    }
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    read = read_tensors(path)
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


def test_a_torchscript_archive_is_read_as_its_state_dict(tmp_path: Path) -> None:
    model = Net()
    read = read_tensors(torchscript(model, tmp_path / "net.pt"))
    assert read.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
        assert torch.equal(read[name], value)


def test_all_references_to_a_storage_of_a_torchscript_archive_share_its_memory(
    tmp_path: Path,
) -> None:
    tensors = {f"part{n}": row for n, row in enumerate(torch.randn(20, 3))}
    torch.save(tensors, tmp_path / "net.pt")  # refers to the storage once per tensor
    with zipfile.ZipFile(tmp_path / "net.pt", "a") as archive:
        archive.writestr("net/constants.pkl", b"")
    read = read_tensors(tmp_path / "net.pt")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert len({value.untyped_storage().data_ptr() for value in read.values()}) == 1


@pytest.mark.parametrize("compressed", ["/data.pkl", "/data/0"])
def test_a_torchscript_archive_that_would_grow_when_read_is_refused(
    tmp_path: Path, compressed: str
) -> None:
    archive, path = torchscript(Net(), tmp_path / "net.pt"), tmp_path / "bomb.pt"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            how = zipfile.ZIP_DEFLATED if name.endswith(compressed) else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), how)
    with pytest.raises(DataError, match=rf"bomb\.pt: net{compressed} is compressed, want"):
        read_tensors(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "torchscript"])
def test_a_hostile_file_executes_nothing_and_is_one_line(tmp_path: Path, form: str) -> None:
    path, created = tmp_path / "hostile.pt", tmp_path / "created"
    payload = {"state_dict": WEIGHTS, "extra": Command(created)}
    if form == "torchscript":
        payload = {"extra": Command(created)}
        with_pickle(torchscript(Net(), tmp_path / "net.pt"), payload, path)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        DataError, match=r"hostile\.pt: contains posix\.system, which could"
    ) as error:
        read_tensors(path)
    assert "\n" not in str(error.value)
    assert not created.exists()


def test_the_error_of_a_pickled_model_contains_the_command_that_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / """ada's "$HOME" `net`.pt"""
    torch.save({"epoch": 3, "model": torch.nn.Linear(3, 2)}, path)
    with pytest.raises(DataError, match=r"contains torch\.nn\.modules\.linear\.Linear") as error:
        read_tensors(path)
    _, _, pasted = str(error.value).partition("convert it: python -c ")
    shell = ["sh", "-c", f"printf %s {pasted}"]  # Python would import torch again
    exec(subprocess.run(shell, check=True, capture_output=True, text=True).stdout)  # noqa: S102
    assert read_tensors(tmp_path / "weights.pt").keys() == {"weight", "bias"}


@pytest.mark.parametrize("end", [WEIGHTS, {}, {0: 1}])
def test_a_small_file_with_too_many_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: dict[Any, Any]
) -> None:
    monkeypatch.setattr("configs.tensor_files._MOST_ENTRIES", 1000)  # quicker than a million
    tree = end
    for _ in range(60):
        tree = {"a": tree, "b": tree}
    torch.save(tree, tmp_path / "wide.pt")
    with pytest.raises(DataError, match=r"wide\.pt: got more than 1,000 nested entries"):
        read_tensors(tmp_path / "wide.pt")


def test_a_tensor_and_a_container_may_have_several_names(tmp_path: Path) -> None:
    torch.save({"encoder": WEIGHTS, "decoder": WEIGHTS}, tmp_path / "tied.pt")
    assert len(read_tensors(tmp_path / "tied.pt")) == 2 * len(WEIGHTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.pt", b"PK\x03\x04 cut", "not a file of weights"),
        ("page.pt", b"<html>", "not a file of weights"),
        ("empty.pt", b"", "not a file of weights"),
        ("cut.safetensors", b"{}", "not a file of weights"),
        (
            "x.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid 1",
            "run `git lfs pull`",
        ),
    ],
)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_tensors(tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "no.pt")
    with pytest.raises(DataError, match="got no named tensors, want weights"):
        read_tensors(tmp_path / "no.pt")


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module.", "clip."],
)
def test_prefixes_of_trainers_are_removed(prefix: str) -> None:
    tensors = {prefix + name: value for name, value in WEIGHTS.items()} | {"loss.t": torch.ones(1)}
    matching = matching_tensors(tensors, WEIGHTS.keys(), "x.pt")
    assert matching.keys() - {"loss.t"} == WEIGHTS.keys()


def test_wrappers_inside_a_name_are_removed() -> None:
    tensors = {
        "a._orig_mod.weight": torch.ones(1),
        "a._fsdp_wrapped_module.module.bias": torch.ones(1),
    }
    assert matching_tensors(tensors, WEIGHTS.keys(), "x.pt").keys() == WEIGHTS.keys()


def test_the_plain_names_win_over_equal_ones_with_a_prefix() -> None:
    average = {f"average.{name}": value + 1 for name, value in WEIGHTS.items()}
    matching = matching_tensors({**average, **WEIGHTS}, WEIGHTS.keys(), "x.pt")
    assert torch.equal(matching["a.bias"], WEIGHTS["a.bias"])


def test_a_file_of_two_models_is_refused() -> None:
    two = {f"{model}.{name}": value for model in ("ema", "net") for name, value in WEIGHTS.items()}
    with pytest.raises(DataError, match=r"x\.pt: got several models, ema\., net\., want one"):
        matching_tensors(two, WEIGHTS.keys(), "x.pt")
