"""``report.json`` and everything that is made of it alone: Markdown, a page, a table, a plot.

A report states what was compared, so that nobody has to trust a number without its protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import DataError

Share = Annotated[float, Field(ge=0, le=1)]
Verdict = Literal["yes", "no", "unclear"]


class _Part(BaseModel):
    """One part of the report; frozen, and refused with unknown or missing fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Figure(_Part):
    """An estimate with its 95 % interval; both ends are None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None


class PublishedRow(_Part):
    """Published figures of one genre, in per cent."""

    resnet_precision: float | None
    resnet_recall: float | None
    resnet_ap: float | None
    lstm_precision: float | None
    lstm_recall: float | None
    lstm_ap: float | None


class GenreRow(_Part):
    """One genre of the scored split; shares from 0 to 1."""

    genre: str
    support: int
    """Movies of the scored split that have the genre."""

    train_support: int | None
    """Movies of the train split that have it; None where the set holds no train movies."""

    precision: Share
    """0 where no film is predicted to have it."""

    recall: Share | None
    """None without a positive movie."""

    ap: Figure | None
    """None without a positive movie."""

    mean_pool_ap: Share | None
    published: PublishedRow | None


class ThresholdRow(_Part):
    """F1 where a genre is predicted from a threshold on, one for all genres."""

    threshold: Share
    origin: str
    """Where the threshold comes from, in words."""

    micro_f1: Share
    macro_f1: Share
    """Mean over the genres that a scored movie has."""

    weighted_f1: Share
    """Mean over genres, by the scored movies that have them."""


class Compared(_Part):
    """What was compared, and how."""

    run: str
    model: str
    checkpoint: Literal["best", "last"]
    epoch: int
    step: int
    features: str
    """Data digest: sha256 of the feature set's manifest."""

    labels: str
    """Digest of genres and splits."""

    encoder: str
    """Where the features come from, in words."""

    untrained: bool
    """The tower had random weights."""

    split: str
    movies: int
    train_movies: int
    windows: int
    """Most windows a movie, averaged in logits."""

    frames: int | None
    """Rows of a window; None: whole movies."""

    shuffled: bool
    """The frames of every movie were permuted."""

    threshold: Share
    """For precision and recall."""

    draws: int
    """Resamplings of the movies; 0: no intervals."""

    seed: int
    """Of the resampling."""


class BaselineResult(_Part):
    """A baseline fitted on the train split of the same feature set, on the same movies."""

    name: str
    note: str
    mean_ap: Figure
    micro_ap: Figure
    difference: Figure
    """mAP of the model minus mAP of the baseline, paired over movies."""

    beaten: Verdict
    """``yes``: the interval lies above 0; ``no``: below; ``unclear``: 0 lies in it."""


class Report(_Part):
    """Everything a reader is told; ``report.json``."""

    version: Literal[1] = 1
    compared: Compared
    mean_ap: Figure
    micro_ap: Figure
    genres: tuple[GenreRow, ...]
    thresholds: tuple[ThresholdRow, ...]
    """One half, and the run's own where it has one."""

    baselines: tuple[BaselineResult, ...]
    published_source: str
    notes: tuple[str, ...]

    @property
    def absent(self) -> tuple[str, ...]:
        """Genres without a positive movie: left out of the mAP."""
        return tuple(row.genre for row in self.genres if row.ap is None)

    @property
    def has_published(self) -> bool:
        """Whether any genre of the report was published."""
        return any(row.published for row in self.genres)


def verdict(difference: Figure) -> Verdict:
    """Say whether a paired difference shows the model above the baseline."""
    if difference.low is None or difference.high is None:
        return "unclear"
    if difference.low > 0:
        return "yes"
    return "no" if difference.high < 0 else "unclear"


def read_report(path: Path) -> Report:
    """Read a ``report.json``.

    Raises:
        DataError: there is none, or it is not a report of this version.
    """
    if not path.is_file():
        raise DataError(f"{path}: no report; make it with `movienet-eval report`")
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top"
        raise DataError(f"{path}: {where}: {first['msg']}, want a report of version 1") from None
