"""What a model is given of each movie when it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from training.stream.epoch_plan import Unit, WindowSpec

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass(frozen=True)
class View:
    """The windows of each movie: evenly spaced, or the complete movie."""

    frames: int | None
    """Rows of a window (T); None: the complete movie at once."""

    windows: int = 1
    """Evenly spaced windows per movie (K); fewer where they would coincide. Of complete movies
    there is one, or with a stride as many as it has phases."""

    stride: int = 1
    """Every k-th frame."""

    row: Unit = "frame"
    """What a row represents: a frame, or the mean over a shot."""

    shuffle_frames: bool = False
    """Permute the frames of every movie first, by (seed, movie)."""

    seed: int = 0
    """Seed of that permutation, as in training: ``stream.seed``."""

    @classmethod
    def of(cls, trained: Config, windows: int | Literal["whole"]) -> View:
        """Return the view of ``eval.windows`` for a run of this configuration.

        A model that was trained on complete movies is given complete movies.
        """
        stream = trained.stream
        is_complete = windows == "whole" or stream.sampling == "full_movie"
        return cls(
            frames=None if is_complete else stream.window,
            # Complete movies with a stride are read once per phase: no frame is left out.
            windows=stream.stride if windows == "whole" or is_complete else windows,
            stride=stream.stride,
            row=stream.unit,
            shuffle_frames=trained.training.shuffle_frames,
            seed=stream.seed,
        )

    @property
    def cut(self) -> WindowSpec:
        """Which rows a window has."""
        return WindowSpec(
            self.frames, self.stride, shuffle_seed=self.seed if self.shuffle_frames else None
        )
