from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import sharding.__main__
from configs.errors import DataError, StateError
from configs.load import dump_config
from configs.schema import Config, EvalConfig
from eval.__main__ import main
from eval.evaluate import Result
from eval.evaluate import evaluate as evaluate_model
from eval.model import load_model
from eval.origin import check_scorable, describe_origin
from eval.predictions import read_predictions
from eval.render import render_html, render_markdown, render_table
from eval.report import Report, read_report
from sharding.features import (
    MovieFeatures,
    before_extension,
    keep_parent,
    open_features,
    publish_feature_shard,
    read_rows,
    seal_features,
)
from sharding.format.manifest import Manifest
from sharding.import_arrays import import_features
from sharding.label_files import labels_reader
from sharding.storage.local import DiskStorage
from tests import forked
from tests.eval.conftest import DIM, GENRES, N_MOVIES, configuration, train_run
from training.baselines import fit_recorded
from training.checkpoint import load_trained
from training.split_selection import split_movies

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def evaluate(config: Config, model: Path | None = None) -> Report:
    return result_of(config, model).report


def result_of(config: Config, model: Path | None = None) -> Result:
    result = evaluate_model(config, model)
    assert result is not None  # rank 0
    return result


@pytest.fixture(scope="module")
def report(trained: Path) -> Report:
    return evaluate(configuration(trained))


def test_the_report_records_what_was_compared(trained: Path, report: Report) -> None:
    features = open_features(configuration(trained).features_dir)
    compared = report.compared
    assert (compared.features, compared.labels) == (features.digest, features.labels.digest)
    assert (compared.split, compared.movies, compared.train_movies) == ("val", 35, 35)
    assert (compared.checkpoint, compared.epoch, compared.step) == ("last", 30, 90)
    assert (compared.frames, compared.windows, compared.threshold) == (6, 3, 0.5)
    assert compared.encoder == "imported arrays 'arrays', all rows kept, 8 values per row"
    assert not compared.untrained


def test_a_genre_without_a_movie_is_excluded_from_the_mean(report: Report) -> None:
    aps = [row.ap.value for row in report.genres if row.ap]
    assert report.absent == ("Animation",)
    assert len(aps) == 2
    assert report.mean_ap.value == pytest.approx(sum(aps) / 2)
    assert report.genres[2].recall is None
    assert report.genres[2].train_support == 0


def test_precision_recall_and_support_are_those_of_the_movies(
    trained: Path, report: Report
) -> None:
    genres = json.loads((trained / "genres.json").read_text())
    val = [genres[f"tt{number:03d}"] for number in range(35, N_MOVIES)]
    assert [row.support for row in report.genres] == [
        sum(genre in own for own in val) for genre in GENRES
    ]
    assert all(row.ap is None or row.ap.value > 0.7 for row in report.genres)


def test_every_interval_contains_its_figure_and_both_baselines_are_compared(
    report: Report,
) -> None:
    figures = [report.mean_ap, report.micro_ap]
    figures += [figure for one in report.baselines for figure in (one.mean_ap, one.difference)]
    for figure in figures:
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
    prior, pooled = report.baselines
    assert (prior.name, pooled.name) == ("class prior", "mean-pool + linear")
    assert prior.beaten == "yes"
    assert pooled.difference.value == pytest.approx(report.mean_ap.value - pooled.mean_ap.value)


def test_the_mean_pool_baseline_is_fitted_on_train_and_scored_on_the_split(
    trained: Path, report: Report
) -> None:
    features = open_features(configuration(trained).features_dir)
    movies = split_movies(features, "val", None)
    first = [float(read_rows(features, int(movie))[:, 0].mean()) for movie in movies]
    truth = features.labels.hot_MG[movies, 0]
    # The baseline uses at least the information of the one value that indicates the genre.
    ap = report.genres[0].mean_pool_ap
    assert ap is not None
    assert ap > average_precision_score(truth, first) - 0.1


def test_the_same_run_gives_the_same_report(trained: Path, report: Report) -> None:
    assert evaluate(configuration(trained)) == report


