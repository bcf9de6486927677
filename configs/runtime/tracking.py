"""Tracking of a run with wandb and TensorBoard. No other module imports either.

``metrics.jsonl`` is the record of a run, wandb only displays it. A failure of the library, the
network, the server or the disk logs one warning and never stops the run. Every call that may hang
therefore runs in one background thread, in order, and nothing waits for it longer than
``tracking.timeout``.

Files are written to ``RUN/wandb`` and ``RUN/tensorboard``. Only metrics, tables, alerts, pictures
without names of movies and the configuration without secrets and folders leave the machine, and
with ``tracking.upload: report`` the complete report.
"""

from __future__ import annotations

import atexit
import logging
import netrc
import os
import queue
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from configs.errors import MachineError
from configs.one_line import one_line
from configs.redaction import redact
from configs.runtime.wandb_files import (
    ended_twice,
    is_synced,
    last_run_id,
    mark_synced,
    next_step,
)

if TYPE_CHECKING:
    from configs.schema import Config, TrackingConfig

logger = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 10.0
_QUIET_S = 2.0
"""Longest wait without a line in the log."""
_MEDIA_FACTOR = 4
"""A table is sent again when its step has grown by this factor, and at the end."""
_CONTINUES = "the run continues without it, metrics.jsonl is complete"
_PROJECT = "movienet-stream"
_MODES = {"disabled": "off", "dryrun": "offline", "offline": "offline"}
"""wandb's modes by ours; all others are online."""
_OTHER_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
_staging: dict[str, str] = {}
"""Variables that this process has set, not the user."""


class Tracker:
    """Tracker without output, and the interface of all trackers.

    It is used on all ranks but 0 and with ``tracking.wandb: off``. No method ever raises.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id
        """Id under which the run is resumed, preserved even if this attempt tracks nothing."""
        self.offline_dir: Path | None = None
        """Folder of an offline run, for ``wandb sync``; None when online."""
        self.url: str | None = None
        """Web page of an online run; None when offline."""
        self.next_step: int | None = None
        """First step that earlier attempts have not stored: from there on log them again. None if
        nothing is missing."""

    @property
    def is_started(self) -> bool:
        """Whether the attributes above are final."""
        return True

    def wait_for_start(self) -> None:
        """Wait until the attributes above are final, at most ``tracking.timeout`` since the start.

        The other methods can be called before.
        """

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Show ``values`` at ``step``. Steps that an earlier attempt has stored are skipped."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Show a table. Each of the ``rows`` has one number or text per column.

        Of many tables or curves of one name, wandb shows a few: the first of the attempt, then one
        whenever ``step`` has grown fourfold, and the last.
        """

    def curves(self, name: str, points: Sequence[tuple[str, float, float]], *, step: int) -> None:
        """Plot precision over recall. ``points`` are (curve, recall, precision)."""

    def image(self, name: str, file: Path, *, step: int) -> None:
        """Show a PNG file. TensorBoard shows none."""

    def alert(self, title: str, text: str) -> None:
        """Send an alert by mail or Slack, as configured in wandb's settings."""

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """Upload files as a new version of an artifact of the run."""

    def flush(self) -> None:
        """Ensure that everything logged so far survives a kill of this process."""

    def finish(self) -> None:
        """Send the rest and end, within ``tracking.timeout``. Safe to call twice."""


def start_tracking(
    config: Config,
    *,
    run_dir: Path,
    job_type: str,
    name: str,
    run_id: str | None,
    rank: int,
    from_step: int = 0,
    wait: bool = True,
) -> Tracker:
    """Start or resume a tracked run. It never raises and waits at most ``tracking.timeout``.

    A process may have one open tracker at a time.

    Args:
        config: Uploaded with the run, URLs without credentials and folders without their path.
        run_dir: Folder of the run. Files are written to its folders ``wandb`` and ``tensorboard``.
        job_type: Stage, e.g. ``training``.
        name: Name on the dashboard.
        run_id: ``Tracker.run_id`` of the previous attempt; None starts a new run.
        rank: Rank of this process. Only rank 0 tracks.
        from_step: Step of the checkpoint from which the run resumes. TensorBoard drops the points
            that a killed attempt logged after it, and skips those up to it.
        wait: Wait for the start. Otherwise it takes place in the background, and the attributes of
            the tracker are final after its ``wait_for_start``.
    """
    if rank != 0:
        return Tracker(run_id)
    tracker = _start_wandb(config, run_dir=run_dir, job_type=job_type, name=name, run_id=run_id)
    if config.tracking.tensorboard:
        tracker = _Both(tracker, _TensorBoard(run_dir / "tensorboard", from_step))
    if wait:
        tracker.wait_for_start()
    return tracker


