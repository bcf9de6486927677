"""Train or resume a run, on any number of ranks: the same global batches, the same steps.

Every rank runs this file; rank 0 alone writes. Communication with other ranks goes through
``DistributedContext`` and is called by all of them in the same order.
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
from typing import TYPE_CHECKING, Literal

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
from training.checkpoint import Position, checkpoint_dir
from training.loss import share_of_step
from training.metrics import precision_at_recall
from training.optim import lr_at, set_lr
from training.rng_keys import seed_of
from training.run_state import Run, check_finished, start_run
from training.scoring import Scores, score_split
from training.stream.view import View
from training.thresholds import global_threshold

if TYPE_CHECKING:
    from configs.runtime.launch import DistributedContext
    from configs.runtime.progress import Progress
    from configs.schema import Config
    from training.stream.batch import Batch

logger = logging.getLogger(__name__)


def train(
    config: Config, distributed: DistributedContext, stop: StopRequest | None = None
) -> Position:
    """Train ``training.epochs`` epochs or until patience ends, from the last checkpoint if any.

    Args:
        config: The run.
        distributed: The ranks.
        stop: Listens already: who asked while the ranks gathered is heard after one step. None
            listens from here on.

    Returns:
        Where the run stands at its end.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 came; all ranks stopped and saved at the same step.
        StateError: the run is another configuration's, done or not.
        MovieNetError: something expected is wrong; ``attempt-N.json`` says so too.
    """
    saved = checkpoint.find(config.run_dir, "last")
    if saved is not None and saved.position.is_end(config.training):
        check_finished(saved, config, distributed)
        logger.info("%s: done, %d epochs", config.run_dir, saved.position.epoch)
        return saved.position
    attempt = None
    if distributed.world.rank == 0:
        attempt = Attempt.begin(config.run_dir)
        checkpoint.clear_unfinished(config.run_dir)
    run: Run | None = None
    try:
        with (
            _lost_ranks_told(distributed),
            nullcontext(stop) if stop else StopRequest() as listening,
        ):
            run = start_run(config, distributed, listening)
            if attempt and run.position.step:
                told = f"attempt {attempt.number} goes on at step {run.position.step}"
                run.metrics.alert(f"{config.training.run_name} requeued", told)
            resume(run)
    except BaseException as error:
        outcome: Literal["interrupted", "failed"]
        outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
        told = str(error) or repr(error)
        if run and outcome == "failed":
            run.metrics.alert(f"{config.training.run_name} failed", told)
        if attempt:
            attempt.finish(outcome, run.position.step if run else None, told)
        raise
    finally:
        if run:
            run.stream.close()
            run.metrics.close()
    if attempt:
        attempt.finish("done", run.position.step)
    return run.position


@contextmanager
def _lost_ranks_told(distributed: DistributedContext) -> Iterator[None]:
    """Tell in one line that another rank is gone; that rank tells why."""
    try:
        yield
    except RuntimeError as error:
        if distributed.world.size == 1 or not re.search("gloo|NCCL", str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise MachineError(
            f"rank {distributed.world.rank}: lost another rank ({reason}); its own line tells why"
        ) from error


def resume(run: Run) -> None:
    """Train what remains of the epochs."""
    config, epochs = run.config, run.config.training.epochs
    if run.distributed.world.rank == 0:
        publish_bytes(config.run_dir / "config.yaml", dump_config(config).encode())
    with progress(epochs * run.stream.steps_per_epoch, label="train", unit="steps") as shown:
        shown.skip(run.position.step)
        while not run.position.is_end(config.training):
            train_epoch(run, shown)
    if run.position.epoch < epochs:
        told = "%s: stopped after epoch %d: no better holdout mAP in %d validations"
        logger.info(told, config.run_dir, run.position.epoch, run.position.stale)


def train_epoch(run: Run, shown: Progress) -> None:
    """Do what remains of one epoch, then validate and save where that is due."""
    run.model.train()
    before = run.stream.stats()
    for batches in _steps(run.stream):
        figures = optimizer_step(run, batches)
        run.position = replace(run.position, step=run.position.step + 1)
        run.metrics.add("train", run.position, figures)
        shown.advance(1, loss=figures["loss"])
        if batches[0].step + 1 < run.stream.steps_per_epoch:  # the last step counts as an epoch
            save_and_stop_where_due(run)
    run.position = replace(run.position, epoch=run.position.epoch + 1)
    run.metrics.add("speed", run.position, _speed(run, before))
    end_epoch(run)


def end_epoch(run: Run) -> None:
    """Validate and save if it is time, and stop if that is wanted."""
    training, at = run.config.training, run.position
    if _due(at.epoch, training.validate_epochs) or at.epoch == training.epochs:
        validate(run)
        save_last(run)
    if not run.position.is_end(training):
        save_and_stop_where_due(run)


def optimizer_step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """Take one step over all micro-batches of this rank; return loss, rate and gradient norm."""
    training, distributed = run.config.training, run.distributed
    lr = lr_at(run.position.step, training, steps_per_epoch=run.stream.steps_per_epoch)
    set_lr(run.optimizer, lr)
    run.optimizer.zero_grad()
    losses = []
    for batch in batches:
        torch.manual_seed(
            seed_of(training.seed, run.position.step, distributed.world.rank, batch.micro)
        )
        with distributed.accumulate(run.model, last=batch.last_micro):
            loss = micro_loss(run, batch)
            distributed.backward(loss)
        losses.append(loss.detach())
    norm = distributed.clip_grad_norm(run.model.parameters(), training.clip_norm or math.inf)
    run.optimizer.step()
    if run.average is not None:
        run.average.update_parameters(distributed.unwrap(run.model))
    parts = distributed.world.size * training.grad_accumulation
    value = distributed.all_reduce_sum(torch.stack(losses).sum()).item() / parts
    if not math.isfinite(value):
        raise MovieNetError(
            f"training: the loss is {value} at step {run.position.step}; "
            "lower training.lr or set training.clip_norm"
        )
    return {"loss": value, "lr": lr, "grad_norm": norm.item()}


def micro_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Return what a micro-batch adds to the loss of the step."""
    device = run.distributed.device
    features_BTD, mask_BT, labels_BG = run.augment(batch.to(device, non_blocking=True))
    logits_BG = run.model(features_BTD, mask_BT)
    return share_of_step(
        run.loss(logits_BG.float(), labels_BG),
        batch.weight.to(device),
        global_weight=batch.global_weight,
        world_size=run.distributed.world.size,
        accumulation=run.config.training.grad_accumulation,
    )


