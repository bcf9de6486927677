"""What the training loop receives.

Axes: B = windows of the batch, T = rows of a window, D = feature size, G = genres.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from training.stream.reader import BorrowedBuffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from training.stream.reader import ReadSlice


class PinnedBuffers:
    """Batch buffers that a GPU copies from without waiting.

    torch's own allocator of pinned memory uses a block again only when nobody holds its tensor and
    the copies that were begun from it are done: it records an event behind each.
    """

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return memory of this shape that nobody holds; its content is anything."""
        tensor = torch.empty(shape, dtype=torch.float16, pin_memory=True)
        return BorrowedBuffer(tensor.numpy(), tensor)

    def clear(self) -> None:
        """Do nothing: free blocks are torch's."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank; its tensors may be kept as long as one likes."""

    features: Tensor
    """``[B, T, D]`` float16; rows that the mask hides are zero. T: of whole movies the longest."""

    mask: Tensor
    """``[B, T]`` bool, True where the row is a real frame; at least one a window."""

    labels: Tensor
    """``[B, G]`` float32, 0 or 1."""

    weight: Tensor
    """``[B]`` float32, 1, or 0 for a window that only fills the batch up."""

    movie: Tensor
    """``[B]`` int64, position in the feature index."""

    start: Tensor
    """``[B]`` int64, first row of the window; its first shot, where rows stand for shots."""

    window_index: Tensor
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

    partner: Batch | None = None
    """A window of another movie beside each, where the stream was asked for them."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | Batch)
        }
        return replace(self, **moved)


def make_batch(
    fetched: ReadSlice,
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
    piece, features_BTD, owner = fetched
    mask_BT = np.arange(features_BTD.shape[1]) < piece.length[:, None]
    return Batch(
        features=owner if isinstance(owner, Tensor) else torch.from_numpy(features_BTD),
        mask=torch.from_numpy(mask_BT),
        labels=torch.from_numpy(hot_MG[piece.movie].astype(np.float32)),
        weight=torch.from_numpy(piece.weight),
        movie=torch.from_numpy(piece.movie),
        start=torch.from_numpy(piece.start),
        window_index=torch.from_numpy(piece.window_index),
        epoch=epoch,
        step=step,
        micro=micro,
        last_micro=last_micro,
        global_weight=piece.global_weight,
    )
