"""State of one rank during training, created fresh or from a checkpoint."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from configs.errors import ConfigError
from training import checkpoint
from training.agreement import check_agreement, data_facts
from training.augment import Augment
from training.checkpoint import Identity, Position, Saved
from training.data_stats import DataStats, measure
from training.init_weights import load_initial_weights
from training.loss import Loss, make_loss
from training.metrics_logger import MetricsLogger
from training.optim import make_average, make_optimizer
from training.registry import build_model, check_model, count_parameters, fixed_frames
from training.row_check import check_rows
from training.split_selection import (
    SplitSelection,
    choose_movies,
    open_labelled,
    warn_of_other_data,
)
from training.stream.loader import FeatureStream, score_batches
from training.stream.view import View
from training.threads import choose_threads
from training.trial import Sample, try_model

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

    from configs.runtime.attempt import Attempt
    from configs.runtime.launch import DistributedContext
    from configs.runtime.signals import StopRequest
    from configs.schema import Config, TrainingConfig
    from sharding.features import FeatureSet
    from training.stream.base import BatchStream

logger = logging.getLogger(__name__)

_STALLED_S = 12.0
"""Time after a stop request in which the data source must deliver the next batch."""

_FEW_MOVIES = 10
"""Holdout below which choosing the best checkpoint is warned of."""


@dataclass
class Run:
    """State of one rank during training."""

    config: Config
    distributed: DistributedContext
    features: FeatureSet
    movies: SplitSelection
    stream: BatchStream
    identity: Identity
    model: nn.Module
    """As prepared by Accelerate."""

    average: AveragedModel | None
    """Moving average of the bare model's weights, in full precision."""

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
    """Time of the last checkpoint, or of the start of the attempt, on this rank's clock."""

    attempt: Attempt | None = None
    """The record of this attempt; of rank 0 alone."""

    is_linked: bool = False
    """Whether the link of the tracking run was logged and recorded, if there is one."""

    looked_at_s: float = field(default_factory=time.monotonic)
    """When this rank last looked for a newer life of its job; on its monotonic clock."""

    @property
    def scored(self) -> nn.Module:
        """The model for validation: the average if enabled, else the model in training."""
        return self.distributed.unwrap(self.model) if self.average is None else self.average.module


def start_run(config: Config, distributed: DistributedContext, stop: StopRequest) -> Run:
    """Open the data, build or load the model, and continue the metrics at the checkpoint.

    Raises:
        MovieNetError: data, configuration, model and checkpoint are inconsistent.
    """
    training = config.training
    logger.info("opening the feature set")
    features = open_labelled(config)
    if distributed.world.rank == 0:
        warn_of_other_data(config, features)
    movies = choose_movies(features, training)
    stream = _open_stream(config, distributed, features, movies, stop)
    if distributed.world.size > 1:
        check_agreement(distributed, data_facts(features, stream.state_dict()))
    loss = make_loss(training.loss, _positives(features, movies), len(movies.train))
    saved = checkpoint.find(config.run_dir, "last")
    # A resumed run moves the stream to the checkpoint, so the stream is created first.
    if saved is None:
        components = _fresh(config, distributed, features, movies)
    else:
        components = _resumed(saved, config, distributed, features, movies, stream)
    _log_start(config, distributed, movies, components)
    at, rank = components.position, distributed.world.rank
    # After everything that may refuse the configuration: until here no metrics are dropped.
    if rank == 0:
        checkpoint.set_aside_later(config.run_dir, at.step)
    metrics = MetricsLogger(config, rank=rank, run_id=at.run_id, from_step=at.step)
    return Run(
        config=config,
        distributed=distributed,
        features=features,
        movies=movies,
        stream=stream,
        identity=components.identity,
        model=components.model,
        average=components.average,
        optimizer=distributed.prepare_optimizer(components.optimizer),
        loss=loss,
        augment=_augment(training, components.identity.data_stats),
        metrics=metrics,
        stop=stop,
        position=replace(at, run_id=metrics.run_id),
        saved_step=components.saved_step,
    )


