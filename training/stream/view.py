"""The windows of each movie that a model scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from training.stream.epoch_plan import Unit, WindowSpec

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass(frozen=True)
class View:
    """Windows of each movie: evenly spaced, or the complete movie."""

    frames: int | None
    """Rows of a window (T); None: the complete movie at once."""

    windows: int = 1
    """Evenly spaced windows per movie (K), fewer if they would coincide. For complete movies: 1, or
    with a stride one per phase."""

    stride: int = 1
    """Every k-th frame."""

    row: Unit = "frame"
    """What a row represents: a frame, or the mean of a shot."""

    shuffle_frames: bool = False
    """Permute the frames of every movie by (seed, movie) before windows are cut."""

    seed: int = 0
    """Seed of the permutation, ``stream.seed`` as in training."""

    @classmethod
    def of(cls, trained: Config, windows: int | Literal["whole"]) -> View:
        """Return the view that ``eval.windows`` defines for a run with this configuration.

        A model that was trained on complete movies scores complete movies.
        """
        stream = trained.stream
        is_complete = windows == "whole" or stream.sampling == "full_movie"
        return cls(
            frames=None if is_complete else stream.window,
            # With a stride, a complete movie is read once per phase, so that no frame is left out.
            windows=stream.stride if windows == "whole" or is_complete else windows,
            stride=stream.stride,
            row=stream.unit,
            shuffle_frames=trained.training.shuffle_frames,
            seed=stream.seed,
        )

    @property
    def spec(self) -> WindowSpec:
        """Rows of a window."""
        return WindowSpec(
            self.frames, self.stride, shuffle_seed=self.seed if self.shuffle_frames else None
        )
