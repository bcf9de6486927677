"""One safetensors file of a trained model: weights, and as metadata all that its use must know.

Every metadata value is text, JSON unless it is said otherwise:

    format        "movienet-export-1"
    class         ``pkg.mod:Net`` or ``net.py:Net`` (plain)
    arguments     keyword arguments of the class: dim, genres, frames where it takes them; options
    source        a user's own model file (plain); absent for an installed one
    loss_source   a user's own loss file (plain); absent for an installed one
    …_sha256      of these two (plain)
    given         what the data told the model, for a class that takes ``prior`` or ``rows``
    genres        names of the outputs, in order
    threshold     from which a probability counts as the genre
    frames        rows of a window
    provenance    how the features were made: encoder, preprocessing, or import
    config        the run's configuration, folders and secrets cut out
    data, labels  digests of what it was trained on (plain)
    run, checkpoint, epoch, step

The names of the tensors are those of the model's ``state_dict``. ``load_exported`` needs neither
the run nor the training code; a model of one's own needs torch and safetensors alone.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from configs.errors import StateError
from training.data_stats import DataStats
from training.registry import build_model

if TYPE_CHECKING:
    from training.checkpoint import Identity, Which

FORMAT = "movienet-export-1"


@dataclass(frozen=True)
class Exported:
    """A model out of its file."""

    model: torch.nn.Module
    """On the CPU, in evaluation mode: rows ``[B, T, D]``, mask ``[B, T]`` -> logits ``[B, G]``."""

    genres: tuple[str, ...]
    threshold: float
    frames: int
    """Rows of a window."""

    provenance: Mapping[str, Any]
    metadata: Mapping[str, str]


def export(run_dir: Path, which: Which, out: Path) -> None:
    """Write the model of a checkpoint, with the weights that are scored.

    Raises:
        StateError: the run has no such checkpoint.
        OSError: the file cannot be written.
    """
    from configs.runtime.publish import publish_bytes
    from training.checkpoint import find, load_trained

    trained, saved = load_trained(run_dir, which), find(run_dir, which)
    if saved is None:
        raise AssertionError("it was there a moment ago")
    told = {
        "threshold": trained.threshold,
        "checkpoint": which,
        "epoch": trained.epoch,
        "step": trained.step,
    }
    weights = {name: value.clone() for name, value in trained.model.state_dict().items()}
    takes = inspect.signature(type(trained.model)).parameters.keys()
    metadata = _describe(saved.identity, takes) | _as_json(told)
    publish_bytes(out, save(weights, metadata))


def load_exported(path: Path) -> Exported:
    """Load what ``export`` wrote; a user's own model file is run.

    Raises:
        StateError: the file is no export, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path}: got format {metadata.get('format')!r}, want {FORMAT!r}")
    model = _build(metadata)
    model.load_state_dict(weights)
    return Exported(
        model=model.eval(),
        genres=tuple(json.loads(metadata["genres"])),
        threshold=json.loads(metadata["threshold"]),
        frames=json.loads(metadata["frames"]),
        provenance=json.loads(metadata["provenance"]),
        metadata=metadata,
    )


def _describe(identity: Identity, takes: Collection[str]) -> dict[str, str]:
    from configs.runtime.tracking import redact

    config, given = identity.config, identity.given
    name, options = config.model.class_, config.model.options
    sizes = {"dim": given.dim, "genres": given.genres, "frames": given.frames}
    arguments = {key: value for key, value in sizes.items() if key in takes} | options
    plain = {"format": FORMAT, "class": name, "data": identity.data, "labels": identity.labels}
    for key, file in (("source", "net.py"), ("loss_source", "loss.py")):
        if file in identity.sources:
            source = identity.sources[file]
            plain |= {key: source.text, f"{key}_sha256": source.sha256}
    if "source" in plain:
        plain["class"] = f"net.py:{name.rpartition(':')[2]}"
    told = {
        "arguments": arguments,
        "options": options,
        "given": {key: value.tolist() for key, value in given.tensors().items()},
        "genres": identity.genres,
        "frames": given.frames,
        "provenance": identity.provenance,
        "config": redact(config.model_dump(mode="json", by_alias=True)),
        "run": config.training.run_name,
    }
    return plain | _as_json(told)


def _as_json(told: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in told.items()}


def _build(metadata: Mapping[str, str]) -> torch.nn.Module:
    lists, options = json.loads(metadata["given"]), json.loads(metadata["options"])
    given = DataStats.from_tensors(
        {
            name: torch.tensor(value, dtype=torch.float64 if name.endswith("scale") else None)
            for name, value in lists.items()
        }
    )
    if "source" not in metadata:
        return build_model(metadata["class"], options, given)
    text = metadata["source"]
    with TemporaryDirectory() as folder:  # a file, so that a traceback shows its lines
        file = Path(folder) / f"net_{hashlib.sha256(text.encode()).hexdigest()[:12]}.py"
        file.write_text(text, encoding="utf-8")
        return build_model(f"{file}:{metadata['class'].rpartition(':')[2]}", options, given)
