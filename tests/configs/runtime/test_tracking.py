"""Real wandb: its process, its files, its command line, and a real server that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from PIL import Image

from configs.load import load_config
from configs.runtime import tracking
from configs.runtime.tracking import start_tracking
from configs.runtime.wandb_files import last_run_id, offline_segments
from tests.disks import small_disk

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("track_a_run.py")
WANDB = Path(sys.executable).with_name("wandb")
KEY = "0" * 40
LINE_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
"""Time at the start of a log line."""
PROMPT_S = 240
"""Limit for runs that must not hang: a hang lasts forever, a busy machine does not."""


@dataclass(frozen=True)
class Tracked:
    """Output of ``track_a_run.py``."""

    figures: dict[str, Any]
    warnings: list[str]
    """Lines on stderr without their time, except those about waiting."""
    waits: list[str]
    """Lines on stderr about waiting for wandb, which depend on the speed of the machine."""
    wall_s: float
    wandb: Path

    @property
    def offline(self) -> Path:
        """The ``.wandb`` file of the offline run."""
        return next(Path(self.figures["offline"]).glob("*.wandb"))


def track(home: Path, *options: str, run: str = "run", **more: str) -> Tracked:
    """Track a run in ``home`` as home and working folder, without a key or settings of the user."""
    environment = clean_environment(home) | more
    command = [sys.executable, str(SCRIPT), str(home / run), *options]
    begun = time.monotonic()
    # Files, not pipes: wandb's own process inherits them, and may be stopped and never end.
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        done = subprocess.run(
            command, cwd=home, env=environment, stdout=out, stderr=err, check=False, timeout=300
        )
        wall_s = time.monotonic() - begun
        out.seek(0)
        err.seek(0)
        printed, log = out.read(), err.read()
    assert done.returncode == 0, log
    figures = json.loads(printed)
    for pid in figures["signalled"]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    lines = [LINE_TIME.sub("", line) for line in log.splitlines()]
    waits = [line for line in lines if line.startswith("wandb: waiting for its ")]
    warnings = [line for line in lines if line not in waits]
    return Tracked(figures, warnings, waits, wall_s, home / run / "wandb")


def clean_environment(home: Path) -> dict[str, str]:
    """Environment without the user's wandb settings and logins."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    return inherited | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


