"""A user's own encoder: a class by dotted path, tried before anyone waits."""

# B = frames in the batch, C = 3 (RGB), H, W = pixels, D = feature size

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.named import load_object
from configs.schema import EncoderConfig
from encoders.decode import Preprocessing
from encoders.weights import weights_digest

T = TypeVar("T")


class OwnTower:
    """Makes a tower of a user's class; the digest of its source is its provenance.

    The constructor gets those of ``device``, ``precision``, ``pretrained`` and ``seed`` that it
    names, and ``encoder.options``. The object has ``dim``, ``preprocessing`` and
    ``encode(frames)``, from uint8 ``[B, 3, H, W]`` on the device to ``[B, D]``.
    """

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build it, and encode two black frames.

        Raises:
            ConfigError: there is no such class, it refuses its options, or it is no encoder.
        """
        place, _, attribute = config.model.rpartition(":")
        # The folder is left out: it decides nothing, and is another on every machine.
        self.name = f"{Path(place).name}:{attribute}"
        cls = load_object(config.model, key="encoder.model")
        if not isinstance(cls, type):
            raise ConfigError(f"encoder.model: {self.name} is {cls!r}, want a class")
        self._own = self._build(cls, config, device, precision)
        self.dim = self._attribute("dim", int)
        self.preprocessing = self._attribute("preprocessing", Preprocessing)
        source = hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
        module = self._own if isinstance(self._own, nn.Module) else None
        self.provenance: Mapping[str, object] = {
            "name": self.name,
            "pretrained": config.pretrained and Path(config.pretrained).name,
            "seed": config.seed,
            "options": dict(config.options),
            "architecture": source,
            "weights": weights_digest(module.state_dict()) if module else source,
        }
        want = self.preprocessing
        self.description = (
            f"{self.name}   own encoder ({source[:12]})   {want.width}x{want.height} pixels   "
            f"{self.dim} values a frame"
        )
        self._try(device)

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Return float32 ``[B, D]`` for uint8 ``[B, 3, H, W]`` on the tower's device."""
        with torch.inference_mode():
            features_BD: Tensor = self._own.encode(frames_BCHW)
        return features_BD.float()

    def _build(self, cls: type, config: EncoderConfig, device: torch.device, precision: str) -> Any:
        offered = {
            "device": device,
            "precision": precision,
            "pretrained": config.pretrained,
            "seed": config.seed,
        }
        twice = sorted(offered.keys() & config.options.keys())
        if twice:
            raise ConfigError(f"encoder.options: {twice[0]!r} is not an option: encoder.{twice[0]}")
        named = inspect.signature(cls).parameters
        arguments = {key: value for key, value in offered.items() if key in named}
        try:
            return cls(**arguments, **config.options)
        except Exception as error:
            kind = type(error).__name__
            raise ConfigError(f"encoder.options: {self.name} refuses: {kind}: {error}") from error

    def _attribute(self, key: str, kind: type[T]) -> T:
        value = getattr(self._own, key, None)
        if not isinstance(value, kind):
            raise ConfigError(
                f"encoder.model: {self.name}: got {key} {value!r}, want {kind.__name__}"
            )
        return value

    def _try(self, device: torch.device) -> None:
        size = (2, 3, self.preprocessing.height, self.preprocessing.width)
        try:
            got = self.encode(torch.zeros(size, dtype=torch.uint8, device=device))
        except Exception as error:
            kind = type(error).__name__
            raise ConfigError(
                f"encoder.model: {self.name} fails on frames {list(size)}: {kind}: {error}"
            ) from error
        if list(got.shape) != [2, self.dim] or not got.isfinite().all():
            raise ConfigError(
                f"encoder.model: {self.name} returns {list(got.shape)} for two frames, "
                f"want finite [2, {self.dim}]"
            )
