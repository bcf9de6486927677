"""The text of batch scripts; golden files hold them as Slurm gets them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import slurm
from configs.schema_slurm import SlurmConfig
from slurm.chain import plan_chain
from slurm.resources import STAGES
from slurm.script import Place, render

BODIES = Path(slurm.__file__).parent
GOLDEN = Path(__file__).parents[1] / "golden" / "slurm"
PLACE = Place(
    folder="/films/runs/lstm/submit-2",
    cwd="/home/me/films",
    label="lstm.2.0a1b2c",
    site="/films/runs/lstm/submit-2/user/site.sh",
    prefix="apptainer exec --nv /images/movienet.sif",
    launch="accelerate",
)
CONFIG = SlurmConfig.model_validate(
    {
        "partition": "gpu",
        "account": "films",
        "shard": {"tasks": 25, "throttle": 4, "cpus": 8},
        "encode": {"tasks": 4, "ranks": 2, "gres": "gpu:2", "cpus": 8},
        "train": {"nodes": 2, "ranks": 4, "gres": "gpu:4", "cpus": 8, "time": "1-00:00:00"},
    }
)
JOBS = {
    job.name: job
    for job in plan_chain(CONFIG, run_name="lstm", max_array_size=11, grid=("training.seed=0,1",))
}


def body(stage: str) -> str:
    return (BODIES / f"{stage}.sbatch").read_text()


@pytest.mark.parametrize(
    "name",
    ["plan", "shard-11", "gate-frames", "encode", "gate-features", "train-seed-1", "eval-seed-1"],
)
def test_scripts_are_as_in_the_golden_files(name: str) -> None:
    job = JOBS[name]
    text = render(job, body(job.stage), PLACE)
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_a_body_is_valid_shell_with_all_options_before_its_first_command(stage: str) -> None:
    path = BODIES / f"{stage}.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    head, start, rest = body(stage).partition("\nset -u\n")
    assert start
    assert "#SBATCH" not in rest
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.parametrize("stage", STAGES)
def test_a_body_appends_its_log_may_be_requeued_and_does_not_use_its_own_path(stage: str) -> None:
    text = body(stage)
    assert "#SBATCH --open-mode=append" in text
    assert "#SBATCH --requeue" in text
    assert not re.search(r"\$0|BASH_SOURCE", text)
    assert "unset SLURM_EXPORT_ENV" in text


def test_the_lines_about_one_life_are_the_same_in_every_body_that_has_them() -> None:
    def common(stage: str) -> str:
        found = re.search(
            r"# --- one life.*# --- end of the common lines\n", body(stage), re.DOTALL
        )
        assert found is not None
        return found[0]

    assert common("shard") == common("encode") == common("train")


@pytest.mark.parametrize("stage", ["shard", "encode"])
def test_an_array_writes_one_log_file_per_task_and_is_told_its_number_of_tasks(stage: str) -> None:
    text = body(stage)
    assert "#SBATCH --output=%x-%A_%a.out" in text
    commands = "\n".join(line.partition("#")[0] for line in text.splitlines())
    assert "SLURM_ARRAY_TASK_COUNT" not in commands


def test_the_machine_rank_is_expanded_on_the_node() -> None:
    text = body("train")
    quoted = text[text.index("machine_rank=") :]
    assert quoted.startswith("machine_rank=${MACHINE_RANK:-$SLURM_NODEID}")
    before = text[: text.index("machine_rank=")]
    assert before.count("'") % 2 == 1  # inside single quotes


def test_paths_with_spaces_stay_one_word() -> None:
    place = Place("/my films/submit-1", "/my films", "a.1", "", "", "srun")
    text = render(JOBS["plan"], body("plan"), place)
    assert '#SBATCH --chdir="/my films"' in text
    assert "set -- --config '/my films/submit-1/config.yaml'" in text
