"""Prediction of films: the same figures as a report, the recorded encoder, and explanations."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import encoders.__main__
import sharding.__main__
import training.__main__
from configs.errors import ConfigError, StateError
from configs.load import load_config
from eval.__main__ import main
from eval.evaluate import evaluate
from eval.film_scoring import FilmScoring
from eval.films import open_film
from eval.predict import Predictor
from eval.prediction import Prediction, read_prediction
from sharding.dump.key_frames import read_shots
from tests.encoders.conftest import TOWER
from tests.videos import scene, write_video
from training.stream.view import View

pytestmark = pytest.mark.slow

LENGTHS = (20, 30, 25, 18)
"""Frames of the scenes of each video."""


def videos(folder: Path, count: int) -> list[str]:
    """Write videos of unlike scenes; return their names."""
    folder.mkdir()
    for number in range(count):
        frames = [
            picture
            for k, length in enumerate(LENGTHS[: 2 + number % 3])
            for picture in [scene(10 * number + k)] * length
        ]
        write_video(folder / f"film{number}.mp4", frames)
    return [f"film{number}" for number in range(count)]


def tree() -> dict[str, Any]:
    return {
        "version": 1,
        "data": {
            "dump": "videos",
            "metadata": "labels.csv",
            "split": "split.json",
            "genres": ["Drama", "Comedy"],
            "root": "data",
        },
        "encoder": {
            "name": "tiny",
            "model": "tiny.json",
            "pretrained": None,
            "precision": "fp32",
            "batch_size": 16,
            "threads": 1,
            "device": "cpu",
        },
        "stream": {"window": 6, "global_batch": 4},
        "model": {"class": "training.models.attention:GatedAttention"},
        "training": {
            "run_name": "run",
            "epochs": 3,
            "lr": 0.05,
            "holdout": 0,
            "threads": 1,
            "device": "cpu",
        },
        "eval": {"split": "test", "checkpoint": "last", "windows": 2, "bootstrap": 0},
        "tracking": {"wandb": "off"},
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos after build, encode, train and export, as a user runs them."""
    folder = tmp_path_factory.mktemp("project")
    names = videos(folder / "videos", 6)
    rows = [f"{name},{'Drama' if k % 2 else 'Comedy'}" for k, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join(["movie,genres", *rows, ""]))
    split = {"train": names[:4], "val": [], "test": names[4:]}
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "tiny.json").write_text(json.dumps(TOWER))
    (folder / "my.yaml").write_text(yaml.safe_dump(tree()))
    with chdir(folder):
        assert sharding.__main__.main(["build", "--config", "my.yaml"]) == 0
        assert encoders.__main__.main(["run", "--config", "my.yaml"]) == 0
        assert training.__main__.main(["run", "--config", "my.yaml"]) == 0
        export = ["export", "data/runs/run", "--checkpoint", "last", "--out", "run.safetensors"]
        assert training.__main__.main(export) == 0
    return folder


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.fixture(scope="module")
def predictor(project: Path) -> Predictor:
    with chdir(project):
        return Predictor.load("data/runs/run")


def probabilities(prediction: Prediction) -> dict[str, float]:
    return {one.genre: one.probability for one in prediction.genres}


def test_a_video_its_frames_and_its_movie_of_the_dump_are_scored_as_in_a_report(
    inside: Path, predictor: Predictor, tmp_path: Path
) -> None:
    config = load_config("my.yaml")
    result = evaluate(config)
    assert result is not None
    scored = result.predictions
    place = scored.movie_id.index("film5")
    want = dict(zip(scored.genres, scored.probabilities_MG[place].tolist(), strict=True))
    frames = tmp_path / "film5"
    frames.mkdir()
    for shot in read_shots(inside / "videos" / "film5.mp4"):
        for image in shot.images:
            name = f"shot_{shot.number:04d}_img_{image.image}.jpg"
            (frames / name).write_bytes(image.jpeg)
    for film in ("videos/film5.mp4", str(frames), "film5"):
        prediction = predictor(film)
        assert (prediction.film, prediction.shots, prediction.frames) == ("film5", 4, 12)
        assert probabilities(prediction) == pytest.approx(want, abs=1e-4)


