"""What the training loop receives.

Axes: B = windows of the batch, T = rows of a window, D = feature size, G = genres.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from training.stream.fetch import Fetched


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank; its tensors may be kept as long as one likes."""

    features: Tensor
    """``[B, T, D]`` float16; rows that the mask hides are zero."""

    mask: Tensor
    """``[B, T]`` bool, True where the row is a real frame; at least one a window."""

    labels: Tensor
    """``[B, G]`` float32, 0 or 1."""

    weight: Tensor
    """``[B]`` float32, 1, or 0 for a window that only fills the batch up."""

    movie: Tensor
    """``[B]`` int64, position in the feature index."""

    start: Tensor
    """``[B]`` int64, first row of the window."""

    visit: Tensor
    """``[B]`` int64, which of its movie's windows this is (k)."""

    epoch: int
    """From 0."""

    step: int
    """Optimiser step within the epoch, from 0."""

    micro: int
    """Micro-batch within the step, from 0."""

    last_micro: bool
    """True where the optimiser steps after this micro-batch."""

    global_weight: float
    """W: sum of the weights of the whole global batch, over all ranks and micro-batches."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def make_batch(
    fetched: Fetched,
    hot_MG: NDArray[np.uint8],
    *,
    epoch: int,
    step: int,
    micro: int,
    last_micro: bool,
) -> Batch:
    """Return the batch of a slice; the features are not copied.

    Args:
        fetched: The slice with its rows.
        hot_MG: ``[M, G]`` uint8, genres of every movie of the index.
        epoch: See ``Batch``.
        step: See ``Batch``.
        micro: See ``Batch``.
        last_micro: See ``Batch``.
    """
    piece, features_BTD, length_B = fetched
    mask_BT = np.arange(features_BTD.shape[1]) < length_B[:, None]
    return Batch(
        features=torch.from_numpy(features_BTD),
        mask=torch.from_numpy(mask_BT),
        labels=torch.from_numpy(hot_MG[piece.movie].astype(np.float32)),
        weight=torch.from_numpy(piece.weight),
        movie=torch.from_numpy(piece.movie),
        start=torch.from_numpy(piece.start),
        visit=torch.from_numpy(piece.visit),
        epoch=epoch,
        step=step,
        micro=micro,
        last_micro=last_micro,
        global_weight=piece.global_weight,
    )
