"""Evaluation of a trained model on one split: its scores, baselines on the same movies, intervals.

M = movies, N = rows of a movie, D = feature size, G = genres
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import MovieNetError, StateError, error_text
from configs.runtime.hints import hint
from eval.intervals import MIN_POSITIVES, Draws, bootstrap, draw_weights
from eval.model import load_model
from eval.predictions import Predictions
from eval.published import SOURCE, read_published
from eval.report import (
    BaselineResult,
    Compared,
    Figure,
    GenreRow,
    PublishedRow,
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
from eval.zero_shot import NAME as ZERO_SHOT
from eval.zero_shot import Prompts, read_prompts, zero_shot_logits
from sharding.features import FeatureSet, before_extension, open_features, split_digest
from sharding.labels import parse_fold
from training.agreement import check_agreement
from training.baselines import MEAN_POOL_C, Baselines, fit_recorded, read_means, usable_movies
from training.checkpoint import Trained, load_trained
from training.metrics import genre_aps, genre_metrics, mean_ap, micro_ap
from training.scoring import Scores, score_split
from training.split_selection import split_movies
from training.stream.view import View
from training.threads import choose_threads

if TYPE_CHECKING:
    from configs.schema import Config
    from encoders.text import TextTower

logger = logging.getLogger(__name__)

MEAN_POOL = "mean-pool + linear"
"""Name of the baseline that has a column per genre."""

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
    train = fit_baselines(config, trained, features)
    baselines, zero_shot_note = _baselines(config, train.fitted, features, scored, prompts)
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
        _compared(config, trained, features, predictions, len(seen), train),
        baselines,
        train,
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


def check_scorable(trained: Trained, features: FeatureSet) -> None:
    """Check that the features were made in the same way as those that the model was trained on.

    Raises:
        StateError: tower, import, dimension or genres differ; one line names the difference.
    """
    where, run = features.storage.location, trained.where
    if tuple(features.labels.genres) != trained.genres:
        genres = json.dumps(trained.genres, ensure_ascii=False)
        relabel = hint("movienet-shard relabel", f"data.genres={genres}")
        raise StateError(
            f"{where}: got genres {_short(features.labels.genres)}, {run} was trained on "
            f"{_short(trained.genres)}; run {relabel}"
        )
    want, got = (_origin(tree) for tree in (trained.provenance, features.manifest.provenance))
    for key in sorted(want.keys() | got.keys()):
        if want.get(key) != got.get(key):
            raise StateError(
                f"{where}: {key}: got {got.get(key)!r}, {run} was trained on {want.get(key)!r}; "
                "set stream.features_url to features that were made in the same way"
            )


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
class Baseline:
    """A baseline and its predictions for the scored movies."""

    name: str
    note: str
    """How it was fitted, as text."""

    logits_MG: NDArray[np.float64]


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
        train: Train,
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
            genres=self._rows(baselines, train),
            thresholds=tuple(threshold_row(self.predictions, rule) for rule in rules),
            curves=curves(self.predictions),
            calibration=calibration(self.predictions),
            cooccurrence=cooccurrence(self.predictions, rules[-1]),
            films=films(self.predictions, rules[-1]),
            baselines=tuple(self._compare(one, compared.trained_on) for one in baselines),
            published_source=SOURCE,
            notes=_notes(compared, train, zero_shot_note),
        )

    def _rows(self, baselines: tuple[Baseline, ...], train: Train) -> tuple[GenreRow, ...]:
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
                train_support=int(train.fitted.support_G[g]) if train.fitted else None,
                precision=one.precision,
                recall=one.recall if one.support else None,
                ap=self._genre_ap(g, one.ap, one.support),
                mean_pool_ap=pooled_aps[g] if pooled_aps and one.support else None,
                published=PublishedRow(**asdict(published[one.genre]))
                if one.genre in published
                else None,
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


@dataclass(frozen=True)
class Train:
    """The baselines of a model and where its train movies were read."""

    fitted: Baselines | None
    note: str | None
    """What a reader must know about them, as a sentence."""


def fit_baselines(config: Config, trained: Trained, features: FeatureSet) -> Train:
    """Return the baselines of a model, fitted on its own train and holdout movies.

    They are read from the scored set if it contains all of them, else from the export or from the
    set that the model was trained on, else from the scored set as far as it contains them.
    """
    movies, n_model = usable_movies(features, trained.movies.ids), len(trained.movies.ids)
    if len(movies) == n_model:
        return Train(Baselines.fit(features, movies), None)
    lacks = f"The scored feature set contains {len(movies)} of the {n_model} movies that the model "
    lacks += "was trained on"
    if trained.baselines is not None:
        return Train(trained.baselines, f"{lacks}; the baselines are those of the export.")
    try:
        fitted = fit_recorded(trained, config.storage)
    except (MovieNetError, OSError) as error:
        reason = f"its own features could not be used ({error_text(error)})"
        if len(movies):
            return Train(
                Baselines.fit(features, movies),
                f"{lacks}, and {reason}: baselines were fitted on {len(movies)} movies.",
            )
        return Train(None, f"{lacks}, and {reason}: no baseline could be fitted.")
    return Train(
        fitted, f"{lacks}; the baselines were fitted on the features that it was trained on."
    )


def _baselines(
    config: Config,
    fitted: Baselines | None,
    features: FeatureSet,
    scored: Positions,
    prompts: Prompts,
) -> tuple[tuple[Baseline, ...], str | None]:
    """Return the baselines of the scored movies, and why the zero-shot one is absent."""
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


def _compared(
    config: Config,
    trained: Trained,
    features: FeatureSet,
    predictions: Predictions,
    n_seen: int,
    train: Train,
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
        train_movies=train.fitted.movies if train.fitted else 0,
        model_movies=len(trained.movies.ids),
        windows=view.windows,
        frames=view.frames,
        shuffled=trained.config.training.shuffle_frames,
        threshold=THRESHOLD,
        draws=config.eval.bootstrap,
        seed=config.eval.seed,
        predictions=predictions.digest,
    )


def describe_origin(provenance: Mapping[str, Any]) -> tuple[str, bool]:
    """Return where features come from, as text, and whether the tower was untrained."""
    dim = f"{provenance.get('dim')} values per row"
    if "import" in provenance:
        imported = provenance["import"]
        rows = "repeated and zero rows removed" if imported["dedup"] else "all rows kept"
        return f"imported arrays {imported['name']!r}, {rows}, {dim}", False
    encoder = provenance["encoder"]
    untrained = encoder.get("pretrained") is None
    weights = (
        f"UNTRAINED, random weights of seed {encoder.get('seed')}"
        if untrained
        else f"weights {encoder['pretrained']}"
    )
    facts = [encoder.get("name"), weights, f"sha256 {str(encoder.get('weights'))[:12]}"]
    facts += [f"preprocessing {encoder.get('preprocess')}", encoder.get("precision"), dim]
    return ", ".join(str(fact) for fact in facts if fact), untrained


def _notes(compared: Compared, train: Train, zero_shot: str | None) -> tuple[str, ...]:
    notes = [note for note in (train.note, zero_shot) if note]
    if compared.draws:
        notes.append(
            f"Genres with fewer than {MIN_POSITIVES} movies in this split have too few for an "
            "interval."
        )
    return tuple(notes)


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must agree between trained and scored features, flattened by one level.

    The frames are not part of it: a model may be scored on other movies.
    """
    flat: dict[str, Any] = {"dim": provenance.get("dim")}
    for section in ("encoder", "import"):
        for key, value in dict(provenance.get(section) or {}).items():
            # Through JSON, as one side was read from a file: tuples become lists.
            flat[f"{section}.{key}"] = json.loads(json.dumps(value))
    return flat


def _short(genres: tuple[str, ...]) -> str:
    return f"{len(genres)} ({', '.join(genres[:3])}{', …' if len(genres) > 3 else ''})"