def inspect(run: Path, *options: str) -> str:
    """Content of a run's file, as printed by wandb's command line."""
    command = [str(WANDB), "leet", "inspect", *options, str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(inspect(run, "--summary", "--json"))
    return content


def run_record(segment: Path) -> dict[str, Any]:
    """The record of the run itself: where it appears and under which name."""
    records = map(json.loads, inspect(segment, "--json").splitlines())
    record: dict[str, Any] = next(r["run"] for r in records if r["type"] == "run")
    return record


@pytest.fixture
def silent_server() -> Iterator[str]:
    """URL of a server that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()


class CountingServer:
    """A server that refuses each request with 401 and counts them."""

    requests = 0
    url = ""


@pytest.fixture
def counting_server() -> Iterator[CountingServer]:
    counted = CountingServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            counted.requests += 1
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        counted.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield counted
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    home = tmp_path_factory.mktemp("offline")
    secret = "data.feature_arrays=s3://AKIA:pass/word@bucket/films?X-Amz-Signature=cafe"
    return track(home, secret, f"data.root={home}/private/films", "tracking.tags=[first]")


def test_without_a_key_the_run_is_stored_offline_in_its_own_folder(offline: Tracked) -> None:
    assert offline.warnings == []
    assert offline.offline.is_relative_to(offline.wandb)
    home = offline.wandb.parent.parent
    # wandb writes nothing else to the user's home folder.
    assert [path.name for path in home.iterdir()] == ["run"]


def test_wandbs_own_command_line_shows_the_metrics(offline: Tracked) -> None:
    text = inspect(offline.offline, "--summary")
    assert "project  movienet-stream" in text
    assert "state    finished (exit code 0)" in text
    for line in (
        "train/loss  0.05",
        "val/mAP     0.19",
        "genres      table-file",
    ):
        assert line in text, text


def test_metrics_are_plotted_over_the_runs_own_step_axis(offline: Tracked) -> None:
    records = [json.loads(line) for line in inspect(offline.offline, "--json").splitlines()]
    axes = [r["metric"] for r in records if r["type"] == "metric"]
    assert [(a.get("name"), a.get("glob_name"), a.get("step_metric")) for a in axes] == [
        ("step", None, None),
        (None, "*", "step"),
    ]
    steps = [r["history"]["item"]["step"] for r in records if r["type"] == "history"]
    assert steps == [*range(0, 200, 10), 200]


def test_a_table_is_stored_with_the_run(offline: Tracked) -> None:
    table = next(offline.wandb.rglob("genres_*.table.json"))
    assert json.loads(table.read_text()) == {
        "columns": ["genre", "ap"],
        "data": [["Drama", 0.5], ["War", None]],
    }
    # `wandb leet` charts every number of a step but the size of a file.
    records = [json.loads(line) for line in inspect(offline.offline, "--json").splitlines()]
    items = [r["history"]["item"].items() for r in records if r["type"] == "history"]
    numbers = {key for item in items for key, value in item if isinstance(value, int | float)}
    charted = {key for key in numbers if not key.startswith("_")} - {"genres.size"}
    assert charted == {"step", "train/loss", "val/mAP"}


def test_tracking_imports_no_pandas_that_scikit_learn_would_find_half_imported(
    offline: Tracked,
) -> None:
    assert offline.figures["pandas"] is False


def test_the_number_of_files_is_bounded_and_the_last_table_is_stored(tmp_path: Path) -> None:
    tracked = track(tmp_path, "--steps", "1000", "--tables")
    assert tracked.warnings == []
    files = [path for path in tracked.wandb.rglob("*") if path.is_file()]
    assert len(files) < 100
    tables = [json.loads(path.read_text()) for path in tracked.wandb.rglob("scores_*.table.json")]
    steps = sorted(table["data"][0][0] for table in tables)
    assert steps[-1] == 999
    assert steps[:4] == [0, 1, 4, 16]


def test_secrets_and_folders_stay_on_this_machine(offline: Tracked) -> None:
    records = inspect(offline.offline, "--json")
    assert '"feature_arrays":"s3://bucket/films"' in records
    assert '"root":"…/films"' in records
    for private in ("AKIA", "word", "cafe", "private", f'"{socket.gethostname()}"', "track_a_run"):
        assert private not in records
    saved = {path.name for path in offline.offline.parent.joinpath("files").iterdir()}
    assert saved == {"media"}


def test_a_run_is_resumed_under_its_id_and_grouped_by_its_name(tmp_path: Path) -> None:
    first = track(tmp_path, "--bad-curve")
    second = track(tmp_path, "--run-id", first.figures["run_id"])
    assert second.figures["run_id"] == first.figures["run_id"]
    assert first.offline != second.offline
    for run in (first.offline, second.offline):
        record = run_record(run)
        assert record["run_id"] == first.figures["run_id"]
        assert (record["run_group"], record["job_type"]) == ("demo", "training")
    # A table that wandb does not take costs no metric.
    assert [line.partition(": a ")[2][:30] for line in first.warnings] == [
        "table or picture is not stored"
    ]
    assert summary(first.offline)["summary"]["val/mAP"] == 0.19


ENVIRONMENT = {
    "WANDB_PROJECT": "thesis",
    "WANDB_ENTITY": "filmlab",
    "WANDB_RUN_GROUP": "g7",
    "WANDB_TAGS": "a,b",
    "WANDB_NAME": "monday",
    # Left by another run in the same shell; wandb refuses an empty mode.
    "WANDB_RUN_ID": "old123",
    "WANDB_RESUME": "must",
    "WANDB_MODE": "",
}
LABELS = ("entity", "project", "run_group", "tags", "display_name")


def test_the_environment_wins_over_defaults_and_the_configuration_over_both(tmp_path: Path) -> None:
    tracked = track(tmp_path, "tracking.project=mine", "tracking.tags=[c]", **ENVIRONMENT)
    assert tracked.warnings == []
    record = run_record(tracked.offline)
    labels = tuple(record[name] for name in LABELS)
    assert labels == ("filmlab", "mine", "g7", ["c"], "monday")
    assert record["run_id"] == tracked.figures["run_id"] != "old123"


def test_with_wandb_dir_the_files_are_stored_there_and_linked_in_the_run(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    tracked = track(tmp_path, WANDB_DIR=str(scratch), WANDB_PROJECT="thesis", WANDB_TAGS="a,b")
    assert tracked.warnings == []
    record = run_record(tracked.offline)
    assert (record["project"], record["tags"]) == ("thesis", ["a", "b"])
    (stored,) = scratch.glob("wandb/offline-run-*/*.wandb")
    (segment,) = offline_segments(tmp_path / "run")
    assert segment.resolve() == stored
    assert not segment.parent.resolve().is_relative_to(tmp_path / "run")
    assert last_run_id(tmp_path / "run") == tracked.figures["run_id"]
    assert "train/loss" in inspect(tmp_path / "run/wandb", "--summary")
    assert next(scratch.rglob("genres_*.table.json"))


STAY_HERE = {
    "WANDB_MODE=offline": "offline",
    "WANDB_MODE=dryrun": "offline",
    "wandb offline": "offline",
    "WANDB_MODE=disabled": "off",
    "WANDB_DISABLED=true": "off",
    "wandb disabled": "off",
}
ONE_BY_ONE = """
import os, sys
from pathlib import Path
from configs.load import load_config
from configs.runtime.logs import start_logging
from configs.runtime.tracking import start_tracking, wandb_server
start_logging()
config = load_config(Path(sys.argv[1]), ["tracking.wandb=auto"])
print(wandb_server(config.tracking))
always = load_config(Path(sys.argv[1]), ["tracking.wandb=online"])
for setting in sys.argv[2:]:
    name, _, value = setting.partition("=")
    file = Path("wandb/settings")
    if value:
        os.environ[name] = value
    else:
        file.write_text("[default]\\nmode = " + setting.split()[1] + "\\n")
    assert wandb_server(config.tracking) is None
    assert wandb_server(always.tracking) is not None  # the configuration wins
    tracker = start_tracking(
        config, run_dir=Path(setting), job_type="training", name="n", run_id="given", rank=0
    )
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert tracker.run_id == "given"
    os.environ.pop(name, None)
    file.unlink(missing_ok=True)
"""
"""Each setting in turn, in one process: an import of wandb takes seconds."""


def test_each_way_to_stay_off_the_network_is_respected_although_there_is_a_key(
    tmp_path: Path, counting_server: CountingServer
) -> None:
    (tmp_path / "wandb").mkdir()  # `wandb offline` and `wandb disabled` write wandb/settings
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": counting_server.url}
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, str(ROOT / "configs/demo.yaml"), *STAY_HERE],
        cwd=tmp_path,
        env=clean_environment(tmp_path) | online,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert counting_server.requests == 0
    assert done.stdout == f"{counting_server.url}\n"  # without a setting it would go online
    for setting, mode in STAY_HERE.items():
        folder = tmp_path / setting
        assert len(offline_segments(folder)) == (mode == "offline"), setting
        assert (folder / "wandb").exists() == (mode == "offline"), setting


def test_a_server_that_never_responds_costs_the_time_limit_and_one_warning(
    tmp_path: Path, silent_server: str
) -> None:
    # The key is in .netrc.
    netrc, machine = tmp_path / ".netrc", silent_server.removeprefix("http://")
    netrc.write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    hung = track(tmp_path, "tracking.timeout=24s", WANDB_BASE_URL=silent_server)
    assert len(hung.warnings) == 1
    assert hung.warnings[0].startswith("warning: wandb: offline, since it cannot go online: ")
    assert hung.waits[0] == "wandb: waiting for its start, at most 24 s"
    # The rest is the import of wandb on a busy machine; wandb's own time limit is 90 s.
    assert hung.figures["start"] < 24 + 60
    assert hung.wall_s < PROMPT_S
    assert summary(hung.offline)["summary"]["val/mAP"] == 0.19


@pytest.mark.parametrize(
    ("override", "more", "warning"),
    [
        ("tracking.wandb=online", {}, "offline, since there is no API key"),
        ("tracking.wandb=auto", {"WANDB_API_KEY": "x"}, "offline, since it cannot go online"),
    ],
)
def test_without_a_valid_key_an_online_run_is_stored_offline(
    tmp_path: Path, override: str, more: dict[str, str], warning: str
) -> None:
    tracked = track(tmp_path, override, **more)
    assert [line.startswith(f"warning: wandb: {warning}") for line in tracked.warnings] == [True]
    assert tracked.offline.exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_the_run_continues_if_wandbs_process_dies_or_hangs(tmp_path: Path, name: str) -> None:
    tracked = track(tmp_path, "--signal", name, "--steps", "2000", "tracking.timeout=5s")
    assert len(tracked.warnings) == 1
    assert tracked.warnings[0].endswith("run continues without it, metrics.jsonl is complete")
    assert tracked.figures["log"] < PROMPT_S
    assert tracked.figures["finish"] < PROMPT_S
    assert tracked.wall_s < PROMPT_S


def test_a_process_that_ends_without_finish_still_completes_its_run(tmp_path: Path) -> None:
    tracked = track(tmp_path, "--no-finish")
    assert tracked.warnings == []
    assert summary(tracked.offline)["summary"]["val/mAP"] == 0.19
    assert tracked.wall_s < PROMPT_S


def test_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "256k"):
        tracked = track(tmp_path, "--steps", "20000", "tracking.timeout=8s", run="small")
    assert [line.startswith("warning: wandb: ") for line in tracked.warnings] == [True]
    assert tracked.wall_s < PROMPT_S


def test_a_broken_installation_costs_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text("raise ImportError('libwandb.so: cannot open')\n")
    tracked = track(tmp_path, "--run-id", "given", PYTHONPATH=f"{broken}:{ROOT}")
    assert tracked.warnings == [
        "warning: wandb: libwandb.so: cannot open; the run continues without it, "
        "metrics.jsonl is complete"
    ]
    assert tracked.figures["run_id"] == "given"


def test_a_missing_tensorboard_costs_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tensorboardX.py").write_text("raise ModuleNotFoundError('tensorboardX')\n")
    options = ["tracking.tensorboard=true", "tracking.wandb=off"]
    tracked = track(tmp_path, *options, PYTHONPATH=f"{broken}:{ROOT}")
    assert tracked.warnings == [
        "warning: tensorboard: not installed, install the extra [tensorboard]; "
        "the run continues without it, metrics.jsonl is complete"
    ]


UPLOAD = """
import sys
from pathlib import Path
from configs.load import load_config
from configs.runtime.tracking import upload_report
config, page, picture, *overrides = sys.argv[1:]
upload_report(
    load_config(Path(config), overrides),
    Path(page).parent,
    pictures={"report/ap": Path(picture)},
    files=[Path(page)],
    step=252,
)
"""


def test_a_report_is_uploaded_as_pictures_and_an_artifact_of_a_run_in_the_same_group(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "demo/report/val"
    folder.mkdir(parents=True)
    page = folder / "report.html"
    page.write_text("<p>of films</p>")
    picture = folder / "ap.png"
    Image.new("RGB", (8, 8), "#0072B2").save(picture)
    arguments = [str(ROOT / "configs/demo.yaml"), str(page), str(picture), f"data.runs={tmp_path}"]
    subprocess.run(
        [sys.executable, "-c", UPLOAD, *arguments],
        env=clean_environment(tmp_path),
        check=True,
        timeout=240,
    )
    (segment,) = offline_segments(folder)
    records = [json.loads(line) for line in inspect(segment, "--json").splitlines()]
    run = next(r["run"] for r in records if r["type"] == "run")
    assert (run["run_group"], run["job_type"]) == ("demo", "report")
    text = next(json.dumps(r) for r in records if "artifact" in r["type"] or "artifact" in str(r))
    assert "demo-report" in text
    assert "report.html" in text
    (stored,) = (folder / "wandb").glob("offline-run-*/files/media/images/report/ap*.png")
    assert stored.read_bytes() == picture.read_bytes()
    assert "image-file" in inspect(segment, "--json")


def test_a_folder_that_cannot_be_created_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file in the way")
    tracked = track(tmp_path)
    assert len(tracked.warnings) == 1
    assert "File exists" in tracked.warnings[0]
    assert tracked.figures["offline"] is None


class RecordedRun:
    """Run of wandb that records steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, _: dict[str, float], *, step: int) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        """Do nothing."""


