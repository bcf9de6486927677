"""Checkpoints of a run: ``RUN/checkpoints/last`` and ``best``, folders published atomically.

With ``training.keep_checkpoints`` above 1, previous ones are kept as ``step-00000400``. If ``last``
is removed, the newest of them is loaded.

    model.safetensors       weights and buffers
    ema.safetensors         their moving average, if enabled; it is the one that is scored
    data_stats.safetensors  statistics of the data: class prior, moments of the rows
    optimizer.safetensors   moments, named ``parameter number.name`` (``last`` only)
    state.json              position, identity of data and run, configuration
    movies.json             ids of the movies that the run trains on, and of its holdout
    net.py, loss.py         files of a custom model and a custom loss

Nothing is pickled. Loading executes no code except the model's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.bounded_yaml import BoundedLoader
from configs.corrupt import report_corrupt
from configs.errors import MachineError, StateError
from configs.load import dump_config
from configs.runtime.hints import hint
from configs.runtime.publish import (
    TEMPORARY_PREFIX,
    clear_leftovers,
    current_folder,
    publishing_folder,
    remove_folder,
    unused_name,
)
from configs.schema import Config, TrainingConfig
from configs.user_code import UserFile, user_file
from training.data_stats import DataStats
from training.metrics_file import read_metrics
from training.registry import build_model

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

    from sharding.features import FeatureSet
    from training.baselines import Baselines
    from training.split_selection import SplitSelection

logger = logging.getLogger(__name__)

VERSION = 1
Which = Literal["best", "last"]

_STEP = r"step-[0-9]{8,}"
"""Names of previous checkpoints, as a pattern."""

_DIGEST = " sha256"
"""End of the key of a custom file."""

FREE = {
    "training": {
        "epochs",
        "patience",
        "threshold",  # no weight depends on it
        "threads",
        "device",
        "expected_world_size",
        "monitor_split",
        "validate_epochs",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "split",  # the digest of the plan detects other train movies
        "run_name",  # the folder of a run may be copied or renamed
    },
    "stream": {"features_url", "prefetch", "threads", "cache_dir", "cache_bytes"},
}
"""Keys that may differ between two attempts of a run."""

_FREE_IN_A_RUN = {"training.lock_wait"}
"""As those above, but part of the digest of a recipe, which reports have stored."""


@dataclass(frozen=True)
class Position:
    """Progress of a run; the same on every rank."""

    epoch: int = 0
    """Completed epochs."""

    step: int = 0
    """Completed optimizer steps."""

    best: float | None = None
    """Best holdout mAP so far."""

    stale: int = 0
    """Validations since the best holdout mAP improved."""

    threshold: float | None = None
    """Tuned on the scores of the holdout at the last validation."""

    genre_thresholds: tuple[float, ...] | None = None
    """One per genre, tuned like ``threshold``; None in checkpoints of earlier versions."""

    unvalidated: bool = False
    """Whether the validation of the last completed epoch failed, and is to be repeated."""

    run_id: str | None = None
    """Id of the tracking run, for resuming it."""

    stream: Mapping[str, Any] | None = None
    """State of the feature stream."""

    scaler: Mapping[str, Any] | None = None
    """Loss scale of fp16."""

    def is_end(self, training: TrainingConfig) -> bool:
        """Return whether all epochs are completed and validated, or the patience is exhausted."""
        if self.unvalidated:
            return False
        return self.epoch >= training.epochs or 0 < training.patience <= self.stale


@dataclass(frozen=True)
class SeenMovies:
    """Ids of the movies that a model depends on. A score on them is not a test."""

    train: tuple[str, ...]
    holdout: tuple[str, ...]
    """Movies that decide which checkpoint is the best one, and the thresholds."""

    @classmethod
    def of(cls, features: FeatureSet, movies: SplitSelection) -> SeenMovies:
        """Return the ids of selected movies."""
        ids = features.movie_ids
        return cls(
            tuple(ids[position] for position in movies.train),
            tuple(ids[position] for position in movies.holdout),
        )

    @property
    def ids(self) -> frozenset[str]:
        """Both, as a set."""
        return frozenset(self.train) | frozenset(self.holdout)


@dataclass(frozen=True)
class Identity:
    """Everything that determines the result of a run; the same in all its checkpoints."""

    config: Config
    genres: tuple[str, ...]
    provenance: Mapping[str, Any]
    """Origin of the features: the encoder or import in the manifest."""

    data: str
    """Digest of the feature manifest."""

    labels: str
    """Digest of the labels."""

    movies: SeenMovies
    world_size: int
    data_stats: DataStats
    sources: Mapping[str, UserFile]
    """Files of custom code by their names in a checkpoint: ``net.py``, ``loss.py``."""

    @classmethod
    def of(
        cls,
        config: Config,
        features: FeatureSet,
        movies: SplitSelection,
        data_stats: DataStats,
        *,
        world_size: int,
    ) -> Identity:
        """Return the identity of a run with the current configuration, data and code."""
        return cls(
            config=config,
            genres=tuple(features.labels.genres),
            provenance=dict(features.manifest.provenance),
            data=features.digest,
            labels=features.labels.digest,
            movies=SeenMovies.of(features, movies),
            world_size=world_size,
            data_stats=data_stats,
            sources=_sources(config),
        )


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk. Its tensors are read on demand."""

    folder: Path
    position: Position
    identity: Identity
    digests: Mapping[str, str]
    """sha256 of each file of tensors."""

    def build(self) -> torch.nn.Module:
        """Return the model with the weights for resuming, on the CPU."""
        model = self._fresh()
        self._load_weights(model, "model.safetensors")
        return model

    def build_scored(self) -> torch.nn.Module:
        """Return the model with the weights for scoring: the average if it exists."""
        averaged = (self.folder / "ema.safetensors").is_file()
        model = self._fresh()
        self._load_weights(model, "ema.safetensors" if averaged else "model.safetensors")
        return model

    def load_average(self, average: AveragedModel) -> None:
        """Load the saved moving average into ``average``."""
        self._load_weights(average.module, "ema.safetensors")

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the saved moments into an optimizer of the same parameters."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        with _report_corruption(self.folder):
            check_digest(self.folder / "optimizer.safetensors", self.digests)
            tensors = load_file(self.folder / "optimizer.safetensors")
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = tensor
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        with _report_corruption(self.folder):
            laid_out = {
                number: {key: _laid_out(value, parameters[number]) for key, value in items.items()}
                for number, items in state.items()
            }
        # Only moments are saved: the settings of the groups come from the configuration.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": laid_out, "param_groups": groups})

    def _load_weights(self, model: torch.nn.Module, name: str) -> None:
        with _report_corruption(self.folder):
            check_digest(self.folder / name, self.digests)
            model.load_state_dict(load_file(self.folder / name))

    def _fresh(self) -> torch.nn.Module:
        model = self.identity.config.model
        name = model.class_
        if "net.py" in self.identity.sources:  # the saved copy: the user's file may have changed
            name = f"{self.folder / 'net.py'}:{name.rpartition(':')[2]}"
        return build_model(name, model.options, self.identity.data_stats)


