"""The position of a stream, and its state in a checkpoint.

Pure: no I/O. A position is two integers, epoch and step. The digests of data, labels and plan
determine everything else, so a state contains neither buffers nor a random generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from configs.errors import StateError

STATE_VERSION = 1
"""Version of ``StreamState``. States of other versions are refused."""

_MAX_EPOCH = 2**64
"""Epochs are keys of the random generator, which takes 64 bits."""

_REMEDIES = {
    "data": (
        "the feature set has changed; set stream.features_url to the original set, or to "
        "FOLDER@{got} if it was extended"
    ),
    "labels": "genres or splits have changed; restore the original labels",
    "plan": (
        "the train movies, training.shuffle_frames or one of stream.seed, sampling, window, "
        "stride, unit, windows_per_movie, bucket_batches, global_batch, drop_last, "
        "shuffle_block_shards have changed; restore them"
    ),
}


class StreamState(TypedDict):
    """Position of a stream: identical on all ranks, valid for any world size."""

    version: int
    epoch: int
    step: int
    data: str
    labels: str
    plan: str


class Digests(NamedTuple):
    """Digests of everything a position refers to, in hexadecimal."""

    data: str
    labels: str
    plan: str


class EpochCursor:
    """Epoch and step of a stream.

    Args:
        steps_per_epoch: Optimizer steps per epoch, at least 1.
        digests: Digests of data, labels and plan. A state with different digests is refused.
    """

    def __init__(self, steps_per_epoch: int, digests: Digests) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epoch = self.step = 0
        self._digests = digests

    def advance(self, epoch: int, step: int) -> None:
        """Count a completed step: move to the next one, or to the next epoch after the last.

        Args:
            epoch: Epoch of the completed step.
            step: Its number within the epoch, from 0.
        """
        self.epoch, self.step = self._after(epoch, step)

    def state_dict(self) -> StreamState:
        """Return the position and its digests."""
        return self._state(self.epoch, self.step)

    def state_before(self, epoch: int, step: int) -> StreamState:
        """Return the state from which ``step`` is the next one."""
        return self._state(epoch, step)

    def state_after(self, epoch: int, step: int) -> StreamState:
        """Return the state after ``step``."""
        return self._state(*self._after(epoch, step))

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        is_last = step + 1 == self.steps_per_epoch
        return (epoch + 1, 0) if is_last else (epoch, step + 1)

    def _state(self, epoch: int, step: int) -> StreamState:
        data, labels, plan = self._digests
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "step": step,
            "data": data,
            "labels": labels,
            "plan": plan,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to the position of ``state``.

        Raises:
            StateError: the state is corrupt, or belongs to different data, labels or plan. The
                position then remains unchanged.
        """
        # Digests first: a position has no meaning for different data, even if it is in range.
        self._check_origin(state)
        epoch, step = state.get("epoch", -1), state.get("step", -1)
        if not _is_below(epoch, _MAX_EPOCH) or not _is_below(step, self.steps_per_epoch):
            raise StateError(
                f"stream state: got epoch {epoch!r}, step {step!r}, want integers from 0, step "
                f"below {self.steps_per_epoch}; the checkpoint is corrupt, use another one"
            )
        self.epoch, self.step = epoch, step

    def _check_origin(self, state: Mapping[str, Any]) -> None:
        got = state.get("version")
        if got != STATE_VERSION:
            raise StateError(
                f"stream state: version: got {got!r}, want {STATE_VERSION}; start a new run"
            )
        for name, want in self._digests._asdict().items():
            got = str(state.get(name))
            if got != want:
                remedy = _REMEDIES[name].format(got=got[:12])
                raise StateError(
                    f"stream state: {name} digest: got {got[:12]}, want {want[:12]}: "
                    f"{remedy}, or start a new run (set another training.run_name)"
                )


def _is_below(value: object, limit: int) -> bool:
    """Return whether ``value`` is an integer in ``[0, limit)``, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
