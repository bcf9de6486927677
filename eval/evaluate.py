"""Evaluation of a trained model on one split: its scores, baselines on the same movies, intervals.

M = movies, N = rows of a movie, D = feature size, G = genres
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import StateError
from configs.runtime.hints import hint
from eval.baselines import (
    MEAN_POOL,
    Baseline,
    FittedBaselines,
    fit_baselines,
    score_baselines,
)
from eval.intervals import MIN_POSITIVES, Draws, bootstrap, draw_weights
from eval.model import load_model
from eval.origin import check_scorable, describe_origin
from eval.predictions import Predictions
from eval.published import SOURCE, read_published
from eval.report import (
    BaselineResult,
    Compared,
    Figure,
    GenreRow,
    Report,
    figure,
    verdict,
)
from eval.sections import (
    THRESHOLD,
    Rule,
    calibration,
    cooccurrence,
    curves,
    films,
    rules,
    threshold_row,
)
from eval.zero_shot import read_prompts
from sharding.features import FeatureSet, before_extension, open_features, split_digest
from sharding.labels import parse_fold
from training.agreement import check_agreement
from training.checkpoint import Trained, load_trained
from training.metrics import genre_aps, genre_metrics, mean_ap, micro_ap
from training.scoring import Scores, score_split
from training.split_selection import split_movies, warn_of_other_data
from training.stream.view import View
from training.threads import choose_threads

if TYPE_CHECKING:
    from configs.schema import Config

logger = logging.getLogger(__name__)

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """A report, and the predictions that it is about."""

    report: Report
    predictions: Predictions


def evaluate(config: Config, model: Path | None = None) -> Result | None:
    """Score a model on ``config.eval.split``. All ranks of a world call this function.

    The model determines the window length. ``config`` determines the data and, by ``eval``, the
    number of windows per movie.

    Args:
        config: The configuration.
        model: Run, checkpoint folder or export; default: the run at ``config.run_dir``.

    Returns:
        The result on rank 0; None on the other ranks, which have scored their part of the movies.

    Raises:
        ConfigError: ``model`` is none of these.
        StateError: the run has no such checkpoint, was trained on other features, or was trained on
            movies of this split.
        DataError: the feature set is missing, or the split has no labelled movie.
    """
    prompts = read_prompts(config.eval.prompts)
    which = config.eval.checkpoint
    trained = load_trained(config.run_dir, which) if model is None else load_model(model, which)
    features = _features_of(trained, config)
    check_scorable(trained, features)
    # The run's own split file decides: another one could score movies that it was trained on.
    scored = split_movies(features, config.eval.split, _split_file(trained))
    seen = seen_movies(trained, [features.movie_ids[movie] for movie in scored])
    if seen and not config.eval.allow_train:
        raise StateError(_refusal(trained, config.eval.split, seen, len(scored)))
    scores = _score(config, trained, features, scored)
    if scores is None:
        return None
    warn_of_other_data(config, features)
    fitted = fit_baselines(config, trained, features)
    baselines, zero_shot_note = score_baselines(config, fitted.baselines, features, scored, prompts)
    decisions = _rules(trained)
    predictions = Predictions(
        scores.movie_id,
        scores.genres,
        scores.labels_MG,
        scores.probabilities_MG,
        decisions[-1].thresholds_G,
        config.eval.split,
    )
    if config.eval.bootstrap:
        logger.info("bootstrap: %d draws of %d movies", config.eval.bootstrap, len(scored))
    evaluation = _Evaluation.of(predictions, draws=config.eval.bootstrap, seed=config.eval.seed)
    report = evaluation.report(
        _compared(config, trained, features, predictions, len(seen), fitted),
        baselines,
        fitted,
        decisions,
        zero_shot_note,
    )
    return Result(report, predictions)


def _features_of(trained: Trained, config: Config) -> FeatureSet:
    """Open the configured features, without films that were added after the training.

    With new films a computed split assigns movies to other splits, and scores are not comparable
    with earlier ones. A location with a digest is opened as it is.
    """
    features = open_features(config.features_url, config.storage)
    own = before_extension(features, trained.data)
    if split_digest(config.features_url)[1] or own is None or own is features:
        return features
    everything = f"stream.features_url={config.features_url}@{features.digest[:12]}"
    logger.info(
        "%s was extended after the training: scoring its former %d of %d movies; all: %s",
        features.storage.location, len(own), len(features),
        hint("movienet-eval report", everything),
    )  # fmt: skip
    return own


def _rules(trained: Trained) -> tuple[Rule, ...]:
    return rules(
        len(trained.genres),
        threshold=trained.threshold,
        is_tuned=trained.config.training.threshold is None,
        genre_thresholds=trained.genre_thresholds,
    )


def _split_file(trained: Trained) -> str | None:
    """Return ``training.split`` of a model. An export contains a fold, but not the path of a file.

    Movies that it was trained on are refused in any case.
    """
    split = trained.config.training.split
    return split if trained.features_url or split is None or parse_fold(split) else None


def seen_movies(trained: Trained, ids: Sequence[str]) -> tuple[str, ...]:
    """Return the movies that the model was trained on or selected by, in the given order."""
    seen = trained.movies.ids
    return tuple(movie for movie in ids if movie in seen)


def _refusal(trained: Trained, split: str, seen: Sequence[str], n_scored: int) -> str:
    allow = hint("movienet-eval report", "eval.allow_train=true")
    return (
        f"{trained.where}: {len(seen)} of {n_scored} movies of split {split!r} were "
        f"trained on ({', '.join(seen[:3])}{', …' if seen[3:] else ''}), so a score on them is not "
        f"a test; set eval.split to another split, or score them nevertheless: {allow}"
    )


@dataclass(frozen=True)
class _Evaluation:
    """The scored movies and bootstrap draws, shared by the model and all baselines."""

    predictions: Predictions
    weights_RM: NDArray[np.uint16]
    draws: Draws

    @classmethod
    def of(cls, predictions: Predictions, *, draws: int, seed: int) -> _Evaluation:
        labels_MG = predictions.labels_MG
        weights_RM = draw_weights(len(labels_MG), draws, seed=seed)
        drawn = bootstrap(labels_MG, predictions.probabilities_MG, weights_RM)
        return cls(predictions, weights_RM, drawn)

    @property
    def labels_MG(self) -> NDArray[np.uint8]:  # noqa: N802  # axes, as in the fields
        return self.predictions.labels_MG

    @property
    def probabilities_MG(self) -> NDArray[np.float64]:  # noqa: N802
        return self.predictions.probabilities_MG

    def report(
        self,
        compared: Compared,
        baselines: tuple[Baseline, ...],
        fitted: FittedBaselines,
        rules: tuple[Rule, ...],
        zero_shot_note: str | None,
    ) -> Report:
        return Report(
            compared=compared,
            mean_ap=self._figure(
                mean_ap(self.labels_MG, self.probabilities_MG), self.draws.mean_ap_R
            ),
            micro_ap=self._figure(
                micro_ap(self.labels_MG, self.probabilities_MG), self.draws.micro_ap_R
            ),
            genres=self._rows(baselines, fitted),
            thresholds=tuple(threshold_row(self.predictions, rule) for rule in rules),
            curves=curves(self.predictions),
            calibration=calibration(self.predictions),
            cooccurrence=cooccurrence(self.predictions, rules[-1]),
            films=films(self.predictions, rules[-1]),
            baselines=tuple(self._compare(one, compared.trained_on) for one in baselines),
            published_source=SOURCE,
            notes=_notes(compared, fitted, zero_shot_note),
        )

    def _rows(
        self, baselines: tuple[Baseline, ...], fitted: FittedBaselines
    ) -> tuple[GenreRow, ...]:
        published = read_published()
        metrics = genre_metrics(
            self.labels_MG, self.probabilities_MG, self.predictions.genres, THRESHOLD
        )
        pooled_aps = next(
            (
                genre_aps(self.labels_MG, one.logits_MG)
                for one in baselines
                if one.name == MEAN_POOL
            ),
            None,
        )
        return tuple(
            GenreRow(
                genre=one.genre,
                support=one.support,
                too_few=0 < one.support < MIN_POSITIVES,
                train_support=int(fitted.baselines.support_G[g]) if fitted.baselines else None,
                precision=one.precision,
                recall=one.recall if one.support else None,
                ap=self._genre_ap(g, one.ap, one.support),
                mean_pool_ap=pooled_aps[g] if pooled_aps and one.support else None,
                published=published.get(one.genre),
            )
            for g, one in enumerate(metrics)
        )

    def _genre_ap(self, genre: int, ap: float, support: int) -> Figure | None:
        if not support:
            return None
        if support < MIN_POSITIVES:
            return Figure(value=ap)
        return figure(ap, self.draws.genre_ap_RG[:, genre], movies=support)

    def _figure(self, value: float, draws_R: NDArray[np.float64]) -> Figure:
        return figure(value, draws_R, movies=len(self.labels_MG))

    def _compare(self, baseline: Baseline, trained_on: int) -> BaselineResult:
        drawn = bootstrap(self.labels_MG, baseline.logits_MG, self.weights_RM)
        baseline_map = mean_ap(self.labels_MG, baseline.logits_MG)
        gain = mean_ap(self.labels_MG, self.probabilities_MG) - baseline_map
        # Paired: both see the same draw of movies, so movies that are hard for both cancel out.
        difference = figure(
            gain,
            self.draws.mean_ap_R - drawn.mean_ap_R,
            movies=len(self.labels_MG),
            bounded=False,
        )
        return BaselineResult(
            name=baseline.name,
            note=baseline.note,
            mean_ap=self._figure(baseline_map, drawn.mean_ap_R),
            micro_ap=self._figure(micro_ap(self.labels_MG, baseline.logits_MG), drawn.micro_ap_R),
            difference=difference,
            beaten=verdict(difference, movies=len(self.labels_MG), trained_on=trained_on),
        )


def _score(
    config: Config, trained: Trained, features: FeatureSet, scored: Positions
) -> Scores | None:
    """Return the scores on rank 0, None on other ranks."""
    from configs.runtime.launch import start

    training = config.training
    distributed = start(
        device=training.device,
        precision="fp32",  # so that all machines give the same figures
        accumulation=1,
        expected_world_size=None,
        threads=training.threads,
    )
    choose_threads(trained.model, distributed.device, training.threads)
    logger.info("scoring: %d movies of split %s", len(scored), config.eval.split)
    try:
        check_agreement(distributed, _facts(config, trained, features, scored))
        scores = score_split(
            trained.model.to(distributed.device),
            features,
            scored,
            View.of(trained.config, config.eval.windows),
            batch_size=config.eval.batch_size,
            distributed=distributed,
        )
        return scores if distributed.world.rank == 0 else None
    finally:
        distributed.close()


def _facts(
    config: Config, trained: Trained, features: FeatureSet, scored: Positions
) -> dict[str, Any]:
    """Return what all ranks must score: another copy of a set or run would mix two models."""
    return {
        "eval": config.eval.model_dump(mode="json"),
        "the features (digest of their manifest)": features.digest[:12],
        "the labels": features.labels.digest[:12],
        "the model": [trained.recipe, trained.checkpoint, trained.step],
        "the number of scored movies": len(scored),
    }


def _compared(
    config: Config,
    trained: Trained,
    features: FeatureSet,
    predictions: Predictions,
    n_seen: int,
    fitted: FittedBaselines,
) -> Compared:
    encoder, untrained = describe_origin(features.manifest.provenance)
    view = View.of(trained.config, config.eval.windows)
    return Compared(
        run=trained.config.training.run_name,
        model=trained.config.model.class_,
        checkpoint=trained.checkpoint,
        epoch=trained.epoch,
        step=trained.step,
        training_seed=trained.config.training.seed,
        recipe=trained.recipe,
        features=features.digest,
        labels=features.labels.digest,
        encoder=encoder,
        untrained=untrained,
        split=config.eval.split,
        movies=len(predictions.movie_id),
        trained_on=n_seen,
        train_movies=fitted.baselines.movies if fitted.baselines else 0,
        model_movies=len(trained.movies.ids),
        windows=view.windows,
        frames=view.frames,
        shuffled=trained.config.training.shuffle_frames,
        threshold=THRESHOLD,
        draws=config.eval.bootstrap,
        seed=config.eval.seed,
        predictions=predictions.digest,
    )


def _notes(compared: Compared, fitted: FittedBaselines, zero_shot: str | None) -> tuple[str, ...]:
    notes = [note for note in (fitted.note, zero_shot) if note]
    if compared.draws:
        notes.append(
            f"Genres with fewer than {MIN_POSITIVES} movies in this split have too few for an "
            "interval."
        )
    return tuple(notes)
