"""Published figures for MovieNet genres, from ``published.csv``.

Source: README of MovieNetPrediction (github.com/veveve10/MovieNetPrediction). Its LSTM figures come
from that project's own split, and its ResNet figures are those it quotes for MovieNet. Neither was
measured on the movies of our reports, and every report states this.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib.resources import files

SOURCE = "MovieNetPrediction README (github.com/veveve10/MovieNetPrediction)"


@dataclass(frozen=True)
class Published:
    """Precision, recall and average precision of one genre, in per cent; None if not published."""

    resnet_precision: float | None
    resnet_recall: float | None
    resnet_ap: float | None
    lstm_precision: float | None
    lstm_recall: float | None
    lstm_ap: float | None


def read_published() -> dict[str, Published]:
    """Return the published figures by genre, in the order of the source."""
    lines = files("eval").joinpath("published.csv").read_text("utf-8").splitlines()
    return {row.pop("genre"): _figures(row) for row in csv.DictReader(lines)}


def _figures(row: dict[str, str]) -> Published:
    values = {name: float(text) for name, text in row.items()}
    return Published(**{name: None if math.isnan(v) else v for name, v in values.items()})
