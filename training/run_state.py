"""What one rank holds while it trains, and how it comes by it: fresh, or from a checkpoint."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from configs.errors import ConfigError
from training import checkpoint
from training.augment import Augment
from training.checkpoint import Identity, Position, Saved
from training.data_stats import DataStats, measure
from training.init_weights import load_initial_weights
from training.loss import Loss, make_loss
from training.metrics_logger import MetricsLogger
from training.optim import make_average, make_optimizer
from training.registry import build_model, check_model, count_parameters, fixed_frames
from training.split_selection import SplitSelection, choose_movies, open_labelled
from training.stream.loader import FeatureStream, score_batches
from training.stream.view import View

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

    from configs.runtime.launch import DistributedContext
    from configs.runtime.signals import StopRequest
    from configs.schema import Config, TrainingConfig
    from sharding.features import FeatureSet
    from training.stream.base import BatchStream

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What one rank holds while it trains."""

    config: Config
    distributed: DistributedContext
    features: FeatureSet
    movies: SplitSelection
    stream: BatchStream
    identity: Identity
    model: nn.Module
    """As prepared by Accelerate."""

    average: AveragedModel | None
    """Moving average of the model's weights, bare and in full precision."""

    optimizer: torch.optim.Optimizer
    """As prepared by Accelerate."""

    loss: Loss
    augment: Augment
    metrics: MetricsLogger
    stop: StopRequest
    position: Position
    saved_step: int | None
    """Step of the last checkpoint."""

    saved_at_s: float = field(default_factory=time.monotonic)
    """When it was saved, or the attempt began; on this rank's monotonic clock."""

    @property
    def scored(self) -> nn.Module:
        """The model that is validated: the average where there is one, else the one in training."""
        return self.distributed.unwrap(self.model) if self.average is None else self.average.module


def start_run(config: Config, distributed: DistributedContext, stop: StopRequest) -> Run:
    """Open the data, build or load the model, and continue the metrics at the checkpoint.

    Raises:
        MovieNetError: data, configuration, model and checkpoint do not fit together.
    """
    training = config.training
    features = open_labelled(config)
    movies = choose_movies(features, training)
    stream = _open_stream(config, distributed, features, movies)
    saved = checkpoint.find(config.run_dir, "last")
    if saved is None:
        parts = _fresh(config, distributed, features, movies)
    else:
        parts = _resumed(saved, config, distributed, features, stream)
    _log_start(config, distributed, movies, parts)
    at = parts.position
    record = MetricsLogger(config, rank=distributed.world.rank, run_id=at.run_id, from_step=at.step)
    return Run(
        config=config,
        distributed=distributed,
        features=features,
        movies=movies,
        stream=stream,
        identity=parts.identity,
        model=parts.model,
        average=parts.average,
        optimizer=distributed.prepare_optimizer(parts.optimizer),
        loss=make_loss(training.loss, _positives(features, movies), len(movies.train)),
        augment=_augment(training, parts.identity.given),
        metrics=record,
        stop=stop,
        position=replace(at, run_id=record.run_id),
        saved_step=parts.saved_step,
    )


@dataclass(frozen=True)
class _Parts:
    """What a fresh and a resumed run obtain in different ways."""

    identity: Identity
    model: nn.Module
    """As prepared by Accelerate."""

    average: AveragedModel | None
    """Copied before the model is wrapped, so that it stays in full precision."""

    optimizer: torch.optim.Optimizer
    """Not yet prepared by Accelerate."""

    position: Position
    saved_step: int | None
    """Step of the checkpoint that the run resumes from."""


def _fresh(
    config: Config, distributed: DistributedContext, features: FeatureSet, movies: SplitSelection
) -> _Parts:
    """Measure the data and build the model at step 0."""
    given = measure(features, movies.train, frames=config.stream.window)
    identity = Identity.of(config, features, given, world_size=distributed.world.size)
    torch.manual_seed(config.training.seed)
    bare = build_model(config.model.class_, config.model.options, given)
    _try_model(bare, features, movies, given)
    if config.model.init_from is not None:
        load_initial_weights(bare, config.model.init_from)
    average = _start_average(bare, distributed, config.training.ema, steps=0)
    model, optimizer = _prepare(bare, config, distributed, given)
    return _Parts(identity, model, average, optimizer, Position(), None)


def _resumed(
    saved: Saved,
    config: Config,
    distributed: DistributedContext,
    features: FeatureSet,
    stream: BatchStream,
) -> _Parts:
    """Restore model, average, optimizer, gradient scaler and stream from a checkpoint."""
    position, given = saved.position, saved.identity.given
    identity = Identity.of(config, features, given, world_size=distributed.world.size)
    torch.manual_seed(config.training.seed)
    _check_saved(saved, identity, config)
    stream.load_state_dict(position.stream or {})
    bare = saved.build()
    average = _start_average(bare, distributed, config.training.ema, steps=position.step)
    if average is not None:
        saved.load_average(average)
    model, optimizer = _prepare(bare, config, distributed, given)
    saved.load_optimizer(optimizer)
    distributed.load_scaler_state(dict(position.scaler or {}))
    return _Parts(identity, model, average, optimizer, position, position.step)