def test_the_times_of_shots_and_key_frames_are_those_of_the_video(
    inside: Path, predictor: Predictor
) -> None:
    prediction = predictor("videos/film5.mp4")
    begins = [point.begin_s for point in prediction.timeline]
    assert begins == pytest.approx([0, 0.8, 2.0, 3.0])
    assert prediction.duration_s == pytest.approx(3.72)
    assert [point.end_s for point in prediction.timeline][-1] == prediction.duration_s
    middle = {0: 0.4, 1: 1.4, 2: 2.48, 3: 3.36}
    for genre in prediction.genres:
        for frame in genre.key_frames:
            assert frame.time_s == pytest.approx(middle[frame.shot])
            assert frame.still in prediction.stills
    assert (inside / "videos" / "film5.mp4").is_file()


def test_any_pictures_are_frames_in_order_of_name_each_a_shot(
    inside: Path, predictor: Predictor, tmp_path: Path
) -> None:
    from PIL import Image

    for number in range(3):
        Image.fromarray(scene(number)).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "004.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").touch()
    with open_film(str(tmp_path), load_config(inside / "my.yaml")) as film:
        assert [still.name for still in film.stills] == ["000.png", "001.png", "002.png", "004.jpg"]
    prediction = predictor(tmp_path)
    assert (prediction.kind, prediction.shots, prediction.frames) == ("frames", 4, 3)
    assert "1 of 4 frames cannot be decoded." in prediction.notes


def test_an_export_predicts_like_its_run_with_the_encoder_of_a_configuration(
    inside: Path, predictor: Predictor
) -> None:
    config = load_config("my.yaml")
    exported = Predictor.load("run.safetensors", config=config)
    film = "videos/film4.mp4"
    assert probabilities(exported(film)) == probabilities(predictor(film))
    assert (inside / "run.safetensors").is_file()


def test_an_encoder_with_other_weights_is_refused_in_one_line(inside: Path) -> None:
    config = load_config("my.yaml", ["encoder.seed=1"])
    with pytest.raises(StateError, match=r"encoder weights: got sha256 \w{12} .* trained on") as no:
        Predictor.load("data/runs/run", config=config, checkpoint="last")
    assert "\n" not in str(no.value)
    assert inside.is_dir()


def test_imported_features_need_an_encoder_that_the_user_names(inside: Path) -> None:
    state = inside / "imported" / "checkpoints"
    shutil.copytree(inside / "data" / "runs" / "run" / "checkpoints", state, symlinks=True)
    for path in state.rglob("state.json"):
        content = json.loads(path.read_text())
        content["provenance"] = {"import": {"name": "arrays", "dedup": False}, "dim": 16}
        path.write_text(json.dumps(content))
    model = inside / "imported"
    with pytest.raises(ConfigError, match="imported features, which name no encoder; pass"):
        Predictor.load(model, checkpoint="last")
    prediction = Predictor.load(model, config=load_config("my.yaml"), checkpoint="last")("film4")
    assert "random weights is assumed" in prediction.notes[0]


# --- explanations ---------------------------------------------------------------------------------


class Mean(torch.nn.Module):
    """Logits are the mean of the real rows, so that every figure can be computed by hand."""

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weight = mask.unsqueeze(-1).float()
        return (features * weight).sum(1) / weight.sum(1)


def scoring(
    rows: list[list[float]], shots: list[int], **view: Any
) -> tuple[FilmScoring, np.ndarray[Any, np.dtype[np.float64]]]:
    rows_ND = np.array(rows, np.float16)
    made = FilmScoring(
        Mean(), torch.device("cpu"), View(**view), rows_ND, np.array(shots), max(shots) + 1
    )
    return made, rows_ND.astype(np.float64)


