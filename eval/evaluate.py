"""Score a trained run on one split, beside baselines on the same movies, and say how sure it is.

M = movies, N = rows of a movie, D = feature size, G = genres
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError, StateError
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
    ThresholdRow,
    verdict,
)
from sharding.features import FeatureSet, open_features, read_rows
from training.checkpoint import Trained, load_trained
from training.metrics import f1_at, genre_aps, genre_metrics, mean_ap, micro_ap
from training.scoring import Scores, score_split
from training.split_selection import split_movies
from training.stream.view import View

if TYPE_CHECKING:
    from configs.schema import Config

logger = logging.getLogger(__name__)

THRESHOLD = 0.5
"""For precision and recall, as in the published tables."""

Positions = NDArray[np.int64]


def evaluate(config: Config) -> Report:
    """Return the report of the run at ``config.run_dir`` on ``config.eval.split``.

    Model and window length are those of the run; data and ``eval``, so the number of windows,
    those of ``config``.

    Raises:
        StateError: the run has no such checkpoint, or was trained on other features.
        DataError: the feature set or the split is missing.
    """
    trained = load_trained(config.run_dir, config.eval.checkpoint)
    features = open_features(config.features_url, config.storage)
    check_scorable(trained, features, str(config.run_dir))
    # A run may have a split file of its own; what it was trained on, it decides.
    split_file = trained.config.training.split
    scored = split_movies(features, config.eval.split, split_file)
    if not len(scored):
        raise DataError(f"{split_file}: split {config.eval.split!r} has no labelled movie here")
    scores = _score(config, trained, features, scored)
    judge = _Judge.of(scores, draws=config.eval.bootstrap, seed=config.eval.seed)
    train = _train_movies(features, split_file)
    baselines = _baselines(features, train, scored) if len(train) else ()
    return judge.report(
        _compared(config, trained, features, len(scored), len(train)),
        baselines,
        train_support_G=features.labels.hot_MG[train].sum(axis=0) if len(train) else None,
        thresholds=_thresholds(trained),
    )


def check_scorable(trained: Trained, features: FeatureSet, run: str) -> None:
    """Refuse features that the model was not made for.

    Raises:
        StateError: tower, import, dimension or genres differ; one line says how.
    """
    where = features.storage.location
    if tuple(features.labels.genres) != trained.genres:
        raise StateError(
            f"{where}: got genres {_short(features.labels.genres)}, {run} was trained on "
            f"{_short(trained.genres)}; relabel the set with its data.genres"
        )
    then, now = (_origin(tree) for tree in (trained.provenance, features.manifest.provenance))
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise StateError(
                f"{where}: {key}: got {now.get(key)!r}, {run} was trained on {then.get(key)!r}; "
                "score features that were made in the same way"
            )


@dataclass(frozen=True)
class Baseline:
    """A baseline's logits for the scored movies."""

    name: str
    note: str
    logits_MG: NDArray[np.float64]


@dataclass(frozen=True)
class _Judge:
    """One set of movies and draws for the model and everything that is compared with it."""

    genres: tuple[str, ...]
    labels_MG: NDArray[np.uint8]
    probabilities_MG: NDArray[np.float64]
    weights_RM: NDArray[np.uint16]
    draws: Draws

    @classmethod
    def of(cls, scores: Scores, *, draws: int, seed: int) -> _Judge:
        weights_RM = draw_weights(len(scores.labels_MG), draws, seed=seed)
        probabilities_MG = scores.probabilities_MG
        drawn = bootstrap(scores.labels_MG, probabilities_MG, weights_RM)
        return cls(scores.genres, scores.labels_MG, probabilities_MG, weights_RM, drawn)

    def report(
        self,
        compared: Compared,
        baselines: tuple[Baseline, ...],
        train_support_G: NDArray[np.int64] | None,
        thresholds: Mapping[float, str],
    ) -> Report:
        notes = _notes(compared, baselines)
        return Report(
            compared=compared,
            mean_ap=_figure(mean_ap(self.labels_MG, self.probabilities_MG), self.draws.mean_ap_R),
            micro_ap=_figure(
                micro_ap(self.labels_MG, self.probabilities_MG), self.draws.micro_ap_R
            ),
            genres=self._rows(baselines, train_support_G),
            thresholds=tuple(self._at(*one) for one in thresholds.items()),
            baselines=tuple(self._compare(baseline) for baseline in baselines),
            published_source=SOURCE,
            notes=notes,
        )

    def _rows(
        self, baselines: tuple[Baseline, ...], train_support_G: NDArray[np.int64] | None
    ) -> tuple[GenreRow, ...]:
        published = read_published()
        found = genre_metrics(self.labels_MG, self.probabilities_MG, self.genres, THRESHOLD)
        pooled = baselines[-1].logits_MG if baselines else None
        pooled_aps = genre_aps(self.labels_MG, pooled) if pooled is not None else None
        return tuple(
            GenreRow(
                genre=one.genre,
                support=one.support,
                train_support=None if train_support_G is None else int(train_support_G[g]),
                precision=one.precision,
                recall=one.recall if one.support else None,
                ap=self._genre_ap(g, one.ap, one.support),
                mean_pool_ap=pooled_aps[g] if pooled_aps and one.support else None,
                published=PublishedRow(**asdict(published[one.genre]))
                if one.genre in published
                else None,
            )
            for g, one in enumerate(found)
        )

    def _at(self, threshold: float, origin: str) -> ThresholdRow:
        found = f1_at(self.labels_MG, self.probabilities_MG, threshold)
        return ThresholdRow(
            threshold=threshold,
            origin=origin,
            micro_f1=found.micro,
            macro_f1=found.macro,
            weighted_f1=found.weighted,
        )

    def _genre_ap(self, genre: int, ap: float, support: int) -> Figure | None:
        if not support:
            return None
        steady = support >= MIN_POSITIVES
        return _figure(ap, self.draws.genre_ap_RG[:, genre]) if steady else Figure(value=ap)

    def _compare(self, baseline: Baseline) -> BaselineResult:
        drawn = bootstrap(self.labels_MG, baseline.logits_MG, self.weights_RM)
        theirs = mean_ap(self.labels_MG, baseline.logits_MG)
        gap = mean_ap(self.labels_MG, self.probabilities_MG) - theirs
        # Paired: the same draw of movies for both, so what is hard for both cancels.
        difference = _figure(gap, self.draws.mean_ap_R - drawn.mean_ap_R, bounded=False)
        return BaselineResult(
            name=baseline.name,
            note=baseline.note,
            mean_ap=_figure(theirs, drawn.mean_ap_R),
            micro_ap=_figure(micro_ap(self.labels_MG, baseline.logits_MG), drawn.micro_ap_R),
            difference=difference,
            beaten=verdict(difference),
        )