def _start_wandb(
    config: Config, *, run_dir: Path, job_type: str, name: str, run_id: str | None
) -> Tracker:
    if _is_off(config.tracking):
        return Tracker(run_id)
    init = {
        "group": config.training.run_name,
        "job_type": job_type,
        "name": name,
        "id": run_id or secrets.token_hex(4),
        "config": redact(config.model_dump(mode="json", by_alias=True)),
        "save_code": False,
    }
    return _WandbTracker(init, run_dir, config.tracking, is_new=run_id is None)


def wandb_server(tracking: TrackingConfig) -> str | None:
    """Return the URL of the server that runs with an API key use.

    None without one: the user stays offline, or wandb cannot be used.
    """
    if _is_off(tracking):
        return None
    with suppress(Exception):
        import wandb

        _clean_environment()
        settings = wandb.setup(_settings(wandb)).settings
        _end_service()
        if _chosen_mode(tracking, settings) in ("auto", "online"):
            return str(settings.base_url)
    return None


def upload_report(
    config: Config, folder: Path, *, pictures: Mapping[str, Path], files: Sequence[Path], step: int
) -> None:
    """Show the pictures of the report in ``folder``, in a separate wandb run.

    It belongs to the group of the training run. A later report of the folder resumes it.

    Args:
        config: Configuration of the report.
        folder: Its folder.
        pictures: PNG files by name.
        files: Files to upload as an artifact; if there are none, no artifact.
        step: Step of the scored checkpoint.
    """
    run = config.training.run_name
    tracker = start_tracking(
        config,
        run_dir=folder,
        job_type="report",
        name=f"{run}-report",
        run_id=last_run_id(folder),
        rank=0,
    )
    for name, file in pictures.items():
        tracker.image(name, file, step=step)
    if files:
        tracker.artifact(f"{run}-report", "report", files)
    tracker.finish()


def sync_command(segment: Path) -> list[str]:
    """Return wandb's command that uploads one segment, also of an online run."""
    return [sys.executable, "-m", "wandb", "sync", "--include-online", str(segment)]


