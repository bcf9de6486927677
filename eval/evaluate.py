"""Evaluation of a trained run on one split: its scores, baselines on the same movies, intervals.

M = movies, N = rows of a movie, D = feature size, G = genres
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import StateError
from configs.runtime.hints import hint
from configs.runtime.progress import progress
from eval.baselines import MEAN_POOL_C, ClassPrior, MeanLinear, mean_rows
from eval.intervals import MIN_POSITIVES, Draws, bootstrap, draw_weights, interval
from eval.published import SOURCE, read_published
from eval.report import (
    BaselineResult,
    Compared,
    Figure,
    GenreRow,
    PublishedRow,
    Report,
    verdict,
)
from eval.sections import (
    THRESHOLD,
    Predictions,
    Rule,
    calibration,
    cooccurrence,
    curves,
    films,
    rules,
    threshold_row,
)
from sharding.features import FeatureSet, open_features, read_rows
from training.checkpoint import Trained, load_trained
from training.metrics import genre_aps, genre_metrics, mean_ap, micro_ap
from training.scoring import Scores, score_split
from training.split_selection import split_movies
from training.stream.view import View

if TYPE_CHECKING:
    from configs.schema import Config

logger = logging.getLogger(__name__)

Positions = NDArray[np.int64]


def evaluate(config: Config) -> Report:
    """Return the report of the run at ``config.run_dir`` on ``config.eval.split``.

    The run determines model and window length. ``config`` determines the data and, by ``eval``, the
    number of windows per movie.

    Raises:
        StateError: the run has no such checkpoint, was trained on other features, or was trained on
            movies of this split.
        DataError: the feature set is missing, or the split has no labelled movie.
    """
    trained = load_trained(config.run_dir, config.eval.checkpoint)
    features = open_features(config.features_url, config.storage)
    check_scorable(trained, features, str(config.run_dir))
    # The run's own split file decides: another one could score movies that it was trained on.
    split_file = trained.config.training.split
    scored = split_movies(features, config.eval.split, split_file)
    seen = seen_movies(trained, [features.movie_ids[movie] for movie in scored])
    if seen and not config.eval.allow_train:
        raise StateError(_refusal(config, seen, len(scored)))
    scores = _score(config, trained, features, scored)
    train = _train_movies(features, trained)
    baselines = _baselines(features, train, scored) if len(train) else ()
    if config.eval.bootstrap:
        logger.info("bootstrap: %d draws of %d movies", config.eval.bootstrap, len(scored))
    evaluation = _Evaluation.of(scores, draws=config.eval.bootstrap, seed=config.eval.seed)
    return evaluation.report(
        _compared(config, trained, features, len(scored), len(seen), len(train)),
        baselines,
        train_support_G=features.labels.hot_MG[train].sum(axis=0) if len(train) else None,
        rules=rules(
            len(trained.genres),
            threshold=trained.threshold,
            is_tuned=trained.config.training.threshold is None,
            genre_thresholds=trained.genre_thresholds,
        ),
    )


def check_scorable(trained: Trained, features: FeatureSet, run: str) -> None:
    """Check that the features were made in the same way as those that the model was trained on.

    Raises:
        StateError: tower, import, dimension or genres differ; one line names the difference.
    """
    where = features.storage.location
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


def _refusal(config: Config, seen: Sequence[str], n_scored: int) -> str:
    allow = hint("movienet-eval report", "eval.allow_train=true")
    return (
        f"{config.run_dir}: {len(seen)} of {n_scored} movies of split {config.eval.split!r} were "
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

    genres: tuple[str, ...]
    labels_MG: NDArray[np.uint8]
    probabilities_MG: NDArray[np.float64]
    predictions: Predictions
    weights_RM: NDArray[np.uint16]
    draws: Draws

    @classmethod
    def of(cls, scores: Scores, *, draws: int, seed: int) -> _Evaluation:
        weights_RM = draw_weights(len(scores.labels_MG), draws, seed=seed)
        probabilities_MG = scores.probabilities_MG
        drawn = bootstrap(scores.labels_MG, probabilities_MG, weights_RM)
        predictions = Predictions(
            scores.movie_id, scores.genres, scores.labels_MG, probabilities_MG
        )
        return cls(
            scores.genres, scores.labels_MG, probabilities_MG, predictions, weights_RM, drawn
        )

    def report(
        self,
        compared: Compared,
        baselines: tuple[Baseline, ...],
        train_support_G: NDArray[np.int64] | None,
        rules: tuple[Rule, ...],
    ) -> Report:
        notes = _notes(compared, baselines)
        return Report(
            compared=compared,
            mean_ap=self._figure(
                mean_ap(self.labels_MG, self.probabilities_MG), self.draws.mean_ap_R
            ),
            micro_ap=self._figure(
                micro_ap(self.labels_MG, self.probabilities_MG), self.draws.micro_ap_R
            ),
            genres=self._rows(baselines, train_support_G),
            thresholds=tuple(threshold_row(self.predictions, rule) for rule in rules),
            curves=curves(self.predictions),
            calibration=calibration(self.predictions),
            cooccurrence=cooccurrence(self.predictions, rules[-1]),
            films=films(self.predictions, rules[-1]),
            baselines=tuple(self._compare(one, compared.trained_on) for one in baselines),
            published_source=SOURCE,
            notes=notes,
        )

    def _rows(
        self, baselines: tuple[Baseline, ...], train_support_G: NDArray[np.int64] | None
    ) -> tuple[GenreRow, ...]:
        published = read_published()
        metrics = genre_metrics(self.labels_MG, self.probabilities_MG, self.genres, THRESHOLD)
        pooled = baselines[-1].logits_MG if baselines else None
        pooled_aps = genre_aps(self.labels_MG, pooled) if pooled is not None else None
        return tuple(
            GenreRow(
                genre=one.genre,
                support=one.support,
                too_few=0 < one.support < MIN_POSITIVES,
                train_support=None if train_support_G is None else int(train_support_G[g]),
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
        return _figure(ap, self.draws.genre_ap_RG[:, genre], movies=support)

    def _figure(self, value: float, draws_R: NDArray[np.float64]) -> Figure:
        return _figure(value, draws_R, movies=len(self.labels_MG))

    def _compare(self, baseline: Baseline, trained_on: int) -> BaselineResult:
        drawn = bootstrap(self.labels_MG, baseline.logits_MG, self.weights_RM)
        baseline_map = mean_ap(self.labels_MG, baseline.logits_MG)
        gain = mean_ap(self.labels_MG, self.probabilities_MG) - baseline_map
        # Paired: both see the same draw of movies, so movies that are hard for both cancel out.
        difference = _figure(
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


def _score(config: Config, trained: Trained, features: FeatureSet, scored: Positions) -> Scores:
    from configs.runtime.launch import start

    training = config.training
    distributed = start(
        device=training.device,
        precision="fp32",  # so that all machines give the same figures
        accumulation=1,
        expected_world_size=1,
        threads=training.threads,
    )
    logger.info("scoring: %d movies of split %s", len(scored), config.eval.split)
    try:
        return score_split(
            trained.model.to(distributed.device),
            features,
            scored,
            View.of(trained.config, config.eval.windows),
            batch_size=config.eval.batch_size,
            distributed=distributed,
        )
    finally:
        distributed.close()


def _baselines(
    features: FeatureSet, train: Positions, scored: Positions
) -> tuple[Baseline, Baseline]:
    labels_MG = features.labels.hot_MG[train]
    with progress(len(train) + len(scored), label="baselines", unit="movies") as bar:

        def rows(movies: Positions) -> Iterator[NDArray[np.float16]]:
            for movie in movies:
                yield read_rows(features, int(movie))
                bar.advance()

        pooled = MeanLinear.fit(mean_rows(rows(train)), labels_MG)
        pooled_logits_MG = pooled.predict(mean_rows(rows(scored)))
    return (
        Baseline(
            "class prior",
            "every movie gets the genre frequencies of the train split",
            ClassPrior.fit(labels_MG).predict(len(scored)),
        ),
        Baseline(
            "mean-pool + linear",
            "logistic regression on the mean of a movie's L2-normalised rows, repeated rows "
            "counted once, zero rows excluded; means centred, one scale for all dimensions, "
            f"C = {MEAN_POOL_C:g}",
            pooled_logits_MG,
        ),
    )


def _train_movies(features: FeatureSet, trained: Trained) -> Positions:
    """Return the model's own train and holdout movies, as far as the set contains them."""
    seen = trained.movies.ids
    is_seen_M = np.fromiter(
        (movie in seen for movie in features.movie_ids), bool, len(features.movie_ids)
    )
    usable_M = is_seen_M & features.labels.hot_MG.any(axis=1) & (features.index.rows > 0)
    return np.flatnonzero(usable_M).astype(np.int64)


