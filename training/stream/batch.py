"""Batches of windows, as the training loop receives them.

Axes: B = windows of the batch, T = rows of a window, D = feature size, G = genres.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

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
        return BorrowedBuffer(tensor.numpy(), tensor)

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


@lru_cache(maxsize=64)
def _positions(n_rows: int) -> NDArray[np.int64]:
    return np.arange(n_rows)


class SmallTensors(NamedTuple):
    """The tensors of a batch except its features; see ``Batch``."""

    mask: Tensor
    labels: Tensor
    weight: Tensor
    movie: Tensor
    start: Tensor
    window_index: Tensor


def small_tensors(piece: Slice, n_rows: int, hot_MG: NDArray[np.uint8]) -> SmallTensors:
    """Return the tensors of a slice that need no reading.

    Args:
        piece: The slice.
        n_rows: T, rows of a window in the batch.
        hot_MG: ``[M, G]`` uint8, genres of every movie of the index.
    """
    return SmallTensors(
        mask=torch.from_numpy(_positions(n_rows) < piece.length[:, None]),
        labels=torch.from_numpy(hot_MG[piece.movie].astype(np.float32)),
        weight=torch.from_numpy(piece.weight),
        movie=torch.from_numpy(piece.movie),
        start=torch.from_numpy(piece.start),
        window_index=torch.from_numpy(piece.window_index),
    )


def make_batch(
    read_slice: ReadSlice,
    small: SmallTensors,
    *,
    epoch: int,
    step: int,
    micro: int,
    last_micro: bool,
) -> Batch:
    """Return the batch of a slice, without copying its features.

    Args:
        read_slice: The slice with its features.
        small: The other tensors of the slice.
        epoch: See ``Batch``.
        step: See ``Batch``.
        micro: See ``Batch``.
        last_micro: See ``Batch``.
    """
    piece, features_BTD, owner = read_slice
    return Batch(
        # Pinned memory belongs to a tensor already: only that tensor keeps its block in use.
        features=owner if isinstance(owner, Tensor) else torch.from_numpy(features_BTD),
        **small._asdict(),
        epoch=epoch,
        step=step,
        micro=micro,
        last_micro=last_micro,
        global_weight=piece.global_weight,
    )
