from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from configs.errors import DataError, StateError
from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.schema import Config
from eval.evaluate import describe_origin, evaluate
from eval.report import Report, read_report
from sharding.features import open_features, read_rows
from sharding.import_arrays import import_features
from training.loop import train
from training.split_selection import split_movies

GENRES = ("Drama", "War", "Animation")
N_FILMS, DIM = 60, 8


def write_films(folder: Path) -> None:
    """60 films; the first number of their rows tells Drama, the second War, none Animation."""
    rng = np.random.default_rng(0)
    (folder / "arrays").mkdir(parents=True)
    genres: dict[str, list[str]] = {}
    for number in range(N_FILMS):
        movie = f"tt{number:03d}"
        rows = rng.normal(size=(rng.integers(2, 12), DIM)) + 2
        told = [genre for genre in GENRES[:2] if rng.random() < 0.5] or ["Drama"]
        rows[:, 0] += 1.5 * ("Drama" in told)
        rows[:, 1] += 1.5 * ("War" in told)
        np.save(folder / "arrays" / f"{movie}.npy", rows.astype(np.float32))
        genres[movie] = told
    movies = sorted(genres)
    split = {"train": movies[:35], "val": movies[35:], "test": []}
    (folder / "genres.json").write_text(json.dumps(genres))
    (folder / "split.json").write_text(json.dumps(split))


def configuration(folder: Path, **sections: dict[str, Any]) -> Config:
    told: dict[str, dict[str, Any]] = {
        "data": {
            "feature_arrays": str(folder / "arrays"),
            "metadata": str(folder / "genres.json"),
            "split": str(folder / "split.json"),
            "genres": GENRES,
            "root": str(folder / "root"),
        },
        "encoder": {"name": "films"},
        "stream": {"window": 6, "global_batch": 16},
        "model": {"class": "training.models.mean:MeanLinear"},
        "training": {"run_name": "mean", "epochs": 30, "lr": 0.05, "holdout": 0, "device": "cpu"},
        "eval": {"checkpoint": "last", "windows": 3, "bootstrap": 100},
        "tracking": {"wandb": "off"},
    }
    for name, section in sections.items():
        told[name] = told[name] | section
    return Config.model_validate({"version": 1, **told})


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    write_films(folder)
    config = configuration(folder)
    import_features(config)
    distributed = start(device="cpu", precision="fp32", accumulation=1, expected_world_size=1)
    try:
        with StopRequest() as stop:
            train(config, distributed, stop)
    finally:
        distributed.close()
    return folder


@pytest.fixture(scope="module")
def report(films: Path) -> Report:
    return evaluate(configuration(films))


def test_the_report_says_what_was_compared(films: Path, report: Report) -> None:
    features = open_features(configuration(films).features_dir)
    compared = report.compared
    assert (compared.features, compared.labels) == (features.digest, features.labels.digest)
    assert (compared.split, compared.movies, compared.train_movies) == ("val", 25, 35)
    assert (compared.checkpoint, compared.epoch, compared.step) == ("last", 30, 90)
    assert (compared.frames, compared.windows, compared.threshold) == (6, 3, 0.5)
    assert compared.encoder == "imported arrays 'films', rows as they came, 8 numbers a row"
    assert not compared.untrained


def test_a_genre_without_a_film_is_left_out_of_the_mean(report: Report) -> None:
    aps = [row.ap.value for row in report.genres if row.ap]
    assert report.absent == ("Animation",)
    assert len(aps) == 2
    assert report.mean_ap.value == pytest.approx(sum(aps) / 2)
    assert report.genres[2].recall is None
    assert report.genres[2].train_support == 0


def test_precision_recall_and_support_are_those_of_the_films(films: Path, report: Report) -> None:
    genres = json.loads((films / "genres.json").read_text())
    val = [genres[f"tt{number:03d}"] for number in range(35, 60)]
    assert [row.support for row in report.genres] == [
        sum(genre in told for told in val) for genre in GENRES
    ]
    assert all(row.ap is None or row.ap.value > 0.7 for row in report.genres)


def test_every_figure_stands_in_its_interval_and_both_baselines_are_compared(
    report: Report,
) -> None:
    figures = [report.mean_ap, report.micro_ap]
    figures += [part for one in report.baselines for part in (one.mean_ap, one.difference)]
    for figure in figures:
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
    prior, pooled = report.baselines
    assert (prior.name, pooled.name) == ("class prior", "mean-pool + linear")
    assert prior.beaten == "yes"
    assert pooled.difference.value == pytest.approx(report.mean_ap.value - pooled.mean_ap.value)


