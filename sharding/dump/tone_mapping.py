"""Conversion of high to standard dynamic range, for the key frames of a video."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_WHITE_NITS = 203.0
"""Luminance of white paper in both curves (ITU-R BT.2408)."""

_PQ_NITS, _HLG_NITS = 10_000.0, 1000.0
"""Luminance of the largest value of each curve; of HLG on its reference display."""

_KNEE = 0.75
"""Luminance, as a fraction of white, above which highlights are compressed."""

_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""BT.2020 to BT.709 primaries (ITU-R BT.2087)."""

_DISPLAY_GAMMA = 2.4


def tone_mapped(signal_HW3: Floats, curve: str) -> npt.NDArray[np.uint8]:
    """Return a picture of high dynamic range as uint8 ``[H, W, 3]`` of standard range.

    Args:
        signal_HW3: R'G'B' in BT.2020 primaries, 0 to 1.
        curve: ``pq`` (SMPTE ST 2084) or ``hlg`` (ARIB STD-B67).
    """
    light = (_pq(signal_HW3) if curve == "pq" else _hlg(signal_HW3)) / np.float32(_WHITE_NITS)
    peak_HW1 = light.max(axis=2, keepdims=True)
    # The largest component decides for all three, so that hues are preserved.
    light *= _compressed(peak_HW1) / np.maximum(peak_HW1, 1e-6)
    light = np.clip(light @ _TO_BT709.T, 0, 1)
    pixels: npt.NDArray[np.uint8] = np.rint(255 * light ** (1 / _DISPLAY_GAMMA)).astype(np.uint8)
    return pixels


def _compressed(light: Floats) -> Floats:
    """Return light unchanged up to the knee, then approaching 1 with a continuous slope."""
    excess = np.maximum(light - _KNEE, 0) / (1 - _KNEE)
    result: Floats = np.minimum(light, _KNEE) + (1 - _KNEE) * excess / (1 + excess)
    return result


def _pq(signal: Floats) -> Floats:
    """Return luminance in nits (SMPTE ST 2084)."""
    power = np.clip(signal, 0, 1) ** (1 / 78.84375)
    ratio = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    light: Floats = _PQ_NITS * ratio ** (1 / 0.1593017578125)
    return light


def _hlg(signal: Floats) -> Floats:
    """Return luminance in nits on the reference display (ITU-R BT.2100)."""
    signal = np.clip(signal, 0, 1)
    high = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    scene = np.where(signal <= 0.5, signal**2 / 3, high).astype(np.float32)
    luma = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    light: Floats = (_HLG_NITS * scene * np.maximum(luma, 1e-6)[..., None] ** 0.2).astype(
        np.float32
    )
    return light
