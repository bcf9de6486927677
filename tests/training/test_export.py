"""An export contains everything that a process without access to the run needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file

from configs.errors import StateError
from configs.runtime.launch import start
from configs.schema import Config
from tests.damage import damaged, reads_or_reports
from tests.training.conftest import MakeConfig
from training import __main__ as command
from training import loop
from training.checkpoint import load_trained
from training.export import export, load_exported, load_trained_export

pytestmark = pytest.mark.slow

NET = """
import torch


class Net(torch.nn.Module):
    def __init__(self, dim, genres, width=4):
        super().__init__()
        self.body, self.head = torch.nn.Linear(dim, width), torch.nn.Linear(width, genres)

    def forward(self, features, mask):
        real = mask.unsqueeze(-1).float()
        return self.head((self.body(features) * real).sum(1) / real.sum(1))
"""

FIVE_LINES = """
import json, sys, torch
from safetensors import safe_open

with safe_open(sys.argv[1], "pt") as file:
    about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
exec(about["source"])
model = Net(**json.loads(about["arguments"]))
model.load_state_dict(weights)

rows = torch.load(sys.argv[2])
torch.save(model.eval()(rows, torch.ones(rows.shape[:2], dtype=bool)), sys.argv[3])
ours = ("configs", "sharding", "training", "eval")
print([name for name in sys.modules if name.partition(".")[0] in ours])
"""
"""The example of the README: torch, safetensors and the file, but none of our packages."""

OUR_LOADER = """
import sys, torch
from training.export import load_exported

