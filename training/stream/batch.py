"""Batches of windows, as the training loop receives them.

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

    from training.stream.epoch_plan import Slice
    from training.stream.reader import ReadSlice


class PinnedBuffers:
    """Batch buffers in pinned memory, from which a GPU copies asynchronously.

    torch's allocator of pinned memory reuses a block only after its tensor is gone and the copies
    from it are complete: it records a CUDA event after each copy.
    """

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return unused memory of this shape; its content is undefined."""
        tensor = torch.empty(shape, dtype=torch.float16, pin_memory=True)
        features_BTD = tensor.numpy()
        return BorrowedBuffer(
            features_BTD, tensor, list(features_BTD.reshape(shape[0], -1).view(np.uint8))
        )

    def clear(self) -> None:
        """Do nothing: torch manages the free blocks."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank; its tensors may be kept for any time."""

    features: Tensor
    """``[B, T, D]`` float16; masked rows are zero. T: the window, or the longest movie."""

    mask: Tensor
    """``[B, T]`` bool, True where the row is a real frame; at least one per window."""

    labels: Tensor
    """``[B, G]`` float32, 0 or 1."""

    weight: Tensor
    """``[B]`` float32, 1, or 0 for padding windows."""

    movie: Tensor
    """``[B]`` int64, position in the feature index."""

    start: Tensor
    """``[B]`` int64, first row of the window; its first shot if rows represent shots."""

    window_index: Tensor
    """``[B]`` int64, k, the number of the window within its movie."""

    epoch: int
    """From 0."""

    step: int
    """Optimizer step within the epoch, from 0."""

    micro: int
    """Micro-batch within the step, from 0."""

    last_micro: bool
    """Whether the optimizer steps after this micro-batch."""

    global_weight: float
    """W: sum of the weights of the global batch, over all ranks and micro-batches."""

    partner: Batch | None = None
    """A window of another movie for each window, if the stream was created with ``partners``."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, without copies; ``partner`` is a dict as well, if any.

        For trainers whose batches are mappings, such as Hugging Face's.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        partner = values.pop("partner")
        return values if partner is None else {**values, "partner": partner.as_dict()}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | Batch)
        }
        return replace(self, **moved)


def plan_batch(
    piece: Slice,
    n_rows: int,
    hot_MG: NDArray[np.uint8],
    *,
    epoch: int,
    step: int,
    micro: int,
    last_micro: bool,
) -> Batch:
    """Return the batch of a slice before its features are read, which ``add_features`` completes.

    Args:
        piece: The slice.
        n_rows: T, rows of a window in the batch.
        hot_MG: ``[M, G]`` uint8, genres of every movie of the index.
        epoch: See ``Batch``.
        step: See ``Batch``.
        micro: See ``Batch``.
        last_micro: See ``Batch``.
    """
    mask_BT = np.ones((len(piece.movie), n_rows), np.bool_)
    for window in np.flatnonzero(piece.length < n_rows).tolist():
        mask_BT[window, piece.length[window] :] = False
    return Batch(
        features=torch.empty(0),
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


def add_features(read_slice: ReadSlice, planned: Batch) -> Batch:
    """Return the planned batch of a slice, completed by its features without copying them."""
    _, features_BTD, owner = read_slice
    # Pinned memory belongs to a tensor already: only that tensor keeps its block in use.
    features = owner if isinstance(owner, Tensor) else torch.from_numpy(features_BTD)
    # Frozen for its users, and they have not received it yet: a copy would cost more than reading
    # a window.
    object.__setattr__(planned, "features", features)
    return planned