def test_without_bootstrap_draws_a_report_has_no_intervals(trained: Path) -> None:
    result = evaluate(configuration(trained, eval={"bootstrap": 0}))
    assert result.mean_ap.low is None
    assert [one.beaten for one in result.baselines] == ["unclear", "unclear"]


def test_the_window_length_is_that_of_the_run_not_of_the_command(
    trained: Path, report: Report
) -> None:
    result = evaluate(configuration(trained, stream={"window": 2}))
    assert result.compared.frames == 6
    assert result.mean_ap == report.mean_ap


def test_movies_that_the_model_was_trained_on_are_refused_and_named(trained: Path) -> None:
    with pytest.raises(
        StateError,
        match=r"mean: 35 of 35 movies of split 'train' were trained on \(tt000, tt001, tt002, …\)",
    ):
        evaluate(configuration(trained, eval={"split": "train"}))


def test_train_movies_that_a_relabel_has_moved_into_val_are_refused_or_named_on_top_of_all_forms(
    trained: Path, tmp_path: Path
) -> None:
    movies = sorted(json.loads((trained / "genres.json").read_text()))
    split = {"train": movies[5:35], "val": movies[:5] + movies[35:], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    data = {"root": str(tmp_path), "runs": str(trained / "root" / "runs")}
    config = configuration(trained, data=data | {"split": str(tmp_path / "split.json")})
    import_features(config)
    with pytest.raises(
        StateError, match="5 of 40 movies of split 'val' were trained on"
    ) as refused:
        evaluate(config)
    assert "eval.allow_train=true" in str(refused.value)
    result = evaluate(config.model_copy(update={"eval": allow(config)}))
    caveat = "5 of 40 scored movies were trained on: this is not a test."
    for form in (render_table(result), render_markdown(result, []), render_html(result, [])):
        assert caveat in form.partition("mAP")[0]
        assert "beats" not in form
    assert [one.beaten for one in result.baselines] == ["not a test", "not a test"]
    assert result.compared.trained_on == 5


def allow(config: Config) -> EvalConfig:
    return config.eval.model_copy(update={"allow_train": True})


def imported(trained: Path, root: Path, first: int) -> Config:
    """Import the movies from ``first`` on into a set of its own."""
    some = tuple(f"tt{number:03d}" for number in range(first, N_MOVIES))
    data = {"root": str(root), "limit": some}
    config = configuration(trained, data=data)
    import_features(config)
    return config


def run_of(trained: Path) -> Path:
    return configuration(trained).run_dir


@contextmanager
def away(features: Path) -> Iterator[None]:
    """Rename the features that a run was trained on for the length of the block."""
    hidden = features.rename(features.with_name("hidden"))
    try:
        yield
    finally:
        hidden.rename(features)


def test_a_split_that_was_imported_alone_is_compared_with_baselines_of_the_models_own_features(
    trained: Path, report: Report, tmp_path: Path
) -> None:
    result = evaluate(imported(trained, tmp_path, 35), run_of(trained))
    assert result.baselines == report.baselines  # difference and interval included
    assert [row.train_support for row in result.genres] == [
        row.train_support for row in report.genres
    ]
    assert (result.compared.train_movies, result.compared.model_movies) == (35, 35)
    assert result.notes[0] == (
        "The scored feature set contains 0 of the 35 movies that the model was trained on; the "
        "baselines were fitted on the features that it was trained on."
    )


def test_baselines_need_the_very_features_that_the_model_was_trained_on(
    trained: Path, tmp_path: Path
) -> None:
    alone, some = (imported(trained, tmp_path / str(first), first) for first in (35, 10))
    own = trained / "root" / "features" / "arrays"
    with away(own):
        result = evaluate(alone, run_of(trained))
        assert result.baselines == ()
        assert "could not be used" in result.notes[0]
        assert result.notes[0].endswith("no baseline could be fitted.")
        # Another set at the recorded place, and some of the movies in the scored set
        shutil.copytree(some.features_dir, own)
        result = evaluate(some, run_of(trained))
        shutil.rmtree(own)
    assert (result.compared.train_movies, result.compared.model_movies) == (25, 35)
    assert re.search(r"got data \w{12}, labels .* was trained on \w{12}", result.notes[0])
    assert result.notes[0].endswith("baselines were fitted on 25 movies.")


def encode_rows(config: Config, shard: int, movies: Sequence[str]) -> None:
    """Publish one feature shard, as an encoder does."""
    rows = {movie: np.load(f"{config.data.feature_arrays}/{movie}.npy") for movie in movies}
    encoded = [
        MovieFeatures(movie, r.astype(np.float16), np.zeros(len(r), np.int32), len(r))
        for movie, r in rows.items()
    ]
    storage = DiskStorage(Path(config.features_dir))
    publish_feature_shard(storage, shard, encoded, input_digest="of the images")


def seal_rows(config: Config, n_shards: int, parent: str | None = None) -> Manifest:
    return seal_features(
        DiskStorage(Path(config.features_dir)),
        n_shards=n_shards,
        provenance={"import": {"name": "rows", "dedup": False}, "dim": DIM},
        labels_for=labels_reader(config.data),
        parent=parent,
    )


def test_an_old_run_is_scored_on_the_movies_that_its_set_had_before_an_extension(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def at(digest: str) -> Config:
        url = f"{config.features_dir}@{digest[:12]}"
        return config.model_copy(
            update={"stream": config.stream.model_copy(update={"features_url": url})}
        )

    caplog.set_level("INFO")
    movies = [f"tt{number:03d}" for number in range(N_MOVIES)]
    data = {"split": None, "root": str(tmp_path)}  # the split is computed from the labels
    config = configuration(trained, data=data, training={"epochs": 2}, eval={"bootstrap": 0})
    encode_rows(config, 0, movies[20:])
    old = seal_rows(config, 1)
    train_run(config)
    before = evaluate(config)

    keep_parent(DiskStorage(Path(config.features_dir)), old)
    encode_rows(config, 1, movies[:20])
    new = seal_rows(config, 2, parent=old.digest)
    assert evaluate(config) == before
    assert "differs from the current" not in caplog.text
    evaluate(
        config.model_copy(update={"data": config.data.model_copy(update={"split": "fold:1/3"})})
    )
    assert "differs from the current data.metadata, data.split" in caplog.text
    assert open_features(at(old.digest).features_url).manifest == old
    assert "scoring its former 50 of 70 movies" in caplog.text
    # Train movies of the run are in val now. Its own set also provides its baselines.
    with pytest.raises(StateError, match="movies of split 'val' were trained on"):
        evaluate(at(new.digest))
    assert fit_recorded(load_trained(config.run_dir, "last")).movies == before.compared.train_movies
    with pytest.raises(DataError, match=f"want one of {new.digest[:12]}, {old.digest[:12]}"):
        evaluate(at("f" * 64))
    # Shards that were encoded again are not those of the former set.
    encode_rows(config, 0, movies[20:60])
    again = seal_rows(config, 2, parent=old.digest)
    assert before_extension(open_features(config.features_dir), old.digest) is None
    assert before_extension(open_features(config.features_dir), again.digest) is not None


def test_an_export_alone_gives_the_report_of_its_run_on_a_test_set_that_was_imported_later(
    trained: Path, exported: Path, report: Report, tmp_path: Path
) -> None:
    later = [f"tt{number:03d}" for number in range(35, N_MOVIES)]
    (tmp_path / "split.json").write_text(json.dumps({"train": [], "val": [], "test": later}))
    data = {"root": str(tmp_path), "limit": later, "split": str(tmp_path / "split.json")}
    config = configuration(trained, data=data, eval={"split": "test"})
    import_features(config)
    with away(trained / "root"):  # neither the run nor its features are on this machine
        result = evaluate(config, exported)
    assert (result.compared.split, result.compared.movies) == ("test", 35)
    assert result.genres == report.genres
    assert result.baselines == report.baselines  # the paired differences included
    assert (result.mean_ap, result.micro_ap) == (report.mean_ap, report.micro_ap)
    assert result.notes[0].endswith("the baselines are those of the export.")


def test_a_model_of_one_genre_is_reported_also_on_a_single_movie(
    trained: Path, tmp_path: Path
) -> None:
    movies = sorted(json.loads((trained / "genres.json").read_text()))
    split = {"train": movies[:35], "val": movies[35:36], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    data = {"root": str(tmp_path), "split": str(tmp_path / "split.json"), "genres": GENRES[:1]}
    config = configuration(trained, data=data, training={"epochs": 1})
    import_features(config)
    train_run(config)
    result = evaluate(config)
    assert (result.compared.movies, len(result.genres)) == (1, 1)
    assert result.mean_ap.value == 1
    assert [one.beaten for one in result.baselines] == ["too few", "too few"]


def test_a_checkpoint_folder_gives_the_report_of_its_run(trained: Path, report: Report) -> None:
    config = configuration(trained)
    folder = config.run_dir / "checkpoints" / "last"
    for model in (folder, config.run_dir):
        assert evaluate(configuration(trained, training={"run_name": "other"}), model) == report


def test_an_export_refuses_other_features_and_the_movies_that_it_was_trained_on(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(StateError, match=r"mean.safetensors: 35 of 35 movies of split 'train'"):
        evaluate(configuration(trained, eval={"split": "train"}), exported)
    config = configuration(trained, data={"root": str(tmp_path), "dedup": True})
    import_features(config)
    message = r"import.dedup: got True, .*mean.safetensors was trained on False"
    with pytest.raises(StateError, match=message):
        evaluate(config, exported)


def test_features_made_in_another_way_are_rejected_by_the_key_that_differs(
    trained: Path, tmp_path: Path
) -> None:
    own = {"runs": str(trained / "root" / "runs"), "root": str(tmp_path)}
    for data, message in (
        ({"dedup": True}, "import.dedup: got True, .* was trained on False"),
        ({"genres": ("Drama", "War")}, r"got genres 2 \(Drama, War\), .* trained on 3"),
    ):
        config = configuration(trained, data=own | data)
        import_features(config, replace=True)
        with pytest.raises(StateError, match=message):
            evaluate(config)


def test_another_dimension_or_encoder_is_rejected_whatever_the_model_was_loaded_from(
    trained: Path, exported: Path
) -> None:
    config = configuration(trained)
    features = open_features(config.features_dir)
    for path in (config.run_dir, config.run_dir / "checkpoints" / "last", exported):
        model = load_model(path, "last")
        check_scorable(model, features)
        provenance = dict(model.provenance)
        for other, message in (
            (provenance | {"dim": 9}, "dim: got 8, .* was trained on 9"),
            ({"dim": 8, "encoder": {"name": "x"}}, "encoder.name: got None, .* was trained on 'x'"),
        ):
            with pytest.raises(StateError, match=message):
                check_scorable(replace(model, provenance=other), features)


def test_a_model_of_a_custom_encoder_is_scored_whether_pretrained_was_recorded_or_not(
    trained: Path,
) -> None:
    config = configuration(trained)
    model, features = load_model(config.run_dir, "last"), open_features(config.features_dir)
    # Older versions recorded ``pretrained`` for classes that do not take it.
    new: dict[str, object] = {"name": "tower.py:Tower", "weights": "ab" * 32, "options": {}}
    old = new | {"pretrained": "openai"}
    for scored, recorded in ((new, old), (old, new)):
        provenance = {"dim": 8, "encoder": scored}
        manifest = replace(features.manifest, provenance=provenance)
        check_scorable(
            replace(model, provenance={"dim": 8, "encoder": recorded}),
            replace(features, manifest=manifest),
        )


def test_the_relabel_command_that_a_rejection_suggests_can_be_pasted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my config.yaml"
    runs = {"runs": str(trained / "root" / "runs"), "root": str(tmp_path)}
    config = configuration(trained, data=runs | {"genres": ("War", "Drama")})
    file.write_text(dump_config(config))
    import_features(config)
    report_command = ["report", "--config", str(file), "eval.bootstrap=0", "training.device=cpu"]
    assert main(report_command) == 1
    program, *arguments = shlex.split(capsys.readouterr().err.split("`")[1])
    assert program == "movienet-shard"
    assert sharding.__main__.main(arguments) == 0
    assert main(report_command) == 0


def test_a_missing_run_or_split_is_one_line(trained: Path) -> None:
    with pytest.raises(StateError, match=r"nowhere: no checkpoint 'last'; run"):
        evaluate(configuration(trained, training={"run_name": "nowhere"}))
    with pytest.raises(DataError, match="split 'test' has no labelled movie"):
        evaluate(configuration(trained, eval={"split": "test"}))


def test_the_origin_describes_the_tower_and_marks_an_untrained_one() -> None:
    encoder = {"name": "ViT-B-32-quickgelu", "pretrained": "openai", "weights": "ab" * 32}
    encoder |= {"preprocess": "fast", "precision": "bf16"}
    origin, untrained = describe_origin({"encoder": encoder, "dim": 512})
    assert origin == (
        "ViT-B-32-quickgelu, weights openai, sha256 abababababab, preprocessing fast, bf16, "
        "512 values per row"
    )
    assert not untrained
    origin, untrained = describe_origin({"encoder": encoder | {"pretrained": None, "seed": 3}})
    assert "UNTRAINED, random weights of seed 3" in origin
    assert untrained


def test_the_command_prints_the_table_and_the_path_and_publishes_the_report(trained: Path) -> None:
    run = trained / "root" / "runs" / "mean"  # its configuration is stored in it
    words = ["eval", "report", str(run), "eval.bootstrap=50"]
    done = forked.run(words, folder=ROOT, environment=os.environ)
    assert done.returncode == 0, done.stderr
    folder = run / "report" / "val"
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert "mean-pool + linear" in done.stdout
    assert "Drama" in done.stdout
    one = read_report(folder / "report.json")
    assert one.compared.draws == 50
    assert (folder / "ap.png").read_bytes().startswith(b"\x89PNG")
    predictions = read_predictions(folder / "predictions.npz", one.compared.predictions)
    assert len(predictions.movie_id) == 35


def test_two_ranks_score_each_movie_once_and_write_one_report_like_a_single_rank(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    config, file = configuration(trained), tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    words = ["eval", "report", "--config", str(file), "--model", str(exported)]
    words += ["--out", str(tmp_path)]
    done = forked.run(words, folder=ROOT, environment=os.environ, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "world 2" in done.stderr
    assert done.stdout.count("report.html") == 1
    two = read_report(tmp_path / "report.json")
    got = read_predictions(tmp_path / "predictions.npz", two.compared.predictions)
    one = result_of(config, exported)
    assert tuple(got.movie_id) == tuple(f"tt{number:03d}" for number in range(35, N_MOVIES))
    # Batches are composed differently: probabilities agree to the rounding of float32.
    probabilities_MG = one.predictions.probabilities_MG
    np.testing.assert_allclose(got.probabilities_MG, probabilities_MG, rtol=1e-5)
    assert [row.support for row in two.genres] == [row.support for row in one.report.genres]
    assert two.mean_ap.value == pytest.approx(one.report.mean_ap.value, rel=1e-6)
    assert two.notes == one.report.notes


def test_a_missing_run_is_one_line_and_exit_code_1(trained: Path) -> None:
    file = trained / "other.yaml"
    file.write_text(dump_config(configuration(trained, training={"run_name": "nowhere"})))
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


def test_the_origin_of_a_custom_encoder_that_takes_no_pretrained_names_no_weights() -> None:
    encoder = {"name": "tower.py:Tower", "preprocess": "exact", "weights": "ab" * 32}
    origin = describe_origin({"encoder": encoder, "dim": 192})
    assert origin == (
        "tower.py:Tower, sha256 abababababab, preprocessing exact, 192 values per row",
        False,
    )
