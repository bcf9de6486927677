"""How often the 95 % intervals of reports cover what they estimate: the table of eval/README.md.

    python tests/bench/study_intervals.py [--splits N] [--truth N] [--draws N] [--json FILE]

Population: independent movies with 21 genres, whose frequencies (65 % to 3 %) resemble MovieNet's.
Labels are thresholded normal variables with two common factors, so genres occur together. The
logits of model and baseline are normal, shifted by the label, and share most of their noise. Two
populations differ in the shift: weak models (mAP 0.38) and strong ones (mAP 0.84).

Estimand: the expected figure on splits of 220 movies from the population. For the AP of a genre,
only splits in which it has at least ten movies count, because others have no interval. It is
measured on ``--truth`` further splits. Coverage is the share of ``--splits`` splits whose interval,
computed by ``eval.intervals`` from that split alone, contains the estimand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.intervals import (
    MIN_POSITIVES,
    bootstrap,
    draw_weights,
    interval,
)

FREQUENCIES = "65 35 30 27 25 20 17 15 13 12 10 9 8 7 6 5.5 5 4.5 4 3.5 3"
"""Share of the movies that have each genre, in per cent."""

FREQUENCIES_G = np.array(FREQUENCIES.split(), dtype=np.float64) / 100
MOVIES = 220
ONCE = np.ones((1, MOVIES), np.uint16)
"""The split itself, as a draw."""

SHIFTS = {"weak": (1.0, 0.8), "strong": (2.6, 2.3)}
"""Shift of the logits of model and baseline by the label, per population."""

Split = tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]
"""Labels, logits of the model and logits of the baseline, ``[M, G]``."""

Name = str | int
"""Name of a figure; the number of a genre for its average precision."""

CLASSES = {
    0.2: "AP of genres in 20 % or more of the movies",
    0.08: "AP of genres in 8 % to 20 %",
    0.0: "AP of genres in 3 % to 8 %",
}


def sample(shifts: tuple[float, float], generator: np.random.Generator) -> Split:
    """Return one split of the population."""
    shape = (MOVIES, len(FREQUENCIES_G))
    border_G = np.array([NormalDist().inv_cdf(1 - share) for share in FREQUENCIES_G])
    load_2G = 0.6 * np.random.default_rng(1).normal(size=(2, len(FREQUENCIES_G)))
    latent = generator.normal(size=(MOVIES, 2)) @ load_2G + generator.normal(size=shape)
    labels = (latent / np.sqrt((load_2G**2).sum(axis=0) + 1) > border_G).astype(np.uint8)
    noise = 0.8 * generator.normal(size=shape)
    first, second = (
        shift * labels - 1.2 * border_G + noise + 0.6 * generator.normal(size=shape)
        for shift in shifts
    )
    return labels, first, second


def figures(split: Split, weights_RM: NDArray[np.uint16]) -> dict[Name, NDArray[np.float64]]:
    """Return the figures that have an interval, in every draw, ``[R]``."""
    labels, *scores = split
    model, baseline = (bootstrap(labels, score, weights_RM) for score in scores)
    return {
        "mAP": model.mean_ap_R,
        "micro-AP": model.micro_ap_R,
        "paired difference of mAP": model.mean_ap_R - baseline.mean_ap_R,
    } | {
        g: model.genre_ap_RG[:, g]
        for g, support in enumerate(labels.sum(axis=0).tolist())
        if support >= MIN_POSITIVES
    }


def estimands(shifts: tuple[float, float], splits: int) -> dict[Name, float]:
    """Return the mean of each figure over the splits in which it has an interval."""
    generator = np.random.default_rng([0, splits])
    values = defaultdict(list)
    for _ in range(splits):
        for name, one in figures(sample(shifts, generator), ONCE).items():
            values[name].append(one[0])
    return {name: float(np.mean(column)) for name, column in values.items()}


def coverage(population: str, *, splits: int, truth: int, draws: int) -> dict[str, float]:
    """Return the share of intervals that contain their estimand, by class of figures."""
    shifts = SHIFTS[population]
    expected, covered = estimands(shifts, truth), defaultdict(list)
    generator = np.random.default_rng([1, splits])
    for number in range(splits):
        split = sample(shifts, generator)
        estimates = figures(split, ONCE)
        for name, drawn in figures(split, draw_weights(MOVIES, draws, seed=number)).items():
            ends = interval(
                float(estimates[name][0]),
                drawn,
                movies=int(split[0][:, name].sum()) if isinstance(name, int) else MOVIES,
                bounded=name != "paired difference of mAP",
            )
            if ends is None:
                raise AssertionError("figures returns those that have an interval")
            covered[_class(name)].append(ends.low <= expected[name] <= ends.high)
    return {name: float(np.mean(hits)) for name, hits in covered.items()}


def _class(name: Name) -> str:
    if isinstance(name, str):
        return name
    return next(text for least, text in CLASSES.items() if FREQUENCIES_G[name] >= least)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description="Coverage of the intervals of reports.")
    parser.add_argument("--splits", type=int, default=2000)
    parser.add_argument("--truth", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    sizes = {"splits": chosen.splits, "truth": chosen.truth, "draws": chosen.draws}
    shares = {name: coverage(name, **sizes) for name in SHIFTS}
    print("| figure | weak models | strong models |\n| --- | --: | --: |")
    for figure in shares["weak"]:
        cells = " | ".join(f"{100 * shares[name][figure]:.1f} %" for name in SHIFTS)
        print(f"| {figure} | {cells} |")
    if chosen.json:
        chosen.json.write_text(json.dumps({**sizes, "coverage": shares}, indent=1))


if __name__ == "__main__":
    main()
