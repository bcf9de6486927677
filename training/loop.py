"""Training loop, fresh or resumed, with the same global batches and steps on any world size.

Every rank executes this module, and only rank 0 writes. Ranks communicate through
``DistributedContext``, whose methods all of them call in the same order.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import Interrupted, MachineError, MovieNetError
from configs.load import dump_config
from configs.runtime.attempt import Attempt
from configs.runtime.progress import progress
from configs.runtime.publish import publish_bytes
from configs.runtime.signals import StopRequest
from training import checkpoint
from training.agreement import check_agreement, startup_facts
from training.checkpoint import Position, checkpoint_dir
from training.loss import share_of_step
from training.metrics import precision_at_recall
from training.metrics_logger import local_link
from training.optim import lr_at, set_lr
from training.rng_keys import seed_of
from training.row_check import check_rows
from training.run_state import Run, check_finished, is_stalled, start_run
from training.scoring import Scores, score_split
from training.stream.reader import AbandonedError
from training.stream.view import View
from training.thresholds import tune

if TYPE_CHECKING:
    from configs.runtime.launch import DistributedContext
    from configs.runtime.progress import Progress
    from configs.schema import Config
    from training.stream.batch import Batch

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Time between two looks for a newer life of the same job."""


def train(
    config: Config,
    distributed: DistributedContext,
    stop: StopRequest | None = None,
    attempt: Attempt | None = None,
) -> Position:
    """Train ``training.epochs`` epochs or until the patience is exhausted, resuming if possible.

    Args:
        config: Configuration of the run.
        distributed: The ranks.
        stop: Active stop request: a signal received before this call takes effect after one step.
            With None, signals are handled during this call only.
        attempt: Record of this attempt on rank 0, if the caller has begun it.

    Returns:
        The final position of the run.

    Raises:
        Interrupted: a stop signal was received. All ranks saved their state at the same step. Or a
            newer life of the same Slurm job waits for the run. Then nothing was saved.
        StateError: the run exists and has another configuration.
        MovieNetError: an expected failure; ``attempt-N.json`` contains its message.
    """
    if attempt is None and distributed.world.rank == 0:
        # Before anything is written: it refuses a run that another process is training.
        attempt = Attempt.begin(config.run_dir, wait_s=config.training.lock_wait)
    run: Run | None = None
    try:
        saved = checkpoint.find(config.run_dir, "last")
        if distributed.world.size > 1:
            check_agreement(distributed, startup_facts(config, saved))
        if saved is not None and saved.position.is_end(config.training):
            # Checked first: a finished run of another configuration must not pass for this one.
            check_finished(saved, config, distributed)
            logger.info("%s: already finished", config.run_dir)
            position, link = saved.position, local_link(config.run_dir)
        else:
            if attempt:
                checkpoint.clear_unfinished(config.run_dir)
            with (
                _report_lost_rank(distributed),
                nullcontext(stop) if stop else StopRequest() as active_stop,
            ):
                run = start_run(config, distributed, active_stop)
                if attempt:
                    _record_start(run, attempt)
                resume(run)
            position, link = run.position, run.metrics.link
    except BaseException as error:
        _record_error(error, run, attempt)
        raise
    finally:
        if run:
            run.stream.close()
            run.metrics.close()
    if attempt:
        attempt.finish("done", position.step)
    _log_link(link)
    return position


def _record_start(run: Run, attempt: Attempt) -> None:
    """Record where this attempt starts, and send an alert if it resumes the run."""
    run.attempt, step = attempt, run.position.step
    run.stop.before_exit = partial(_record_kill, run, attempt)
    attempt.record_start(step)
    if step:
        message = f"attempt {attempt.number} resumes at step {step}"
        run.metrics.alert(f"{run.config.training.run_name} requeued", message)


def _record_error(error: BaseException, run: Run | None, attempt: Attempt | None) -> None:
    """Record why this attempt ends, and send an alert if it was not stopped."""
    is_stop = isinstance(error, Interrupted | KeyboardInterrupt)
    message = str(error) or repr(error)
    if run:
        _record_link(run, wait=False)
    if run and not is_stop:
        run.metrics.alert(f"{run.config.training.run_name} failed", message)
    if attempt:
        step = run.position.step if run else None
        attempt.finish("interrupted" if is_stop else "failed", step, message)


