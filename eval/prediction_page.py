"""Forms of a prediction: terminal text, one HTML page, and the files of a folder."""

from __future__ import annotations

import base64
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.runtime.publish import publish_bytes
from eval.pages import WIDTH, render_template, table_text

if TYPE_CHECKING:
    from eval.prediction import GenrePrediction, KeyFrame, Prediction

SHOWN = 6
"""Genres with timeline and key frames: the predicted ones, then the most probable, up to this."""

_BAR = 20
_LEVELS = "▁▂▃▄▅▆▇█"
_CHART_WIDTH, _CHART_HEIGHT = 1000, 100


class Chart(NamedTuple):
    """Timeline of one genre as paths of an SVG of 1000 x 100."""

    genre: GenrePrediction
    area: str
    """Filled steps."""

    threshold_y: float
    text: str
    """Content in words."""


def write_prediction(folder: Path, prediction: Prediction, *, stills: bool = True) -> list[Path]:
    """Publish ``prediction.html`` and ``prediction.json``; return their paths.

    Args:
        folder: Created if it does not exist.
        prediction: The data.
        stills: Embed pictures in the page.
    """
    shown = prediction if stills else replace(prediction, stills={})
    contents = {
        "prediction.html": render_html(shown).encode(),
        # Published last: once it exists, the page belongs to it.
        "prediction.json": prediction.to_json(),
    }
    for name, data in contents.items():
        publish_bytes(folder / name, data)
    return [folder / name for name in contents]


def render_html(prediction: Prediction) -> str:
    """Return one self-contained page, with the pictures in ``prediction.stills``."""
    shown = shown_genres(prediction)
    stills = {
        number: f"data:image/{_kind(data)};base64,{base64.b64encode(data).decode()}"
        for number, data in prediction.stills.items()
    }
    return render_template(
        "prediction.html.j2",
        {"place": place, "clock": clock, "count": count},
        prediction=prediction,
        shown=shown,
        charts=[chart(prediction, genre) for genre in shown],
        ticks=_ticks(prediction),
        stills=stills,
        strip=dict(prediction.strip),
    )


def _kind(data: bytes) -> str:
    return "png" if data.startswith(b"\x89PNG") else "jpeg"


def shown_genres(prediction: Prediction) -> list[GenrePrediction]:
    """Return the genres with timeline and key frames."""
    ranked = sorted(prediction.genres, key=lambda one: not one.predicted)  # stable
    n_predicted = sum(one.predicted for one in ranked)
    return ranked[: max(min(n_predicted, 2 * SHOWN), min(SHOWN, len(ranked)))]


def clock(seconds: float | None) -> str:
    """Return a time such as ``1:02:03`` or ``0:07``; a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: int, noun: str) -> str:
    """Return a number and a noun, e.g. ``1 shot`` or ``2 shots``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def place(frame: KeyFrame) -> str:
    """Return where a key frame is: time and shot."""
    shot = f"shot {frame.shot}"
    return shot if frame.time_s is None else f"{clock(frame.time_s)}, {shot}"


def chart(prediction: Prediction, genre: GenrePrediction) -> Chart:
    """Return the timeline of a genre."""
    edges, values = _edges(prediction), _values(prediction, genre.genre)
    area = f"M0,{_CHART_HEIGHT}"
    for value, begin, end in zip(values, edges[:-1], edges[1:], strict=True):
        y = _CHART_HEIGHT * (1 - value)
        area += f" L{begin:.1f},{y:.1f} L{end:.1f},{y:.1f}"
    area += f" L{_CHART_WIDTH},{_CHART_HEIGHT} Z"
    peak = max(range(len(values)), key=values.__getitem__)
    point = prediction.timeline[peak]
    where = f"shot {point.first_shot}" if point.begin_s is None else clock(point.begin_s)
    text = (
        f"{genre.genre}: probability {min(values):.2f} to {max(values):.2f} over the film, highest "
        f"at {where}; threshold {genre.threshold:.2f}"
    )
    return Chart(genre, area, _CHART_HEIGHT * (1 - genre.threshold), text)


def _values(prediction: Prediction, genre: str) -> list[float]:
    column = prediction.timeline_genres.index(genre)
    return [point.probabilities[column] for point in prediction.timeline]


def _edges(prediction: Prediction) -> list[float]:
    """Return the horizontal edges of the parts: in time, without times in shots."""
    points = prediction.timeline
    if prediction.duration_s:
        begins = [point.begin_s or 0.0 for point in points]
        return [_CHART_WIDTH * x / prediction.duration_s for x in [*begins, prediction.duration_s]]
    firsts = [point.first_shot for point in points]
    return [_CHART_WIDTH * x / prediction.shots for x in [*firsts, prediction.shots]]


def _ticks(prediction: Prediction) -> list[str]:
    """Return the labels of the axis at its begin, middle and end."""
    if prediction.duration_s is not None:
        return [clock(prediction.duration_s * share) for share in (0, 0.5, 1)]
    last = prediction.shots - 1
    return [f"shot {shot}" for shot in (0, last // 2, last)]


def render_text(prediction: Prediction, *, width: int = WIDTH) -> str:
    """Return the prediction for a terminal.

    Args:
        prediction: The data.
        width: Columns; no line is longer.
    """
    blocks = [_headline(prediction, width), _genre_table(prediction, width)]
    blocks.append(_timeline_text(prediction, width))
    blocks.append(_key_frame_text(prediction, width))
    notes = [*prediction.notes]
    if prediction.model.untrained:
        notes.insert(0, "UNTRAINED encoder: these figures carry no information about the film.")
    if notes:
        blocks.append("\n".join(textwrap.fill(note, width) for note in notes))
    return "\n\n".join(blocks)


def _headline(prediction: Prediction, width: int) -> str:
    length = "" if prediction.duration_s is None else f"{clock(prediction.duration_s)}, "
    genres = ", ".join(prediction.predicted) or "no genre"
    text = (
        f"{prediction.film}: {genres} ({length}{count(prediction.shots, 'shot')}, "
        f"{count(prediction.frames, 'key frame')})"
    )
    return textwrap.fill(text, width, break_on_hyphens=False)


def _genre_table(prediction: Prediction, width: int) -> str:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("genre")
    table.add_column("probability", no_wrap=True)
    for name in ("", "threshold", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for one in prediction.genres:
        full = round(_BAR * one.probability)
        table.add_row(
            one.genre,
            "█" * full + "·" * (_BAR - full),
            f"{one.probability:.3f}",
            f"{one.threshold:.3f}",
            "predicted" if one.predicted else "",
        )
    return table_text(table, width)


def _timeline_text(prediction: Prediction, width: int) -> str:
    from rich.table import Table

    first, _, last = _ticks(prediction)
    table = Table(box=None, pad_edge=False)
    table.add_column("timeline")
    table.add_column(f"{first} … {last}", no_wrap=True)
    for genre in shown_genres(prediction):
        values = _values(prediction, genre.genre)
        line = "".join(_LEVELS[min(7, int(8 * value))] for value in values)
        table.add_row(genre.genre, line)
    return table_text(table, width)


def _key_frame_text(prediction: Prediction, width: int) -> str:
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    lines = ["Shots without which the logit of a genre falls most, and by how much (occlusion):"]
    for genre in shown_genres(prediction):
        frames = [f"{place(one)}: {one.drop:.3f}" for one in genre.key_frames]
        lines.append(f"{genre.genre}: {'; '.join(frames) or 'none'}")
    return "\n".join(wrap.fill(line) for line in lines)
