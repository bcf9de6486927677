"""Comparison of runs on the same movies and labels, from their reports and predictions.

M = common movies, G = genres, R = bootstrap draws
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError, StateError
from configs.runtime.hints import hint
from eval.comparison import Comparison, Difference, GenreAps, RecipeRow, RunRow, Spread
from eval.intervals import Draws, bootstrap, draw_weights
from eval.model import is_model, is_run, report_dir
from eval.predictions import NPZ, Predictions, read_predictions
from eval.report import Compared, Report, figure, read_report, verdict
from training.metrics import genre_aps, mean_ap, micro_ap

REPORT = "report.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A run with its report and predictions."""

    name: str
    """Of the run, or as the user named it where that is ambiguous."""

    folder: Path
    report: Report
    predictions: Predictions
    stale: str | None = None
    """Why the report is outdated, if it is."""


def find_reports(words: Sequence[str], split: str, runs_dir: Path | None) -> list[Scored]:
    """Read the reports of runs on a split.

    Args:
        words: Each a name in ``runs_dir``, a path that ``eval.model`` can load, or the folder of a
            report.
        split: The split.
        runs_dir: Folder of the runs of a configuration, if there is one.

    Raises:
        ConfigError: a word is none of these.
        StateError: a run has no report on this split yet; the message contains the command.
        DataError: report or predictions are damaged, or do not belong together.
    """
    runs = [_find_report(word, split, runs_dir) for word in words]
    names = [run.report.compared.run for run in runs]
    if len(set(names)) < len(names):  # e.g. a run and its export
        return runs
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _find_report(word: str, split: str, runs_dir: Path | None) -> Scored:
    path = Path(word)
    if runs_dir is not None and not path.exists():
        path = runs_dir / word
    if (path / REPORT).is_file():
        return _read_scored(word, path)
    if not is_model(path):
        name = f"the name of a run in {runs_dir}" if runs_dir else "the name of a run with --config"
        raise ConfigError(
            f"RUN: got {word}, want {name}, or the path of a run, of a checkpoint folder, of an "
            "export or of the folder of a report"
        )
    folder = report_dir(path, split)
    command = _report_command(path, split)
    if not (folder / REPORT).is_file():
        raise StateError(f"{path}: no report on split {split!r}; run {command}")
    run = _read_scored(word, folder)
    return replace(run, stale=_staleness(path, run.report.compared, command))


def _staleness(path: Path, compared: Compared, command: str) -> str | None:
    """Return why the report of a run is no longer that of its checkpoint; None if it is."""
    if not is_run(path) or compared.checkpoint not in ("best", "last"):
        return None
    from training.checkpoint import saved_step  # imports torch, which takes seconds

    step = saved_step(path, "best" if compared.checkpoint == "best" else "last")
    if step in (None, compared.step):
        return None
    return (
        f"its report is that of step {compared.step}, but {compared.checkpoint!r} is at step "
        f"{step} now; run {command}"
    )


def _report_command(path: Path, split: str) -> str:
    config, override = path / "config.yaml", f"eval.split={split}"
    words = ["movienet-eval", "report", "--model", str(path)]
    if config.is_file():  # of the run, as it was started
        return f"`{shlex.join([*words, '--config', str(config), override])}`"
    return hint(shlex.join(words), override)


def _read_scored(name: str, folder: Path) -> Scored:
    report = read_report(folder / REPORT)
    predictions = read_predictions(folder / NPZ, report.compared.predictions)
    return Scored(name, folder, report, predictions)


def compare(runs: Sequence[Scored]) -> Comparison:
    """Compare runs on the movies that all of them have scored; the first run is the reference.

    Bootstrap draws and their seed are those of the first report.

    Raises:
        ConfigError: there are fewer than two runs, or one is named twice.
        DataError: splits, genres or labels differ, or no movie is common.
    """
    _check_names(runs)
    first = runs[0]
    for run in runs[1:]:
        _check_same_protocol(first, run)
    common = _common_movies(runs)
    for run in runs[1:]:
        _check_labels(first, run, common)
    protocol = first.report.compared
    if protocol.draws:
        logger.info("bootstrap: %d draws of %d movies", protocol.draws, len(common))
    weights_RM = draw_weights(len(common), protocol.draws, seed=protocol.seed)
    figures = [_Figures.of(_aligned(run, first, common), weights_RM) for run in runs]
    recipes = _recipes(runs)
    trained_on = max(run.report.compared.trained_on for run in runs)
    return Comparison(
        split=protocol.split,
        movies=len(common),
        draws=protocol.draws,
        seed=protocol.seed,
        runs=tuple(
            _run_row(number, run, own, figures[0], trained_on)
            for number, (run, own) in enumerate(zip(runs, figures, strict=True))
        ),
        recipes=_recipe_rows(runs, figures, recipes, trained_on),
        genres=_genre_rows(first.predictions.genres, figures),
        notes=_notes(runs, len(common)),
    )


