"""The world of a Slurm step, and the interface between its nodes."""

from __future__ import annotations

import socket

import pytest

from configs.errors import ConfigError
from configs.runtime.network import interface_towards, interfaces
from configs.runtime.slurm_step import hosts_of, step_place, tasks_on_node
from configs.runtime.world import World, world_from_environment

STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "tb[1-2]",
    "SLURM_JOB_ID": "12345",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    place = step_place(STEP)
    assert place is not None
    assert place.variables() == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "tb1",
        "MASTER_PORT": "22345",
    }


def test_the_address_of_the_batch_script_wins() -> None:
    place = step_place(STEP | {"MASTER_ADDR": "tb1i", "MASTER_PORT": "29999"})
    assert place is not None
    assert (place.master_addr, place.master_port) == ("tb1i", 29999)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch shell
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_the_batch_shell_and_a_step_of_one_task_are_no_world(environment: dict[str, str]) -> None:
    assert step_place(environment) is None


def test_commands_take_the_world_of_a_step_where_no_launcher_has_set_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=3, size=4, local_rank=1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=0, size=2, local_rank=0)


def test_a_step_without_its_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match="a Slurm step of 2 tasks with SLURM_PROCID=, SLURM"):
        world_from_environment()


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("tb1", ("tb1",)),
        ("tb[1-2,7],login1", ("tb1", "tb2", "tb7", "login1")),
        ("jwb[0098-0101]", ("jwb0098", "jwb0099", "jwb0100", "jwb0101")),
    ],
)
def test_slurm_s_lists_of_hosts_are_expanded(text: str, hosts: tuple[str, ...]) -> None:
    assert hosts_of(text) == hosts


@pytest.mark.parametrize(("node", "tasks"), [(0, 2), (2, 2), (3, 1)])
def test_the_tasks_of_a_node_are_read_from_slurm_s_list(node: int, tasks: int) -> None:
    assert tasks_on_node("2(x3),1", node) == tasks


def test_an_interface_is_found_by_its_route_and_never_loopback() -> None:
    assert not any(address.startswith("127.") for address in interfaces().values())
    for name, address in interfaces().items():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
        assert name != "lo"
    assert interface_towards(["127.0.0.1"]) in (None, *interfaces())
