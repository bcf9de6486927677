"""Search by text: the shots of a feature set that are most similar to words, over all films."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from configs.errors import ConfigError, MovieNetError, error_text
from configs.schema import Config
from encoders.text import TextTower
from eval.origin import describe_origin
from eval.shot_search import Hit, search
from eval.stills import Stills
from sharding.features import FeatureSet, open_features


@dataclass(frozen=True)
class FoundShot:
    """A shot, by its most similar row."""

    rank: int
    """From 1."""

    similarity: float
    """Cosine of text and row, from -1 to 1. Only the order of shots has a meaning."""

    movie: str
    shot: int | None
    """None if the feature set does not contain shots: then each row counts as one."""

    row: int
    """Row within the movie, from 0."""

    position: float
    """Place of the row in its movie: 0 is the start, 1 the end."""

    split: str
    """Empty if the movie is in no split."""

    genres: tuple[str, ...]
    image: str | None = None
    """Name of the row's image in its movie's folder; None if frame shards were not read."""


@dataclass(frozen=True)
class SearchResult:
    """The content of ``search.json``, and the thumbnails of its page."""

    query: str
    features: str
    """Data digest of the feature set."""

    encoder: str
    """Where the features come from, as text."""

    movies: int
    rows: int
    """Rows of the set."""

    skipped: int
    """Rows without a similarity: zero rows, and rows with NaN or infinite numbers."""

    shots: tuple[FoundShot, ...]
    """The most similar one first."""

    notes: tuple[str, ...]
    """Reasons for missing stills and skipped rows."""

    stills: tuple[bytes | None, ...] = field(repr=False)
    """JPEG per shot; not part of ``search.json``."""


def search_text(config: Config, query: str, *, top: int, with_stills: bool) -> SearchResult:
    """Return the shots of ``config.features_url`` that are most similar to a text.

    Args:
        config: Features, the encoder that made them, and the frames for thumbnails.
        query: The text.
        top: Maximum number of shots.
        with_stills: Whether to read thumbnails.

    Raises:
        ConfigError: the query is empty, or the configured encoder is not that of the features.
        DataError: the features or the weights are missing, or no text tower belongs to them.
    """
    if not query.strip():
        raise ConfigError('QUERY: got no words, want a text such as "a car chase at night"')
    features = open_features(config.features_url, config.storage)
    provenance, where = features.manifest.provenance, features.storage.location
    tower = TextTower.of(config.encoder, provenance, where)
    found = search(features, tower.encode([query])[0], top)
    result = SearchResult(
        query=query,
        features=features.digest,
        encoder=describe_origin(provenance)[0],
        movies=len(features),
        rows=found.rows,
        skipped=found.skipped,
        shots=tuple(_shot(features, rank, hit) for rank, hit in enumerate(found.hits, 1)),
        notes=_skipped_note(found.skipped),
        stills=(None,) * len(found.hits),
    )
    if not with_stills:
        return replace(result, notes=(*result.notes, "No stills, by `--no-stills`."))
    return _with_stills(config, features, result, found.hits)


def _shot(features: FeatureSet, rank: int, hit: Hit) -> FoundShot:
    labels = features.labels
    return FoundShot(
        rank=rank,
        similarity=hit.similarity,
        movie=features.movie_ids[hit.movie],
        shot=hit.shot,
        row=hit.row,
        position=(hit.row + 0.5) / int(features.index.rows[hit.movie]),
        split=str(labels.split_M[hit.movie]),
        genres=tuple(
            genre for genre, has in zip(labels.genres, labels.hot_MG[hit.movie], strict=True) if has
        ),
    )


def _skipped_note(skipped: int) -> tuple[str, ...]:
    if not skipped:
        return ()
    return (f"{skipped:,} rows were skipped: zero rows, or rows with NaN or infinite numbers.",)


def _with_stills(
    config: Config, features: FeatureSet, result: SearchResult, hits: Sequence[Hit]
) -> SearchResult:
    """Return the result with thumbnails, or with the reason why there are none."""
    try:
        reader = Stills(config, features)
    except (MovieNetError, OSError) as error:
        return replace(result, notes=(*result.notes, f"No stills: {error_text(error)}."))
    shots, stills, reasons = [], list[bytes | None](), list[str]()
    for shot, hit in zip(result.shots, hits, strict=True):
        try:
            still = reader.read(hit.movie, hit.row)
        except (MovieNetError, OSError) as error:
            reasons.append(error_text(error))
            shots.append(shot)
            stills.append(None)
        else:
            shots.append(replace(shot, image=still.name))
            stills.append(still.jpeg)
    notes = [f"No still of {len(reasons)} shots; first: {reasons[0]}."] if reasons else []
    return replace(result, shots=tuple(shots), stills=tuple(stills), notes=(*result.notes, *notes))