def test_the_mean_pool_baseline_is_fitted_on_train_and_scored_on_the_split(
    films: Path, report: Report
) -> None:
    features = open_features(configuration(films).features_dir)
    movies = split_movies(features, "val", None)
    first = [float(read_rows(features, int(movie))[:, 0].mean()) for movie in movies]
    truth = features.labels.hot_MG[movies, 0]
    # It sees at least what the one telling number alone tells.
    told = report.genres[0].mean_pool_ap
    assert told is not None
    assert told > average_precision_score(truth, first) - 0.1


def test_the_same_run_gives_the_same_report(films: Path, report: Report) -> None:
    assert evaluate(configuration(films)) == report


def test_without_draws_there_are_no_intervals(films: Path) -> None:
    found = evaluate(configuration(films, eval={"bootstrap": 0}))
    assert found.mean_ap.low is None
    assert [one.beaten for one in found.baselines] == ["unclear", "unclear"]


def test_the_runs_own_windows_are_scored_whatever_the_command_says(
    films: Path, report: Report
) -> None:
    found = evaluate(configuration(films, stream={"window": 2}))
    assert found.compared.frames == 6
    assert found.mean_ap == report.mean_ap


def test_scoring_train_says_that_it_is_no_test(films: Path) -> None:
    found = evaluate(configuration(films, eval={"split": "train"}))
    assert "no test" in found.notes[0]


def test_a_split_that_was_imported_alone_is_scored_without_baselines(
    films: Path, tmp_path: Path
) -> None:
    val = tuple(f"tt{number:03d}" for number in range(35, 60))
    data = {"root": str(tmp_path), "limit": val, "runs": str(films / "root" / "runs")}
    config = configuration(films, data=data)
    import_features(config)
    found = evaluate(config)
    assert found.baselines == ()
    assert found.compared.movies == 25
    assert "no baseline" in found.notes[0]


def test_features_of_another_making_are_refused_by_name(films: Path, tmp_path: Path) -> None:
    own = {"runs": str(films / "root" / "runs"), "root": str(tmp_path)}
    for data, told in (
        ({"dedup": True}, "import.dedup: got True, .* was trained on False"),
        ({"genres": ("Drama", "War")}, r"got genres 2 \(Drama, War\), .* trained on 3"),
    ):
        config = configuration(films, data=own | data)
        import_features(config, replace=True)
        with pytest.raises(StateError, match=told):
            evaluate(config)


def test_a_run_or_a_split_that_is_not_there_is_told_in_one_line(films: Path) -> None:
    with pytest.raises(StateError, match=r"nowhere: no checkpoint 'last'; run"):
        evaluate(configuration(films, training={"run_name": "nowhere"}))
    with pytest.raises(DataError, match="split 'test' has no labelled movie"):
        evaluate(configuration(films, eval={"split": "test"}))


def test_the_tower_is_told_in_words_and_an_untrained_one_plainly() -> None:
    encoder = {"name": "ViT-B-32-quickgelu", "pretrained": "openai", "weights": "ab" * 32}
    encoder |= {"preprocess": "fast", "precision": "bf16"}
    words, untrained = describe_origin({"encoder": encoder, "dim": 512})
    assert words == (
        "ViT-B-32-quickgelu, weights openai, sha256 abababababab, preprocessing fast, bf16, "
        "512 numbers a row"
    )
    assert not untrained
    words, untrained = describe_origin({"encoder": encoder | {"pretrained": None, "seed": 3}})
    assert "UNTRAINED, random weights of seed 3" in words
    assert untrained


def test_the_command_prints_the_table_and_the_path_and_writes_the_report(films: Path) -> None:
    from configs.load import dump_config

    file = films / "config.yaml"
    file.write_text(dump_config(configuration(films)))
    done = subprocess.run(
        [sys.executable, "-m", "eval", "report", "--config", str(file), "eval.bootstrap=50"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    folder = films / "root" / "runs" / "mean" / "report"
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert "mean-pool + linear" in done.stdout
    assert "Drama" in done.stdout
    assert read_report(folder / "report.json").compared.draws == 50
    assert (folder / "ap.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_run_is_one_line_and_exit_code_1(films: Path) -> None:
    from configs.load import dump_config

    file = films / "other.yaml"
    file.write_text(dump_config(configuration(films, training={"run_name": "nowhere"})))
    done = subprocess.run(
        [sys.executable, "-m", "eval", "report", "--config", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