def _record_kill(run: Run, attempt: Attempt) -> None:
    message = "ended by a second Ctrl-C; steps since the last checkpoint are lost"
    attempt.finish("interrupted", run.position.step, message)


@contextmanager
def _report_lost_rank(distributed: DistributedContext) -> Iterator[None]:
    """Convert the traceback of a broken collective into one line; the lost rank logs the cause."""
    try:
        yield
    except RuntimeError as error:
        if distributed.world.size == 1 or not re.search("gloo|NCCL", str(error)):
            raise
        # Without the address of the peer in front and gloo's advice at the end.
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise MachineError(
            f"rank {distributed.world.rank}: lost another rank ({reason}); see the error of that "
            "rank"
        ) from error


def resume(run: Run) -> None:
    """Train the remaining epochs."""
    config, epochs = run.config, run.config.training.epochs
    if run.distributed.world.rank == 0:
        publish_bytes(config.run_dir / "config.yaml", dump_config(config).encode())
    _record_link(run, wait=False)
    if config.training.compile:
        logger.info("compiling the model during the first step")
    with progress(epochs * run.stream.steps_per_epoch, label="train", unit="steps") as bar:
        bar.skip(run.position.step)
        if run.position.unvalidated:
            run.saved_step = None  # the same step is saved once more
            end_epoch(run)
        while not run.position.is_end(config.training):
            train_epoch(run, bar)
    if run.position.epoch < epochs:  # the counter of the bar is not full: give the reason
        message = "stopped early after epoch %d: no better holdout mAP in %d validations"
        logger.info(message, run.position.epoch, run.position.stale)


def _record_link(run: Run, *, wait: bool) -> None:
    """Log and record where to follow the run, as soon as its tracking has started."""
    if run.is_linked or not run.metrics.is_tracked(wait=wait):
        return
    run.is_linked = True
    if run.attempt and run.metrics.url:
        run.attempt.record_link(run.metrics.url)
    _log_link(run.metrics.link)


def _log_link(link: str | None) -> None:
    if link:
        logger.info("tracking: %s", link)


def train_epoch(run: Run, bar: Progress) -> None:
    """Train the remaining steps of one epoch, then validate and save if due."""
    run.model.train()
    before = run.stream.stats()
    for batches in _delivered(run):
        metrics = optimizer_step(run, batches)
        run.position = replace(run.position, step=run.position.step + 1)
        run.metrics.add("train", run.position, metrics)
        bar.advance(1, loss=metrics["loss"])
        _record_link(run, wait=False)
        # After the last step, end_epoch first counts the epoch and validates.
        if batches[0].step + 1 < run.stream.steps_per_epoch:
            save_and_stop_where_due(run)
    run.position = replace(run.position, epoch=run.position.epoch + 1)
    run.metrics.add("speed", run.position, _speed(run, before))
    end_epoch(run)


def end_epoch(run: Run) -> None:
    """Validate and save if due, and stop if requested."""
    training, at = run.config.training, run.position
    is_due = _due(at.epoch, training.validate_epochs) or at.epoch == training.epochs
    if is_due or at.unvalidated:
        run.position = replace(at, unvalidated=False)
        try:
            validate(run)
        except AbandonedError as error:
            _keep_epoch(run)
            raise Interrupted(f"{_stopped(run)} ({error})") from error
        except BaseException:
            _keep_epoch(run)
            raise
        save_last(run)
        run.metrics.plot_if_due()
    # A run at its end is done: a stop request no longer changes that.
    if not run.position.is_end(training):
        save_and_stop_where_due(run)


def _keep_epoch(run: Run) -> None:
    """Save the epoch that was trained before its validation failed; that error is reported."""
    run.position = replace(run.position, unvalidated=True)
    try:
        _save_state(run)
    except MovieNetError as error:
        logger.warning("%s", error)


