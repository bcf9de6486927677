"""What decides the bytes of a feature set, written down before the first picture: ``plan.json``.

Pure but for ``make_plan``'s argument: values in, values and bytes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from configs.errors import ConfigError, DataError
from sharding.deal import deal
from sharding.forms import FORMAT, Manifest, canonical_json, sha256_hex

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.registry import Tower

PLAN = "plan.json"


@dataclass(frozen=True)
class EncodePlan:
    """The resolved encoder of a feature set."""

    encoder: Mapping[str, object]
    """Name, architecture, weights digest, preprocessing, precision: what must agree to score."""

    dim: int
    """Length of a row (D)."""

    batch_size: int
    """Frames a forward pass; decides the last bit only."""

    threads: int
    """Arithmetic threads on the CPU; decides the last bit only."""

    frames: str
    """Digest of the manifest of the frame set."""

    n_shards: int
    """Shards of the frame set, and so of the feature set."""

    def made_from(self, frames_sha256: str) -> str:
        """Return the digest of what a feature shard is made from.

        Args:
            frames_sha256: Digest of the tar of the frame shard.
        """
        parts = {
            "format": FORMAT,
            "frames": frames_sha256,
            "encoder": dict(self.encoder),
            "batch_size": self.batch_size,
            "threads": self.threads,
        }
        return sha256_hex(canonical_json(parts))

    @property
    def provenance(self) -> dict[str, object]:
        """What the manifest says of the origin of the rows."""
        return {"encoder": dict(self.encoder), "dim": self.dim, "frames": self.frames}

    def to_bytes(self) -> bytes:
        """Return ``plan.json``."""
        return canonical_json({"format": FORMAT, "kind": "features", **self.tree()})

    def tree(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return {
            "encoder": dict(self.encoder),
            "dim": self.dim,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "frames": self.frames,
            "shards": self.n_shards,
        }

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``plan.json``.

        Raises:
            DataError: it is damaged or of another version.
        """
        try:
            tree: Any = json.loads(data)
            if tree["format"] != FORMAT or tree["kind"] != "features":
                raise DataError(f"{where}: got format {tree['format']!r}, want {FORMAT}")
            return cls(
                encoder=dict(tree["encoder"]),
                dim=int(tree["dim"]),
                batch_size=int(tree["batch_size"]),
                threads=int(tree["threads"]),
                frames=str(tree["frames"]),
                n_shards=int(tree["shards"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: damaged ({error!r}); plan again with --replace") from None


def make_plan(config: EncoderConfig, tower: Tower, precision: str, frames: Manifest) -> EncodePlan:
    """Write down what a configuration means with this tower, at this precision."""
    encoder = {
        **tower.provenance,
        "preprocess": config.preprocess,
        "preprocessing": tower.preprocessing.as_dict(),
        "precision": precision,
        "normalize": config.normalize,
    }
    return EncodePlan(
        encoder=encoder,
        dim=tower.dim,
        batch_size=config.batch_size,
        threads=config.threads,
        frames=frames.digest,
        n_shards=len(frames.shards),
    )


def check_same(old: EncodePlan, new: EncodePlan, where: str) -> None:
    """Refuse to go on with a plan that says something else, and say what.

    Raises:
        ConfigError: the plans differ.
    """
    differences = [
        f"{key} was {_short(before)}, is {_short(after)}"
        for key, before, after in _differences(old.tree(), new.tree(), "")
    ]
    if differences:
        raise ConfigError(
            f"{where}: planned otherwise: {'; '.join(differences)}; choose another encoder.name, "
            "or say --replace to encode anew what no longer fits"
        )


def my_shards(
    images: Sequence[int], share: tuple[int, int], rank: int, size: int
) -> tuple[int, ...]:
    """Return the shards of one rank of one share, the most images first.

    Dealt in two steps, shares then ranks, so tasks with other numbers of ranks never overlap.

    Args:
        images: Images of every shard of the set, done or not.
        share: ``(i, n)``: the i-th of n shares, from 0.
        rank: Of this process, within its task.
        size: Ranks of this task.
    """
    mine = deal(images, share[1])[share[0]]
    of_rank = deal([images[number] for number in mine], size)[rank]
    numbers = [mine[position] for position in of_rank]
    return tuple(sorted(numbers, key=lambda number: (-images[number], number)))


def _differences(old: Any, new: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _short(value: object) -> str:
    # Of a digest, the first twelve characters say enough.
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else json.dumps(value)
