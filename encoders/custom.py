"""A custom encoder: a user's class by dotted path, checked on two frames before the task starts."""

# B = frames in the batch, C = 3 (RGB), H, W = pixels, D = feature size

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, MachineError, MovieNetError
from configs.schema import EncoderConfig
from configs.user_code import load_object
from encoders.decode import Preprocessing
from encoders.weights import weights_digest

T = TypeVar("T")


class CustomTower:
    """A tower made of a user's class; the digest of its source is its provenance.

    The constructor gets those of ``device``, ``precision``, ``pretrained``, ``weights_dir`` and
    ``seed`` that it names, and ``encoder.options``. The object has ``dim``, ``preprocessing`` and
    ``encode(frames)``, from uint8 ``[B, 3, H, W]`` on the device to ``[B, D]``.

    Two methods are optional: ``versions()`` returns library versions by name, and ``fetch``, a
    classmethod or staticmethod, downloads the weights and returns their path. ``fetch`` gets those
    of ``pretrained``, ``weights_dir``, ``seed`` and ``encoder.options`` that it names.
    """

    @classmethod
    def fetch(cls, config: EncoderConfig) -> str | None:
        """Run the class's own ``fetch``; return the path, or the class's name if it returns none.

        Returns:
            None if the class does not define ``fetch``.

        Raises:
            ConfigError: there is no such class, or ``fetch`` needs an instance.
            MachineError: ``fetch`` failed.
        """
        own, name = _load_class(config)
        if not hasattr(own, "fetch"):
            return None
        # A tower cannot be built before its weights are there, so fetch must work without one.
        if not isinstance(inspect.getattr_static(own, "fetch"), classmethod | staticmethod):
            raise ConfigError(
                f"encoder.model: {name}: got fetch as an instance method, want a classmethod or "
                "staticmethod"
            )
        fetch: Callable[..., object] = own.fetch
        try:
            fetched = fetch(**_named_by(fetch, {**_weights_settings(config), **config.options}))
        except MovieNetError:
            raise
        except Exception as error:  # a download raises whatever its library raises
            raise MachineError(f"fetch {name}: {type(error).__name__}: {error}") from error
        return str(fetched or name)

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build it, and encode two black frames.

        Raises:
            ConfigError: there is no such class, it refuses its options, or it is no encoder.
        """
        cls, self.name = _load_class(config)
        self._own = self._build(cls, config, device, precision)
        self._versions = self._read_versions()
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

    def versions(self) -> Mapping[str, str]:
        """Return what the class's ``versions()`` returned; empty if it does not define it."""
        return self._versions

    def _build(self, cls: type, config: EncoderConfig, device: torch.device, precision: str) -> Any:
        offered = {"device": device, "precision": precision, **_weights_settings(config)}
        twice = sorted(offered.keys() & config.options.keys())
        if twice:
            raise ConfigError(f"encoder.options: {twice[0]!r} is not an option: encoder.{twice[0]}")
        try:
            return cls(**_named_by(cls, offered), **config.options)
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

    def _read_versions(self) -> dict[str, str]:
        """Call ``versions()`` once, now: its mistakes must show before the first shard."""
        method = getattr(self._own, "versions", dict)
        try:
            versions: object = method()
        except Exception as error:
            kind = type(error).__name__
            raise ConfigError(
                f"encoder.model: {self.name}: versions() fails: {kind}: {error}"
            ) from error
        if not isinstance(versions, Mapping) or not all(
            isinstance(text, str) for pair in versions.items() for text in pair
        ):
            raise ConfigError(
                f"encoder.model: {self.name}: got versions() {versions!r}, want a dict of names "
                "and version strings"
            )
        return dict(versions)

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


def _load_class(config: EncoderConfig) -> tuple[type[Any], str]:
    """Return the class that ``encoder.model`` names, and its name for messages and provenance."""
    place, _, attribute = config.model.rpartition(":")
    # Without the folder: it does not affect the features, and differs between machines.
    name = f"{Path(place).name}:{attribute}"
    own = load_object(config.model, key="encoder.model")
    if not isinstance(own, type):
        raise ConfigError(f"encoder.model: {name} is {own!r}, want a class")
    return own, name


def _weights_settings(config: EncoderConfig) -> dict[str, object]:
    return {
        "pretrained": config.pretrained,
        "weights_dir": config.weights_dir,
        "seed": config.seed,
    }


def _named_by(function: Callable[..., object], offered: Mapping[str, object]) -> dict[str, object]:
    """Return those of the arguments that the signature names."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in offered.items() if key in names}
