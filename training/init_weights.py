"""Weights to begin with: ``model.init_from``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.errors import ConfigError
from configs.runtime.publish import current_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def load_initial_weights(model: nn.Module, place: str) -> None:
    """Give a model every tensor of ``place`` that has its name and shape there; log the others.

    Args:
        model: With fresh weights.
        place: ``model.init_from``: a run's folder (its best checkpoint, else its last), a
            checkpoint's folder, or a ``.safetensors`` file. The averaged weights where there are.

    Raises:
        ConfigError: there are no weights, or none of them fits a matrix of the model.
    """
    file = _weights_file(Path(place))
    try:
        offered = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.init_from: {file}: unreadable ({error})") from error
    own = model.state_dict()
    fitting = {name: offered[name] for name, value in own.items() if _fits(value, offered, name)}
    name = type(model).__name__
    if not any(value.ndim > 1 for value in fitting.values()):  # a bias fits by chance
        raise ConfigError(
            f"model.init_from: {file}: none of its {len(offered)} tensors fits a weight matrix of "
            f"{name}; want weights of the same class and options"
        )
    model.load_state_dict(fitting, strict=False)
    fresh = ", ".join(own.keys() - fitting.keys()) or "nothing"
    logger.info("%s begins from %s: %d tensors; fresh: %s", name, file, len(fitting), fresh)


def _fits(value: Tensor, offered: dict[str, Tensor], name: str) -> bool:
    return name in offered and offered[name].shape == value.shape


def _weights_file(place: Path) -> Path:
    if place.is_file():
        return place
    folders = (place / "checkpoints/best", place / "checkpoints/last", place)
    for folder in filter(None, map(current_folder, folders)):
        for name in ("ema.safetensors", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise ConfigError(
        f"model.init_from: {place}: no weights there; "
        "want a run's folder, a checkpoint's, or a .safetensors file"
    )