def _score(config: Config, trained: Trained, features: FeatureSet, scored: Positions) -> Scores:
    from configs.runtime.launch import start

    training = config.training
    distributed = start(
        device=training.device,
        precision="fp32",  # the same figures wherever a report is made
        accumulation=1,
        expected_world_size=1,
        threads=training.threads,
    )
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
    with progress(len(train) + len(scored), label="baselines", unit="movies") as shown:

        def rows(movies: Positions) -> Iterator[NDArray[np.float16]]:
            for movie in movies:
                yield read_rows(features, int(movie))
                shown.advance()

        pooled = MeanLinear.fit(mean_rows(rows(train)), labels_MG)
        pooled_logits_MG = pooled.predict(mean_rows(rows(scored)))
    return (
        Baseline(
            "class prior",
            "every film gets the share that each genre has in the train split",
            ClassPrior.fit(labels_MG).predict(len(scored)),
        ),
        Baseline(
            "mean-pool + linear",
            "logistic regression on the mean of a film's L2-normalised rows, equal neighbours "
            f"once and zero rows left out; centred, one scale, C = {MEAN_POOL_C:g}",
            pooled_logits_MG,
        ),
    )


def _thresholds(trained: Trained) -> Mapping[float, str]:
    """Return the thresholds to report: one half, and what the run brings with it."""
    found = {THRESHOLD: "as in the published tables"}
    if trained.threshold != THRESHOLD:
        given = trained.config.training.threshold is not None
        found[trained.threshold] = "training.threshold" if given else "tuned on the run's holdout"
    return found


def _train_movies(features: FeatureSet, split_file: str | None) -> Positions:
    try:
        return split_movies(features, "train", split_file)
    except DataError:
        # A split that was imported alone, for scoring only.
        return np.zeros(0, np.int64)


def _compared(
    config: Config, trained: Trained, features: FeatureSet, n_scored: int, n_train: int
) -> Compared:
    words, untrained = describe_origin(features.manifest.provenance)
    view = View.of(trained.config, config.eval.windows)
    return Compared(
        run=config.training.run_name,
        model=trained.config.model.class_,
        checkpoint=config.eval.checkpoint,
        epoch=trained.epoch,
        step=trained.step,
        features=features.digest,
        labels=features.labels.digest,
        encoder=words,
        untrained=untrained,
        split=config.eval.split,
        movies=n_scored,
        train_movies=n_train,
        windows=view.windows,
        frames=view.frames,
        shuffled=trained.config.training.shuffle_frames,
        threshold=THRESHOLD,
        draws=config.eval.bootstrap,
        seed=config.eval.seed,
    )


def describe_origin(provenance: Mapping[str, Any]) -> tuple[str, bool]:
    """Say in words where features come from, and whether the tower was untrained."""
    dim = f"{provenance.get('dim')} numbers a row"
    if "import" in provenance:
        told = provenance["import"]
        rows = "repeated and zero rows dropped" if told["dedup"] else "rows as they came"
        return f"imported arrays {told['name']!r}, {rows}, {dim}", False
    encoder = provenance["encoder"]
    untrained = encoder.get("pretrained") is None
    weights = (
        f"UNTRAINED, random weights of seed {encoder.get('seed')}"
        if untrained
        else f"weights {encoder['pretrained']}"
    )
    parts = [encoder.get("name"), weights, f"sha256 {str(encoder.get('weights'))[:12]}"]
    parts += [f"preprocessing {encoder.get('preprocess')}", encoder.get("precision"), dim]
    return ", ".join(str(part) for part in parts if part), untrained


def _notes(compared: Compared, baselines: tuple[Baseline, ...]) -> tuple[str, ...]:
    notes = []
    if compared.split == "train":
        notes.append("Scored on the films the model was trained on: this is no test of it.")
    if not baselines:
        notes.append("The feature set holds no train films, so no baseline could be fitted.")
    if compared.draws:
        notes.append(f"Genres with fewer than {MIN_POSITIVES} films here have no interval.")
    return tuple(notes)


def _figure(value: float, draws_R: NDArray[np.float64], *, bounded: bool = True) -> Figure:
    found = interval(value, draws_R, bounded=bounded)
    return Figure(value=value, low=found.low, high=found.high) if found else Figure(value=value)


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must agree, one level deep; the frames that were encoded may be others."""
    flat: dict[str, Any] = {"dim": provenance.get("dim")}
    for part in ("encoder", "import"):
        for key, value in dict(provenance.get(part) or {}).items():
            flat[f"{part}.{key}"] = json.loads(json.dumps(value))
    return flat


def _short(genres: tuple[str, ...]) -> str:
    return f"{len(genres)} ({', '.join(genres[:3])}{', …' if len(genres) > 3 else ''})"
