"""What a run shows to wandb and TensorBoard; the only user of both.

``metrics.jsonl`` is the record of a run, wandb its window: whatever is wrong with the library, the
network, the server or the disk costs one warning and never the run. So everything that may hang
happens in one thread of its own, in order, and is waited for no longer than ``tracking.timeout``.

Files lie in ``RUN/wandb`` and ``RUN/tensorboard``. Nothing leaves the machine but metrics, tables,
alerts and the configuration, whose secrets and folders are cut out; and the report, where
``tracking.upload`` says so.
"""

from __future__ import annotations

import atexit
import logging
import netrc
import os
import queue
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from configs.errors import MachineError

if TYPE_CHECKING:
    from configs.schema import Config

logger = logging.getLogger(__name__)

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>\S*)")
_FOLDER = re.compile(r"(?:~|\.{1,2})?/.*")
_FLUSH_TIMEOUT_S = 10.0
_RUN_FOLDER = re.compile(r"(?:offline-)?run-(?P<started>\d{8}_\d{6})-(?P<id>.+)")


class Tracker:
    """A tracker that keeps nothing: on all ranks but 0, when it is off, or when wandb fails."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id
        """Id under which the run is resumed; kept even where this attempt tracks nothing."""
        self.offline_dir: Path | None = None
        """Folder of an offline run, for ``wandb sync``; None when online."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Show ``values`` at ``step`` of the run's own axis, which goes on over restarts."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Show a table; ``rows`` hold one plain value a column."""

    def curves(self, name: str, points: Sequence[tuple[str, float, float]], *, step: int) -> None:
        """Plot precision over recall; ``points`` are (curve, recall, precision)."""

    def alert(self, title: str, text: str) -> None:
        """Tell those who follow the run, as wandb's settings say: by mail or Slack."""

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """Keep files with the run, under a name that counts versions."""

    def flush(self) -> None:
        """Let what was shown so far survive a kill of this process."""

    def finish(self) -> None:
        """Send what is left and end; waits ``tracking.timeout`` at most. Safe to call twice."""


def start_tracking(
    config: Config,
    *,
    run_dir: Path,
    job_type: str,
    name: str,
    run_id: str | None,
    rank: int,
    from_step: int = 0,
) -> Tracker:
    """Begin or resume a run; never raises, waits ``tracking.timeout`` at most.

    One tracker at a time lives in a process.

    Args:
        config: Uploaded with the run; URLs lose their credentials, folders their path.
        run_dir: Files lie in its folder ``wandb``.
        job_type: The stage, e.g. ``training``.
        name: Name on the dashboard.
        run_id: ``Tracker.run_id`` of the attempt before; None starts a new run.
        rank: Only 0 tracks.
        from_step: Step of the checkpoint that the run goes on from; TensorBoard, which can, drops
            what a lost attempt showed beyond it.
    """
    if rank != 0:
        return Tracker(run_id)
    wandb = _start_wandb(config, run_dir=run_dir, job_type=job_type, name=name, run_id=run_id)
    if not config.tracking.tensorboard:
        return wandb
    return _Both(wandb, _TensorBoard(run_dir / "tensorboard", from_step))


def _start_wandb(
    config: Config, *, run_dir: Path, job_type: str, name: str, run_id: str | None
) -> Tracker:
    mode = config.tracking.wandb
    if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
        mode = "off"
    if mode == "off":
        return Tracker(run_id)
    init = {
        "project": config.tracking.project,
        "entity": config.tracking.entity,
        "group": config.tracking.group or config.training.run_name,
        "tags": list(config.tracking.tags),
        "job_type": job_type,
        "name": name,
        "id": run_id or secrets.token_hex(4),
        "dir": str(run_dir),
        "config": redact(config.model_dump(mode="json", by_alias=True)),
        "save_code": False,
    }
    return _WandbTracker(init, mode, config.tracking.timeout)


def upload_report(config: Config, files: Sequence[Path]) -> None:
    """Keep the files of a report as an artifact, in a run of its own in the run's group."""
    run = config.training.run_name
    tracker = start_tracking(
        config,
        run_dir=config.run_dir / "report",
        job_type="report",
        name=f"{run}-report",
        run_id=last_run_id(config.run_dir / "report"),
        rank=0,
    )
    tracker.artifact(f"{run}-report", "report", files)
    tracker.finish()


