"""The data of a report: ``report.json``, the only input of its Markdown, page, table and plot.

A report records what was compared and how, so that every figure comes with its protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import DataError
from configs.runtime.hints import hint
from eval.intervals import interval

Share = Annotated[float, Field(ge=0, le=1)]
Verdict = Literal["yes", "no", "unclear", "not a test", "too few"]

FEWEST_MOVIES = 30
"""Movies below which a report compares without a claim: a bootstrap of a few movies repeats them,
so its interval is too narrow."""


class Record(BaseModel):
    """A frozen section of the report; unknown, missing and non-finite values are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Figure(Record):
    """An estimate with its 95 % interval; both ends are None if it has none."""

    value: float
    low: float | None = None
    high: float | None = None


class PublishedRow(Record):
    """Published figures of one genre, in per cent; None if not published."""

    resnet_precision: float | None
    resnet_recall: float | None
    resnet_ap: float | None
    lstm_precision: float | None
    lstm_recall: float | None
    lstm_ap: float | None


class GenreRow(Record):
    """One genre of the scored split; all figures are fractions from 0 to 1."""

    genre: str
    support: int
    """Movies of the scored split that have the genre."""

    too_few: bool
    """True with one to nine such movies: the AP has no interval."""

    train_support: int | None
    """Movies of the train split that have the genre; None without baselines."""

    precision: Share
    """0 if no movie is predicted to have the genre."""

    recall: Share | None
    """None without a positive movie."""

    ap: Figure | None
    """None without a positive movie."""

    mean_pool_ap: Share | None
    published: PublishedRow | None


class Decided(Record):
    """Precision, recall and F1 of predicted genres; 0 where nothing is predicted or positive."""

    precision: Share
    recall: Share
    f1: Share


class GenreDecided(Decided):
    """Those of one genre, with its threshold."""

    threshold: Share


class ThresholdRow(Record):
    """Decisions by one rule; probabilities at or above the threshold count as predicted."""

    threshold: Share | None
    """Shared by all genres; None: one per genre."""

    origin: str
    """Where the threshold comes from, as text."""

    micro: Decided
    """Over all (movie, genre) pairs."""

    macro: Decided
    """Mean over the genres with at least one scored movie."""

    weighted: Decided
    """Mean over genres, weighted by their number of scored movies."""

    genres: tuple[GenreDecided, ...]
    """In the order of the report's genres."""


class Curve(Record):
    """Precision over recall of one genre, or of all (movie, genre) pairs."""

    name: str
    precision: tuple[Share, ...]
    """The best at this or a higher recall, at evenly spaced recalls from 0 to 1."""


class ReliabilityBin(Record):
    """(movie, genre) pairs whose probability is in one interval."""

    low: Share
    high: Share
    pairs: int
    predicted: Share
    """Mean probability."""

    observed: Share
    """Share of the pairs whose movie has the genre."""


class Calibration(Record):
    """How far probabilities agree with frequencies."""

    error: Share
    """Expected calibration error over ten bins of equal width."""

    bins: tuple[ReliabilityBin, ...]
    """Bins with at least one pair, ascending."""


class Cooccurrence(Record):
    """Movies that have both genres, ``[G][G]``; the diagonal counts each genre."""

    labelled: tuple[tuple[int, ...], ...]
    predicted: tuple[tuple[int, ...], ...]
    """By the last of the report's thresholds."""


class FilmBar(Record):
    """One genre of a film."""

    genre: str
    probability: Share
    threshold: Share
    """The last of the report's thresholds."""

    labelled: bool


class Film(Record):
    """A film and the genres to show, by falling probability: the most probable, and its own."""

    movie: str
    bars: tuple[FilmBar, ...]


class Films(Record):
    """The films with the most confident predictions. A film's prediction is its first bar."""

    right: tuple[Film, ...]
    wrong: tuple[Film, ...]


