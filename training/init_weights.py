"""Initial weights from another run: ``model.init_from``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError
from configs.runtime.publish import current_folder
from configs.tensor_files import matching_tensors, read_tensors
from training.checkpoint import check_digest
from training.export import read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def load_initial_weights(model: nn.Module, place: str) -> None:
    """Load every tensor that matches the model by name and shape, and log those that do not.

    Args:
        model: With fresh weights.
        place: ``model.init_from``: the folder of a run (its best checkpoint, else its last), the
            folder of a checkpoint, or a file that ``configs.tensor_files`` reads. Averaged weights
            take precedence.

    Raises:
        ConfigError: there are no weights, they differ from their digest, or none of them matches
            a weight matrix of the model.
    """
    file = _weights_file(Path(place))
    current = model.state_dict()
    try:
        saved = matching_tensors(_read(file), current.keys(), file)
    except DataError as error:
        raise ConfigError(f"model.init_from: {error}") from error
    matching = {name: saved[name] for name, value in current.items() if _fits(value, saved, name)}
    name = type(model).__name__
    if not any(value.ndim > 1 for value in matching.values()):  # a bias may match by chance
        raise ConfigError(
            f"model.init_from: {file}: none of its {len(saved)} tensors matches a weight matrix of "
            f"{name}; want weights of the same class and options"
        )
    model.load_state_dict(matching, strict=False)
    fresh = ", ".join(sorted(current.keys() - matching.keys())) or "none"
    logger.info("%s: loaded %d tensors from %s; fresh: %s", name, len(matching), file, fresh)


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; those of a checkpoint or an export must match their digest."""
    if file.suffix != ".safetensors":
        return read_tensors(file)
    with report_corrupt(f"model.init_from: {file}", "choose other weights", ConfigError):
        if (state := file.with_name("state.json")).is_file():
            check_digest(file, json.loads(state.read_text(encoding="utf-8"))["sha256"])
        return read_weights(file)[1]


def _fits(value: Tensor, saved: dict[str, Tensor], name: str) -> bool:
    return name in saved and saved[name].shape == value.shape


def _weights_file(place: Path) -> Path:
    if place.is_file():
        return place
    folders = (place / "checkpoints/best", place / "checkpoints/last", place)
    for folder in filter(None, map(current_folder, folders)):
        for name in ("ema.safetensors", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise ConfigError(
        f"model.init_from: {place}: no weights; "
        "want the folder of a run or checkpoint, or a file of weights"
    )