exported = load_exported(sys.argv[1])
rows = torch.load(sys.argv[2])
torch.save(exported.model(rows, torch.ones(rows.shape[:2], dtype=bool)).detach(), sys.argv[3])
heavy = ("accelerate", "wandb", "pydantic", "yaml", "training.loop", "training.checkpoint")
print([name for name in sys.modules if name in heavy])
"""


def train(config: Config) -> None:
    distributed = start(
        device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
    )
    with closing(distributed):
        loop.train(config, distributed)


def use(program: str, out: Path, folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """Run a program on the export and the rows in a process of its own; return its logits."""
    torch.save(rows, folder / "rows.pt")
    paths = [str(folder / "rows.pt"), str(folder / "logits.pt")]
    isolated = ["-I"] if "load_exported" not in program else []
    command = [sys.executable, *isolated, "-c", program, str(out), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    logits: torch.Tensor = torch.load(paths[1])
    return logits


@pytest.fixture
def custom(make_config: MakeConfig, tmp_path: Path) -> Config:
    """A trained run of a custom model whose original file was deleted."""
    file = tmp_path / "net.py"
    file.write_text(NET)
    config = make_config(model={"class": f"{file}:Net", "options": {"width": 3}})
    train(config)
    file.unlink()
    return config


def test_a_custom_model_is_loaded_in_five_lines_without_our_packages(
    custom: Config, tmp_path: Path
) -> None:
    out, rows = tmp_path / "model.safetensors", torch.randn(2, 6, 8)
    export(custom.run_dir, "best", out)
    logits = use(FIVE_LINES, out, tmp_path, rows)
    trained = load_trained(custom.run_dir, "best").model
    assert torch.equal(logits, trained(rows, torch.ones(2, 6, dtype=torch.bool)))


def test_a_built_in_model_is_loaded_without_the_run_and_the_training_loop(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(training={"epochs": 1, "ema": 0.9})
    train(config)
    out, rows = tmp_path / "model.safetensors", torch.randn(2, 6, 8)
    export(config.run_dir, "last", out)
    logits = use(OUR_LOADER, out, tmp_path, rows)
    trained = load_trained(config.run_dir, "last")  # the average: these weights are scored
    assert torch.equal(logits, trained.model(rows, torch.ones(2, 6, dtype=torch.bool)))
    exported = load_exported(out)
    assert exported.genres == trained.genres
    assert (exported.threshold, exported.frames) == (trained.threshold, 6)
    assert exported.genre_thresholds == trained.genre_thresholds
    assert exported.provenance == {"import": {"from": "test"}, "dim": 8}


def test_the_metadata_describe_the_model_and_contain_no_local_path(
    custom: Config, tmp_path: Path
) -> None:
    out = tmp_path / "model.safetensors"
    export(custom.run_dir, "last", out)
    with safe_open(out, "pt") as file:
        metadata: dict[str, Any] = file.metadata()
    assert (metadata["format"], metadata["class"]) == ("movienet-export-1", "net.py:Net")
    assert metadata["source"] == NET
    assert metadata["source_sha256"] == hashlib.sha256(NET.encode()).hexdigest()
    assert json.loads(metadata["arguments"]) == {"dim": 8, "genres": 3, "width": 3}
    assert json.loads(metadata["genres"]) == ["Drama", "Comedy", "Western"]
    assert json.loads(metadata["config"])["training"]["lr"] == 0.01
    assert [json.loads(metadata[key]) for key in ("checkpoint", "epoch")] == ["last", 3]
    assert str(tmp_path) not in json.dumps(metadata)


def test_a_custom_loss_is_stored_in_checkpoint_and_export_and_must_not_change(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    file, moved = tmp_path / "custom.py", tmp_path / "moved.py"
    text = "def loss(logits, labels):\n    return ((logits - labels) ** 2).mean(1)\n"
    for place in (file, moved):
        place.write_text(text)
    train(make_config(training={"loss": f"{file}:loss", "epochs": 1}))
    config = make_config(training={"loss": f"{moved}:loss", "epochs": 2})
    train(config)  # the path differs, the content does not
    assert (config.run_dir / "checkpoints/last/loss.py").read_text() == text
    export(config.run_dir, "last", tmp_path / "model.safetensors")
    metadata = load_exported(tmp_path / "model.safetensors").metadata
    assert metadata["loss_source"] == text
    assert metadata["loss_source_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    moved.write_text(text.replace("mean", "sum"))
    with pytest.raises(StateError, match=r"got loss\.py sha256 '\w+', want '\w+' as in its"):
        train(config)


def test_the_command_accepts_the_folder_of_a_run_or_its_configuration(
    custom: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["export", str(custom.run_dir)]) == 0
    out = custom.run_dir / "run.safetensors"
    assert f"{out}: checkpoint 'best'" in capsys.readouterr().out
    baselines = load_trained_export(out).baselines
    assert baselines is not None
    assert baselines.movies == len(load_trained(custom.run_dir, "best").movies.ids)
    last = custom.run_dir / "last.safetensors"
    words = ["--config", str(custom.run_dir / "config.yaml"), "--checkpoint", "last"]
    assert command.main(["export", *words, "--out", str(last)]) == 0
    assert load_exported(last).metadata["checkpoint"] == '"last"'


def test_a_run_whose_features_have_moved_is_exported_without_baselines(
    make_config: MakeConfig,
    finished: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config("finished")
    shutil.copytree(finished.run_dir, config.run_dir, symlinks=True)
    state = config.run_dir / "checkpoints/last/state.json"
    state.write_text(state.read_text().replace(finished.features_url, "moved/away"))
    assert command.main(["export", str(config.run_dir), "--checkpoint", "last"]) == 0
    assert "exported without baselines: moved/away" in capsys.readouterr().err
    out = config.run_dir / "finished.safetensors"
    assert load_trained_export(out).baselines is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "RUN: got none, want the folder of a run, or --config FILE"),
        (["export", "nowhere"], "RUN: got nowhere, which is not a folder, want that of a run"),
    ],
)
def test_a_missing_run_is_reported_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_an_export_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content, message in ((b"{", "corrupt"), (None, "got format None")):
        if content is None:
            save_file({"a": torch.zeros(1)}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(StateError, match=message):
            load_exported(file)


def test_files_of_earlier_versions_have_no_thresholds_per_genre(
    make_config: MakeConfig, finished: Config, tmp_path: Path
) -> None:
    out, config = tmp_path / "export.safetensors", make_config("finished")
    shutil.copytree(finished.run_dir, config.run_dir, symlinks=True)
    export(config.run_dir, "last", out)
    with safe_open(out, "pt") as file:
        later = ("genre_thresholds", "recipe", "baselines", "sha256")
        metadata = {k: v for k, v in file.metadata().items() if k not in later}
        save_file({name: file.get_tensor(name) for name in file.keys()}, out, metadata)  # noqa: SIM118
    assert load_exported(out).genre_thresholds is None
    trained = load_trained_export(out)
    assert (trained.recipe, trained.baselines) == (None, None)
    state = config.run_dir / "checkpoints/last/state.json"
    tree = json.loads(state.read_text())
    del tree["position"]["genre_thresholds"]
    state.write_text(json.dumps(tree))
    assert load_trained(config.run_dir, "last").genre_thresholds is None


def test_one_other_byte_of_a_tensor_is_reported(finished: Config, tmp_path: Path) -> None:
    out = tmp_path / "export.safetensors"
    export(finished.run_dir, "last", out)
    data = bytearray(out.read_bytes())
    data[-1] ^= 1  # tensors are last: the weight remains a plausible number
    out.write_bytes(data)
    with pytest.raises(StateError, match=r"tensors or metadata differ from their sha256\); run"):
        load_exported(out)


def test_a_damaged_export_is_loaded_or_a_one_line_error(finished: Config, tmp_path: Path) -> None:
    out = tmp_path / "export.safetensors"
    export(finished.run_dir, "last", out)

    @settings(max_examples=40)
    @given(damaged(out.read_bytes()))
    def check(corrupt: bytes) -> None:
        out.write_bytes(corrupt)
        assert reads_or_reports(lambda: load_exported(out))

    check()