def offline_segments(run_dir: Path) -> tuple[Path, ...]:
    """Return the ``.wandb`` files of a run kept offline, oldest first; one an attempt."""
    return tuple(sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")))


def last_run_id(run_dir: Path) -> str | None:
    """Return the id under which the newest attempt was tracked, online or not; None before it."""
    found = [
        (named["started"], named["id"])
        for path in (run_dir / "wandb").glob("*run-*")
        if (named := _RUN_FOLDER.fullmatch(path.name))
    ]
    return max(found)[1] if found else None


def sync_command(part: Path) -> list[str]:
    """Return wandb's own command that uploads one offline part."""
    return [sys.executable, "-m", "wandb", "sync", str(part)]


def is_synced(part: Path) -> bool:
    """Whether wandb has marked a part as uploaded."""
    return part.with_name(f"{part.name}.synced").exists()


def sync_segment(part: Path) -> None:
    """Upload one offline part; wandb shows its progress and asks nothing.

    Raises:
        MachineError: it was refused, or cut off.
    """
    # The run may be there from an earlier part: go on with it.
    environment = os.environ | {"WANDB_RESUME": "allow"}
    done = subprocess.run(
        sync_command(part), env=environment, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise MachineError(
            f"{part}: wandb did not upload it (exit code {done.returncode}), its own line tells "
            "why; run the same command again, what is uploaded is skipped"
        )


def redact(value: Any) -> Any:
    """Return plain data without what only this machine should know.

    URLs lose user, password and query (signed links), folders all but their last name:
    ``s3://key:secret@bucket/films?sig=1`` becomes ``s3://bucket/films``, ``/home/ada/films``
    becomes ``…/films``.
    """
    if isinstance(value, Mapping):
        return {str(redact(key)): redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    if _URL.search(value):
        return _URL.sub(_bare_url, value)
    return f"…/{Path(value).name}" if _FOLDER.fullmatch(value) else value


def _bare_url(found: re.Match[str]) -> str:
    scheme, rest = found["scheme"], found["rest"]
    body = re.split(r"[?#]", rest)[0]
    if "@" in body:
        # From the last one: keys of S3 contain slashes.
        body = body.rpartition("@")[2]
    elif "@" in rest:
        body = "…"
    if scheme.lower() == "file":
        body = f"…/{Path(body).name}"
    return f"{scheme}://{body}"


class _WandbTracker(Tracker):
    """One wandb run; every call to wandb is made by its thread."""

    def __init__(self, init: dict[str, Any], mode: str, timeout_s: float) -> None:
        super().__init__(init["id"])
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._run: Any = None
        self._given_up = self._late = False
        self._worker = _Worker("wandb")
        self._worker.submit(lambda: self._begin(init, mode))
        self._wait("start")
        # Before wandb's own exit hook, which would cut off what is under way.
        atexit.register(self.finish)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        entry = {**values, "step": step}
        self._submit(lambda: self._run.log(entry))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        data = [list(row) for row in rows]

        def task() -> None:
            import wandb

            table = wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
            self._run.log({name: table, "step": step})

        self._submit(task)

    def curves(self, name: str, points: Sequence[tuple[str, float, float]], *, step: int) -> None:
        def task() -> None:
            import wandb

            columns = ["class", "recall", "precision"]
            table = wandb.Table(columns=columns, data=[list(point) for point in points])
            chart = wandb.plot_table(
                vega_spec_name="wandb/area-under-curve/v0",  # what wandb's own pr_curve draws with
                data_table=table,
                fields={"x": "recall", "y": "precision", "class": "class"},
                string_fields={
                    "title": name,
                    "x-axis-title": "recall",
                    "y-axis-title": "precision",
                },
            )
            self._run.log({name: chart, "step": step})

        self._submit(task)

    def alert(self, title: str, text: str) -> None:
        private = " ".join(redact(word) for word in text.split())
        self._submit(lambda: self._run.alert(title=title, text=private))

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        def task() -> None:
            import wandb

            made = wandb.Artifact(name, type=kind)
            for file in files:
                made.add_file(str(file))
            self._run.log_artifact(made)

        self._submit(task)

    def flush(self) -> None:
        # Handed to wandb's own process it outlives this one. Who is slow once is not waited for.
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
        atexit.unregister(self.finish)
        self._submit(lambda: self._run.finish())
        self._submit(_end_service)
        self._wait("end")
        self._worker.close()
        if self._given_up:
            # What hangs would hang the end of the process too, in wandb's exit hook. Ending the
            # service takes that hook away at once; how long the rest lasts is then nobody's wait.
            _abandon_service()

    def _submit(self, task: Callable[[], None]) -> None:
        if not self._given_up:
            self._worker.submit(lambda: self._try(task))

    def _try(self, task: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            task()
        except Exception as error:  # noqa: BLE001  # wandb may fail in any way, the run goes on
            self._give_up(str(error) or type(error).__name__)

    def _wait(self, what: str) -> None:
        """Wait for all that was submitted."""
        if self._given_up:
            return
        done = self._worker.submit(lambda: None)
        try:
            done.result(timeout=self._timeout_s)
        except TimeoutError:
            self._give_up(f"no {what} within {self._timeout_s:g} s")

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            line = " ".join(reason.split())
            logger.warning("wandb: %s; the run goes on without it, metrics.jsonl has all", line)

    def _begin(self, init: dict[str, Any], mode: str) -> None:
        self._try(lambda: self._connect(init, mode))

    def _connect(self, init: dict[str, Any], mode: str) -> None:
        # Its reports of its own errors go to its makers, and would hang with the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # On a full disk each line of its debug log would become a traceback on our stderr.
        logging.getLogger("wandb").setLevel(logging.CRITICAL + 1)
        # Where this folder cannot be made, wandb would take one of the system's.
        (Path(init["dir"]) / "wandb").mkdir(parents=True, exist_ok=True)
        # Tables wait here for their upload; the default is the home folder.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ[name] = str(Path(init["dir"]).absolute() / "wandb")
        # Before anything else: some of its news come before a run has settings.
        wandb.setup(_settings(wandb, init_timeout=30.0, finish_timeout=self._timeout_s))
        if _choose_mode(wandb, mode) == "online" and self._go_online(wandb, init):
            return
        self._adopt(_init(wandb, init, "offline", self._timeout_s, self._timeout_s))
        self.offline_dir = Path(self._run.settings.sync_dir)

    def _go_online(self, wandb: Any, init: dict[str, Any]) -> bool:
        # The import may have taken long. The rest of the time is for beginning again offline.
        left_s = max(self._deadline - time.monotonic(), 1.0)
        patience_s = max(0.6 * left_s, left_s - 15)
        try:
            run = _init(wandb, init, "online", patience_s, self._timeout_s)
        except Exception as error:  # noqa: BLE001  # network, server, key or library
            if self._given_up:
                return True
            line = " ".join(str(error).split())
            logger.warning("wandb: offline, since it cannot go online: %s", line)
            # The failed run still holds its id.
            _end_service(exit_code=1)
            return False
        self._adopt(run)
        return True

    def _adopt(self, run: Any) -> None:
        # An own axis: wandb's starts at 0 again when an offline run is resumed.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run = run


class _TensorBoard(Tracker):
    """Event files; what is wrong with them costs one warning and never the run."""

    def __init__(self, folder: Path, from_step: int) -> None:
        super().__init__()
        self._writer: Any = None
        try:
            from tensorboardX import SummaryWriter  # torch's own would bring torch into sharding

            # Two attempts may begin in one second, which is all that its names tell.
            own = f".{os.getpid()}"
            self._writer = SummaryWriter(str(folder), purge_step=from_step + 1, filename_suffix=own)
        except Exception as error:  # noqa: BLE001  # not installed, or the folder is refused
            self._give_up(error)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
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
        except Exception as error:  # noqa: BLE001  # the disk is full, say
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        missing = isinstance(error, ModuleNotFoundError)
        line = "not installed, the extra [tensorboard] brings it" if missing else str(error)
        told = "tensorboard: %s; the run goes on without it, metrics.jsonl has all"
        logger.warning(told, " ".join(line.split()))


class _Both(Tracker):
    """wandb and TensorBoard beside each other."""

    def __init__(self, wandb: Tracker, board: Tracker) -> None:
        super().__init__(wandb.run_id)
        self.offline_dir = wandb.offline_dir
        self._all = (wandb, board)

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
    """One daemon thread that does tasks in order; the process can end in spite of it."""

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


def _choose_mode(wandb: Any, wanted: str) -> str:
    """Return ``online`` or ``offline``; a run never stops to ask for a key."""
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE") or "auto"
    if wanted == "offline":
        return "offline"
    if _has_key(wandb):
        return "online"
    if wanted == "online":
        logger.warning("wandb: offline, since there is no API key; get one by `wandb login`")
    return "offline"


def _has_key(wandb: Any) -> bool:
    """Whether an API key is in the environment, wandb's settings or ``.netrc``."""
    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == wandb.Settings.model_fields["base_url"].default:
        # The public server has had another name, under which older logins stand.
        hosts.append("api.wandb.ai")
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in known for host in hosts)


def _init(
    wandb: Any, init: dict[str, Any], mode: str, init_timeout_s: float, finish_timeout_s: float
) -> Any:
    settings = _settings(wandb, init_timeout=init_timeout_s, finish_timeout=finish_timeout_s)
    # An offline run cannot ask whether its id exists; `wandb sync` appends by the id.
    resume = "allow" if mode == "online" else None
    return wandb.init(**init, mode=mode, resume=resume, settings=settings)


def _settings(wandb: Any, **timeouts: float) -> Any:
    wanted: dict[str, Any] = {
        # The console is ours: no capture, no banner.
        "console": "off",
        "silent": True,
        # Neither code nor machine: a dashboard needs the metrics.
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
        **timeouts,
    }
    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def _end_service(exit_code: int = 0) -> None:
    """End wandb's own process; a later tracker starts another."""
    import wandb

    wandb.teardown(exit_code)


def _abandon_service() -> None:
    def end() -> None:
        with suppress(Exception):
            _end_service(exit_code=1)

    ending = threading.Thread(target=end, name="wandb-end", daemon=True)
    ending.start()
    ending.join(timeout=1.0)
