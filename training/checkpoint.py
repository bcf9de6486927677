"""A training run at rest: ``RUN/checkpoints/last`` and ``best``, each a folder, whole or absent.

With ``training.keep_checkpoints`` above 1 the ones before ``last`` are kept as ``step-00000400``;
if ``last`` is removed, the newest of them is loaded.

    model.safetensors      weights and buffers
    ema.safetensors        their moving average, where there is one: what is scored
    given.safetensors      what the data told the model: prior, statistics of the rows
    optimizer.safetensors  moments, named ``parameter number.name`` (``last`` only)
    state.json             position, identity of data and run, the configuration
    net.py, loss.py        a user's own files of model and loss, if there are any

Nothing is pickled; loading runs no code but the model's own.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

from configs.errors import MachineError, StateError
from configs.load import dump_config
from configs.runtime.publish import TEMPORARY_PREFIX, current_folder, publishing_folder
from configs.schema import Config, TrainingConfig
from configs.user_code import UserFile, user_file
from training.data_stats import DataStats
from training.registry import build_model

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

    from sharding.features import FeatureSet

logger = logging.getLogger(__name__)

VERSION = 1
Which = Literal["best", "last"]

FREE = {
    "training": {
        "epochs",
        "patience",
        "threshold",  # it decides no weight
        "threads",
        "device",
        "expected_world_size",
        "monitor_split",
        "validate_epochs",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "split",  # the plan's digest guards which movies are trained on
        "run_name",  # a folder may be copied or renamed
    },
    "stream": {"features_url", "prefetch", "threads", "cache_dir", "cache_bytes"},
}
"""Keys that may change between two attempts of a run."""


@dataclass(frozen=True)
class Position:
    """How far a run has come; the same on every rank."""

    epoch: int = 0
    """Whole epochs done."""

    step: int = 0
    """Optimiser steps done."""

    best: float | None = None
    """Best holdout mAP so far."""

    stale: int = 0
    """Validations since it was reached."""

    threshold: float | None = None
    """Tuned on the holdout's scores of now."""

    run_id: str | None = None
    """The tracking run that goes on."""

    stream: Mapping[str, Any] | None = None
    """State of the feature stream."""

    scaler: Mapping[str, Any] | None = None
    """Loss scale of fp16."""

    def is_end(self, training: TrainingConfig) -> bool:
        """Return whether all epochs are done, or the holdout has not improved for too long."""
        return self.epoch >= training.epochs or 0 < training.patience <= self.stale