def _check_names(runs: Sequence[Scored]) -> None:
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"RUN: got {twice} twice, want each run once")
    if len(runs) < 2:
        raise ConfigError(f"RUN: got {len(runs)} run, want two or more to compare")


def _check_same_protocol(first: Scored, run: Scored) -> None:
    got, want = run.report.compared.split, first.report.compared.split
    if got != want:
        raise DataError(f"{run.folder}: got a report on split {got!r}, {first.name} has {want!r}")
    genres, expected = set(run.predictions.genres), set(first.predictions.genres)
    if genres != expected:
        differing = ", ".join(sorted(genres ^ expected)[:3])
        raise DataError(
            f"{run.folder}: got {len(genres)} genres, {first.name} has {len(expected)}, and they "
            f"differ in {differing}; compare runs of the same data.genres"
        )


def _common_movies(runs: Sequence[Scored]) -> tuple[str, ...]:
    sets = [frozenset(run.predictions.movie_id) for run in runs]
    common = frozenset.intersection(*sets)
    if not common:
        counts = ", ".join(f"{run.name} {len(ids)}" for run, ids in zip(runs, sets, strict=True))
        raise DataError(f"compare: no movie was scored by all runs ({counts} movies)")
    return tuple(movie for movie in runs[0].predictions.movie_id if movie in common)


def _check_labels(first: Scored, run: Scored, common: Sequence[str]) -> None:
    want, got = (_aligned(one, first, common).labels_MG for one in (first, run))
    if differing := np.flatnonzero((want != got).any(axis=1)).tolist():
        example = differing[0]
        genre = first.predictions.genres[int(np.argmax(want[example] != got[example]))]
        raise DataError(
            f"{run.folder}: {len(differing)} of {len(common)} common movies have other labels than "
            f"in {first.name}, e.g. {common[example]} in {genre!r}; relabel one of the two sets by "
            "`movienet-shard relabel`, then write its report again"
        )


def _aligned(run: Scored, first: Scored, common: Sequence[str]) -> Predictions:
    """Return the predictions for the common movies, in the order of genres of the first run."""
    predictions = run.predictions
    row = {movie: position for position, movie in enumerate(predictions.movie_id)}
    column = {genre: position for position, genre in enumerate(predictions.genres)}
    columns = [column[genre] for genre in first.predictions.genres]
    cells = np.ix_([row[movie] for movie in common], columns)
    return Predictions(
        movie_id=common,
        genres=first.predictions.genres,
        labels_MG=predictions.labels_MG[cells],
        probabilities_MG=predictions.probabilities_MG[cells],
        thresholds_G=predictions.thresholds_G[columns],
        split=predictions.split,
    )


@dataclass(frozen=True)
class _Figures:
    """Figures of one run on the common movies, as they are and in every draw."""

    movies: int
    support_G: NDArray[np.int64]
    genre_aps: tuple[float, ...]
    mean_ap: float
    micro_ap: float
    draws: Draws

    @classmethod
    def of(cls, predictions: Predictions, weights_RM: NDArray[np.uint16]) -> _Figures:
        labels_MG, probabilities_MG = predictions.labels_MG, predictions.probabilities_MG
        return cls(
            movies=len(labels_MG),
            support_G=labels_MG.sum(axis=0, dtype=np.int64),
            genre_aps=genre_aps(labels_MG, probabilities_MG),
            mean_ap=mean_ap(labels_MG, probabilities_MG),
            micro_ap=micro_ap(labels_MG, probabilities_MG),
            draws=bootstrap(labels_MG, probabilities_MG, weights_RM),
        )


