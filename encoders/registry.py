"""Interface of image towers, and selection of the tower, device and precision of a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from configs.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from configs.schema import EncoderConfig
    from encoders.decode import Preprocessing


logger = logging.getLogger(__name__)


class Tower(Protocol):
    """Image tower: maps uint8 images to one feature each."""

    @classmethod
    def fetch(cls, config: EncoderConfig) -> str | None:
        """Download the weights of a configuration; no tower needs to be built for this.

        Returns:
            Description of the download for the user, e.g. its path; None if there is nothing to
            download.

        Raises:
            ConfigError: the configuration selects no such tower.
            MachineError: the download failed.
        """
        ...

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build the tower; raises the errors listed at ``make_tower``."""
        ...

    name: str
    """Model name."""

    dim: int
    """Length of a feature (D)."""

    preprocessing: Preprocessing
    """Input size and resizing; the tower itself subtracts the mean and divides by the std."""

    provenance: Mapping[str, object]
    """Everything apart from the pixels that determines the features, e.g. architecture and digest
    of the weights."""

    description: str
    """One line for the user: name, weights, input size and feature size."""

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Return float32 ``[B, D]`` for uint8 ``[B, 3, H, W]`` on the tower's device."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Return versions of the libraries that compute the features, by name.

        Sidecars record them for information; no digest depends on them.
        """
        ...


def make_tower(config: EncoderConfig, device: torch.device, precision: str) -> Tower:
    """Build the tower of a configuration.

    Args:
        config: Model, weights and seed.
        device: Where it runs.
        precision: ``fp32``, ``bf16`` or ``fp16``, from ``resolve_precision``.

    Raises:
        ConfigError: model or tag do not exist, or their activations differ; or a custom encoder
            does not implement the interface.
        DataError: weights are missing, or belong to another model.
    """
    return _tower_class(config)(config, device, precision)


def fetch_weights(config: EncoderConfig) -> str | None:
    """Download the weights of a configuration.

    Returns:
        Description of the download, e.g. its path; None if there is nothing to download.

    Raises:
        ConfigError: the model does not exist; or a custom encoder defines ``fetch`` as neither
            classmethod nor staticmethod.
        MachineError: the download failed.
    """
    return _tower_class(config).fetch(config)


def _tower_class(config: EncoderConfig) -> type[Tower]:
    if config.is_custom:
        from encoders.custom import CustomTower

        return CustomTower
    if config.options:
        raise ConfigError(
            f"encoder.options: {config.model} takes none; remove them, or set encoder.model to a "
            "custom encoder, e.g. ./tower.py:Tower"
        )
    logger.info("importing OpenCLIP")  # takes seconds
    from encoders.clip import ClipTower

    return ClipTower


def pick_device(name: str) -> torch.device:
    """Return the device of a single process; ranks get theirs from ``configs.runtime.launch``.

    Args:
        name: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.

    Raises:
        ConfigError: ``name`` is ``cuda`` and there is no GPU.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("encoder.device: got 'cuda', but torch finds no GPU; want 'cpu'")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision on a device; ``auto`` is bf16 if the hardware supports it, else fp32.

    Raises:
        ConfigError: the device does not support the precision.
    """
    has_bf16 = _has_bf16(device)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("encoder.precision: got 'fp16' on the CPU, want 'fp32' or 'bf16'")
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError("encoder.precision: this GPU has no bf16, want 'fp16' or 'fp32'")
    return precision


def _has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without the instructions a CPU emulates bf16 through fp32, which is slower than fp32 itself.
    # The oldest supported torch does not have this function.
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    capabilities = get_capabilities() if get_capabilities else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
