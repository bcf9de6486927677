"""Frame shards as input of encoding: a sealed set, or temporary shards built when needed."""

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
    """Frame shards opened by a task."""

    @property
    def shards(self) -> FrameShards:
        """Shards; those yielded by ``ready`` can be read."""

    def ready(self, numbers: Iterable[int], fail: Fail) -> Iterator[Iterable[int]]:
        """Yield the numbers in order, in groups of shards that can be read now.

        A group must be encoded before the next one is requested. ``fail`` is called with shards
        that cannot be built.
        """


class FrameSource(Protocol):
    """A set of frame shards, whether or not their tars are stored."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    @property
    def plan(self) -> Plan:
        """Which movie is in which shard."""

    @property
    def is_temporary(self) -> bool:
        """Whether shards are built when needed and deleted after encoding."""

    @property
    def digest(self) -> str:
        """Digest that identifies the frame set in the plan of a feature set."""

    @property
    def costs(self) -> tuple[int, ...]:
        """Cost of each shard, completed or not, for the assignment to tasks."""

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each shard; 0 if known only once the shard is built."""

    def before(self, n_shards: int) -> str | None:
        """Return the digest of the set when it had ``n_shards``; None if it never had."""

    def sha256(self, number: int) -> str | None:
        """Return the digest of a shard's tar; None if it was never built."""

    def reading(self, stop: StopRequest) -> AbstractContextManager[FrameReader]:
        """Open the shards for a task; after a stop request no further shard is built."""

    def manifest(self) -> Manifest:
        """Return the manifest of the complete set.

        Raises:
            DataError: a shard has not been built yet, or too many images are bad.
        """


def open_frame_source(config: Config) -> FrameSource:
    """Return the frames selected by ``encoder.frame_storage``.

    Raises:
        ConfigError: storage is ``temporary`` and the configuration has no dump.
        DataError: storage is ``persistent`` and the set is absent, corrupt or not sealed; or
            storage is ``temporary`` and the frames were planned with other options.
    """
    if config.encoder.frame_storage == "temporary":
        from encoders.temporary_frames import temporary_frames

        return temporary_frames(config)
    return PersistentFrames(open_frames(config.frames_url, config.storage))


@dataclass(frozen=True, eq=False)
class PersistentFrames:
    """A sealed frame set; every shard is ready at any time."""

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
        """Digest of the manifest."""
        return self.shards.digest

    @property
    def costs(self) -> tuple[int, ...]:
        """Images of each shard."""
        return self.images

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each shard."""
        return tuple(shard.samples for shard in self.shards.manifest.shards)

    def before(self, n_shards: int) -> str | None:
        """Return the digest of the set when it had ``n_shards``; None if it never had."""
        # The extension that follows these shards records it as its parent.
        extensions = self.plan.extensions
        return next((each.parent for each in extensions if each.first == n_shards), None)

    def sha256(self, number: int) -> str | None:
        """Return the digest of a shard's tar."""
        return self.shards.sealed(number).sha256

    def reading(self, stop: StopRequest) -> AbstractContextManager[FrameReader]:  # noqa: ARG002
        """Return this set; there is nothing to open."""
        return nullcontext(self)

    def ready(self, numbers: Iterable[int], fail: Fail) -> Iterator[Iterable[int]]:  # noqa: ARG002
        """Yield all numbers as one group."""
        yield numbers

    def manifest(self) -> Manifest:
        """Return the manifest."""
        return self.shards.manifest