def optimizer_step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """Take one step over all micro-batches of this rank.

    Args:
        run: The run.
        batches: The micro-batches of this step.

    Returns:
        Global loss, learning rate and gradient norm.

    Raises:
        DataError: the loss is nan or infinite, and so are rows that this rank has read.
        MovieNetError: the loss is nan or infinite.
    """
    training, distributed = run.config.training, run.distributed
    lr = lr_at(run.position.step, training, steps_per_epoch=run.stream.steps_per_epoch)
    set_lr(run.optimizer, lr)
    run.optimizer.zero_grad()
    losses = []
    for batch in batches:
        # Seeded per micro-batch: dropout is the same after a restart, without saved state.
        torch.manual_seed(
            seed_of(training.seed, run.position.step, distributed.world.rank, batch.micro)
        )
        # Gradients are reduced once per step, in the last micro-batch.
        with distributed.accumulate(run.model, last=batch.last_micro):
            loss = micro_loss(run, batch)
            distributed.backward(loss)
        losses.append(loss.detach())
    norm = distributed.clip_grad_norm(run.model.parameters(), training.clip_norm or math.inf)
    run.optimizer.step()
    if run.average is not None:
        run.average.update_parameters(distributed.unwrap(run.model))
    n_micro_batches = distributed.world.size * training.grad_accumulation
    value = distributed.all_reduce_sum(torch.stack(losses).sum()).item() / n_micro_batches
    # The loss is global, so all ranks raise this error at the same step.
    if not math.isfinite(value):
        for batch in batches:
            check_rows(run.features, batch)
        raise MovieNetError(
            f"training: the loss is {value} at step {run.position.step}; "
            "lower training.lr or set training.clip_norm"
        )
    return {"loss": value, "lr": lr, "grad_norm": norm.item()}