def validate(run: Run) -> None:
    """Score holdout and watched split; keep the model if the holdout calls it the best."""
    parts = {
        "holdout": run.movies.holdout,
        run.config.training.monitor_split or "": run.movies.monitored,
    }
    scores = {name: _score(run, movies) for name, movies in parts.items() if len(movies)}
    figures = {
        f"{name}/{key}": value
        for name, scored in scores.items()
        for key, value in scored.summary().items()
    }
    run.metrics.add("validation", run.position, figures)
    for name, scored in scores.items():
        support_G = scored.labels_MG.sum(0).tolist()
        run.metrics.add_genres(name, run.position, scored.genres, scored.aps_G, support_G)
        points = precision_at_recall(scored.labels_MG, scored.probabilities_MG, scored.genres)
        run.metrics.add_curves(name, run.position, points)
    if "holdout" in scores:
        update_best(run, scores["holdout"], figures["holdout/map"])


def update_best(run: Run, holdout: Scores, reached: float) -> None:
    """Tune the threshold on the holdout; keep the model if its mAP there is the best so far."""
    best = -math.inf if run.position.best is None else run.position.best
    run.position = replace(
        run.position,
        best=reached if reached >= best else run.position.best,
        stale=0 if reached > best else run.position.stale + 1,
        threshold=global_threshold(holdout.labels_MG, holdout.probabilities_MG),
    )
    # Of equals the later: a small holdout is soon sorted perfectly, and the model still improves.
    if reached >= best:
        _save(run, "best")


def save_last(run: Run) -> None:
    """Publish the state of this step, unless that is done; all ranks go on together."""
    if run.saved_step == run.position.step:
        return
    scaler = run.distributed.scaler_state()
    run.position = replace(run.position, stream=run.stream.state_dict(), scaler=scaler)
    run.metrics.sync()
    _save(run, "last")
    run.saved_step, run.saved_at_s = run.position.step, time.monotonic()
    run.distributed.barrier()


def save_and_stop_where_due(run: Run) -> None:
    """Save if it is time; if a rank was asked to stop, save and raise ``Interrupted``.

    All ranks decide alike, at the same step: whoever heard a signal speaks for all, and of the
    clocks rank 0's counts.
    """
    training = run.config.training
    waited_s = time.monotonic() - run.saved_at_s
    overdue = run.distributed.world.rank == 0 and 0 < 60 * training.checkpoint_minutes <= waited_s
    overdue, asked = run.distributed.any_rank(overdue, run.stop.requested)
    if asked or overdue or _due(run.position.step, training.checkpoint_steps):
        save_last(run)
    if not asked:
        return
    reason = run.stop.reason or "another rank"
    raise Interrupted(
        f"{run.config.run_dir}: stopped by {reason} at step {run.position.step}, state saved; "
        "run the same command to go on"
    )


def _save(run: Run, which: checkpoint.Which) -> None:
    if run.distributed.world.rank != 0:
        return
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
    )


def _speed(run: Run, before: Mapping[str, float]) -> dict[str, float]:
    """Return windows a second over all ranks; of rank 0 what it read, its wait and peak memory."""
    spent = {name: value - before[name] for name, value in run.stream.stats().items()}
    seconds = max(spent["seconds"], 1e-9)
    windows = run.distributed.all_reduce_sum(torch.tensor(spent["windows"])).item()
    figures = {
        **{name: spent[name] for name in ("bytes", "requests", "retries", "cache_hits")},
        "windows_per_s": windows / seconds,
        "wait_share": spent["waited_s"] / seconds,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if run.distributed.device.type == "cuda":
        figures["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def _steps(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group micro-batches into optimiser steps."""
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if batch.last_micro:
            yield step
            step = []