@dataclass(frozen=True)
class Trained:
    """A trained model with everything that scoring requires."""

    where: str
    """Run folder, checkpoint folder or export, for messages."""

    model: torch.nn.Module
    """On the CPU, in evaluation mode."""

    config: Config
    """Of the run; in an export without folders and secrets."""

    checkpoint: str
    """``best``, ``last`` or ``step-…``."""

    recipe: str | None
    """See ``recipe``; None in exports of earlier versions."""

    genres: tuple[str, ...]
    provenance: Mapping[str, Any]
    data: str
    """Digest of the manifest of the features that it was trained on."""

    labels: str
    """Digest of their labels."""

    movies: SeenMovies
    dim: int
    epoch: int
    step: int
    threshold: float
    """Decision threshold: that of the configuration, that tuned on the holdout, or 0.5."""

    genre_thresholds: tuple[float, ...] | None
    """One decision threshold per genre, tuned on the holdout; None without a holdout, or if the
    configuration has one threshold for all genres."""

    features_url: str | None
    """Location of the features that it was trained on; None in an export."""

    baselines: Baselines | None = None
    """Fitted on the movies that it was trained on; only in an export."""


def checkpoint_dir(run_dir: Path, which: Which) -> Path:
    """Return the folder of a checkpoint."""
    return run_dir / "checkpoints" / which