def sync_segment(segment: Path, *, is_newest: bool) -> None:
    """Upload one segment. wandb shows its progress on stderr and asks no questions.

    A killed attempt leaves an incomplete record at the end of its file. wandb uploads the others
    and does not mark the file, since the run may still write to it. If a later attempt exists, the
    file is marked here: the next upload would send its steps twice.

    Raises:
        MachineError: wandb could not upload the segment.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _OTHER_RUN}
    # An earlier segment may have created the run: append to it.
    environment = inherited | {"WANDB_RESUME": "allow"}
    errors: list[str] = []
    with subprocess.Popen(
        sync_command(segment),
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            errors += [line] if "ERROR" in line else []
    is_torn = bool(errors) and all("incomplete record" in line for line in errors)
    is_cut = [line.split()[-2:] for line in errors] == [["No", "response."]] and ended_twice(
        segment
    )
    if process.returncode or not (is_synced(segment) or is_torn or is_cut):
        raise MachineError(
            f"{segment}: not uploaded, wandb exited with code {process.returncode} for the reason "
            "above; rerun the command, uploaded segments are skipped"
        )
    if is_cut or (is_torn and not is_newest):
        mark_synced(segment)


class _Media(NamedTuple):
    """Tables or charts of one name."""

    sent_step: int
    waiting: Callable[[], None] | None = None
    """Sends the newest one, which is not due yet."""


class _WandbTracker(Tracker):
    """One wandb run. Only its worker thread calls wandb."""

    def __init__(
        self, init: dict[str, Any], run_dir: Path, tracking: TrackingConfig, *, is_new: bool
    ) -> None:
        super().__init__(init["id"])
        self._is_new = is_new
        self._folder = run_dir / "wandb"
        self._files = Path(os.environ.get("WANDB_DIR") or run_dir).absolute() / "wandb"
        self._tracking = tracking
        self._timeout_s = tracking.timeout
        self._deadline = time.monotonic() + tracking.timeout
        self._run: Any = None
        self._segment: Path | None = None
        self._given_up = self._late = False
        self._media: dict[str, _Media] = {}
        # Not by the worker: libraries in C may read the environment at the same time.
        # wandb reports its own errors to its vendor, which would hang without a network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        _clean_environment()
        _stage_files_in(self._files)
        self._worker = _Worker("wandb")
        self._start = self._worker.submit(lambda: self._try(lambda: self._connect(init)))
        self._is_awaited = False

    @property
    def is_started(self) -> bool:
        return self._given_up or self._start.done()

    def wait_for_start(self) -> None:
        if self._is_awaited:
            return
        self._is_awaited = True
        self._wait("start", self._start, self._deadline - time.monotonic())
        # Exit hooks run in reverse order: this one precedes wandb's, which would drop the rest.
        atexit.register(self.finish)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        def task() -> None:
            if self.next_step is None or step >= self.next_step:
                self._run.log({**values, "step": step}, step=step)

        self._submit(task)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        data = [list(row) for row in rows]

        def task() -> None:
            self._show({name: _table(columns, data, allow_mixed_types=True)}, step)

        self._add_media(name, step, task)

    def curves(self, name: str, points: Sequence[tuple[str, float, float]], *, step: int) -> None:
        def task() -> None:
            import wandb

            chart = wandb.plot_table(
                vega_spec_name="wandb/area-under-curve/v0",  # the chart of wandb's own pr_curve
                data_table=_table(["class", "recall", "precision"], list(map(list, points))),
                fields={"x": "recall", "y": "precision", "class": "class"},
                string_fields={
                    "title": name,
                    "x-axis-title": "recall",
                    "y-axis-title": "precision",
                },
            )
            self._show({name: chart}, step)

        self._add_media(name, step, task)

    def image(self, name: str, file: Path, *, step: int) -> None:
        def task() -> None:
            import wandb

            self._show({name: wandb.Image(str(file))}, step)

        self._submit_media(task)

    def alert(self, title: str, text: str) -> None:
        private = " ".join(redact(word) for word in text.split())
        self._submit(lambda: self._run.alert(title=title, text=private))

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        def task() -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            for file in files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

        self._submit(task)

    def flush(self) -> None:
        # Data handed to wandb's own process survives a kill of this one. After one timeout do not
        # wait again: each checkpoint would be delayed.
        self.wait_for_start()
        if self._given_up or self._late:
            return
        done = self._worker.submit(lambda: None)
        try:
            done.result(timeout=_FLUSH_TIMEOUT_S)
        except TimeoutError:
            self._late = True

    def finish(self) -> None:
        if self._worker.closed:
            return
        self.wait_for_start()
        atexit.unregister(self.finish)
        for media in self._media.values():
            if media.waiting is not None:
                self._submit_media(media.waiting)
        self._submit(self._end)
        self._wait("end", self._worker.submit(lambda: None), self._timeout_s)
        self._worker.close()
        if self._given_up:
            # A hanging service would block the end of the process in wandb's exit hook. Teardown
            # removes that hook at once, and runs in a thread that nothing waits for.
            _abandon_service()

    def _end(self) -> None:
        try:
            self._run.finish()
        except TimeoutError:
            self._leave_the_rest()
            return
        _end_service()
        if self._segment and not self._given_up:
            mark_synced(self._segment)

    def _show(self, media: dict[str, Any], step: int) -> None:
        """Log media, also of a step that the server has already: a report is drawn again."""
        self._run.log({**media, "step": step}, step=max(step, self._run.starting_step))

    def _add_media(self, name: str, step: int, task: Callable[[], None]) -> None:
        """Submit a table or chart if its step is due, else only if it is the last of its name.

        wandb stores each as three files, and file systems of clusters limit the number of files.
        """
        media = self._media.get(name)
        if media is None or step >= _MEDIA_FACTOR * media.sent_step:
            self._media[name] = _Media(step)
            self._submit_media(task)
        else:
            self._media[name] = _Media(media.sent_step, task)

    def _submit_media(self, task: Callable[[], None]) -> None:
        """Submit a task whose failure costs no metric. wandb waits for the server to take media."""

        def attempt() -> None:
            try:
                task()
            except Exception as error:  # noqa: BLE001  # e.g. a server that does not respond
                line = one_line(str(error))
                logger.warning("wandb: a table or picture is not stored: %s", line)

        self._submit(attempt)

    def _submit(self, task: Callable[[], None]) -> None:
        if time.monotonic() > self._deadline:
            self.wait_for_start()  # gives up, so that tasks do not accumulate
        if not self._given_up:
            self._worker.submit(lambda: self._try(task))

    def _try(self, task: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            task()
        except Exception as error:  # noqa: BLE001  # whatever fails in wandb, the run continues
            self._give_up(str(error) or type(error).__name__)

    def _wait(self, phase: str, done: Future[None], limit_s: float) -> None:
        """Wait for a task and all before it, at most ``limit_s``; then give up."""
        if self._given_up:
            return
        if limit_s > _QUIET_S:
            with suppress(TimeoutError):
                done.result(timeout=_QUIET_S)
                return
            limit_s -= _QUIET_S
            logger.info("wandb: waiting for its %s, at most %g s", phase, self._timeout_s)
        try:
            done.result(timeout=max(0.0, limit_s))
        except TimeoutError:
            if phase == "end" and self._segment:
                self._leave_the_rest()
            else:
                self._give_up(f"no {phase} within {self._timeout_s:g} s")

    def _leave_the_rest(self) -> None:
        self._give_up(
            f"the server has not confirmed the end of the run within {self._timeout_s:g} s",
            f"`movienet-train sync {shlex.quote(str(self._folder.parent))}` uploads the rest",
        )

    def _give_up(self, reason: str, outcome: str = _CONTINUES) -> None:
        if not self._given_up:
            self._given_up = True
            logger.warning("wandb: %s; %s", one_line(reason), outcome)

    def _connect(self, init: dict[str, Any]) -> None:
        import wandb
        import wandb.util

        # On a full disk each line of wandb's debug log would become a traceback on stderr.
        logging.getLogger("wandb").setLevel(logging.CRITICAL + 1)
        # To test for data frames, which we never log, wandb would import pandas in this thread.
        # Meanwhile scikit-learn fails in the main one: it uses a module that is half imported.
        wandb.util.pd_available = False
        # If these folders cannot be created, fail here: wandb would use a temporary one.
        for needed in (self._folder, self._files):
            needed.mkdir(parents=True, exist_ok=True)
        # Before anything else: wandb prints some messages before a run has settings.
        setup = wandb.setup(_settings(wandb, init_timeout=30.0, finish_timeout=self._timeout_s))
        mode = _chosen_mode(self._tracking, setup.settings)
        if mode == "off":
            self._given_up = True
            with suppress(OSError):  # attempts that were tracked are kept
                self._folder.rmdir()
            return
        init = (
            init | _labels(init, self._tracking, setup.settings) | {"dir": str(self._files.parent)}
        )
        if _online_with_key(wandb, mode) and self._go_online(wandb, init):
            return
        stored = 0 if self._is_new else next_step(self._folder.parent)
        self._adopt(_init(wandb, init, "offline", self._timeout_s, self._timeout_s))
        self.offline_dir = Path(self._run.settings.sync_dir)
        self.next_step = stored

    def _go_online(self, wandb: Any, init: dict[str, Any]) -> bool:
        # The import may have taken long. Reserve a part of the remaining time to start offline.
        left_s = max(self._deadline - time.monotonic(), 1.0)
        online_s = max(0.6 * left_s, left_s - 15)
        try:
            run = _init(wandb, init, "online", online_s, self._timeout_s)
        except Exception as error:  # noqa: BLE001  # network, server, key or library
            if self._given_up:
                return True
            line = one_line(str(error))
            logger.warning("wandb: offline, since it cannot go online: %s", line)
            # The failed run still occupies its id in wandb's service.
            _end_service(exit_code=1)
            return False
        self._adopt(run)
        self._segment = Path(run.settings.sync_file)
        # Servers other than wandb's may not report the last step that they have.
        uploaded = 0 if self._is_new else next_step(self._folder.parent, uploaded=True)
        self.next_step = max(run.starting_step, uploaded or 0)
        self.url = run.url  # only online: an offline run prints a warning
        return True

    def _adopt(self, run: Any) -> None:
        # The step is wandb's default axis as well. A metric of its own keeps it in tables.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run = run
        attempt = Path(run.settings.sync_dir)
        if attempt.parent != self._folder.absolute():
            _link_attempt(self._folder, attempt)


def _table(columns: Sequence[str], rows: list[list[Any]], **options: Any) -> Any:
    """Return a table that `wandb leet` does not chart: it plots every number of a step.

    With a table, wandb logs its numbers of rows and columns. They are also in its file.
    """
    import wandb

    table = wandb.Table(columns=list(columns), data=rows, **options)
    to_json = table.to_json

    def without_counts(owner: Any) -> dict[str, Any]:
        content = to_json(owner)
        if isinstance(owner, wandb.Run):
            return {k: v for k, v in content.items() if k not in ("ncols", "nrows")}
        return dict(content)

    table.to_json = without_counts
    return table


class _TensorBoard(Tracker):
    """Event files of TensorBoard. A failure logs one warning and never stops the run."""

    def __init__(self, folder: Path, from_step: int) -> None:
        super().__init__()
        self._writer: Any = None
        self._from_step = from_step
        try:
            from tensorboardX import SummaryWriter  # torch's writer would import torch in sharding

            # File names contain the second of their start only, and two attempts may share it.
            suffix = f".{os.getpid()}"
            self._writer = SummaryWriter(
                str(folder), purge_step=from_step + 1, filename_suffix=suffix
            )
        except Exception as error:  # noqa: BLE001  # not installed, or the folder is not writable
            self._give_up(error)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        if step > self._from_step:
            self._try(lambda w: [w.add_scalar(name, value, step) for name, value in values.items()])

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
        self._try(lambda w: w.add_text(name, text, step))

    def flush(self) -> None:
        self._try(lambda w: w.flush())

    def finish(self) -> None:
        self._try(lambda w: w.close())
        self._writer = None

    def _try(self, task: Callable[[Any], object]) -> None:
        if self._writer is None:
            return
        try:
            task(self._writer)
        except Exception as error:  # noqa: BLE001  # for example a full disk
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        missing = isinstance(error, ModuleNotFoundError)
        reason = "not installed, install the extra [tensorboard]" if missing else str(error)
        logger.warning(
            "tensorboard: %s; the run continues without it, metrics.jsonl is complete",
            one_line(reason),
        )


class _Both(Tracker):
    """wandb and TensorBoard at the same time."""

    def __init__(self, wandb: Tracker, board: Tracker) -> None:
        super().__init__(wandb.run_id)
        self._wandb, self._all = wandb, (wandb, board)

    @property
    def is_started(self) -> bool:
        return self._wandb.is_started

    def wait_for_start(self) -> None:
        self._wandb.wait_for_start()
        self.offline_dir, self.url = self._wandb.offline_dir, self._wandb.url
        self.next_step = self._wandb.next_step

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for tracker in self._all:
            tracker.log(values, step=step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        for tracker in self._all:
            tracker.table(name, columns, rows, step=step)

    def curves(self, name: str, points: Sequence[tuple[str, float, float]], *, step: int) -> None:
        for tracker in self._all:
            tracker.curves(name, points, step=step)

    def image(self, name: str, file: Path, *, step: int) -> None:
        for tracker in self._all:
            tracker.image(name, file, step=step)

    def alert(self, title: str, text: str) -> None:
        for tracker in self._all:
            tracker.alert(title, text)

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        for tracker in self._all:
            tracker.artifact(name, kind, files)

    def flush(self) -> None:
        for tracker in self._all:
            tracker.flush()

    def finish(self) -> None:
        for tracker in self._all:
            tracker.finish()


class _Worker:
    """Daemon thread that runs tasks in order. It does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None]
        self._tasks = queue.SimpleQueue()
        self.closed = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._tasks.put((task, done))
        return done

    def close(self) -> None:
        self.closed = True
        self._tasks.put(None)

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, done = item
            task()
            done.set_result(None)


