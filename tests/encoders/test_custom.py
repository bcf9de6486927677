"""Custom encoders, in a file next to the config and in a package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from configs.errors import ConfigError
from configs.schema import Config, EncoderConfig
from encoders.__main__ import _encoder_text, main
from encoders.registry import fetch_weights, make_tower
from encoders.task import run_task
from tests.snippets import snippets

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CHECKOUT = Path(__file__).parents[2]

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


class Full(Means):
    @classmethod
    def fetch(cls, weights_dir, scale):
        import pathlib

        file = pathlib.Path(weights_dir, "means.bin")
        file.write_text(str(scale))
        return file

    def versions(self):
        import os

        return {"means": os.environ.get("MEANS_VERSION", "1.0")}


class Silent(Plain):
    @staticmethod
    def fetch():
        pass


class Offline(Plain):
    @staticmethod
    def fetch(pretrained):
        raise OSError(f"no route to the host of {pretrained}")


class NeedsSelf(Plain):
    def fetch(self):
        pass


class BadVersions(Plain):
    def versions(self):
        return {"means": 1.0}


class FailingVersions(Plain):
    def versions(self):
        raise KeyError("means")


a_function = len
"""

Configure = Callable[..., Config]


TAKES_PRETRAINED = """

class Takes(Means):
    def __init__(self, *, device, pretrained):
        super().__init__(device=device)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "means.py"
    path.write_text(TOWER)
    return path


def settings(model: str, **more: object) -> EncoderConfig:
    return EncoderConfig.model_validate({"name": "t", "model": model, "pretrained": None, **more})


@pytest.mark.usefixtures("file", "config")
def test_a_custom_encoder_next_to_the_config_makes_a_feature_set(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure("encoder.model=./means.py:Means", "encoder.options.scale=2")
    assert config.encoder.model == f"{tmp_path}/means.py:Means", "relative to the config file"
    manifest = run_task(config).manifest
    assert manifest is not None
    provenance = manifest.provenance["encoder"]
    assert isinstance(provenance, dict)
    assert provenance["name"] == "means.py:Means"
    assert provenance["options"] == {"scale": 2}
    assert provenance["architecture"] == hashlib.sha256(TOWER.encode()).hexdigest()
    with tarfile.open(Path(config.features_dir) / "features-00000.tar") as tar:
        stored = tar.extractfile("tt0000001.features.npy")
        assert stored is not None
        rows = np.load(io.BytesIO(stored.read()))
    assert rows.shape[1] == 3
    assert 0 < rows.min() < rows.max() < 2


def test_the_provenance_depends_on_source_options_and_weights(file: Path) -> None:
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


def test_pretrained_is_recorded_only_for_a_class_that_takes_it(file: Path) -> None:
    without = make_tower(settings(f"{file}:Means", pretrained="openai"), CPU, "fp32")
    assert "pretrained" not in without.provenance
    file.write_text(TOWER + TAKES_PRETRAINED)
    takes = make_tower(settings(f"{file}:Takes", pretrained="dir/mine.pt"), CPU, "fp32")
    assert takes.provenance["pretrained"] == "mine.pt"


def test_the_log_of_a_custom_encoder_names_no_weights_that_it_may_not_take(file: Path) -> None:
    text = _encoder_text(settings(f"{file}:Means", pretrained="openai"))
    assert text == "encoder means.py:Means"


def test_a_custom_encoder_may_be_a_plain_class_in_a_package(
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
        ("Wide", {}, r"encode\(\) returns \[2, 4\] for two frames, want finite \[2, 3\]"),
        (
            "Failing",
            {},
            r"encode\(\) fails on frames \[2, 3, 8, 8\]: \S+means\.py:\d+: RuntimeError: no kernel",
        ),
        ("a_function", {}, "want a class"),
        ("Mean", {}, r"has no 'Mean'; did you mean 'Means'\?"),
        (
            "Means",
            {"options": {"size": 1}},
            r"encoder\.options: got {'size': 1}, means\.py:Means refuses them: got an unexpected",
        ),
        ("Means", {"options": {"device": 1}}, r"'device' is not an option; set encoder\.device"),
        (
            "BadVersions",
            {},
            r"got versions\(\) \{'means': 1\.0\}, want a dict of names and version",
        ),
        (
            "FailingVersions",
            {},
            r"FailingVersions: versions\(\) fails: \S+means\.py:\d+: KeyError: 'means'",
        ),
    ],
)
def test_an_invalid_encoder_is_refused_in_one_line(
    file: Path, name: str, more: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        make_tower(settings(f"{file}:{name}", **more), CPU, "fp32")
    assert "\n" not in str(caught.value)


# --- versions and fetch ---------------------------------------------------------------------------


def sidecars(config: Config) -> list[dict[str, object]]:
    """The ``information`` of each sidecar, in order of the shards."""
    paths = sorted(Path(config.features_dir).glob("features-*.json"))
    return [json.loads(path.read_bytes())["information"] for path in paths]


@pytest.mark.usefixtures("file", "config")
def test_sidecars_record_the_versions_of_a_custom_encoder_and_not_of_openclip(
    configure: Configure,
) -> None:
    full = configure("encoder.model=./means.py:Full")
    run_task(full)
    assert sidecars(full)
    for information in sidecars(full):
        assert information["means"] == "1.0"
        assert information["torch"] == torch.__version__
        assert "open_clip_torch" not in information
    without = configure("encoder.model=./means.py:Means", "encoder.name=without")
    run_task(without)
    assert not any({"open_clip_torch", "means"} & set(each) for each in sidecars(without))


@pytest.mark.usefixtures("config")
def test_sidecars_of_an_openclip_tower_record_the_version_of_openclip(
    configure: Configure,
) -> None:
    config = configure()
    run_task(config)
    versions = {information["open_clip_torch"] for information in sidecars(config)}
    assert versions == {importlib.metadata.version("open_clip_torch")}


@pytest.mark.usefixtures("file", "config")
def test_no_digest_depends_on_versions(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = "encoder.model=./means.py:Full", f"encoder.frames_url={configure().frames_dir}"
    digests = []
    for version in ("1.0", "2.0"):
        monkeypatch.setenv("MEANS_VERSION", version)
        config = configure(*same, f"data.root={tmp_path}/{version}")
        manifest = run_task(config).manifest
        assert manifest is not None
        digests.append(manifest.digest)
        assert {information["means"] for information in sidecars(config)} == {version}
    assert digests[0] == digests[1]


def fetch(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> tuple[int, str]:
    """Run ``fetch``; return the exit code and the one line printed after the announcement."""
    code = main(["fetch", "--config", str(folder / "config.yaml"), *overrides])
    printed = capsys.readouterr()
    announcement, *lines = [*printed.err.splitlines(), *printed.out.splitlines()]
    assert "fetching encoder means.py:" in announcement
    assert len(lines) == 1
    return code, lines[0]


@pytest.mark.usefixtures("file")
def test_fetch_calls_the_custom_encoder_with_the_arguments_it_names(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    overrides = ["encoder.options.scale=2", f"encoder.weights_dir={tmp_path}"]
    code, line = fetch(capsys, tmp_path, "encoder.model=./means.py:Full", *overrides)
    assert (code, line) == (0, f"fetched {tmp_path}/means.bin")
    assert (tmp_path / "means.bin").read_text() == "2"
    code, line = fetch(capsys, tmp_path, "encoder.model=./means.py:Silent")
    assert (code, line) == (0, "fetched means.py:Silent")


@pytest.mark.usefixtures("file")
def test_a_custom_encoder_without_fetch_has_nothing_to_fetch(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    code, line = fetch(capsys, tmp_path, "encoder.model=./means.py:Means")
    assert code == 0
    assert line == (f"nothing to fetch for encoder.model={tmp_path}/means.py:Means")


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("Offline", 1, "error: fetch means.py:Offline: LINE: OSError: no route to the host of tag"),
        (
            "NeedsSelf",
            2,
            "error: encoder.model: means.py:NeedsSelf: got fetch as an instance method, want a "
            "classmethod or staticmethod",
        ),
        ("a_function", 2, "error: encoder.model: means.py:a_function is <built-in function len>"),
    ],
)
def test_a_fetch_that_fails_is_reported_in_one_line(
    name: str,
    code: int,
    line: str,
    configure: Configure,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure()
    model = f"encoder.model=./means.py:{name}"
    got = fetch(capsys, tmp_path, model, "encoder.pretrained=tag")
    error = re.sub(r"\S+means\.py:\d+:", "LINE:", got[1])
    assert (got[0], error[: len(line)]) == (code, line)


@pytest.mark.parametrize(
    ("readme", "heading", "versions"),
    [
        ("README.md", "Your encoder", {}),
        (
            "encoders/README.md",
            "Custom encoders",
            {"timm": importlib.metadata.version("timm")},
        ),
    ],
)
def test_the_example_of_a_readme_fetches_and_loads_trained_weights(
    readme: str,
    heading: str,
    versions: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    are_trained = []
    create = timm.create_model

    def create_without_network(name: str, *, pretrained: bool, num_classes: int) -> object:
        are_trained.append(pretrained)
        return create(name, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", create_without_network)
    (example,) = snippets(CHECKOUT / readme)[heading]
    path = tmp_path / "tower.py"
    path.write_text(example)
    config = settings(f"{path}:Tower")
    assert fetch_weights(config) == "tower.py:Tower"
    tower = make_tower(config, CPU, "fp32")
    assert are_trained == [True, True]
    assert tower.encode(torch.zeros(3, 3, 224, 224, dtype=torch.uint8)).shape == (3, tower.dim)
    assert tower.versions() == versions


def test_options_of_an_openclip_model_are_refused(tower_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.json takes none; remove them"):
        make_tower(settings(str(tower_file), options={"a": 1}), CPU, "fp32")
