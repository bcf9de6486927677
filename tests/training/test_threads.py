"""The number of threads follows the size of the model alone, so that resuming stays exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from configs.runtime.launch import default_threads
from training.threads import choose_threads, threads_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    default_threads()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_parameters", "limit", "threads"),
    [
        (95_701, 16, 1),  # GatedAttention, the size of all built-in models
        (1_999_999, 16, 1),
        (4_000_000, 16, 4),
        (90_000_000, 16, 16),
        (90_000_000, 1, 1),  # OMP_NUM_THREADS=1, as torchrun sets it for several ranks
        (0, 1, 1),
    ],
)
def test_there_is_one_thread_per_million_parameters_up_to_the_limit(
    n_parameters: int, limit: int, threads: int
) -> None:
    assert threads_for(n_parameters, limit=limit) == threads


def test_a_small_model_gets_one_thread_and_the_choice_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.set_num_threads(3)
    with caplog.at_level("INFO", "training"):
        choose_threads(nn.Linear(9, 10), CPU, 0)
    assert torch.get_num_threads() == 1
    assert caplog.messages == [
        f"threads 1 of {default_threads()}, chosen for 100 parameters; training.threads sets "
        "another number"
    ]


@pytest.mark.parametrize(("device", "configured"), [("cpu", 3), ("cuda", 0)])
def test_a_configured_number_and_the_threads_of_a_gpu_s_process_are_kept(
    device: str, configured: int
) -> None:
    torch.set_num_threads(3)
    choose_threads(nn.Linear(9, 10), torch.device(device), configured)
    assert torch.get_num_threads() == 3