@dataclass(frozen=True)
class Identity:
    """What a run was made of; the same in all its checkpoints."""

    config: Config
    genres: tuple[str, ...]
    provenance: Mapping[str, Any]
    """How the features were made: the manifest's encoder or import."""

    data: str
    """Digest of the feature manifest."""

    labels: str
    """Digest of the labels."""

    world_size: int
    given: DataStats
    sources: Mapping[str, UserFile]
    """The user's own files by the names they are kept under: ``net.py``, ``loss.py``."""

    @classmethod
    def of(
        cls, config: Config, features: FeatureSet, given: DataStats, *, world_size: int
    ) -> Identity:
        """Return the identity of a run that starts now."""
        return cls(
            config=config,
            genres=tuple(features.labels.genres),
            provenance=dict(features.manifest.provenance),
            data=features.digest,
            labels=features.labels.digest,
            world_size=world_size,
            given=given,
            sources=_sources(config),
        )


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found; tensors are read when asked for."""

    folder: Path
    position: Position
    identity: Identity

    def build(self) -> torch.nn.Module:
        """Return the model with the weights that training goes on with, on the CPU."""
        model = self._fresh()
        self._load_weights(model, "model.safetensors")
        return model

    def build_scored(self) -> torch.nn.Module:
        """Return the model with the weights that are scored: the average where there is one."""
        averaged = (self.folder / "ema.safetensors").is_file()
        model = self._fresh()
        self._load_weights(model, "ema.safetensors" if averaged else "model.safetensors")
        return model

    def load_average(self, average: AveragedModel) -> None:
        """Give the average of a model its saved weights."""
        self._load_weights(average.module, "ema.safetensors")

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimiser of the same parameters its saved moments."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        with _damage_told(self.folder):
            tensors = load_file(self.folder / "optimizer.safetensors")
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _load_weights(self, model: torch.nn.Module, name: str) -> None:
        with _damage_told(self.folder):
            load_model(model, self.folder / name)

    def _fresh(self) -> torch.nn.Module:
        model = self.identity.config.model
        name = model.class_
        if "net.py" in self.identity.sources:  # the file of then, wherever the user's is now
            name = f"{self.folder / 'net.py'}:{name.rpartition(':')[2]}"
        return build_model(name, model.options, self.identity.given)


@dataclass(frozen=True)
class Trained:
    """A trained model and what scoring must know of it."""

    model: torch.nn.Module
    """On the CPU, in evaluation mode."""

    config: Config
    genres: tuple[str, ...]
    provenance: Mapping[str, Any]
    dim: int
    epoch: int
    step: int
    threshold: float
    """From which a genre is predicted: the configuration's, the holdout's, or 0.5."""


def checkpoint_dir(run_dir: Path, which: Which) -> Path:
    """Return where a checkpoint lies."""
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
    """Publish a checkpoint in the place of the one before; one rank calls this.

    Args:
        folder: Of ``checkpoint_dir``.
        model: As built, without the wraps of Accelerate.
        average: Moving average of its weights, if there is one.
        optimizer: None where training will not go on from here.
        position: How far the run is.
        identity: What it is made of.
        keep: How many stay, this one included; what was before it becomes ``step-…`` beside it.

    Raises:
        MachineError: the disk refuses it; the one before is whole.
    """
    aside = _step_dir(folder) if keep > 1 else None
    with _refusal_told(folder), publishing_folder(folder, aside=aside) as new:
        save_model(model, str(new / "model.safetensors"))
        if average is not None:
            save_model(average.module, str(new / "ema.safetensors"))
        save_file(_whole(identity.given.tensors()), new / "given.safetensors")
        if optimizer is not None:
            save_file(_optimizer_tensors(optimizer), new / "optimizer.safetensors")
        for name, source in identity.sources.items():
            (new / name).write_text(source.text, encoding="utf-8")
        state = new / "state.json"
        state.write_text(json.dumps(_state(position, identity), indent=1), encoding="utf-8")
        for file in new.glob("*.safetensors"):
            shutil.copymode(state, file)  # safetensors lets nobody else read, whatever the umask
    if folder.name == "last":
        for old in _steps(folder.parent)[keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _refusal_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        full = re.search("no space|quota", reason, re.IGNORECASE)
        remedy = "make room" if full else "put that right"
        raise MachineError(
            f"{folder}: not saved: {reason}; {remedy} and run the same command again, "
            "the checkpoint before is whole"
        ) from error


def _step_dir(folder: Path) -> Path | None:
    """Return what the checkpoint that lies in ``folder`` now is called when it steps aside."""
    now = current_folder(folder)
    if now is None:
        return None
    try:
        step = json.loads((now / "state.json").read_text(encoding="utf-8"))["position"]["step"]
    except (OSError, ValueError, KeyError):
        return None  # damaged: not worth keeping
    return folder.with_name(f"step-{step:08d}")


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints that stepped aside, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def clear_unfinished(run_dir: Path) -> None:
    """Delete what attempts that were killed while they saved have left half-written."""
    for folder in (run_dir / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def find(run_dir: Path, which: Which) -> Saved | None:
    """Return a checkpoint of a run, or None if there is none yet.

    Raises:
        StateError: it is of another version of the product, or damaged.
    """
    place = checkpoint_dir(run_dir, which)
    folder = current_folder(place)
    if folder is None and which == "last":
        folder = next(iter(_steps(place.parent)), None)
        if folder is not None:
            logger.warning("%s: missing, %s is taken", place, folder.name)
    if folder is None:
        return None
    with _damage_told(folder):
        return _read(folder)


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, SafetensorError, FileNotFoundError) as error:
        before = [step.name for step in _steps(folder.parent) if step != folder]
        then = f"go on from {before[0]}" if before else "begin anew"
        raise StateError(
            f"{folder}: damaged ({type(error).__name__}: {error}); remove it to {then}"
        ) from error


def _read(folder: Path) -> Saved:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["version"] != VERSION:
        raise StateError(f"{folder}: got version {state['version']}, want {VERSION}")
    identity = Identity(
        config=Config.model_validate(yaml.safe_load(state["config"])),
        genres=tuple(state["genres"]),
        provenance=state["provenance"],
        data=state["data"],
        labels=state["labels"],
        world_size=state["world_size"],
        given=DataStats.from_tensors(load_file(folder / "given.safetensors")),
        sources={
            name: UserFile((folder / name).read_text(encoding="utf-8"), sha256)
            for name, sha256 in state["sources"].items()
        },
    )
    return Saved(folder, Position(**state["position"]), identity)


def load_trained(run_dir: Path, which: Which) -> Trained:
    """Load a trained model.

    Raises:
        StateError: the run has no such checkpoint.
    """
    saved = find(run_dir, which)
    if saved is None:
        other: Which = "last" if which == "best" else "best"
        there = find(run_dir, other) is not None
        hint = f"there is {other!r}" if there else "run `movienet-train run` first"
        raise StateError(f"{run_dir}: no checkpoint {which!r}; {hint}")
    identity, position = saved.identity, saved.position
    wanted = identity.config.training.threshold
    tuned = position.threshold if wanted is None else wanted
    return Trained(
        model=saved.build_scored().eval(),
        config=identity.config,
        genres=identity.genres,
        provenance=identity.provenance,
        dim=identity.given.dim,
        epoch=position.epoch,
        step=position.step,
        threshold=0.5 if tuned is None else tuned,
    )


def check_resumable(saved: Identity, now: Identity, run_dir: Path) -> None:
    """Refuse to go on where the result would be of neither configuration.

    Raises:
        StateError: the first key that differs, what it was and is, and what to do.
    """
    then, here = _decisive(saved), _decisive(now)
    for key in sorted(then.keys() | here.keys()):
        if then.get(key) != here.get(key):
            raise StateError(
                f"{run_dir}: its checkpoint has {key} {then.get(key)!r}, the configuration "
                f"{here.get(key)!r}; choose another training.run_name, or set it back"
            )


def _decisive(identity: Identity) -> dict[str, Any]:
    config, sources = identity.config, identity.sources
    training = config.training.model_dump(exclude=FREE["training"])
    if config.training.schedule == "cosine":
        training["epochs"] = config.training.epochs  # the whole curve depends on its end
    named = {
        # Of one's own file what is in it counts, not where it lies.
        file: name.rpartition(":")[2] if file in sources else name
        for file, name in _own_files(config).items()
    }
    parts = {
        "training": {**training, "loss": named["loss.py"]},
        "stream": config.stream.model_dump(exclude=FREE["stream"]),
        "eval": {"windows": config.eval.windows},  # by them the best checkpoint is chosen
        "model.options": config.model.options,
        "model": {"class": named["net.py"], "init_from": config.model.init_from},
    }
    flat = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    digests = {f"{file} sha256": source.sha256 for file, source in sources.items()}
    return {**flat, **digests, "genres": identity.genres}


def _own_files(config: Config) -> dict[str, str]:
    """Return what may be a user's own, by the name under which its file is then kept."""
    return {"net.py": config.model.class_, "loss.py": config.training.loss}


def _sources(config: Config) -> dict[str, UserFile]:
    found = {file: user_file(name) for file, name in _own_files(config).items()}
    return {file: source for file, source in found.items() if source is not None}


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
    return _whole(
        {
            f"{number}.{name}": torch.as_tensor(value)
            for number, values in state.items()
            for name, value in values.items()
        }
    )


def _whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Equal values may share memory, which safetensors refuses.
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
