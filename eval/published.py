"""Published figures for MovieNet genres, from ``published.csv``.

Source: README of MovieNetPrediction (github.com/veveve10/MovieNetPrediction). Its LSTM figures come
from that project's own split, and its ResNet figures are those it quotes for MovieNet. Neither was
measured on the movies of our reports, and every report states this.
"""

from __future__ import annotations

import csv
import math
from importlib.resources import files

from eval.report import PublishedRow

SOURCE = "MovieNetPrediction README (github.com/veveve10/MovieNetPrediction)"


def read_published() -> dict[str, PublishedRow]:
    """Return the published figures by genre, in the order of the source."""
    lines = files("eval").joinpath("published.csv").read_text("utf-8").splitlines()
    return {row.pop("genre"): _figures(row) for row in csv.DictReader(lines)}


def _figures(row: dict[str, str]) -> PublishedRow:
    values = {name: float(text) for name, text in row.items()}
    return PublishedRow(**{name: None if math.isnan(v) else v for name, v in values.items()})
