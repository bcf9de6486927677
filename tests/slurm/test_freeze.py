from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import PRESETS, load_config
from slurm.freeze import copy_package, freeze


@pytest.mark.parametrize("url", ["https://ada:5ec2et@host/set", "https://host/set?sig=5ec2et"])
def test_a_secret_of_a_url_is_not_frozen_into_a_file(tmp_path: Path, url: str) -> None:
    config = load_config("demo", [f"stream.features_url={url}"])
    with pytest.raises(
        ConfigError, match=r"stream\.features_url: got a URL with a password"
    ) as got:
        freeze(config, tmp_path)
    assert "5ec2et" not in str(got.value)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_demo_preset_without_its_model_is_refused_with_the_command_that_copies_it(
    tmp_path: Path,
) -> None:
    shutil.copyfile(PRESETS / "demo.yaml", tmp_path / "mine.yaml")
    missing = tmp_path / "towers" / "demo.json"
    command = f'install -D -m 644 "$(movienet-shard presets towers/demo)" {missing}'
    with pytest.raises(ConfigError) as got:
        freeze(load_config(tmp_path / "mine.yaml"), tmp_path)
    assert str(got.value) == f"encoder.model: no file {str(missing)!r}; run `{command}`"


def test_the_files_that_belong_to_a_config_are_frozen(tmp_path: Path) -> None:
    files = {"net.py": "net", "loss.py": "loss", "tower.json": "{}", "prompts.txt": "a {genre}"}
    for name, text in (files | {"site.sh": "site"}).items():
        (tmp_path / name).write_text(text)
    keys = (
        *("model.class=./net.py:Net", "training.loss=./loss.py:loss", "slurm.site=site.sh"),
        *("encoder.model=tower.json", "eval.prompts=prompts.txt"),
    )
    shutil.copyfile(PRESETS / "demo.yaml", tmp_path / "films.yaml")
    folder = tmp_path / "submit-1"
    folder.mkdir()
    frozen = freeze(load_config(tmp_path / "films.yaml", keys), folder)
    stored = (folder / "config.yaml").read_text()
    for name in (*files, "site.sh"):
        copy = folder / "user" / name
        assert copy.read_text() == (tmp_path / name).read_text()
        assert str(copy) in stored
    assert frozen.eval.prompts == str(folder / "user" / "prompts.txt")


def test_libraries_compiled_on_the_submit_host_are_not_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "package_with_a_library"
    package.mkdir(parents=True)
    for name in ("__init__.py", "resize.c", "_resize.abi3.so"):
        (package / name).touch()
    monkeypatch.syspath_prepend(package.parent)
    copy_package(package.name, tmp_path / "code")
    frozen = {path.name for path in (tmp_path / "code" / package.name).iterdir()}
    assert frozen == {"__init__.py", "resize.c"}
