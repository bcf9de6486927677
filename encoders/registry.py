"""The interface of an image tower, and the tower that a configuration selects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from configs.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from configs.schema import EncoderConfig
    from encoders.decode import Preprocessing


class Tower(Protocol):
    """An image tower: uint8 pictures in, one feature each out."""

    @classmethod
    def fetch(cls, config: EncoderConfig) -> str | None:
        """Download the weights of a configuration, before a tower is built.

        Returns:
            What was downloaded, for the user, e.g. its path; None if there is nothing to download.

        Raises:
            ConfigError: the configuration selects no such tower.
            MachineError: the download failed.
        """
        ...

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build the tower; ``make_tower`` lists the errors."""
        ...

    name: str
    """Name of the model."""

    dim: int
    """Length of a feature."""

    preprocessing: Preprocessing
    """How the pictures must have been resized; the tower itself subtracts mean and divides."""

    provenance: Mapping[str, object]
    """What decides the features beside the pixels: architecture, weights digest and the like."""

    description: str
    """One line for people."""

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Return float32 ``[B, D]`` for uint8 ``[B, 3, H, W]`` on the tower's device."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the libraries that compute the features, by name.

        They are recorded in the sidecars for information and enter no digest.
        """
        ...


def make_tower(config: EncoderConfig, device: torch.device, precision: str) -> Tower:
    """Build the tower of a configuration.

    Args:
        config: Model, weights and seed.
        device: Where it runs.
        precision: ``fp32``, ``bf16`` or ``fp16``; ``resolve_precision`` gives one.

    Raises:
        ConfigError: model, tag and activation do not fit each other, or do not exist; an own
            encoder is none.
        DataError: weights are missing or do not fit the model.
    """
    return _tower_class(config)(config, device, precision)


def fetch_weights(config: EncoderConfig) -> str | None:
    """Download the weights of a configuration; return what was downloaded, None if nothing is.

    Raises:
        ConfigError: the model does not exist; or a custom encoder defines ``fetch`` as neither
            classmethod nor staticmethod.
        MachineError: the download failed.
    """
    return _tower_class(config).fetch(config)


def _tower_class(config: EncoderConfig) -> type[Tower]:
    if ":" in config.model:
        from encoders.custom import CustomTower

        return CustomTower
    if config.options:
        raise ConfigError(
            f"encoder.options: {config.model} takes none, want an own encoder, 'pkg.mod:Tower'"
        )
    from encoders.clip import ClipTower

    return ClipTower


def pick_device(wanted: str) -> torch.device:
    """Return the device of a single process; ranks get theirs from ``configs.runtime.launch``.

    Raises:
        ConfigError: a GPU is wanted, and there is none.
    """
    import torch

    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("encoder.device: got 'cuda', but torch finds no GPU; want 'cpu'")
    return torch.device("cuda" if found and wanted != "cpu" else "cpu")


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Return the arithmetic that ``auto`` means on a device; refuse what a device cannot do.

    Raises:
        ConfigError: the device has no such arithmetic.
    """
    good = _bf16_is_good(device)
    if wanted == "auto":
        return "bf16" if good else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError("encoder.precision: got 'fp16' on the CPU, want 'fp32' or 'bf16'")
    if wanted == "bf16" and device.type == "cuda" and not good:
        raise ConfigError("encoder.precision: this GPU has no bf16, want 'fp16' or 'fp32'")
    return wanted


def _bf16_is_good(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without the instructions a CPU does bf16 through fp32, which is slower than fp32 itself.
    ask = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch we take
    capabilities = ask() if ask else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
