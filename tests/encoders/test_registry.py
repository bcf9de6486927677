from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from encoders.registry import resolve_precision

CPU = torch.device("cpu")


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 'fp16' on the CPU"):
        resolve_precision("fp16", CPU)


def test_auto_resolves_to_a_concrete_precision() -> None:
    assert resolve_precision("auto", CPU) in ("bf16", "fp32")