def save(
    folder: Path,
    *,
    model: torch.nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer | None,
    position: Position,
    identity: Identity,
    keep: int = 1,
) -> None:
    """Publish a checkpoint atomically, replacing the previous one. One rank calls this function.

    Args:
        folder: The folder returned by ``checkpoint_dir``.
        model: The bare model, not wrapped by Accelerate.
        average: Moving average of its weights, if enabled.
        optimizer: None if the run will not resume from this checkpoint.
        position: Progress of the run.
        identity: Identity of the run.
        keep: Number of checkpoints to keep, including this one. With more than 1, the previous one
            is renamed ``step-…``.

    Raises:
        MachineError: writing failed. The previous checkpoint is intact.
    """
    aside = _step_dir(folder) if keep > 1 else None
    with _report_write_errors(folder), publishing_folder(folder, aside=aside) as new:
        save_file(copy_to_cpu(model.state_dict()), new / "model.safetensors")
        if average is not None:
            save_file(copy_to_cpu(average.module.state_dict()), new / "ema.safetensors")
        save_file(copy_to_cpu(identity.data_stats.tensors()), new / "data_stats.safetensors")
        if optimizer is not None:
            save_file(_optimizer_tensors(optimizer), new / "optimizer.safetensors")
        for name, source in identity.sources.items():
            (new / name).write_text(source.text, encoding="utf-8")
        movies = json.dumps(asdict(identity.movies), separators=(",", ":"))
        (new / "movies.json").write_text(movies, encoding="utf-8")
        digests = {file.name: _digest_of(file) for file in sorted(new.glob("*.safetensors"))}
        state = new / "state.json"
        tree = _state(position, identity) | {"sha256": digests}
        state.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        for file in new.glob("*.safetensors"):
            shutil.copymode(state, file)  # safetensors ignores the umask and writes mode 600
    # Old checkpoints are deleted only after the new one is on disk.
    if folder.name == "last":
        for old in _steps(folder.parent)[keep - 1 :]:
            remove_folder(old)


@contextmanager
def _report_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps errors of the disk: only the text reveals a full one.
        reason = str(getattr(error, "strerror", None) or error)
        is_full = re.search("no space|quota", reason, re.IGNORECASE)
        remedy = "free disk space" if is_full else "fix this"
        raise MachineError(
            f"{folder}: not saved: {reason}; {remedy} and rerun the command, "
            "the previous checkpoint is intact"
        ) from error


def _step_dir(folder: Path) -> Path | None:
    """Return the ``step-…`` name of the current checkpoint in ``folder``, or None without one."""
    current = current_folder(folder)
    step = _step_of(current) if current else None
    return None if step is None else folder.with_name(f"step-{step:08d}")


def saved_step(run_dir: Path, which: Which) -> int | None:
    """Return the step of a checkpoint; None if it is missing or corrupt."""
    folder = current_folder(checkpoint_dir(run_dir, which))
    return _step_of(folder) if folder else None


