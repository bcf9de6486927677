"""The model that a report scores: that of a run, of a checkpoint folder, or of an export file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError

if TYPE_CHECKING:
    from training.checkpoint import Trained, Which


def load_model(path: Path, which: Which) -> Trained:
    """Load a trained model.

    Args:
        path: Folder of a run, one of its checkpoint folders, or a file written by
            ``movienet-train export``.
        which: The checkpoint of a run.

    Raises:
        ConfigError: ``path`` is none of these.
        StateError: the run has no such checkpoint, or checkpoint or export are corrupt.
    """
    # These import torch, which takes seconds; the paths below do not need it.
    from training.checkpoint import load_trained, load_trained_checkpoint
    from training.export import load_trained_export

    if path.is_file():
        return load_trained_export(path)
    if _is_checkpoint(path):
        return load_trained_checkpoint(path)
    if is_run(path):
        return load_trained(path, which)
    got = "a folder without checkpoints" if path.is_dir() else "which does not exist"
    raise ConfigError(
        f"--model: got {path}, {got}; want the folder of a run, one of its checkpoint folders, or "
        "a file written by `movienet-train export`"
    )


def newest(path: Path) -> Which:
    """Return the checkpoint of a run to use by default: ``best``, or ``last`` without a holdout."""
    from training.checkpoint import find

    return "best" if not path.is_dir() or find(path, "best") else "last"


def is_run(path: Path) -> bool:
    """Return whether ``path`` is the folder of a run."""
    return (path / "checkpoints").is_dir()


def is_model(path: Path) -> bool:
    """Return whether ``path`` can be a run, a checkpoint folder or an export."""
    return path.is_file() or _is_checkpoint(path) or is_run(path)


def report_dir(path: Path, split: str) -> Path:
    """Return the default folder of a report on ``split``.

    ``RUN/report/SPLIT`` for a run, and ``NAME-report/SPLIT`` next to an export file or a checkpoint
    folder, where ``NAME`` is its name without ``.safetensors``.
    """
    if path.is_file() or _is_checkpoint(path):
        name = path.name.removesuffix(".safetensors")
        return path.with_name(f"{name}-report") / split
    return path / "report" / split


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file()
