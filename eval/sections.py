"""Sections of a report that are computed from the predictions of the model alone.

M = movies, G = genres
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from eval.calibration import expected_error, reliability
from eval.confident import most_confident
from eval.cooccurrence import count_together
from eval.predictions import Predictions
from eval.report import (
    Calibration,
    Cooccurrence,
    Curve,
    Decided,
    Film,
    FilmBar,
    Films,
    GenreDecided,
    ReliabilityBin,
    ThresholdRow,
)
from training.metrics import decide, precision_at_recall

ALL_PAIRS = "all genres"
"""Name of the curve over all (movie, genre) pairs."""

THRESHOLD = 0.5
"""Threshold of precision and recall, as in the published tables."""


@dataclass(frozen=True)
class Rule:
    """A way to decide which genres are predicted."""

    thresholds_G: NDArray[np.float64]
    origin: str
    per_genre: bool


def rules(
    n_genres: int,
    *,
    threshold: float,
    is_tuned: bool,
    genre_thresholds: Sequence[float] | None,
) -> tuple[Rule, ...]:
    """Return one half, the model's threshold if it is another one, and those per genre if any.

    Args:
        n_genres: Number of genres.
        threshold: The model's.
        is_tuned: It was tuned on the holdout, not configured.
        genre_thresholds: The model's, tuned on the holdout.
    """
    tuned = "tuned by cross-validation on the run's holdout"
    found = [Rule(np.full(n_genres, THRESHOLD), "as in the published tables", per_genre=False)]
    if threshold != THRESHOLD:
        origin = tuned if is_tuned else "training.threshold"
        found.append(Rule(np.full(n_genres, threshold), origin, per_genre=False))
    if genre_thresholds is not None:
        kept = "; none improved on the common one" if set(genre_thresholds) == {threshold} else ""
        found.append(Rule(np.array(genre_thresholds), f"{tuned}{kept}", per_genre=True))
    return tuple(found)


def threshold_row(predictions: Predictions, rule: Rule) -> ThresholdRow:
    """Return precision, recall and F1 of the decisions of one rule."""
    made = decide(predictions.labels_MG, predictions.probabilities_MG >= rule.thresholds_G)
    thresholds = rule.thresholds_G.tolist()
    return ThresholdRow(
        threshold=None if rule.per_genre else thresholds[0],
        origin=rule.origin,
        micro=Decided(**asdict(made.micro)),
        macro=Decided(**asdict(made.macro)),
        weighted=Decided(**asdict(made.weighted)),
        genres=tuple(
            GenreDecided(threshold=threshold, **asdict(one))
            for threshold, one in zip(thresholds, made.genres, strict=True)
        ),
    )


def curves(predictions: Predictions) -> tuple[Curve, ...]:
    """Return precision over recall of all pairs, and of each genre with a movie."""
    labels_MG, probabilities_MG = predictions.labels_MG, predictions.probabilities_MG
    pairs = labels_MG.reshape(-1, 1), probabilities_MG.reshape(-1, 1)
    return _curves(*pairs, [ALL_PAIRS]) + _curves(labels_MG, probabilities_MG, predictions.genres)


def _curves(
    labels_MG: NDArray[np.uint8], probabilities_MG: NDArray[np.float64], names: Sequence[str]
) -> tuple[Curve, ...]:
    points = groupby(precision_at_recall(labels_MG, probabilities_MG, names), key=itemgetter(0))
    return tuple(Curve(name=name, precision=tuple(p for *_, p in one)) for name, one in points)


def calibration(predictions: Predictions) -> Calibration:
    """Return the reliability of the probabilities."""
    bins = reliability(predictions.labels_MG, predictions.probabilities_MG)
    return Calibration(
        error=expected_error(bins), bins=tuple(ReliabilityBin(**asdict(one)) for one in bins)
    )


def cooccurrence(predictions: Predictions, rule: Rule) -> Cooccurrence:
    """Return which genres occur together, labelled and predicted by ``rule``."""
    labelled, predicted = (
        tuple(tuple(row) for row in count_together(hot_MG).tolist())
        for hot_MG in (
            predictions.labels_MG,
            predictions.probabilities_MG >= rule.thresholds_G,
        )
    )
    return Cooccurrence(labelled=labelled, predicted=predicted)


def films(predictions: Predictions, rule: Rule) -> Films:
    """Return the films with the most confident right and wrong predictions."""
    right, wrong = (_films(predictions, rule, right=right) for right in (True, False))
    return Films(right=right, wrong=wrong)


def _films(predictions: Predictions, rule: Rule, *, right: bool) -> tuple[Film, ...]:
    chosen = most_confident(predictions.labels_MG, predictions.probabilities_MG, right=right)
    return tuple(
        Film(
            movie=predictions.movie_id[film.movie],
            bars=tuple(
                FilmBar(
                    genre=predictions.genres[bar.genre],
                    probability=bar.probability,
                    threshold=float(rule.thresholds_G[bar.genre]),
                    labelled=bar.labelled,
                )
                for bar in film.bars
            ),
        )
        for film in chosen
    )
