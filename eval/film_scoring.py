"""Scores of one film: its logits, those without some of its shots, and those of its parts.

N = key frames of the film (rows), S = its shots, U = units of the model (rows or shots),
W = windows, G = genres
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.registry import fixed_frames
from training.stream.epoch_plan import plan_scoring
from training.stream.view import View

Rows = NDArray[np.float16]
Positions = NDArray[np.int64]
Logits = NDArray[np.float64]

POINTS = 24
"""Points of the timeline."""

_MAX_OCCLUSIONS = 400
"""Parts of a film that are left out one after the other; of a longer film several shots at once."""

_MAX_WINDOWS = 32
"""Windows of a forward pass of the model."""

_MAX_ROWS = 2**16
"""Rows of a forward pass of the model, padding included."""


class FilmScoring:
    """The model's logits for windows of one film, also without some of its shots."""

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        view: View,
        rows_ND: Rows,
        shot_N: Positions,
        n_shots: int,
    ) -> None:
        """Score the windows of the film.

        Args:
            model: The model, on ``device`` and in evaluation mode.
            device: Where it runs.
            view: Windows and unit of the model.
            rows_ND: Encoded key frames, float16 ``[N, D]``, in order of shots.
            shot_N: Shot of each row, int64 ``[N]``, from 0.
            n_shots: Shots of the film, including those without a row.
        """
        self._model, self._device, self._view = model, device, view
        self.rows_ND, self._n_shots = rows_ND, n_shots
        if view.row == "shot":
            rows_ND, shot_N = _shot_means(rows_ND, shot_N)
        self._units_UD, self._shot_U = rows_ND, shot_N
        self._windows = self._planned()
        self._logits_WG = self._run(self._windows)

    def _planned(self) -> list[Positions]:
        """Return the units of each window, the same windows as in a report."""
        n_units = np.array([len(self._units_UD)])
        plan = plan_scoring(
            np.zeros(1, np.int64),
            n_units,
            spec=self._view.spec,
            windows=self._view.windows,
            global_batch=1,
        )
        return [
            plan.spec.rows(0, int(k), int(start), int(n_units[0]))
            for k, start in zip(plan.window_index, plan.start, strict=True)
        ]

    @property
    def n_scored(self) -> int:
        """Number of key frames in the windows."""
        units = np.unique(np.concatenate(self._windows))
        if self._view.row == "frame":
            return len(units)
        return int(len(self.rows_ND) * len(units) / len(self._units_UD))

    def film_logits(self) -> Logits:
        """Return the mean over windows, ``[G]``."""
        mean_G: Logits = self._logits_WG.mean(axis=0)
        return mean_G

    def contributions(self) -> tuple[Logits, int]:
        """Return by how much each logit falls without each shot, ``[S, G]``.

        A shot outside of the windows contributes 0. nan: the film has no other shot.

        Returns:
            The contributions, and the number of adjacent shots that are left out at once.
        """
        group = math.ceil(self._n_shots / _MAX_OCCLUSIONS)
        part_U = self._shot_U // group
        drop_SG = np.zeros((self._n_shots, self._logits_WG.shape[1]))
        left_out = [
            (number, part, window[part_U[window] != part])
            for number, window in enumerate(self._windows)
            for part in np.unique(part_U[window])
        ]
        # Left out by the mask, so that the other rows keep their places.
        kept = [one for one in left_out if len(one[2])]
        logits = self._run(
            [self._windows[number] for number, _, _ in kept],
            [part_U[self._windows[number]] != part for number, part, _ in kept],
        )
        for (number, part, _), logits_G in zip(kept, logits, strict=True):
            shots = slice(part * group, (part + 1) * group)
            drop_SG[shots] += (self._logits_WG[number] - logits_G) / len(self._windows)
        for _, part, _ in (one for one in left_out if not len(one[2])):
            drop_SG[part * group : (part + 1) * group] = np.nan
        return drop_SG, group

    def timeline(self) -> tuple[list[tuple[int, int, NDArray[np.float64]]], int]:
        """Return ``(first shot, shot after the last, probabilities [G])`` of parts of the film.

        Returns:
            The parts, and the number of shots around each from which it is scored.
        """
        n_points = min(POINTS, self._n_shots)
        edges = np.arange(n_points + 1) * self._n_shots // n_points
        width = min(self._n_shots, max(3, math.ceil(self._n_shots / 12)))
        windows = []
        for begin, end in itertools.pairwise(edges.tolist()):
            first = max(0, min((begin + end - width + 1) // 2, self._n_shots - width))
            inside = (self._shot_U >= first) & (self._shot_U < first + width)
            # Shots whose frames cannot be decoded have no rows: then those of the complete film.
            units = np.flatnonzero(inside) if inside.any() else np.arange(len(self._shot_U))
            windows.append(_middle(units, self._view.frames))
        probabilities = sigmoid(self._run(windows))
        parts = zip(edges[:-1].tolist(), edges[1:].tolist(), probabilities, strict=True)
        return list(parts), width

    def _run(
        self, windows: Sequence[Positions], masks: Sequence[NDArray[np.bool_]] | None = None
    ) -> Logits:
        """Return the logits of windows, ``[W, G]``; a mask marks the units that count."""
        length = self._view.frames or max((len(window) for window in windows), default=1)
        length = fixed_frames(self._model) or length
        size = max(1, min(_MAX_WINDOWS, _MAX_ROWS // length))
        logits = []
        for begin in range(0, len(windows), size):
            batch = windows[begin : begin + size]
            features = torch.zeros(len(batch), length, self._units_UD.shape[1])
            mask = torch.zeros(len(batch), length, dtype=torch.bool)
            for k, window in enumerate(batch):
                real = np.ones(len(window), bool) if masks is None else masks[begin + k]
                features[k, : len(window)] = torch.from_numpy(
                    self._units_UD[window].astype(np.float32) * real[:, None]
                )
                mask[k, : len(window)] = torch.from_numpy(real)
            with torch.no_grad():
                output = self._model(features.to(self._device), mask.to(self._device))
            logits.append(output.float().cpu().numpy().astype(np.float64))
        n_genres = len(self._logits_WG[0]) if not windows else 0
        return np.concatenate(logits) if logits else np.zeros((0, n_genres))


def _shot_means(rows_ND: Rows, shot_N: Positions) -> tuple[Rows, Positions]:
    """Return the mean row of each shot, summed in float32 as the stream does."""
    starts = np.flatnonzero(np.diff(shot_N, prepend=-1))
    sums = np.add.reduceat(rows_ND, starts, axis=0, dtype=np.float32)
    counts = np.diff(np.append(starts, len(shot_N)))
    return (sums / counts[:, None]).astype(np.float16), shot_N[starts]


def _middle(units: Positions, limit: int | None) -> Positions:
    """Return the units in the middle, at most ``limit``."""
    if limit is None or len(units) <= limit:
        return units
    first = (len(units) - limit) // 2
    return units[first : first + limit]


def sigmoid(logits: Any) -> Any:
    """Return the probabilities of logits, an array or a number."""
    return 1 / (1 + np.exp(-logits))
