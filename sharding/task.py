"""One sharding task from start to end: its shards, its record, and the seal of a complete set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from configs.errors import Interrupted, MachineError
from configs.runtime.attempt import TaskAttempt, task_dir
from configs.runtime.signals import StopRequest
from configs.schema import Config
from sharding.build import build_shards, choose_shards, plan_for_build, shard_costs, tracked
from sharding.dump.scan import dump_of
from sharding.format.manifest import Manifest
from sharding.format.plan import Plan
from sharding.seal import missing_frames, seal_frames
from sharding.storage.base import Storage
from sharding.storage.open import open_storage


@dataclass(frozen=True)
class Outcome:
    """What a task did."""

    n_shards: int
    """Of the set."""

    missing: tuple[int, ...]
    """Shards of the set that are not done."""

    manifest: Manifest | None
    """The sealed set, if it is complete."""


@dataclass
class _Record:
    """The attempt of a task, and the bytes of its finished shards."""

    attempt: TaskAttempt
    n_bytes: int | None = None

    def count(self, plan: Plan, numbers: Sequence[int], missing: Sequence[int]) -> None:
        costs = shard_costs(plan)
        self.n_bytes = sum(costs[number] for number in set(numbers) - set(missing))


def run_task(
    config: Config,
    *,
    task: tuple[int, int] = (0, 1),
    only: Sequence[str] = (),
    replace: bool = False,
    stop: StopRequest | None = None,
) -> Outcome:
    """Build the shards of a task; seal if that makes the set complete.

    Args:
        config: Of the run.
        task: ``(i, n)``: the i-th of n tasks, from 0.
        only: Names or numbers of its only shards; none means all of the task.
        replace: Build shards again that were made from other input.
        stop: Requested by signals.

    Raises:
        Interrupted: a stop was requested; finished shards are kept.
        MovieNetError: something expected is wrong.
    """
    stop = stop or StopRequest()
    with _on_record(config, task, only) as record:
        storage = open_storage(config.frames_dir, config.storage)
        plan = plan_for_build(storage, config)
        numbers = choose_shards(plan, task=task, only=only)
        try:
            _build(config, storage, plan, numbers, task, replace=replace, stop=stop)
        except MachineError:
            # A worker that the signal has reached while it started is no failure.
            if stop.requested:
                raise Interrupted(f"{stop.reason}: rerun the command") from None
            raise
        finally:
            missing = missing_frames(storage, plan, replace=True)
            record.count(plan, numbers, missing)
        manifest = None
        if not missing:
            bad = config.sharding.max_bad_fraction
            manifest = seal_frames(storage, max_bad_fraction=bad)
        return Outcome(len(plan.shards), tuple(missing), manifest)


def _build(
    config: Config,
    storage: Storage,
    plan: Plan,
    numbers: Sequence[int],
    task: tuple[int, int],
    *,
    replace: bool,
    stop: StopRequest,
) -> None:
    with tracked(config, task) as on_figures:
        build_shards(
            storage,
            dump_of(config),
            plan,
            numbers,
            max_bad_fraction=config.sharding.max_bad_fraction,
            replace=replace,
            workers=config.sharding.workers,
            config=config.storage,
            on_figures=on_figures,
            stop=stop,
        )


@contextmanager
def _on_record(config: Config, task: tuple[int, int], only: Sequence[str]) -> Iterator[_Record]:
    folder = task_dir(config, "shard", task, only)
    record = _Record(TaskAttempt.begin(folder, task=f"{task[0]}/{task[1]}"))
    try:
        yield record
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        message = str(error) or repr(error)
        record.attempt.report("interrupted" if interrupted else "failed", record.n_bytes, message)
        raise
    record.attempt.report("done", record.n_bytes)
