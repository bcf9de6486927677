"""The exit codes of the training command."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.training.conftest import MakeConfig
from tests.training.launched import ROOT, TIMEOUT_S, attempt, command, run_alone, wait_for_step


@pytest.mark.slow
def test_an_interrupted_command_exits_with_75(make_config: MakeConfig) -> None:
    config = make_config("alone", training={"epochs": 500, "validate_epochs": 0})
    process = subprocess.Popen(command(config), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_step(config, 5)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75
    assert "stopped by SIGUSR1 at step" in told.splitlines()[-1]
    assert attempt(config, 1)[0] == "interrupted"


def test_a_launch_of_worlds_of_one_is_refused_by_an_option(make_config: MakeConfig) -> None:
    done = run_alone(make_config(), "--expected-world-size", "2")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: expected_world_size: launched 1 rank, want 2; start them with"
    )
    assert len(done.stderr.splitlines()) == 1
