"""Export of a trained model to one safetensors file: weights, and in the metadata all other inputs.

Metadata values are strings. They contain JSON, except those marked plain:

    format        ``movienet-export-1`` (plain)
    class         ``pkg.mod:Net`` or ``net.py:Net`` (plain)
    arguments     keyword arguments of the class: its options, and those of dim, genres, frames
                  that it accepts
    options       ``model.options`` of the run
    source        file of a custom model (plain); absent for an installed model
    loss_source   file of a custom loss (plain); absent for an installed loss
    …_sha256      digests of these two files (plain)
    data_stats    statistics of the data, for a class that accepts ``prior`` or ``rows``
    genres        names of the outputs, in order
    threshold     probability from which a genre is predicted
    genre_thresholds  one such probability per genre, or null; absent in earlier files
    frames        rows of a window
    provenance    origin of the features: encoder and preprocessing, or import
    config        configuration of the run, without folders and secrets
    data, labels  digests of the training data (plain)
    movies        ids of the movies that the run trained on, and of its holdout
    run, checkpoint, epoch, step
    recipe        digest of all that determines the result, except seeds (plain)
    baselines     class prior and linear model, fitted on the model's movies; absent if its features
                  could not be read (``training.baselines``)
    sha256        digest of the tensors and of all other metadata (plain), checked when the file is
                  loaded; absent in earlier files

Tensors have the names of the model's ``state_dict``. ``load_exported`` needs neither the run nor
the training loop. A custom model can be loaded with torch and safetensors only.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from configs.corrupt import report_corrupt
from configs.errors import StateError
from configs.redaction import redact
from training.data_stats import DataStats
from training.registry import build_model

if TYPE_CHECKING:
    from training.baselines import Baselines
    from training.checkpoint import Identity, Trained, Which

FORMAT = "movienet-export-1"

_REMEDY = "run `movienet-train export RUN` again"
_STRUCTURED = ("config", "movies", "checkpoint", "epoch", "step")


@dataclass(frozen=True)
class Exported:
    """A model loaded from an export."""

    model: torch.nn.Module
    """On the CPU, in evaluation mode: rows ``[B, T, D]``, mask ``[B, T]`` -> logits ``[B, G]``."""

    genres: tuple[str, ...]
    threshold: float
    genre_thresholds: tuple[float, ...] | None
    """One per genre, tuned on the holdout of the run; None without a holdout, or if
    ``training.threshold`` is set."""

    frames: int
    """Rows of a window."""

    provenance: Mapping[str, Any]
    metadata: Mapping[str, str]


def export(run_dir: Path, which: Which, out: Path, baselines: Baselines | None = None) -> None:
    """Write the model of a checkpoint, with the weights for scoring.

    Args:
        run_dir: Folder of the run.
        which: The checkpoint.
        out: The file to write, atomically.
        baselines: Fitted on the movies of the model, for reports on other feature sets.

    Raises:
        StateError: the run has no such checkpoint.
        OSError: the file cannot be written.
    """
    from configs.runtime.publish import publish_bytes
    from training.checkpoint import find, load_trained, recipe

    trained, saved = load_trained(run_dir, which), find(run_dir, which)
    if saved is None:
        raise AssertionError("load_trained has loaded this checkpoint")
    progress = {
        "threshold": trained.threshold,
        "genre_thresholds": trained.genre_thresholds,
        "checkpoint": which,
        "epoch": trained.epoch,
        "step": trained.step,
    }
    # Copied: safetensors rejects tensors that share memory, and those that are not contiguous.
    weights = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in trained.model.state_dict().items()
    }
    parameters = inspect.signature(type(trained.model)).parameters.keys()
    metadata = _describe(saved.identity, parameters) | _as_json(progress)
    metadata["recipe"] = recipe(saved.identity)
    if baselines is not None:
        metadata["baselines"] = json.dumps(baselines.to_tree())
    metadata["sha256"] = _digest(weights, metadata)
    publish_bytes(out, save(weights, metadata))


def _digest(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of tensors and metadata, whatever their order in the file."""
    digest = hashlib.sha256()
    described = {name: [str(value.dtype), list(value.shape)] for name, value in weights.items()} | {
        "": {key: value for key, value in metadata.items() if key != "sha256"}
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(weights):
        # The memory as bytes: numpy lacks some of the dtypes.
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return metadata and tensors of a safetensors file.

    Raises:
        ValueError: it is an export whose digest differs. safetensors raises other exceptions.
    """
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    has_digest = metadata.get("format") == FORMAT and "sha256" in metadata
    if has_digest and metadata["sha256"] != _digest(weights, metadata):
        raise ValueError("tensors or metadata differ from their sha256")
    return metadata, weights


def load_exported(path: Path) -> Exported:
    """Load a file written by ``export``. The code of a custom model is executed.

    Raises:
        StateError: the file is not an export, or is corrupt.
    """
    with report_corrupt(path, _REMEDY, StateError):
        metadata, weights = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise StateError(
            f"{path}: got format {metadata.get('format')!r}, want {FORMAT!r}; write the file by "
            "`movienet-train export RUN`"
        )
    with report_corrupt(path, _REMEDY, StateError):
        model = _build(metadata)
        model.load_state_dict(weights)
        genre_thresholds = json.loads(metadata.get("genre_thresholds", "null"))
        return Exported(
            model=model.eval(),
            genres=tuple(json.loads(metadata["genres"])),
            threshold=json.loads(metadata["threshold"]),
            genre_thresholds=tuple(genre_thresholds) if genre_thresholds else None,
            frames=json.loads(metadata["frames"]),
            provenance=json.loads(metadata["provenance"]),
            metadata=metadata,
        )


def load_trained_export(path: Path) -> Trained:
    """Load an export like a checkpoint, for scoring.

    Raises:
        StateError: the file is not an export, or is corrupt.
    """
    from configs.schema import Config
    from training.baselines import Baselines
    from training.checkpoint import SeenMovies, Trained

    exported = load_exported(path)
    metadata = exported.metadata
    with report_corrupt(path, _REMEDY, StateError):
        tree = {key: json.loads(metadata[key]) for key in _STRUCTURED}
        baselines = json.loads(metadata.get("baselines", "null"))
        return Trained(
            where=str(path),
            model=exported.model,
            config=Config.model_validate(tree["config"]),
            checkpoint=tree["checkpoint"],
            recipe=metadata.get("recipe"),
            genres=exported.genres,
            provenance=exported.provenance,
            data=metadata["data"],
            labels=metadata["labels"],
            movies=SeenMovies(**{key: tuple(ids) for key, ids in tree["movies"].items()}),
            dim=exported.provenance["dim"],
            epoch=tree["epoch"],
            step=tree["step"],
            threshold=exported.threshold,
            genre_thresholds=exported.genre_thresholds,
            features_url=None,
            baselines=Baselines.from_tree(baselines) if baselines else None,
        )


def _describe(identity: Identity, parameters: Collection[str]) -> dict[str, str]:
    config, data_stats = identity.config, identity.data_stats
    name, options = config.model.class_, config.model.options
    sizes = {"dim": data_stats.dim, "genres": data_stats.genres, "frames": data_stats.frames}
    arguments = {key: value for key, value in sizes.items() if key in parameters} | options
    plain = {"format": FORMAT, "class": name, "data": identity.data, "labels": identity.labels}
    for key, file in (("source", "net.py"), ("loss_source", "loss.py")):
        if file in identity.sources:
            source = identity.sources[file]
            plain |= {key: source.text, f"{key}_sha256": source.sha256}
    if "source" in plain:  # the path of the original file is private and useless elsewhere
        plain["class"] = f"net.py:{name.rpartition(':')[2]}"
    structured = {
        "arguments": arguments,
        "options": options,
        "data_stats": {key: value.tolist() for key, value in data_stats.tensors().items()},
        "genres": identity.genres,
        "frames": data_stats.frames,
        "provenance": identity.provenance,
        "movies": asdict(identity.movies),
        "config": redact(config.model_dump(mode="json", by_alias=True)),
        "run": config.training.run_name,
    }
    return plain | _as_json(structured)


def _as_json(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in values.items()}


def _build(metadata: Mapping[str, str]) -> torch.nn.Module:
    lists, options = json.loads(metadata["data_stats"]), json.loads(metadata["options"])
    data_stats = DataStats.from_tensors(
        {
            # As in a checkpoint: scales are float64, the dtype of all others is inferred.
            name: torch.tensor(value, dtype=torch.float64 if name.endswith("scale") else None)
            for name, value in lists.items()
        }
    )
    if "source" not in metadata:
        return build_model(metadata["class"], options, data_stats)
    text = metadata["source"]
    with TemporaryDirectory() as folder:  # a file, so that a traceback shows its lines
        # Named by its digest: two exports in one process must not share a module.
        file = Path(folder) / f"net_{hashlib.sha256(text.encode()).hexdigest()[:12]}.py"
        file.write_text(text, encoding="utf-8")
        return build_model(f"{file}:{metadata['class'].rpartition(':')[2]}", options, data_stats)