def _step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint; None if it is corrupt."""
    try:
        with _report_corruption(folder):
            return _read(folder).position.step
    except StateError:
        return None


def _steps(folder: Path) -> list[Path]:
    """Return the previous checkpoints, newest first: only folders with names of ``_step_dir``."""
    if not folder.is_dir():
        return []
    steps = (path for path in folder.iterdir() if re.fullmatch(_STEP, path.name) and path.is_dir())
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def clear_unfinished(run_dir: Path) -> None:
    """Delete what attempts left that were killed while they handled a checkpoint."""
    clear_leftovers(run_dir / "checkpoints", f"last|best|{_STEP}")
    for trial in run_dir.glob(f"{TEMPORARY_PREFIX}trial-*"):
        shutil.rmtree(trial, ignore_errors=True)


def set_aside_later(run_dir: Path, step: int) -> None:
    """Keep what the run wrote after ``step`` if its ``last`` is missing: it starts again there.

    ``best`` of a later step is renamed, ``metrics.jsonl`` is copied. Where ``last`` exists, the run
    repeats its later steps exactly, and nothing is lost.
    """
    checkpoints, metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    if not checkpoints.is_dir() or current_folder(checkpoints / "last"):
        return
    best = current_folder(checkpoints / "best")
    if best and ((its_step := _step_of(best)) is None or its_step > step):
        kept = best.rename(unused_name(checkpoints / "best"))
        logger.warning("%s: restarts at step %d; its later 'best' is now %s", run_dir, step, kept)
    if any(record["step"] > step for record in read_metrics(metrics)):
        copy = unused_name(metrics)
        shutil.copyfile(metrics, copy)
        logger.warning("%s: restarts at step %d; its later metrics are in %s", run_dir, step, copy)


def find(run_dir: Path, which: Which) -> Saved | None:
    """Return a checkpoint of a run, or None if there is none.

    Raises:
        StateError: the checkpoint is corrupt or was written by another version of the product.
    """
    place = checkpoint_dir(run_dir, which)
    folder = current_folder(place)
    if folder is None and which == "last":
        folder = next(iter(_steps(place.parent)), None)
        if folder is not None:
            logger.warning("%s: missing, using %s", place, folder.name)
    if folder is None:
        return None
    with _report_corruption(folder):
        return _read(folder)


def _report_corruption(folder: Path) -> AbstractContextManager[None]:
    return report_corrupt(folder, _remedy(folder), StateError)


def _remedy(folder: Path) -> str:
    """Return what to do about a corrupt checkpoint. Nothing is deleted: parts may be of use."""
    if folder.name.startswith("best"):
        return _use("last")
    previous = [step.name for step in _steps(folder.parent) if step != folder]
    outcome = f"resume from {previous[0]}" if previous else "start from step 0"
    return f"rename this folder, e.g. to corrupt-{folder.name}, to {outcome}"


def _use(which: Which) -> str:
    """Return how to score or export another checkpoint."""
    return (
        f"use {which!r}: set eval.checkpoint={which} for `movienet-eval`, or pass "
        f"`--checkpoint {which}` to `movienet-train export`"
    )


def _read(folder: Path) -> Saved:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["version"] != VERSION:
        raise StateError(
            f"{folder}: got checkpoint version {state['version']}, want {VERSION}; use the release "
            "that wrote it, or choose another training.run_name"
        )
    check_digest(folder / "data_stats.safetensors", state["sha256"])
    identity = Identity(
        config=Config.model_validate(
            yaml.load(state["config"], Loader=BoundedLoader)  # noqa: S506  # a SafeLoader
        ),
        genres=tuple(state["genres"]),
        provenance=state["provenance"],
        data=state["data"],
        labels=state["labels"],
        movies=_read_movies(folder / "movies.json"),
        world_size=state["world_size"],
        data_stats=DataStats.from_tensors(
            copy_to_cpu(load_file(folder / "data_stats.safetensors"))
        ),
        sources={
            name: UserFile((folder / name).read_text(encoding="utf-8"), sha256)
            for name, sha256 in state["sources"].items()
        },
    )
    return Saved(folder, _position(state["position"]), identity, state["sha256"])


def _position(tree: Mapping[str, Any]) -> Position:
    thresholds = tree.get("genre_thresholds")  # a list in JSON
    return Position(**{**tree, "genre_thresholds": tuple(thresholds) if thresholds else None})


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_digest(file: Path, digests: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if a file of tensors differs from its digest in ``state.json``."""
    if _digest_of(file) != digests[file.name]:
        raise ValueError(f"{file.name} differs from its sha256")


def _read_movies(path: Path) -> SeenMovies:
    tree = json.loads(path.read_text(encoding="utf-8"))
    return SeenMovies(tuple(tree["train"]), tuple(tree["holdout"]))


def load_trained(run_dir: Path, which: Which) -> Trained:
    """Load a trained model.

    Raises:
        StateError: the run has no such checkpoint.
    """
    saved = find(run_dir, which)
    if saved is None:
        other: Which = "last" if which == "best" else "best"
        if find(run_dir, other) is None:
            raise StateError(
                f"{run_dir}: no checkpoint {which!r}; run {hint('movienet-train run')}"
            )
        raise StateError(f"{run_dir}: no checkpoint {which!r}; {_use(other)}")
    return _trained(saved, str(run_dir), which)


def load_trained_checkpoint(folder: Path) -> Trained:
    """Load the trained model of one checkpoint folder, e.g. ``RUN/checkpoints/step-00000400``.

    Raises:
        StateError: the checkpoint is corrupt or was written by another version of the product.
    """
    with _report_corruption(folder):
        saved = _read(folder)
    return _trained(saved, str(folder), folder.resolve().name)


def _trained(saved: Saved, where: str, checkpoint: str) -> Trained:
    identity, position = saved.identity, saved.position
    configured = identity.config.training.threshold
    threshold = position.threshold if configured is None else configured
    return Trained(
        where=where,
        model=saved.build_scored().eval(),
        config=identity.config,
        checkpoint=checkpoint,
        recipe=recipe(identity),
        genres=identity.genres,
        provenance=identity.provenance,
        data=identity.data,
        labels=identity.labels,
        movies=identity.movies,
        dim=identity.data_stats.dim,
        epoch=position.epoch,
        step=position.step,
        threshold=0.5 if threshold is None else threshold,
        genre_thresholds=position.genre_thresholds if configured is None else None,
        features_url=identity.config.features_url,
    )