def micro_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Return the contribution of a micro-batch to the loss of the step, a float32 scalar."""
    device = run.distributed.device
    features_BTD, mask_BT, labels_BG = run.augment(batch.to(device, non_blocking=True))
    logits_BG = run.model(features_BTD, mask_BT)
    return share_of_step(
        run.loss(logits_BG.float(), labels_BG),  # in float32, whatever the precision of the model
        batch.weight.to(device),
        global_weight=batch.global_weight,
        world_size=run.distributed.world.size,
        accumulation=run.config.training.grad_accumulation,
    )


def validate(run: Run) -> None:
    """Score the holdout and the monitored split, and update the best checkpoint."""
    # Scoring imports scikit-learn, which checks whether modules are loaded that another thread may
    # just be importing.
    _record_link(run, wait=True)
    splits = {
        "holdout": run.movies.holdout,
        run.config.training.monitor_split or "": run.movies.monitored,
    }
    scores = {name: _score(run, movies) for name, movies in splits.items() if len(movies)}
    metrics = {
        f"{name}/{key}": value
        for name, scored in scores.items()
        for key, value in scored.summary().items()
    }
    run.metrics.add("validation", run.position, metrics)
    for name, scored in scores.items():
        support_G = scored.labels_MG.sum(0).tolist()
        run.metrics.add_genres(name, run.position, scored.genres, scored.aps_G, support_G)
        points = precision_at_recall(scored.labels_MG, scored.probabilities_MG, scored.genres)
        run.metrics.add_curves(name, run.position, points)
    if "holdout" in scores:
        update_best(run, scores["holdout"], metrics["holdout/map"])


def update_best(run: Run, holdout: Scores, holdout_map: float) -> None:
    """Tune the thresholds on the holdout, and save the model if its holdout mAP is the best."""
    thresholds = tune(holdout.labels_MG, holdout.probabilities_MG)
    best = -math.inf if run.position.best is None else run.position.best
    run.position = replace(
        run.position,
        best=holdout_map if holdout_map >= best else run.position.best,
        stale=0 if holdout_map > best else run.position.stale + 1,
        threshold=thresholds.common,
        genre_thresholds=thresholds.genres,
    )
    # Ties go to the later model: a small holdout soon reaches mAP 1 while the model improves.
    if holdout_map >= best:
        _save(run, "best")


def save_last(run: Run) -> None:
    """Publish the state of this step, unless it is saved already, and synchronize all ranks."""
    if run.saved_step == run.position.step:
        return
    _save_state(run)
    run.distributed.barrier()


def _save_state(run: Run) -> None:
    """Publish the state of this step, on rank 0; no collective."""
    scaler = run.distributed.scaler_state()
    run.position = replace(run.position, stream=run.stream.state_dict(), scaler=scaler)
    # Metrics first: after a power cut, no step before the checkpoint lacks its record.
    run.metrics.sync()
    _record_link(run, wait=True)
    _save(run, "last")
    run.saved_step, run.saved_at_s = run.position.step, time.monotonic()


def save_and_stop_where_due(run: Run) -> None:
    """Save if due. If a stop was requested on any rank, save and raise ``Interrupted``.

    All ranks decide identically and at the same step: a signal received by one rank counts for
    all, and rank 0's clock determines the time.
    """
    training = run.config.training
    elapsed_s = time.monotonic() - run.saved_at_s
    overdue = run.distributed.world.rank == 0 and 0 < 60 * training.checkpoint_minutes <= elapsed_s
    flags = (overdue, run.stop.requested, _superseded(run))
    overdue, stopping, superseded = run.distributed.any_rank(*flags)
    if superseded:
        raise Interrupted(_newer_life(run))
    if stopping or overdue or _due(run.position.step, training.checkpoint_steps):
        save_last(run)
    if not stopping:
        return
    raise Interrupted(_stopped(run))


def _stopped(run: Run) -> str:
    reason = run.stop.reason or "another rank"
    return (
        f"{run.config.run_dir}: stopped by {reason} at step {run.position.step}, state saved; "
        "rerun the command to resume"
    )


def _superseded(run: Run) -> bool:
    """Return whether a newer life of this job has begun; looks once a second, on rank 0."""
    now = time.monotonic()
    if run.attempt is None or now - run.looked_at_s < _LOOK_S:
        return False
    run.looked_at_s = now
    return run.attempt.superseded()


def _newer_life(run: Run) -> str:
    return (
        f"{run.config.run_dir}: a newer life of this job has begun; stopped at step "
        f"{run.position.step} without saving"
    )


def _save(run: Run, which: checkpoint.Which) -> None:
    if run.distributed.world.rank != 0:
        return
    if run.attempt and run.attempt.superseded():
        raise Interrupted(_newer_life(run))
    checkpoint.save(
        checkpoint_dir(run.config.run_dir, which),
        model=run.distributed.unwrap(run.model),
        average=run.average,
        optimizer=run.optimizer if which == "last" else None,
        position=run.position,
        identity=run.identity,
        keep=run.config.training.keep_checkpoints if which == "last" else 1,
    )


def _score(run: Run, movies: NDArray[np.int64]) -> Scores:
    config = run.config
    return score_split(
        run.scored,
        run.features,
        movies,
        View.of(config, config.eval.windows),
        batch_size=config.eval.batch_size,
        distributed=run.distributed,
        source=run.stream.source,
        give_up=partial(is_stalled, run.stop),
    )


def _speed(run: Run, before: Mapping[str, float]) -> dict[str, float]:
    """Return windows per second over all ranks, and reads, waiting time and memory of rank 0."""
    delta = {name: value - before[name] for name, value in run.stream.stats().items()}
    seconds = max(delta["seconds"], 1e-9)
    windows = run.distributed.all_reduce_sum(torch.tensor(delta["windows"])).item()
    metrics = {
        **{name: delta[name] for name in ("bytes", "requests", "retries", "cache_hits")},
        "windows_per_s": windows / seconds,
        "wait_share": delta["waited_s"] / seconds,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if run.distributed.device.type == "cuda":
        metrics["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return metrics


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def _delivered(run: Run) -> Iterator[list[Batch]]:
    """Yield the steps of this rank; a stop that meets a silent data source saves the last one."""
    try:
        yield from _steps(run.stream)
    except AbandonedError as error:
        if run.position.step != run.saved_step:
            _save_state(run)  # without the other ranks: they may wait in a collective
        raise Interrupted(f"{_stopped(run)} ({error})") from error


def _steps(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group micro-batches into optimizer steps."""
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if batch.last_micro:
            yield step
            step = []
