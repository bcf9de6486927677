from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_config

MINIMAL = "version: 1\ndata: {root: out}\nencoder: {name: tower}\ntraining: {run_name: first}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a configuration, a dump and links to it and to its parent."""
    (tmp_path / "config.yaml").write_text(MINIMAL)
    (tmp_path / "films" / "240P").mkdir(parents=True)
    (tmp_path / "link").symlink_to("films/240P")
    (tmp_path / "up").symlink_to("films")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.dump=films/240P", "data.root=films/240P"],
        ["data.dump=films/240P", "data.root=films/240P/out"],
        ["data.dump=films/240P/", "data.root=link/out"],
        ["data.dump=link", "data.root=films/240P/not/yet"],
        ["data.dump=s3://b/240P", "data.root=s3://b/240P/out", "data.runs=runs"],
        ["data.dump=films", "data.runs=films/runs"],
        ["data.dump=films", "encoder.scratch_dir=films/tmp"],
        ["data.dump=films", "stream.cache_dir=up/cache"],
    ],
)
def test_a_folder_of_results_in_the_dump_is_refused(folder: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"want a folder outside data\.dump \(.*\), whose subf"):
        load_config(folder / "config.yaml", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.dump=out/frames"],
        ["data.dump=out/frames/240P"],
        ["data.dump=films/frames", "data.root=up"],
        ["data.dump=out/runs/first/240P"],
        ["data.dump=out/limit-3/frames", "data.limit=3"],
        ["data.dump=s3://b/out/frames/", "data.root=s3://b/out", "data.runs=runs"],
        ["data.feature_arrays=out/features/tower"],
        ["data.feature_tars=out/features/tower/features-{000..003}.tar"],
    ],
)
def test_an_input_in_a_folder_of_results_is_refused(folder: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.\w+: got .*, want a place outside .*written$"):
        load_config(folder / "config.yaml", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.dump=out/dump/240P", "data.metadata=out/meta", "data.split=out/split.json"],
        ["data.dump=films/240P", "data.root=films"],
        ["data.dump=films/240P", "data.root=films/240P-shards", "data.metadata=films/240P"],
        ["data.dump=films/240P", "data.runs=films"],
        ["data.feature_tars=out/features/other"],
    ],
)
def test_separate_folders_are_accepted(folder: Path, overrides: list[str]) -> None:
    data = load_config(folder / "config.yaml", overrides).data
    values = dict(override.removeprefix("data.").split("=") for override in overrides)
    assert {key: getattr(data, key) for key in values} == values


def test_home_and_variables_in_paths_are_expanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    overrides = [
        "data.root=~/films",
        "data.dump=$SCRATCH/240P",
        "data.split=fold:0/5",
        "stream.cache_dir=${SCRATCH}/cache",
        "stream.features_url=https://host/$a/~",
        "model.class=~/net.py:Net",
    ]
    config = load_config(folder / "config.yaml", overrides)
    assert config.data.root == "/home/me/films"
    assert config.data.dump == "/scratch/me/240P"
    assert config.stream.cache_dir == "/scratch/me/cache"
    assert config.stream.features_url == "https://host/$a/~"
    assert config.model.class_ == "/home/me/net.py:Net"


@pytest.mark.parametrize("value", ["$NOWHERE_SET/films", "films/${NOWHERE_SET}"])
def test_a_variable_that_is_not_set_is_refused(folder: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: got .*, but NOWHERE_SET is not set"):
        load_config(folder / "config.yaml", [f"data.root={value}"])


@pytest.mark.parametrize(
    "key",
    [
        *("data.dump", "data.metadata", "data.split", "data.feature_arrays", "data.feature_tars"),
        *("encoder.pretrained", "model.init_from", "training.split", "slurm.site", "data.root"),
    ],
)
def test_a_pipe_or_device_is_refused_and_never_opened(folder: Path, key: str) -> None:
    os.mkfifo(folder / "pipe")
    for path in ("pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match=rf"{key}: got .*, a pipe or device, want a file"):
            load_config(folder / "config.yaml", [f"{key}={path}"])


def test_a_pipe_as_a_file_of_code_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "net.py")
    with pytest.raises(ConfigError, match=r"model\.class: got .*, a pipe or device"):
        load_config(folder / "config.yaml", ["model.class=./net.py:Net"])


@pytest.mark.parametrize("key", ["data.metadata", "data.split", "training.split"])
def test_a_url_is_refused_where_only_files_on_disk_are_read(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: got s3://b/x\.json, want .* download it first"):
        load_config(folder / "config.yaml", [f"{key}=s3://b/x.json"])
