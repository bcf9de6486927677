"""The data of a comparison: ``compare.json``, the only input of its table and page."""

from __future__ import annotations

from typing import Literal

from eval.report import Figure, Record, Share, Verdict


class Spread(Record):
    """A figure over the seeds of a recipe."""

    mean: float
    std: float | None
    """Sample standard deviation, of n - 1; None for one run."""


class Difference(Record):
    """mAP minus that of the reference on the same movies."""

    mean_ap: Figure
    """Paired over movies. The interval covers the choice of the movies, not that of the seeds."""

    better: Verdict
    """As in a report: ``yes`` means that the complete interval is above 0."""


class RunRow(Record):
    """One compared run; all its figures are computed on the common movies."""

    key: str
    """Letter of the run in tables: A, B, …."""

    name: str
    source: str
    """Folder of its report."""

    model: str
    checkpoint: str
    epoch: int
    step: int
    training_seed: int
    encoder: str
    """Where its features come from, as text."""

    features: str
    """Digest of the features that it was scored on."""

    movies: int
    """Movies of its report."""

    trained_on: int
    """Those of them that it was trained on or selected by; 0 in a test."""

    mean_ap: Figure
    micro_ap: Figure
    difference: Difference | None
    """To the first run; None for the first run."""


class RecipeRow(Record):
    """Runs that differ only in their seeds."""

    name: str
    runs: tuple[str, ...]
    """Keys of the runs."""

    seeds: tuple[int, ...]
    """``training.seed`` of each run."""

    mean_ap: Spread
    micro_ap: Spread
    difference: Difference | None
    """Mean of its runs minus the mean of the first recipe's; None for the first recipe."""


class GenreAps(Record):
    """Average precision of one genre by each run."""

    genre: str
    support: int
    """Common movies that have the genre."""

    aps: tuple[Share | None, ...]
    """In the order of the runs; None without a movie."""


class Comparison(Record):
    """The content of ``compare.json``."""

    version: Literal[1] = 1
    split: str
    movies: int
    """Movies that all runs have scored."""

    draws: int
    """Bootstrap draws; 0: no intervals."""

    seed: int
    """Seed of the bootstrap."""

    runs: tuple[RunRow, ...]
    recipes: tuple[RecipeRow, ...]
    genres: tuple[GenreAps, ...]
    notes: tuple[str, ...]