def _is_off(tracking: TrackingConfig) -> bool:
    """Return whether nothing is tracked, without importing wandb where possible."""
    if tracking.wandb != "auto":
        return tracking.wandb == "off"
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "true", "yes")
    return disabled or os.environ.get("WANDB_MODE") == "disabled"


def _chosen_mode(tracking: TrackingConfig, user: Any) -> str:
    """Return ``auto``, ``online``, ``offline`` or ``off``.

    Args:
        tracking: Its ``wandb`` wins unless it is ``auto``.
        user: wandb's settings from environment variables and the files that `wandb offline` and
            `wandb disabled` write.
    """
    if tracking.wandb != "auto" or "mode" not in user.model_fields_set:
        return tracking.wandb
    return _MODES.get(user.mode, "online")


def _labels(init: Mapping[str, Any], tracking: TrackingConfig, user: Any) -> dict[str, Any]:
    """Return where a run appears: the configuration wins over wandb's settings, they over defaults.

    Only training has the name ``WANDB_NAME``: all stages and tasks of a job inherit it, and tasks
    of one name could not be told apart. Names of other stages and tasks begin with it.
    """
    name = init["name"]
    if user.run_name:
        name = user.run_name if init["job_type"] == "training" else f"{user.run_name}-{name}"
    return {
        "name": name,
        "project": tracking.project or user.project or _PROJECT,
        "entity": tracking.entity or user.entity,
        "group": tracking.group or user.run_group or init["group"],
        "tags": list((user.run_tags or ()) if tracking.tags is None else tracking.tags),
    }


