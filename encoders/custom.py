"""Custom encoders: user classes given by path, checked on two frames before a task starts."""

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
from configs.user_code import load_object, raised_at
from encoders.decode import Preprocessing
from encoders.weights import weights_digest

T = TypeVar("T")


class CustomTower:
    """Adapter from a user's class to ``Tower``; its provenance is the digest of the source file.

    The constructor of the class receives ``encoder.options`` and those of ``device``,
    ``precision``, ``pretrained``, ``weights_dir`` and ``seed`` that its signature names. Instances
    have ``dim``, ``preprocessing``, and ``encode(frames)`` from uint8 ``[B, 3, H, W]`` on the
    device to ``[B, D]``.

    Two methods are optional. ``versions()`` returns library versions by name. ``fetch``, a
    classmethod or staticmethod, downloads the weights and returns their path; it receives those of
    ``pretrained``, ``weights_dir``, ``seed`` and ``encoder.options`` that its signature names.
    """

    @classmethod
    def fetch(cls, config: EncoderConfig) -> str | None:
        """Call ``fetch`` of the class; return the path, or the name of the class without a path.

        Returns:
            None if the class does not define ``fetch``.

        Raises:
            ConfigError: the class does not exist, or its ``fetch`` needs an instance.
            MachineError: ``fetch`` failed.
        """
        user_class, name = _load_class(config)
        if not hasattr(user_class, "fetch"):
            return None
        # A tower cannot be built before its weights are stored, so fetch must work without one.
        if not isinstance(inspect.getattr_static(user_class, "fetch"), classmethod | staticmethod):
            raise ConfigError(
                f"encoder.model: {name}: got fetch as an instance method, want a classmethod or "
                "staticmethod"
            )
        fetch: Callable[..., object] = user_class.fetch
        try:
            fetched = fetch(**_named_by(fetch, {**_weights_settings(config), **config.options}))
        except MovieNetError:
            raise
        except Exception as error:  # download libraries raise errors of any type
            raise MachineError(f"fetch {name}: {raised_at(error, config.model)}") from error
        return str(fetched or name)

    def __init__(self, config: EncoderConfig, device: torch.device, precision: str) -> None:
        """Build an instance of the class, and encode two black frames as a check.

        Raises:
            ConfigError: the class does not exist, rejects its options, or is not an encoder.
        """
        cls, self.name = _load_class(config)
        self._model = config.model
        self._instance = self._build(cls, config, device, precision)
        self._versions = self._read_versions()
        self.dim = self._attribute("dim", int)
        self.preprocessing = self._attribute("preprocessing", Preprocessing)
        source = hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
        module = self._instance if isinstance(self._instance, nn.Module) else None
        self.provenance: Mapping[str, object] = {
            "name": self.name,
            # Only a class that takes it can have loaded these weights.
            **_named_by(cls, {"pretrained": config.pretrained and Path(config.pretrained).name}),
            "seed": config.seed,
            "options": dict(config.options),
            "architecture": source,
            "weights": weights_digest(module.state_dict()) if module else source,
        }
        size = self.preprocessing
        self.description = (
            f"{self.name}: custom encoder ({source[:12]}), {size.width}x{size.height} px to "
            f"{self.dim} values"
        )
        self._check_encode(device)

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Return float32 ``[B, D]`` for uint8 ``[B, 3, H, W]`` on the tower's device."""
        with torch.inference_mode():
            features_BD: Tensor = self._instance.encode(frames_BCHW)
        return features_BD.float()

    def versions(self) -> Mapping[str, str]:
        """Return the result of the class's ``versions()``; empty if it defines none."""
        return self._versions

    def _build(self, cls: type, config: EncoderConfig, device: torch.device, precision: str) -> Any:
        arguments = {"device": device, "precision": precision, **_weights_settings(config)}
        duplicates = sorted(arguments.keys() & config.options.keys())
        if duplicates:
            key = duplicates[0]
            raise ConfigError(f"encoder.options: {key!r} is not an option; set encoder.{key}")
        arguments = {**_named_by(cls, arguments), **config.options}
        try:
            inspect.signature(cls).bind(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"encoder.options: got {dict(config.options)}, {self.name} refuses them: {error}"
            ) from error
        try:
            return cls(**arguments)
        except (Exception, SystemExit) as error:
            where = raised_at(error, config.model)
            given = f" with encoder.options {dict(config.options)}" if config.options else ""
            raise ConfigError(
                f"encoder.model: {self.name} cannot be constructed{given}: {where}"
            ) from error

    def _attribute(self, key: str, kind: type[T]) -> T:
        value = getattr(self._instance, key, None)
        if not isinstance(value, kind):
            raise ConfigError(
                f"encoder.model: {self.name}: got {key} {value!r}, want {kind.__name__}"
            )
        return value

    def _read_versions(self) -> dict[str, str]:
        """Call ``versions()`` once, so that its errors show before the first shard."""
        method = getattr(self._instance, "versions", dict)
        try:
            versions: object = method()
        except (Exception, SystemExit) as error:
            where = raised_at(error, self._model)
            raise ConfigError(f"encoder.model: {self.name}: versions() fails: {where}") from error
        if not isinstance(versions, Mapping) or not all(
            isinstance(text, str) for pair in versions.items() for text in pair
        ):
            raise ConfigError(
                f"encoder.model: {self.name}: got versions() {versions!r}, want a dict of names "
                "and version strings"
            )
        return dict(versions)

    def _check_encode(self, device: torch.device) -> None:
        size = (2, 3, self.preprocessing.height, self.preprocessing.width)
        try:
            got = self.encode(torch.zeros(size, dtype=torch.uint8, device=device))
        except (Exception, SystemExit) as error:
            where = raised_at(error, self._model)
            raise ConfigError(
                f"encoder.model: {self.name}: encode() fails on frames {list(size)}: {where}"
            ) from error
        if list(got.shape) != [2, self.dim] or not got.isfinite().all():
            raise ConfigError(
                f"encoder.model: {self.name}: encode() returns {list(got.shape)} for two frames, "
                f"want finite [2, {self.dim}]"
            )


def _load_class(config: EncoderConfig) -> tuple[type[Any], str]:
    """Return the class given by ``encoder.model``, and its name for messages and provenance."""
    module, _, attribute = config.model.rpartition(":")
    # Without the folder, which does not affect the features and differs between machines.
    name = f"{Path(module).name}:{attribute}"
    user_class = load_object(config.model, key="encoder.model")
    if not isinstance(user_class, type):
        raise ConfigError(f"encoder.model: {name} is {user_class!r}, want a class")
    return user_class, name


def _weights_settings(config: EncoderConfig) -> dict[str, object]:
    return {
        "pretrained": config.pretrained,
        "weights_dir": config.weights_dir,
        "seed": config.seed,
    }


def _named_by(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> dict[str, object]:
    """Return the arguments named in the signature of ``function``."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in arguments.items() if key in names}
