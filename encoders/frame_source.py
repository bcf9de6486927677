"""Where an encode task finds its frames: kept as a sealed set, or built when their turn comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sharding.frames import open_frames

if TYPE_CHECKING:
    from configs.runtime.signals import StopRequest
    from configs.schema import Config
    from encoders.input_pipeline import Fail
    from sharding.format.manifest import Manifest
    from sharding.format.plan import Plan
    from sharding.frames import FrameSet, FrameShards


class FrameReader(Protocol):
    """Frame shards, while a task reads them."""

    @property
    def shards(self) -> FrameShards:
        """How a shard that is ready is read."""

    def ready(self, numbers: Iterable[int], fail: Fail) -> Iterator[Iterable[int]]:
        """Yield all numbers, in order, in groups that can be read now; ``fail`` hears of others.

        A group must be encoded before the next one is asked for.
        """


class FrameSource(Protocol):
    """A whole set of frame shards, whether or not their tars lie anywhere."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    @property
    def plan(self) -> Plan:
        """Which movie is in which shard."""

    @property
    def is_temporary(self) -> bool:
        """Whether they are built when their turn comes."""

    @property
    def digest(self) -> str:
        """What the plan of a feature set names them by."""

    @property
    def costs(self) -> tuple[int, ...]:
        """What each shard costs, done or not, for the deal."""

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each shard; 0 where only building tells."""

    def before(self, n_shards: int) -> str | None:
        """Return the digest from when there were so many shards; None if that never was."""

    def sha256(self, number: int) -> str | None:
        """Return the digest of a shard's tar; None as long as nobody knows it."""

    def reading(self, stop: StopRequest) -> AbstractContextManager[FrameReader]:
        """Open them for a task; a group that is not ready within a stop's time is given up."""

    def manifest(self) -> Manifest:
        """Return the manifest of the complete set.

        Raises:
            DataError: a shard has not been built yet, or too many images are bad.
        """


def open_frame_source(config: Config) -> FrameSource:
    """Return what ``encoder.frame_storage`` says.

    Raises:
        ConfigError: ``scratch`` without a dump.
        DataError: ``keep``, and the set is absent, damaged or not sealed; ``scratch``, and the plan
            was made with other options.
    """
    if config.encoder.frame_storage == "temporary":
        from encoders.temporary_frames import temporary_frames

        return temporary_frames(config)
    return PersistentFrames(open_frames(config.frames_url, config.storage))


@dataclass(frozen=True, eq=False)
class PersistentFrames:
    """A sealed set: every shard is ready at any time."""

    shards: FrameSet
    is_temporary = False

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""
        return self.shards.storage.location

    @property
    def plan(self) -> Plan:
        """Which movie is in which shard."""
        return self.shards.plan

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return self.shards.digest

    @property
    def costs(self) -> tuple[int, ...]:
        """The images of each shard."""
        return self.images

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each shard."""
        return tuple(shard.samples for shard in self.shards.manifest.shards)

    def before(self, n_shards: int) -> str | None:
        """Return the digest from when there were so many shards: the parent of the part behind."""
        return next((part.parent for part in self.plan.extensions if part.first == n_shards), None)

    def sha256(self, number: int) -> str | None:
        """Return the digest of a shard's tar."""
        return self.shards.sealed(number).sha256

    def reading(self, stop: StopRequest) -> AbstractContextManager[FrameReader]:  # noqa: ARG002
        """Open them for a task."""
        return nullcontext(self)

    def ready(self, numbers: Iterable[int], fail: Fail) -> Iterator[Iterable[int]]:  # noqa: ARG002
        """Yield all of them at once."""
        yield numbers

    def manifest(self) -> Manifest:
        """Return the manifest."""
        return self.shards.manifest