def _clean_environment() -> None:
    """Remove variables that name another run, and empty ones, which wandb refuses.

    The id of a run is in its folder, and a shell or a job may have inherited that of another run.
    """
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        if name in _OTHER_RUN or not os.environ[name]:
            del os.environ[name]


def _link_attempt(folder: Path, attempt: Path) -> None:
    """Link an attempt that is stored in ``WANDB_DIR``, which has those of all runs, in its run."""
    latest = folder / "latest-run"  # read by `wandb leet`
    with suppress(OSError):  # a file system without links
        (folder / attempt.name).symlink_to(attempt, target_is_directory=True)
        latest.unlink(missing_ok=True)
        latest.symlink_to(attempt.name, target_is_directory=True)


def _stage_files_in(folder: Path) -> None:
    """Let wandb store tables and artifacts in a folder until their upload, not in the home folder.

    Folders that the user has set are kept.
    """
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if os.environ.get(name, "") == _staging.get(name, ""):
            _staging[name] = os.environ[name] = str(folder)


def _online_with_key(wandb: Any, mode: str) -> bool:
    """Return whether to go online. Without a key a run is offline: it never prompts."""
    if mode == "offline":
        return False
    if _has_key(wandb):
        return True
    if mode == "online":
        logger.warning("wandb: offline, since there is no API key; run `wandb login`")
    return False