def _run_row(
    number: int, run: Scored, own: _Figures, reference: _Figures, trained_on: int
) -> RunRow:
    compared = run.report.compared
    return RunRow(
        key=_key(number),
        name=run.name,
        source=str(run.folder),
        model=compared.model,
        checkpoint=compared.checkpoint,
        epoch=compared.epoch,
        step=compared.step,
        training_seed=compared.training_seed,
        encoder=compared.encoder,
        features=compared.features,
        movies=compared.movies,
        trained_on=compared.trained_on,
        mean_ap=figure(own.mean_ap, own.draws.mean_ap_R, movies=own.movies),
        micro_ap=figure(own.micro_ap, own.draws.micro_ap_R, movies=own.movies),
        difference=_difference([own], [reference], trained_on) if number else None,
    )


def _key(number: int) -> str:
    """Return A … Z, A1 … Z1, …."""
    return ascii_uppercase[number % 26] + (str(number // 26) if number >= 26 else "")


def _difference(
    ours: Sequence[_Figures], theirs: Sequence[_Figures], trained_on: int
) -> Difference:
    """Return the difference of mean mAPs. Each draw contains the same movies for all runs."""
    values = [np.mean([one.mean_ap for one in side]) for side in (ours, theirs)]
    draws_2R = [np.mean([one.draws.mean_ap_R for one in side], axis=0) for side in (ours, theirs)]
    movies = ours[0].movies
    gap = figure(
        float(values[0] - values[1]), draws_2R[0] - draws_2R[1], movies=movies, bounded=False
    )
    return Difference(mean_ap=gap, better=verdict(gap, movies=movies, trained_on=trained_on))


def _recipes(runs: Sequence[Scored]) -> list[list[int]]:
    """Return the numbers of the runs of each recipe, in order of their first runs."""
    recipes: dict[object, list[int]] = {}
    for number, run in enumerate(runs):
        compared = run.report.compared
        # Scored in the same way, too. An export of an earlier version has no recipe.
        protocol = compared.features, compared.checkpoint, compared.windows, compared.frames
        key = (compared.recipe, protocol) if compared.recipe else number
        recipes.setdefault(key, []).append(number)
    return list(recipes.values())


def _recipe_rows(
    runs: Sequence[Scored],
    figures: Sequence[_Figures],
    recipes: Sequence[Sequence[int]],
    trained_on: int,
) -> tuple[RecipeRow, ...]:
    rows: list[RecipeRow] = []
    reference = [figures[number] for number in recipes[0]]
    for numbers in recipes:
        own = [figures[number] for number in numbers]
        rows.append(
            RecipeRow(
                name=_recipe_name([runs[number].name for number in numbers]),
                runs=tuple(_key(number) for number in numbers),
                seeds=tuple(runs[number].report.compared.training_seed for number in numbers),
                mean_ap=_spread([one.mean_ap for one in own]),
                micro_ap=_spread([one.micro_ap for one in own]),
                difference=_difference(own, reference, trained_on) if rows else None,
            )
        )
    return tuple(rows)


def _recipe_name(names: Sequence[str]) -> str:
    """Return what the names of the runs begin with, without the number of a seed."""
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in same)
    return re.sub(r"[-_.= ]*[0-9]*$", "", prefix) or names[0]


def _spread(values: Sequence[float]) -> Spread:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean=float(np.mean(values)), std=std)


def _genre_rows(genres: Sequence[str], figures: Sequence[_Figures]) -> tuple[GenreAps, ...]:
    support_G = figures[0].support_G.tolist()
    return tuple(
        GenreAps(
            genre=genre,
            support=support,
            aps=tuple(one.genre_aps[g] if support else None for one in figures),
        )
        for g, (genre, support) in enumerate(zip(genres, support_G, strict=True))
    )


def _notes(runs: Sequence[Scored], n_common: int) -> tuple[str, ...]:
    notes = [
        f"{run.name}: {compared.trained_on} of {compared.movies} scored movies were trained on: "
        "this is not a test."
        for run in runs
        if (compared := run.report.compared).trained_on
    ]
    notes += [f"{run.name}: {run.stale}." for run in runs if run.stale]
    notes += [
        f"{run.name}: scored {run.report.compared.movies} movies, {n_common} of them are common."
        for run in runs
        if run.report.compared.movies != n_common
    ]
    return tuple(notes)
