"""The prediction for one film: ``prediction.json``, and the data of its page."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from configs.corrupt import report_corrupt
from configs.errors import DataError

_FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FROZEN)
class KeyFrame:
    """A shot that contributes to a genre, shown by its middle key frame."""

    still: int
    """Number of the key frame within the film, from 0."""

    name: str
    """File name, e.g. ``shot_0003_img_1.jpg``."""

    shot: int
    """Number of its shot."""

    time_s: float | None
    """Seconds since the begin; None if the film is not a video."""

    drop: float
    """By how much the logit of the genre falls without this shot; positive: evidence for it."""


@dataclass(frozen=True, config=_FROZEN)
class GenrePrediction:
    """One genre."""

    genre: str
    probability: float
    threshold: float
    """Probability from which the genre is predicted."""

    predicted: bool
    key_frames: tuple[KeyFrame, ...]
    """Those that contribute most, the strongest first; at most three."""


@dataclass(frozen=True, config=_FROZEN)
class TimelinePoint:
    """Probabilities of a part of the film."""

    first_shot: int
    """Position of the first shot of the part, from 0."""

    begin_s: float | None
    end_s: float | None
    probabilities: tuple[float, ...]
    """In the order of ``genres``, from the shots around this part."""


@dataclass(frozen=True, config=_FROZEN)
class ModelFacts:
    """What predicted."""

    model: str
    """Class."""

    run: str
    epoch: int
    step: int
    encoder: str
    """Where its features come from, as text."""

    untrained: bool
    """Whether the encoder has random weights."""


@dataclass(frozen=True, config=_FROZEN)
class Prediction:
    """Genres of one film. Its fields are those of ``prediction.json``, except ``stills``."""

    film: str
    """Title: the name of the file, folder or movie."""

    kind: str
    """``video``, ``frames`` or ``movie of the dump``."""

    duration_s: float | None
    """None if the film is not a video."""

    shots: int
    frames: int
    """Key frames that were encoded."""

    scored_frames: int
    """Those of them that are in the windows from which the probabilities are computed."""

    genres: tuple[GenrePrediction, ...]
    """By falling probability."""

    timeline: tuple[TimelinePoint, ...]
    timeline_genres: tuple[str, ...]
    """Names of the probabilities of the timeline."""

    shots_per_point: int
    """Shots from which one point of the timeline is computed."""

    strip: dict[int, float | None]
    """Key frames of the filmstrip, evenly spread: time in seconds by number."""

    contribution: Literal["occlusion"]
    """Origin of ``key_frames``: the logit of the film minus the logit without a shot."""

    model: ModelFacts
    notes: tuple[str, ...] = ()
    version: Literal[1] = 1
    stills: dict[int, bytes] = field(default_factory=dict, repr=False)
    """Pictures by number of the key frame: those of the page, not stored in the JSON."""

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of the predicted genres."""
        return tuple(one.genre for one in self.genres if one.predicted)

    @property
    def folder(self) -> str:
        """Name of a folder for the forms of this prediction."""
        return re.sub(r"[^\w.()\- ]", "_", self.film).strip(". ") or "film"

    def to_json(self) -> bytes:
        """Return ``prediction.json``."""
        return _ADAPTER.dump_json(self, indent=1, exclude={"stills"}) + b"\n"

    def _repr_html_(self) -> str:
        from html import escape

        from eval.prediction_page import render_html

        # In a frame, so that the styles of page and notebook do not mix.
        page = escape(render_html(self), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="Prediction" '
            'style="width:100%;height:60rem;border:0"></iframe>'
        )


_ADAPTER = TypeAdapter(Prediction)


def read_prediction(path: str | Path) -> Prediction:
    """Read ``prediction.json``; it contains no pictures.

    Raises:
        DataError: the file is corrupt.
    """
    with report_corrupt(path, "run `movienet-eval predict` again", DataError):
        return _ADAPTER.validate_json(Path(path).read_bytes())