def _has_key(wandb: Any) -> bool:
    """Return whether an API key is in the environment, wandb's settings or ``.netrc``."""
    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == wandb.Settings.model_fields["base_url"].default:
        # Older logins are stored under a former name of the public server.
        hosts.append("api.wandb.ai")
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        logins = netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in logins for host in hosts)


def _init(
    wandb: Any, init: dict[str, Any], mode: str, init_timeout_s: float, finish_timeout_s: float
) -> Any:
    settings = _settings(wandb, init_timeout=init_timeout_s, finish_timeout=finish_timeout_s)
    # An offline run cannot check whether its id exists; `wandb sync` appends by the id.
    resume = "allow" if mode == "online" else None
    return wandb.init(**init, mode=mode, resume=resume, settings=settings)


def _settings(wandb: Any, **timeouts: float) -> Any:
    options: dict[str, Any] = {
        # The console belongs to the product: no capture, no banner.
        "console": "off",
        "silent": True,
        # Privacy: a dashboard needs metrics, neither code nor the machine's description.
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "host": "",
        "program": "",
        "use_dot_wandb": False,
        "reinit": "create_new",
        "finish_timeout_raises": True,
        **timeouts,
    }
    # Versions of wandb differ in their settings.
    supported = wandb.Settings.model_fields
    return wandb.Settings(**{name: options[name] for name in options if name in supported})


def _end_service(exit_code: int = 0) -> None:
    """End wandb's own process. A later tracker starts a new one."""
    import wandb

    wandb.teardown(exit_code)


def _abandon_service() -> None:
    def end() -> None:
        with suppress(Exception):
            _end_service(exit_code=1)

    ending = threading.Thread(target=end, name="wandb-end", daemon=True)
    ending.start()
    ending.join(timeout=1.0)