def test_a_contribution_is_the_fall_of_the_logit_without_the_shot() -> None:
    made, rows_ND = scoring([[3, 0], [1, 0], [0, 4], [0, 0]], [0, 0, 1, 2], frames=None)
    drops, group = made.contributions()
    assert group == 1
    without = [rows_ND[[2, 3]], rows_ND[[0, 1, 3]], rows_ND[[0, 1, 2]]]
    want = [rows_ND.mean(axis=0) - rest.mean(axis=0) for rest in without]
    np.testing.assert_allclose(drops, want, atol=1e-6)


def test_a_shot_outside_of_the_windows_contributes_nothing_and_a_single_shot_is_undefined() -> None:
    made, _ = scoring([[1], [2], [3], [4], [5]], [0, 1, 2, 3, 4], frames=2, windows=1)
    drops, _ = made.contributions()
    assert np.flatnonzero(drops[:, 0]).tolist() == [1, 2]  # one window in the middle
    assert made.n_scored == 2
    single, _ = scoring([[1], [2]], [0, 0], frames=4)
    assert np.isnan(single.contributions()[0]).all()


def test_rows_of_shots_are_their_means() -> None:
    made, _ = scoring([[1], [3], [8]], [0, 0, 1], frames=2, row="shot")
    assert made.film_logits().tolist() == [5.0]
    assert made.n_scored == 3


def test_of_a_film_of_many_shots_several_are_left_out_at_once() -> None:
    n_shots = 900
    made, _ = scoring([[float(k % 7)] for k in range(n_shots)], list(range(n_shots)), frames=None)
    drops, group = made.contributions()
    assert group == 3
    assert drops.shape == (n_shots, 1)
    assert (drops[0:3] == drops[0]).all()


def test_the_timeline_covers_the_film_without_gaps_from_the_shots_around() -> None:
    made, _ = scoring([[float(k)] for k in range(60)], list(range(60)), frames=None)
    parts, width = made.timeline()
    assert [(first, after) for first, after, _ in parts] == [
        (60 * k // 24, 60 * (k + 1) // 24) for k in range(24)
    ]
    assert width == 5
    values = [float(p_G[0]) for _, _, p_G in parts]
    assert values == sorted(values)
    assert values[0] == pytest.approx(1 / (1 + np.exp(-2.0)))  # the mean of shots 0 to 4


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_genres_and_writes_page_and_json(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--model", "data/runs/run", "--out", str(tmp_path)]
    assert main(["predict", "videos/film4.mp4", "film5", *arguments, "--no-stills"]) == 0
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines() if "page:" not in line) <= 80
    assert output.count("timeline") == 2
    for name in ("film4", "film5"):
        assert "<img" not in (tmp_path / name / "prediction.html").read_text("utf-8")
        assert read_prediction(tmp_path / name / "prediction.json").film == name
    assert inside.is_dir()


def test_of_several_films_a_broken_one_does_not_stop_the_others(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("404")
    films = [str(broken), "videos/film4.mp4"]
    assert main(["predict", *films, "--model", "data/runs/run", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "error: 1 of 2 films failed, the first: " in captured.err
    assert (tmp_path / "film4" / "prediction.json").is_file()
    assert inside.is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "absent: not in the dump videos, which has 6 movies"),
        (["absent.mp4"], "absent.mp4: no such file or folder; want a video, a folder of frames"),
        (["nowhere/absent"], "no such file or folder; want a video, a folder of frames"),
        (["film4", "eval.windows=3"], "eval.windows=3: got no --config FILE"),
        (["eval.windows=3", "--config", "my.yaml"], "FILM: got none"),
    ],
)
def test_wrong_use_is_one_line(
    inside: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["predict", *words, "--model", "data/runs/run"]) in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert inside.is_dir()
