"""The README's examples run as they stand there: plain, beside Accelerate, with torchdata."""

from __future__ import annotations

import inspect
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

from configs.schema import StreamConfig
from sharding.features import open_features
from tests.sharding.servers import free_port
from training.stream.epoch_plan import SamplingOrder, plan_epoch
from training.stream.loader import FeatureStream

N_ROWS = [3 + (movie * 37) % 41 for movie in range(23)]
README = Path(__file__).resolve().parents[3] / "training" / "stream" / "README.md"


def example(title: str) -> str:
    """Return the code under a heading."""
    section = README.read_text().partition(f"## {title}")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


class Net(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(dim, 3)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mean = (features * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits: torch.Tensor = self.head(mean)
        return logits


def test_the_plain_loop_trains_and_goes_on_from_its_checkpoint(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    make_films(N_ROWS, folder=tmp_path)
    code = example("In a plain PyTorch loop").replace("data/features/vit-b-32", str(tmp_path))
    model = Net(8)
    config = StreamConfig(window=10, global_batch=7)
    features = open_features(str(tmp_path))
    with FeatureStream(features, np.arange(23), config) as stream:
        begin = stream.state_dict()
    scope: dict[str, Any] = {
        "FeatureStream": FeatureStream,
        "open_features": open_features,
        "config": type("Config", (), {"stream": config}),
        "rank": 0,
        "world": 1,
        "device": "cpu",
        "epochs": 2,
        "checkpoint": {"stream": begin},
        "model": model,
        "criterion": torch.nn.BCEWithLogitsLoss(reduction="none"),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    before = model.head.weight.detach().clone()
    exec(code, scope)  # noqa: S102  # our own README
    assert not torch.equal(model.head.weight, before)
    assert (scope["checkpoint"]["stream"]["epoch"], scope["checkpoint"]["stream"]["step"]) == (2, 0)


RANK = """
import json, sys
import numpy as np
import torch
from accelerate import Accelerator
from configs.errors import ConfigError
from configs.schema import StreamConfig
from sharding.features import open_features
from training.stream.loader import FeatureStream

# Net

accelerator = Accelerator(cpu=True)
features = open_features(sys.argv[1])
movies, config = np.arange(23), StreamConfig(window=10, global_batch=7, seed=3)
model = Net(8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
seen = []

class Seen(torch.nn.BCEWithLogitsLoss):
    def forward(self, logits, labels):
        batch = scope["batch"]
        real = batch.weight > 0
        seen.extend(zip(batch.movie[real].tolist(), batch.start[real].tolist()))
        return super().forward(logits, labels)

scope = dict(globals(), criterion=Seen(reduction="none"))
exec(sys.argv[2], scope)
same = isinstance(scope["stream"], FeatureStream)
weight = accelerator.unwrap_model(scope["model"]).head.weight.sum().item()

class Batches(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from scope["stream"]

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
print(json.dumps({"seen": seen, "same": same, "weight": weight, "refused": refused}))
"""


def test_beside_accelerate_two_ranks_read_the_plan_and_a_dealer_is_refused(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    make_films(N_ROWS, folder=tmp_path)
    port = str(free_port())
    program = RANK.replace("# Net", inspect.getsource(Net))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), example("Beside Accelerate")],
            env=dict(
                os.environ,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                PYTHONPATH=".",
                OMP_NUM_THREADS="1",
            ),
            cwd=README.parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = [json.loads(each.splitlines()[-1]) for each in said]
    assert [each["same"] for each in told] == [True, True]
    plan = plan_epoch(SamplingOrder(3, 10, 1, 7), np.arange(23), np.array(N_ROWS), epoch=0)
    planned = Counter(zip(plan.movie.tolist(), plan.start.tolist(), strict=True))
    seen = [Counter(tuple(window) for window in each["seen"]) for each in told]
    assert seen[0] + seen[1] == planned
    assert told[0]["weight"] == told[1]["weight"]
    refused = told[0]["refused"] + told[1]["refused"]
    assert [line.partition("Accelerate's ")[2].partition(",")[0] for line in refused] == [
        "IterableDatasetShard",
        "DataLoaderDispatcher",
        "IterableDatasetShard",
    ]
    assert all("dispatch_batches=False" in line and "\n" not in line for line in refused)


def test_the_stateful_data_loader_of_torchdata_goes_on_where_its_state_was_taken(
    make_films: Callable[..., Any],
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    films = make_films(N_ROWS)
    config = StreamConfig(window=10, global_batch=4, seed=3)

    def loader() -> Any:
        scope: dict[str, Any] = {
            "torch": torch,
            "StatefulDataLoader": stateful.StatefulDataLoader,
            "stream": FeatureStream(films.features, films.movies, config),
        }
        exec(example("With torchdata's StatefulDataLoader"), scope)  # noqa: S102  # our own README
        return scope["loader"]

    whole = [batch.movie.tolist() for batch in loader()]
    assert len(whole) == 6
    for stop in range(1, 6):
        first = loader()
        walk = iter(first)
        head = [next(walk).movie.tolist() for _ in range(stop)]
        state = first.state_dict()
        again = loader()
        again.load_state_dict(state)
        assert head + [batch.movie.tolist() for batch in again] == whole