@dataclass(frozen=True)
class _Components:
    """Components that a fresh and a resumed run obtain in different ways."""

    identity: Identity
    model: nn.Module
    """As prepared by Accelerate."""

    average: AveragedModel | None
    """Copied before Accelerate wraps the model, and therefore in full precision."""

    optimizer: torch.optim.Optimizer
    """Not yet prepared by Accelerate."""

    position: Position
    saved_step: int | None
    """Step of the checkpoint that the run resumes from."""


def _fresh(
    config: Config, distributed: DistributedContext, features: FeatureSet, movies: SplitSelection
) -> _Components:
    """Measure the data and build the model at step 0."""
    logger.info("measuring the features of %s train movies", f"{len(movies.train):,}")
    data_stats = measure(features, movies.train, frames=config.stream.window)
    world_size = distributed.world.size
    identity = Identity.of(config, features, movies, data_stats, world_size=world_size)
    torch.manual_seed(config.training.seed)  # the same initial weights on every rank
    bare = build_model(config.model.class_, config.model.options, data_stats)
    logger.info("checking %s on two movies", type(bare).__name__)
    sample = _check_model(bare, features, movies, data_stats)
    choose_threads(bare, distributed.device, config.training.threads)
    if distributed.world.rank == 0:  # the others wait for its weights
        config.run_dir.mkdir(parents=True, exist_ok=True)
        try_model(identity, sample, config.run_dir)
    # Not in a resumed run: its checkpoint contains the weights.
    if config.model.init_from is not None:
        load_initial_weights(bare, config.model.init_from)
    average = _start_average(bare, distributed, config.training.ema, steps=0)
    model, optimizer = _prepare(bare, config, distributed, data_stats)
    return _Components(identity, model, average, optimizer, Position(), None)


def _resumed(
    saved: Saved,
    config: Config,
    distributed: DistributedContext,
    features: FeatureSet,
    movies: SplitSelection,
    stream: BatchStream,
) -> _Components:
    """Restore model, average, optimizer, gradient scaler and stream from a checkpoint."""
    logger.info("loading %s", saved.folder)
    position, data_stats = saved.position, saved.identity.data_stats
    world_size = distributed.world.size
    identity = Identity.of(config, features, movies, data_stats, world_size=world_size)
    torch.manual_seed(config.training.seed)
    _check_saved(saved, identity, config)  # first: its message names the key that differs
    stream.load_state_dict(position.stream or {})
    bare = saved.build()
    choose_threads(bare, distributed.device, config.training.threads)
    average = _start_average(bare, distributed, config.training.ema, steps=position.step)
    if average is not None:
        saved.load_average(average)
    model, optimizer = _prepare(bare, config, distributed, data_stats)
    saved.load_optimizer(optimizer)
    distributed.load_scaler_state(dict(position.scaler or {}))
    return _Components(identity, model, average, optimizer, position, position.step)