def _prepare(
    bare: nn.Module, config: Config, distributed: DistributedContext, given: DataStats
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap the model for the ranks; return it with an optimizer of its bare parameters."""
    training = config.training
    model = distributed.prepare_model(bare)
    if training.precision != "fp32":
        _try_precision(distributed.unwrap(model), distributed.device, given, training.precision)
    return model, make_optimizer(distributed.unwrap(model), training)


def _log_start(
    config: Config, distributed: DistributedContext, movies: SplitSelection, parts: _Parts
) -> None:
    at, n_parameters = parts.position, count_parameters(distributed.unwrap(parts.model))
    logger.info(
        "%s: %s epoch %d, step %d   parameters %s   movies: train %d, holdout %d, watched %d",
        *(config.run_dir, "from" if parts.saved_step is None else "resumed at", at.epoch, at.step),
        *(f"{n_parameters:,}", len(movies.train), len(movies.holdout), len(movies.monitored)),
    )


def _augment(training: TrainingConfig, given: DataStats) -> Augment:
    return Augment(
        training.seed,
        # Noise is given in standard deviations of the train movies' values.
        noise=training.feature_noise * given.rows.raw.scale,
        hide_frames=training.frame_dropout,
        drop_features=training.feature_dropout,
        mean_D=given.rows.raw.mean_D,
        mixup=training.mixup,
    )


def check_finished(saved: Saved, config: Config, distributed: DistributedContext) -> None:
    """Refuse to report a run as done under another configuration, or with other data.

    Raises:
        StateError: a difference affects the result; its line names the difference.
        MovieNetError: the data cannot be opened.
    """
    features = open_labelled(config)
    world_size = distributed.world.size
    now = Identity.of(config, features, saved.identity.given, world_size=world_size)
    checkpoint.check_resumable(saved.identity, now, config.run_dir)
    movies = choose_movies(features, config.training)
    with _open_stream(config, distributed, features, movies) as stream:
        stream.load_state_dict(saved.position.stream or {})


def _open_stream(
    config: Config, distributed: DistributedContext, features: FeatureSet, movies: SplitSelection
) -> BatchStream:
    options: dict[str, Any] = {
        "rank": distributed.world.rank,
        "world_size": distributed.world.size,
        "accumulation": config.training.grad_accumulation,
        "shuffle_frames": config.training.shuffle_frames,
        "partners": config.training.mixup > 0,
    }
    if config.stream.reader == "webdataset":
        from training.stream.webdataset_stream import WebDatasetStream

        return WebDatasetStream(features, movies.train, config.stream, **options)
    pinned = distributed.device.type == "cuda"
    return FeatureStream(features, movies.train, config.stream, **options, pinned=pinned)


def _start_average(
    bare: nn.Module, distributed: DistributedContext, decay: float, *, steps: int
) -> AveragedModel | None:
    return make_average(bare, decay, steps=steps).to(distributed.device) if decay else None


def _positives(features: FeatureSet, movies: SplitSelection) -> torch.Tensor:
    return torch.from_numpy(features.labels.hot_MG[movies.train].sum(0)).float()


def _try_model(
    model: nn.Module, features: FeatureSet, movies: SplitSelection, given: DataStats
) -> None:
    two = movies.train[:2]
    batch = next(score_batches(features, two, View(given.frames), batch_size=len(two)))
    check_model(model, batch.features.float(), batch.mask, given.genres)
    only = fixed_frames(model)
    if only is not None and only != given.frames:
        name = type(model).__name__
        raise ConfigError(f"stream.window: got {given.frames}, {name} takes {only} only")


def _try_precision(
    model: nn.Module, device: torch.device, given: DataStats, precision: str
) -> None:
    """Refuse arithmetic that the device lacks for this model: few CPUs run an LSTM in bf16."""
    rows_BTD = torch.zeros(2, given.frames, given.dim, device=device)
    try:
        with torch.no_grad():
            model(rows_BTD, torch.ones(2, given.frames, dtype=torch.bool, device=device))
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        name = type(model).__name__
        raise ConfigError(
            f"training.precision: {name} does not run in {precision} on this {device.type}: "
            f"{reason}; want 'fp32', or another model or machine"
        ) from error


def _check_saved(saved: Saved, now: Identity, config: Config) -> None:
    checkpoint.check_resumable(saved.identity, now, config.run_dir)
    then = saved.identity.world_size
    if then != now.world_size:
        logger.warning(
            "%s was saved on %d ranks and goes on on %d: the global batches stay the same, "
            "dropout does not",
            *(config.run_dir, then, now.world_size),
        )