def recipe(identity: Identity) -> str:
    """Return a digest of everything that determines the result of a run, except its seeds.

    Runs with the same recipe are repetitions: the spread of their scores is that of the seeds.
    """
    training, ids = identity.config.training, identity.movies
    decisive = _decisive(identity) | {
        "training.epochs": training.epochs,
        "training.patience": training.patience,
        "training.threshold": training.threshold,
        "data": identity.data,
        "labels": identity.labels,
        # A holdout is drawn by the seed: only the movies of both together are those of the recipe.
        "movies": sorted(ids.ids),
    }
    for seed in ("training.seed", "stream.seed"):
        del decisive[seed]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def check_resumable(saved: Identity, current: Identity, run_dir: Path) -> None:
    """Check that resuming would give the same result as a run with the current configuration.

    Raises:
        ConfigError: the model has another, impossible option: its name is mistyped, for example.
        StateError: a key that affects the result differs.
    """
    before, after = _decisive(saved), _decisive(current)
    model, same_class = current.config.model, before["model.class"] == after["model.class"]
    if same_class and model.options != saved.config.model.options:
        build_model(model.class_, model.options, current.data_stats)
    # Sorted: every rank reports the same key. A file differs only if its name in the configuration
    # is the same.
    keys = (before.keys() | after.keys()) - _FREE_IN_A_RUN
    for key in sorted(keys, key=lambda key: (_is_file(key), key)):
        if before.get(key) != after.get(key):
            got, want = _shown(key, current, after), _shown(key, saved, before)
            remedy = "the file from the copy in its checkpoint" if _is_file(key) else "the value"
            raise StateError(
                f"{run_dir}: got {key} {got}, want {want} as in its checkpoint; restore {remedy}, "
                "or choose another training.run_name"
            )


def _is_file(key: str) -> bool:
    return key.endswith(_DIGEST)


def _shown(key: str, identity: Identity, decisive: Mapping[str, Any]) -> str:
    """Return a value as it is in the configuration of the user."""
    config = identity.config
    names = {"model.class": config.model.class_, "training.loss": config.training.loss}
    value = names.get(key, decisive.get(key))
    return repr(value) if key in decisive else "no value"


def _decisive(identity: Identity) -> dict[str, Any]:
    config, sources = identity.config, identity.sources
    training = config.training.model_dump(exclude=FREE["training"])
    if config.training.schedule == "cosine":
        training["epochs"] = config.training.epochs  # every rate depends on the last epoch
    names = {
        # The content of a custom file counts, not its path.
        file: name.rpartition(":")[2] if file in sources else name
        for file, name in _custom_code(config).items()
    }
    sections = {
        "training": {**training, "loss": names["loss.py"]},
        "stream": config.stream.model_dump(exclude=FREE["stream"]),
        "eval": {"windows": config.eval.windows},  # the best checkpoint depends on them
        "model.options": config.model.options,
        "model": {"class": names["net.py"], "init_from": config.model.init_from},
    }
    flat = {
        f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
    }
    digests = {f"{file}{_DIGEST}": source.sha256 for file, source in sources.items()}
    return {**flat, **digests, "genres": identity.genres}


def _custom_code(config: Config) -> dict[str, str]:
    """Return the names that may refer to custom code, by the file that would store it."""
    return {"net.py": config.model.class_, "loss.py": config.training.loss}


def _sources(config: Config) -> dict[str, UserFile]:
    keys = {"net.py": "model.class", "loss.py": "training.loss"}
    sources = {file: user_file(name, key=keys[file]) for file, name in _custom_code(config).items()}
    return {file: source for file, source in sources.items() if source is not None}


def _state(position: Position, identity: Identity) -> dict[str, Any]:
    return {
        "version": VERSION,
        "position": asdict(position),
        "data": identity.data,
        "labels": identity.labels,
        "genres": identity.genres,
        "provenance": identity.provenance,
        "world_size": identity.world_size,
        "sources": {name: source.sha256 for name, source in identity.sources.items()},
        "config": dump_config(identity.config),
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return copy_to_cpu(
        {
            f"{number}.{name}": torch.as_tensor(value)
            for number, values in state.items()
            for name, value in values.items()
        }
    )


def _laid_out(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a moment in the memory layout of its parameter.

    Fused optimizers read both in the order of memory. Files contain the logical order, so for a
    transposed or channels-last parameter the moments of one value would be applied to another.
    It is a copy: the optimizer would keep the file mapped, and NFS its folder undeletable.
    """
    if moment.ndim == 0:
        return moment.clone()  # the count of steps
    if moment.shape != parameter.shape:
        got, want = list(moment.shape), list(parameter.shape)
        raise ValueError(f"got a moment of shape {got}, want that of its parameter, {want}")
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


def copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous copies in the memory of the CPU; a full GPU has no room for them.

    safetensors rejects tied weights, which share memory, and views that are not contiguous.
    """
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