def _compared(
    config: Config,
    trained: Trained,
    features: FeatureSet,
    n_scored: int,
    n_seen: int,
    n_train: int,
) -> Compared:
    encoder, untrained = describe_origin(features.manifest.provenance)
    view = View.of(trained.config, config.eval.windows)
    return Compared(
        run=config.training.run_name,
        model=trained.config.model.class_,
        checkpoint=config.eval.checkpoint,
        epoch=trained.epoch,
        step=trained.step,
        features=features.digest,
        labels=features.labels.digest,
        encoder=encoder,
        untrained=untrained,
        split=config.eval.split,
        movies=n_scored,
        trained_on=n_seen,
        train_movies=n_train,
        model_movies=len(trained.movies.ids),
        windows=view.windows,
        frames=view.frames,
        shuffled=trained.config.training.shuffle_frames,
        threshold=THRESHOLD,
        draws=config.eval.bootstrap,
        seed=config.eval.seed,
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


def _notes(compared: Compared, baselines: tuple[Baseline, ...]) -> tuple[str, ...]:
    notes = []
    if not baselines:
        notes.append(
            "The feature set contains none of the movies that the model was trained on, so no "
            "baseline could be fitted."
        )
    elif compared.train_movies < compared.model_movies:
        notes.append(
            f"Baselines were fitted on {compared.train_movies} of the {compared.model_movies} "
            "movies that the model was trained on; the feature set lacks the others."
        )
    if compared.draws:
        notes.append(
            f"Genres with fewer than {MIN_POSITIVES} movies in this split have too few for an "
            "interval."
        )
    return tuple(notes)


def _figure(
    value: float, draws_R: NDArray[np.float64], *, movies: int, bounded: bool = True
) -> Figure:
    ends = interval(value, draws_R, movies=movies, bounded=bounded)
    return Figure(value=value, low=ends.low, high=ends.high) if ends else Figure(value=value)


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
