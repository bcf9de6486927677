"""Time limits, options and arrays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.schema_slurm import SlurmConfig, parse_walltime
from slurm.resources import clock, expand, ranges, resolve, split_array


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90min", 5400),
        ("4h", 14400),
        ("30:00", 1800),
        ("04:00:00", 14400),
        ("1-12:00:00", 129600),
        ("2-06:00", 194400),
    ],
)
def test_a_time_limit_is_written_with_a_unit_or_as_slurm_writes_it(text: str, seconds: int) -> None:
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize("value", [120, "120", "soon", None, True])
def test_a_bare_number_is_refused_since_slurm_means_minutes(value: object) -> None:
    with pytest.raises(ValueError, match=r"got .*, want a duration"):
        parse_walltime(value)


@given(st.integers(1, 10**7))
def test_slurm_s_notation_of_a_duration_means_the_same_number_of_seconds(seconds: int) -> None:
    assert parse_walltime(clock(seconds)) == seconds


def test_a_configuration_survives_being_written_and_read() -> None:
    config = SlurmConfig.model_validate({"time": "1-00:00:00", "train": {"lead": "90s"}})
    assert SlurmConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_stage_takes_its_own_value_then_the_section_s_then_the_default() -> None:
    config = SlurmConfig.model_validate(
        {"partition": "gpu", "time": "6h", "train": {"partition": "big", "nodes": 2, "ranks": 4}}
    )
    train, shard = resolve(config, "train"), resolve(config, "shard")
    assert train.options == (
        "--partition=big",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--time=06:00:00",
        "--signal=B:USR1@300",
    )
    assert train.world_size == 8
    assert shard.options[:2] == ("--partition=gpu", "--nodes=1")
    assert shard.tasks == 8


def test_every_key_becomes_the_option_of_sbatch_with_its_name() -> None:
    config = SlurmConfig.model_validate(
        {
            "train": {
                "account": "a",
                "qos": "q",
                "gres": "gpu:4",
                "constraint": "c",
                "reservation": "r",
                "exclude": "n[1,2]",
                "cpus": 6,
                "mem": "64G",
                "signal": "USR2",
                "lead": "10min",
                "mail": "me@example.org",
                "extra": ["--comment=films"],
            }
        }
    )
    assert resolve(config, "train").options == (
        *("--account=a", "--qos=q", "--gres=gpu:4", "--constraint=c", "--reservation=r"),
        *("--exclude=n[1,2]", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=6"),
        *("--mem=64G", "--time=12:00:00", "--signal=B:USR2@600"),
        *("--mail-user=me@example.org", "--mail-type=END,FAIL", "--comment=films"),
    )


def test_a_time_limit_that_the_signal_and_the_start_use_up_is_refused() -> None:
    config = SlurmConfig.model_validate({"train": {"time": "6min", "lead": "5min"}})
    with pytest.raises(
        ConfigError, match=r"slurm\.train\.time: got 00:06:00, .* at least 00:06:30"
    ):
        resolve(config, "train")


@pytest.mark.parametrize("option", ["--array=0-3", "--output=x", "--no-requeue", "-p gpu"])
def test_options_that_the_chain_depends_on_cannot_be_overridden(option: str) -> None:
    with pytest.raises(ValidationError, match="extra"):
        SlurmConfig.model_validate({"extra": [option]})


@pytest.mark.parametrize("stage", ["plan", "shard", "encode", "eval", "gate"])
def test_only_training_spans_nodes(stage: str) -> None:
    with pytest.raises(ValidationError, match=f"slurm.{stage}.nodes: got 2, want 1"):
        SlurmConfig.model_validate({stage: {"nodes": 2}})


@given(st.lists(st.integers(0, 200), unique=True).map(sorted), st.integers(1, 50))
def test_arrays_cover_every_task_once_within_the_limit_of_the_cluster(
    tasks: list[int], max_array_size: int
) -> None:
    arrays = split_array(tasks, max_array_size)
    covered = [offset + index for offset, text in arrays for index in expand(text)]
    assert sorted(covered) == tasks
    assert all(max(expand(text)) < max_array_size for _, text in arrays)


def test_twenty_five_tasks_on_a_cluster_with_arrays_of_eleven_are_three_arrays() -> None:
    assert split_array(range(25), 11) == ((0, "0-10"), (11, "0-10"), (22, "0-2"))


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 5], "1,3,5")]
)
def test_task_numbers_are_listed_as_slurm_lists_them(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
    assert list(expand(text)) == numbers