def tracker_in_the_background(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: RecordedRun, timeout: str
) -> tuple[tracking.Tracker, threading.Event]:
    """Return a tracker that does not start before the event is set."""
    event = threading.Event()

    def connect(tracker: Any, _: dict[str, Any]) -> None:
        event.wait(PROMPT_S)
        tracker._run = run
        tracker.url = "https://wandb.example/run"

    monkeypatch.setattr(tracking._WandbTracker, "_connect", connect)
    monkeypatch.setattr(tracking, "_end_service", lambda **_: None)
    config = load_config(ROOT / "configs" / "demo.yaml", [f"tracking.timeout={timeout}"])
    tracker = start_tracking(
        config, run_dir=folder, job_type="training", name="n", run_id=None, rank=0, wait=False
    )
    return tracker, event


def test_steps_before_the_start_in_the_background_are_sent_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RecordedRun()
    tracker, event = tracker_in_the_background(tmp_path, monkeypatch, run, "60s")
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step=step)
    assert (tracker.is_started, tracker.url, run.steps) == (False, None, [])
    event.set()
    tracker.wait_for_start()
    tracker.log({"loss": 1.0}, step=3)
    tracker.finish()
    assert (tracker.url, run.steps) == ("https://wandb.example/run", [1, 2, 3])


def test_a_start_in_the_background_that_hangs_is_given_up_at_the_next_step_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, event = tracker_in_the_background(tmp_path, monkeypatch, RecordedRun(), "0.1s")
    while not tracker.is_started:
        tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    event.set()
    (warning,) = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert warning.startswith("wandb: no start within 0.1 s; the run continues without it")


@pytest.mark.parametrize(("rank", "mode"), [(1, "auto"), (0, "off")])
def test_other_ranks_and_off_track_nothing_and_preserve_the_id(
    tmp_path: Path, rank: int, mode: str
) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", [f"tracking.wandb={mode}"])
    tracker = start_tracking(
        config, run_dir=tmp_path, job_type="training", name="n", run_id="given", rank=rank
    )
    tracker.log({"loss": 1.0}, step=0)
    tracker.table("t", ["a"], [[1]], step=0)
    tracker.finish()
    assert (tracker.run_id, tracker.offline_dir) == ("given", None)
    assert list(tmp_path.iterdir()) == []
