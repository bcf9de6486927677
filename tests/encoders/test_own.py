"""A user's own encoder, as a file beside the config and as a module."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.schema import Config, EncoderConfig
from encoders.registry import make_tower
from encoders.run import run_task

CPU = torch.device("cpu")

TOWER = """
import torch
from encoders.decode import Preprocessing


class Means(torch.nn.Module):
    dim = 3
    preprocessing = Preprocessing(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, *, device, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((3,), float(scale), device=device))

    def encode(self, frames):
        return frames.float().mean((2, 3)) / 255 * self.scale


class Plain:
    dim = 3
    preprocessing = Means.preprocessing

    def encode(self, frames):
        return torch.zeros(len(frames), 3)


class NoDim(Plain):
    dim = None


class Wide(Plain):
    def encode(self, frames):
        return torch.zeros(len(frames), 4)


class Failing(Plain):
    def encode(self, frames):
        raise RuntimeError("no kernel")


a_function = len
"""

Configure = Callable[..., Config]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "means.py"
    path.write_text(TOWER)
    return path


def settings(model: str, **more: object) -> EncoderConfig:
    return EncoderConfig.model_validate({"name": "t", "model": model, "pretrained": None, **more})


@pytest.mark.usefixtures("file", "config")
def test_an_own_encoder_beside_the_config_makes_a_feature_set(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure("encoder.model=./means.py:Means", "encoder.options.scale=2")
    assert config.encoder.model == f"{tmp_path}/means.py:Means", "relative to the config file"
    manifest = run_task(config).manifest
    assert manifest is not None
    told = manifest.provenance["encoder"]
    assert isinstance(told, dict)
    assert told["name"] == "means.py:Means"
    assert told["options"] == {"scale": 2}
    assert told["architecture"] == hashlib.sha256(TOWER.encode()).hexdigest()
    with tarfile.open(Path(config.features_dir) / "features-00000.tar") as tar:
        stored = tar.extractfile("tt0000001.features.npy")
        assert stored is not None
        rows = np.load(io.BytesIO(stored.read()))
    assert rows.shape[1] == 3
    assert 0 < rows.min() < rows.max() < 2


def test_its_source_options_and_weights_are_what_must_agree(file: Path) -> None:
    first = make_tower(settings(f"{file}:Means"), CPU, "fp32").provenance
    assert first == make_tower(settings(f"{file}:Means"), CPU, "fp32").provenance
    scaled = make_tower(settings(f"{file}:Means", options={"scale": 3.0}), CPU, "fp32").provenance
    assert first["weights"] != scaled["weights"]
    other = file.with_name("elsewhere") / "means.py"
    other.parent.mkdir()
    other.write_text(TOWER)
    assert make_tower(settings(f"{other}:Means"), CPU, "fp32").provenance == first
    other.with_name("changed").mkdir()
    changed = other.with_name("changed") / "means.py"
    changed.write_text(TOWER + "# another source")
    assert make_tower(settings(f"{changed}:Means"), CPU, "fp32").provenance != first


def test_an_own_encoder_may_be_no_module_and_lie_in_a_package(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = file.with_name("my_towers")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plain.py").write_text(TOWER)
    monkeypatch.syspath_prepend(str(file.parent))
    tower = make_tower(settings("my_towers.plain:Plain"), CPU, "fp32")
    assert tower.provenance["weights"] == hashlib.sha256(TOWER.encode()).hexdigest()
    assert tower.encode(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).shape == (5, 3)


@pytest.mark.parametrize(
    ("name", "more", "line"),
    [
        ("NoDim", {}, r"means\.py:NoDim: got dim None, want int"),
        ("Wide", {}, r"returns \[2, 4\] for two frames, want finite \[2, 3\]"),
        ("Failing", {}, r"fails on frames \[2, 3, 8, 8\]: RuntimeError: no kernel"),
        ("a_function", {}, "want a class"),
        ("Mean", {}, r"has no 'Mean'; did you mean 'Means'\?"),
        (
            "Means",
            {"options": {"size": 1}},
            r"encoder\.options: means\.py:Means refuses: TypeError",
        ),
        ("Means", {"options": {"device": 1}}, r"'device' is not an option: encoder\.device"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_line(
    file: Path, name: str, more: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        make_tower(settings(f"{file}:{name}", **more), CPU, "fp32")
    assert "\n" not in str(caught.value)


def test_options_of_an_openclip_model_are_refused(tower_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.json takes none, want an own encoder"):
        make_tower(settings(str(tower_file), options={"a": 1}), CPU, "fp32")