class Compared(Record):
    """The protocol of a report: run, data, split and settings."""

    run: str
    model: str
    checkpoint: str
    """``best``, ``last`` or ``step-…``."""

    epoch: int
    step: int
    training_seed: int
    recipe: str | None
    """Digest of everything that determines the model, except seeds; None in earlier exports."""

    features: str
    """Data digest: sha256 of the feature set's manifest."""

    labels: str
    """Digest of genres and splits."""

    encoder: str
    """Where the features come from, as text."""

    untrained: bool
    """True if the features were made with random weights."""

    split: str
    movies: int
    trained_on: int
    """Scored movies that the model was trained on or selected by; 0 in a test."""

    train_movies: int
    """Movies that the baselines were fitted on; 0 without baselines."""

    model_movies: int
    """Movies that the model was trained on or selected by."""

    windows: int
    """Maximum number of windows per movie; their logits are averaged."""

    frames: int | None
    """Rows per window; None: complete movies."""

    shuffled: bool
    """True if the frames of every movie were permuted."""

    threshold: Share
    """Threshold of precision and recall."""

    draws: int
    """Bootstrap draws; 0: no intervals."""

    seed: int
    """Seed of the bootstrap."""

    predictions: str
    """The sha256 of ``predictions.npz``."""


class BaselineResult(Record):
    """A baseline, scored on the same movies: fitted on the model's train movies, or zero-shot."""

    name: str
    note: str
    mean_ap: Figure
    micro_ap: Figure
    difference: Figure
    """mAP of the model minus mAP of the baseline, paired over movies."""

    beaten: Verdict
    """``yes``: the interval is above 0; ``no``: below 0; ``unclear``: it contains 0, or there is no
    interval. ``not a test``: the model was trained on scored movies; ``too few``: fewer than 30
    movies were scored."""


class Report(Record):
    """The content of ``report.json``."""

    version: Literal[2] = 2
    compared: Compared
    mean_ap: Figure
    micro_ap: Figure
    genres: tuple[GenreRow, ...]
    thresholds: tuple[ThresholdRow, ...]
    """One half, the model's own threshold if it has another one, and those per genre if it has any.
    None depends on the scored movies."""

    curves: tuple[Curve, ...]
    """All pairs first, then the genres with a movie."""

    calibration: Calibration
    cooccurrence: Cooccurrence
    films: Films
    baselines: tuple[BaselineResult, ...]
    published_source: str
    notes: tuple[str, ...]

    @property
    def absent(self) -> tuple[str, ...]:
        """Genres without a positive movie, which the mAP excludes."""
        return tuple(row.genre for row in self.genres if row.ap is None)

    @property
    def caveat(self) -> str | None:
        """What makes the report no test, for the top of every form; None for a test."""
        compared = self.compared
        if not compared.trained_on:
            return None
        return (
            f"{compared.trained_on} of {compared.movies} scored movies were trained on: this is "
            "not a test."
        )

    @property
    def has_published(self) -> bool:
        """Whether any genre of the report has published figures."""
        return any(row.published for row in self.genres)


def figure(
    value: float, draws_R: NDArray[np.float64], *, movies: int, bounded: bool = True
) -> Figure:
    """Return an estimate with the interval of its bootstrap draws; see ``intervals.interval``."""
    ends = interval(value, draws_R, movies=movies, bounded=bounded)
    return Figure(value=value, low=ends.low, high=ends.high) if ends else Figure(value=value)


def verdict(difference: Figure, *, movies: int, trained_on: int) -> Verdict:
    """Return whether a paired difference shows that the model beats the baseline.

    Args:
        difference: mAP of the model minus mAP of the baseline.
        movies: Scored movies.
        trained_on: Those of them that the model was trained on.
    """
    if trained_on:
        return "not a test"
    if movies < FEWEST_MOVIES:
        return "too few"
    if difference.low is None or difference.high is None:
        return "unclear"
    if difference.low > 0:
        return "yes"
    return "no" if difference.high < 0 else "unclear"


def read_report(path: Path) -> Report:
    """Read a ``report.json``.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    if not path.is_file():
        raise DataError(f"{path}: no report; run {hint('movienet-eval report')}")
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(place) for place in first["loc"]) or "top level"
        raise DataError(
            f"{path}: {key}: {first['msg']}, want a report of version 2; "
            f"run {hint('movienet-eval report')}"
        ) from None
