"""Ranks that were started with different things are refused before their first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import dump_config
from tests.configs.runtime.launchers import launcher_rows
from tests.training.conftest import LENGTHS, MakeConfig, MakeFilms
from tests.training.launched import ROOT, TIMEOUT_S
from training.agreement import first_difference, startup_facts

pytestmark = pytest.mark.slow

RANKS = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from configs.errors import StateError
from configs.load import load_config
from configs.runtime.launch import start
from training.agreement import check_agreement, data_facts, startup_facts
from training.checkpoint import find
from training.loop import train

file, other_net, other_features, other_runs = sys.argv[1:]
rank = int(os.environ["RANK"])
print("variables:", *os.environ, flush=True)
distributed = start(device="cpu", precision="fp32", accumulation=1, expected_world_size=2)

def attempt(case, *overrides):
    config = load_config(Path(file), overrides if rank else ())
    try:
        train(config, distributed)
        print(f"{case}: trained", flush=True)
    except StateError as error:
        print(f"{case}, rank {rank}: {error}", flush=True)

attempt("lr", "training.lr=0.5")
attempt("model", f"model.class={other_net}:Net")
attempt("features", f"stream.features_url={other_features}")
attempt("threads", "training.threads=2")
attempt("run folder", f"data.runs={other_runs}")
group = dist.distributed_c10d._get_default_group()
limit = group._get_backend(torch.device("cpu")).options._timeout
print(f"limit {limit.total_seconds():g} s", flush=True)
distributed.close()
"""
"""One world of two ranks, in which rank 1 is started with other things, one after the other."""

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, *, dim, genres):
        super().__init__()
        self.head = torch.nn.Linear(dim, genres)

    def forward(self, features, mask):
        real = mask.unsqueeze(-1).float()
        return self.head((features * real).sum(1) / real.sum(1)) {change}
"""


def test_the_first_difference_names_the_rank_and_both_values() -> None:
    same = {"training.lr": 0.1, "training.epochs": 3}
    assert first_difference([same, same, same]) is None
    other = same | {"training.lr": 0.2, "training.seed": 1}
    assert first_difference([same, same, other]) == (
        "ranks differ in training.lr: rank 0 has 0.1, rank 2 has 0.2"
    )


def test_what_belongs_to_a_node_may_differ(make_config: MakeConfig) -> None:
    one = make_config(training={"threads": 1}, stream={"cache_dir": "/a", "prefetch": 2})
    other = make_config(training={"threads": 4}, stream={"cache_dir": "/b", "prefetch": 4})
    assert startup_facts(one, None) == startup_facts(other, None)
    assert startup_facts(one, None) != startup_facts(make_config(training={"seed": 1}), None)


def test_two_ranks_refuse_to_start_with_different_things_and_name_them(
    make_config: MakeConfig, make_films: MakeFilms, tmp_path: Path
) -> None:
    nets = []
    for name, change in (("a", ""), ("b", "* 2")):
        (tmp_path / name).mkdir()
        nets.append(tmp_path / name / "net.py")
        nets[-1].write_text(NET.format(change=change))
    config = make_config(model={"class": f"{nets[0]}:Net", "options": {}}, training={"epochs": 1})
    features = tmp_path / "features"
    make_films(LENGTHS, folder=features, origin={"from": "another copy"})
    file = tmp_path / "films.yaml"
    file.write_text(dump_config(config))
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *(
                "--standalone",
                str(script),
                str(file),
                str(nets[1]),
                str(features),
                str(tmp_path / "runs"),
            ),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = next(line for line in lines if line.startswith("variables: ")).split()
    assert set(launcher_rows()["torchrun"][1]) <= set(names)
    for rank in (0, 1):
        for case, difference in (
            ("lr", "training.lr: rank 0 has 0.01, rank 1 has 0.5"),
            ("model", 'the file of model.class: rank 0 has "'),
            ("features", 'the features (digest of their manifest): rank 0 has "'),
            ("run folder", 'the checkpoint: rank 0 has "'),
        ):
            start = f"{case}, rank {rank}: ranks differ in {difference}"
            assert any(line.startswith(start) for line in lines), (start, done.stdout)
    assert lines.count("threads: trained") == 2
    assert lines.count("limit 590 s") == 2  # torch's default of 1,800 s is in force if it is lost
    assert all(
        line.endswith("start all ranks with the same configuration, code, data and run folder")
        for line in lines
        if "differ" in line
    )
