"""The snippets of the README run as printed: in a plain loop, with Accelerate, with torchdata."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.sharding.servers import free_port
from tests.snippets import run_snippet, snippet, snippets
from training.stream.epoch_plan import SamplingOrder, plan_epoch

pytestmark = pytest.mark.slow

N_ROWS = [3 + (movie * 37) % 41 for movie in range(23)]
ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "training" / "stream" / "README.md"


@pytest.fixture
def folder(make_films: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a feature set of 23 movies and ``my.yaml``, which names it."""
    make_films(N_ROWS, folder=tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, epochs=1)
    return tmp_path


def write_config(folder: Path, *, epochs: int) -> None:
    tree = {
        "version": 1,
        "data": {"root": str(folder)},
        "encoder": {"name": "random"},
        "stream": {
            "features_url": str(folder / "features"),
            "window": 10,
            "global_batch": 7,
            "seed": 3,
        },
        "training": {"run_name": "run", "epochs": epochs},
        "tracking": {"wandb": "off"},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(tree))


def test_every_snippet_of_the_readme_starts_with_its_imports() -> None:
    for sections in snippets(README).values():
        for code in sections:
            assert code.startswith(("import ", "from "))


def test_every_file_and_test_that_the_readme_names_exists() -> None:
    text = README.read_text()
    for test_file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", text):
        assert f"def {name}(" in (Path(__file__).parent / test_file).read_text()
    table = text.partition("## Where to find what")[2].partition("\n## ")[0]
    files = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", table)}
    modules = {path.name for path in README.parent.glob("*.py")} - {"__init__.py"}
    assert files - {"schema.py"} == modules


def test_the_plain_loop_trains_and_resumes_from_its_checkpoint(folder: Path) -> None:
    code = snippet(README, "In a plain PyTorch loop")
    for epoch in (1, 2):
        write_config(folder, epochs=epoch)
        variables = run_snippet(code)
        state = torch.load(folder / "checkpoint.pt")["stream"]
        assert (state["epoch"], state["step"]) == (epoch, 0)
        assert variables["stream"].stats()["windows"] == len(N_ROWS)  # one epoch per run
    assert variables["model"].weight.abs().sum() > 0


RANK = """
import json, sys
import torch
from configs.errors import ConfigError
from movienet_stream import FeatureStream

seen = []

class Recording(torch.nn.BCEWithLogitsLoss):
    def forward(self, logits, labels):
        batch = scope["batch"]
        real = batch.weight > 0
        seen.extend(zip(batch.movie[real].tolist(), batch.start[real].tolist()))
        return super().forward(logits, labels)

torch.nn.BCEWithLogitsLoss = Recording
scope = {}
exec(sys.argv[1], scope)
accelerator, stream = scope["accelerator"], scope["stream"]
is_unchanged = isinstance(stream, FeatureStream)
weight = accelerator.unwrap_model(scope["model"]).weight.sum().item()

class Batches(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from stream

refused = []
for dispatch in (False, True):
    accelerator.dataloader_config.dispatch_batches = dispatch
    wrapped = torch.utils.data.DataLoader(Batches(), batch_size=1, collate_fn=lambda rows: rows[0])
    loader = accelerator.prepare(wrapped)
    if dispatch and accelerator.process_index:
        continue  # waits for rank 0, which is refused
    try:
        next(iter(loader))
    except ConfigError as error:
        refused.append(str(error))
answer = {"seen": seen, "is_unchanged": is_unchanged, "weight": weight, "refused": refused}
print(json.dumps(answer))
"""


def test_with_accelerate_two_ranks_read_the_plan_and_its_data_loaders_are_refused(
    folder: Path,
) -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, snippet(README, "With Accelerate")],
            env=dict(
                os.environ,
                ACCELERATE_USE_CPU="true",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                PYTHONPATH=str(ROOT),
                OMP_NUM_THREADS="1",
            ),
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    answers = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert [answer["is_unchanged"] for answer in answers] == [True, True]
    plan = plan_epoch(SamplingOrder(3, 10, 1, 7), np.arange(23), np.array(N_ROWS), epoch=0)
    planned = Counter(zip(plan.movie.tolist(), plan.start.tolist(), strict=True))
    seen = [Counter(tuple(window) for window in answer["seen"]) for answer in answers]
    assert seen[0] + seen[1] == planned
    assert answers[0]["weight"] == answers[1]["weight"]
    refused = answers[0]["refused"] + answers[1]["refused"]
    assert [line.partition("Accelerate's ")[2].partition(",")[0] for line in refused] == [
        "IterableDatasetShard",
        "DataLoaderDispatcher",
        "IterableDatasetShard",
    ]
    assert all("dispatch_batches=False" in line and "\n" not in line for line in refused)


@pytest.mark.usefixtures("folder")
def test_the_stateful_data_loader_of_torchdata_resumes_at_its_state() -> None:
    pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return run_snippet(snippet(README, "With torchdata's StatefulDataLoader"))["loader"]

    uninterrupted = [batch.movie.tolist() for batch in loader()]
    assert len(uninterrupted) == 4
    for stop in range(1, 4):
        first = loader()
        batches = iter(first)
        head = [next(batches).movie.tolist() for _ in range(stop)]
        state = first.state_dict()
        resumed = loader()
        resumed.load_state_dict(state)
        assert head + [batch.movie.tolist() for batch in resumed] == uninterrupted