def _prepare(
    bare: nn.Module, config: Config, distributed: DistributedContext, data_stats: DataStats
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap the model for the ranks; return it with an optimizer of its bare parameters."""
    training, device = config.training, distributed.device
    model = distributed.prepare_model(bare)
    if training.precision != "fp32":
        _check_precision(distributed.unwrap(model), device, data_stats, training.precision)
    return model, make_optimizer(distributed.unwrap(model), training)


def _log_start(
    config: Config, distributed: DistributedContext, movies: SplitSelection, components: _Components
) -> None:
    at, model = components.position, distributed.unwrap(components.model)
    logger.info(
        "%s: %s at epoch %d, step %d",
        *(config.run_dir, "starting" if components.saved_step is None else "resuming"),
        *(at.epoch, at.step),
    )
    logger.info("%s: %s parameters", type(model).__name__, f"{count_parameters(model):,}")
    logger.info(
        "movies: %s train, %s holdout, %s %s",
        *(f"{len(movies.train):,}", f"{len(movies.holdout):,}", f"{len(movies.monitored):,}"),
        config.training.monitor_split or "monitored",
    )
    if 0 < len(movies.holdout) < _FEW_MOVIES:
        logger.warning(
            "training.holdout: the best checkpoint and the threshold are chosen on %d movies only, "
            "mostly by chance; set a larger fraction, or 0 and eval.checkpoint=last",
            len(movies.holdout),
        )


def _augment(training: TrainingConfig, data_stats: DataStats) -> Augment:
    return Augment(
        training.seed,
        # The option is in standard deviations of the train movies' values.
        noise=training.feature_noise * data_stats.rows.raw.scale,
        frame_dropout=training.frame_dropout,
        feature_dropout=training.feature_dropout,
        mean_D=data_stats.rows.raw.mean_D,
        mixup=training.mixup,
    )


def check_finished(saved: Saved, config: Config, distributed: DistributedContext) -> None:
    """Check that a finished run has the current configuration and data.

    Raises:
        StateError: the run differs in a way that affects the result.
        MovieNetError: the data cannot be opened.
    """
    features = open_labelled(config)
    if distributed.world.rank == 0:
        warn_of_other_data(config, features)
    movies = choose_movies(features, config.training)
    data_stats, world_size = saved.identity.data_stats, distributed.world.size
    current = Identity.of(config, features, movies, data_stats, world_size=world_size)
    checkpoint.check_resumable(saved.identity, current, config.run_dir)
    with _open_stream(config, distributed, features, movies) as stream:
        stream.load_state_dict(saved.position.stream or {})


def _open_stream(
    config: Config,
    distributed: DistributedContext,
    features: FeatureSet,
    movies: SplitSelection,
    stop: StopRequest | None = None,
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
    pinned = distributed.device.type == "cuda"  # page-locked buffers make copies asynchronous
    if stop is not None:
        options["give_up"] = partial(is_stalled, stop)
    return FeatureStream(features, movies.train, config.stream, **options, pinned=pinned)


def is_stalled(stop: StopRequest) -> bool:
    """Return whether a stop has waited too long for the data source.

    A launcher kills its ranks 30 s after it has stopped them.
    """
    return stop.seconds > _STALLED_S


def _start_average(
    bare: nn.Module, distributed: DistributedContext, decay: float, *, steps: int
) -> AveragedModel | None:
    return make_average(bare, decay, steps=steps).to(distributed.device) if decay else None


def _positives(features: FeatureSet, movies: SplitSelection) -> torch.Tensor:
    return torch.from_numpy(features.labels.hot_MG[movies.train].sum(0)).float()


def _check_model(
    model: nn.Module, features: FeatureSet, movies: SplitSelection, data_stats: DataStats
) -> Sample:
    two = movies.train[:2]
    batch = next(score_batches(features, two, View(data_stats.frames), batch_size=len(two)))
    check_rows(features, batch)  # of a large set, not every movie was measured
    sample = Sample(batch.features.float(), batch.mask)
    check_model(model, sample.features_BTD, sample.mask_BT, data_stats.genres)
    only = fixed_frames(model)
    if only is not None and only != data_stats.frames:
        name = type(model).__name__
        raise ConfigError(f"stream.window: got {data_stats.frames}, want {only} for {name}")
    return sample


def _check_precision(
    model: nn.Module, device: torch.device, data_stats: DataStats, precision: str
) -> None:
    """Raise if the device cannot run this model in ``precision``: few CPUs run bf16 LSTMs."""
    rows_BTD = torch.zeros(2, data_stats.frames, data_stats.dim, device=device)
    try:
        with torch.no_grad():
            model(rows_BTD, torch.ones(2, data_stats.frames, dtype=torch.bool, device=device))
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]  # torch appends pages of advice
        name = type(model).__name__
        raise ConfigError(
            f"training.precision: {name} does not run in {precision} on this {device.type}: "
            f"{reason}; want 'fp32', or another model or machine"
        ) from error


def _check_saved(saved: Saved, current: Identity, config: Config) -> None:
    checkpoint.check_resumable(saved.identity, current, config.run_dir)
    saved_size = saved.identity.world_size
    if saved_size != current.world_size:
        logger.warning(
            "%s: saved with world size %d, resuming with %d: global batches are the same, "
            "dropout is not",
            *(config.run_dir, saved_size, current.world_size),
        )
