"""The baselines of a report: how they are fitted, and their predictions for the scored movies.

M = movies, D = feature size, G = genres
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from configs.errors import MovieNetError, error_text
from eval.zero_shot import NAME as ZERO_SHOT
from eval.zero_shot import Prompts, zero_shot_logits
from sharding.features import FeatureSet
from training.baselines import MEAN_POOL_C, Baselines, fit_recorded, read_means, usable_movies

if TYPE_CHECKING:
    from configs.schema import Config
    from encoders.text import TextTower
    from training.checkpoint import Trained

MEAN_POOL = "mean-pool + linear"
"""Name of the baseline that has a column per genre."""


@dataclass(frozen=True)
class Baseline:
    """A baseline and its predictions for the scored movies."""

    name: str
    note: str
    """How it was fitted, as text."""

    logits_MG: NDArray[np.float64]


@dataclass(frozen=True)
class FittedBaselines:
    """The baselines of a model and where its train movies were read."""

    baselines: Baselines | None
    """None if the train movies could not be read."""

    note: str | None
    """Their limits, as a sentence; None if they were fitted on all train movies."""


def fit_baselines(config: Config, trained: Trained, features: FeatureSet) -> FittedBaselines:
    """Return the baselines of a model, fitted on its own train and holdout movies.

    They are read from the scored set if it contains all of them, else from the export or from the
    set that the model was trained on, else from the scored set as far as it contains them.
    """
    movies, n_model = usable_movies(features, trained.movies.ids), len(trained.movies.ids)
    if len(movies) == n_model:
        return FittedBaselines(Baselines.fit(features, movies), None)
    lacks = f"The scored feature set contains {len(movies)} of the {n_model} movies that the model "
    lacks += "was trained on"
    if trained.baselines is not None:
        return FittedBaselines(
            trained.baselines, f"{lacks}; the baselines are those of the export."
        )
    try:
        fitted = fit_recorded(trained, config.storage)
    except (MovieNetError, OSError) as error:
        reason = f"its own features could not be used ({error_text(error)})"
        if len(movies):
            return FittedBaselines(
                Baselines.fit(features, movies),
                f"{lacks}, and {reason}: baselines were fitted on {len(movies)} movies.",
            )
        return FittedBaselines(None, f"{lacks}, and {reason}: no baseline could be fitted.")
    return FittedBaselines(
        fitted, f"{lacks}; the baselines were fitted on the features that it was trained on."
    )


def score_baselines(
    config: Config,
    fitted: Baselines | None,
    features: FeatureSet,
    scored: NDArray[np.int64],
    prompts: Prompts,
) -> tuple[tuple[Baseline, ...], str | None]:
    """Return the baselines of the scored movies, and why the zero-shot one is absent.

    Args:
        config: The encoder, whose text tower the zero-shot baseline uses.
        fitted: Those that were fitted on train movies, if any.
        features: The scored feature set.
        scored: Positions of the scored movies in it.
        prompts: Texts of the zero-shot baseline.
    """
    tower, note = _text_tower(config, features)
    if fitted is None and tower is None:
        return (), note
    means_MD = read_means(features, scored)
    baselines = _fitted_baselines(fitted, means_MD) if fitted else ()
    if tower:
        baselines += (_zero_shot(tower, prompts, features.labels.genres, means_MD),)
    return baselines, note


def _fitted_baselines(fitted: Baselines, means_MD: NDArray[np.float32]) -> tuple[Baseline, ...]:
    return (
        Baseline(
            "class prior",
            "every movie gets the genre frequencies of the train split",
            fitted.prior.predict(len(means_MD)),
        ),
        Baseline(
            MEAN_POOL,
            "logistic regression on the mean of a movie's L2-normalised rows, repeated rows "
            "counted once, zero rows excluded; means centred, one scale for all dimensions, "
            f"C = {MEAN_POOL_C:g}",
            fitted.linear.predict(means_MD),
        ),
    )


def _zero_shot(
    tower: TextTower, prompts: Prompts, genres: Sequence[str], means_MD: NDArray[np.float32]
) -> Baseline:
    return Baseline(
        ZERO_SHOT,
        "not trained on movies: mean cosine of a movie's rows and the texts of a genre, by "
        f"{len(prompts.templates)} templates such as “{prompts.templates[0]}”",
        zero_shot_logits(tower, prompts, genres, means_MD),
    )


def _text_tower(config: Config, features: FeatureSet) -> tuple[TextTower | None, str | None]:
    """Return the text tower of the features, or why there is none."""
    from encoders.text import TextTower

    # Without the location of the features: a report is the same wherever they are stored.
    try:
        return TextTower.of(config.encoder, features.manifest.provenance, "the features"), None
    except (MovieNetError, OSError) as error:
        return None, f"No baseline {ZERO_SHOT}: {error_text(error)}."
