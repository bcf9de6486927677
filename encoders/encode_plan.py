"""What decides the bytes of a feature set, written down before the first picture: ``plan.json``.

Pure but for ``make_plan``'s argument: values in, values and bytes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from configs.errors import ConfigError, DataError
from sharding.assign import assign_shards
from sharding.format.encoding import FORMAT, canonical_json, sha256_hex

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.frame_source import FrameSource
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
    """Digest of the manifest of the frame set, in scratch of its plan."""

    n_shards: int
    """Shards of the frame set, and so of the feature set."""

    scratch: bool = False
    """Whether frame shards are built when their turn comes, and dropped."""

    parent: str | None = None
    """Digest of the manifest that the newest part adds shards to."""

    def input_digest(self, frames_sha256: str) -> str:
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

    def provenance(self, frames: str) -> dict[str, object]:
        """Return what the manifest says of the origin of the rows.

        Args:
            frames: Digest of the manifest of the frames.
        """
        return {"encoder": dict(self.encoder), "dim": self.dim, "frames": frames}

    def to_bytes(self) -> bytes:
        """Return ``plan.json``."""
        return canonical_json({"format": FORMAT, "kind": "features", **self.tree()})

    def tree(self) -> dict[str, object]:
        """Return the fields as plain values; those that came later only where they say much."""
        scratch = {"scratch": True} if self.scratch else {}
        parent = {"parent": self.parent} if self.parent else {}
        return {
            "encoder": dict(self.encoder),
            "dim": self.dim,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "frames": self.frames,
            "shards": self.n_shards,
            **scratch,
            **parent,
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
                scratch=bool(tree.get("scratch", False)),
                parent=tree.get("parent"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: damaged ({error!r}); plan again with --replace") from None


def make_plan(
    config: EncoderConfig, tower: Tower, precision: str, frames: FrameSource
) -> EncodePlan:
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
        n_shards=len(frames.plan.shards),
        scratch=frames.is_temporary,
    )


def resume(
    old: EncodePlan, new: EncodePlan, *, before: str | None, sealed: str | None, where: str
) -> EncodePlan:
    """Return the plan that holds from now on: the old one, or one with a part more.

    Args:
        old: The plan that is there.
        new: What the configuration and the frames of today mean.
        before: Digest of the frames from when they had as many shards as ``old``.
        sealed: Digest of the feature set, if it is sealed.
        where: Its place, for messages.

    Raises:
        ConfigError: the plans differ in more than frames that came later.
    """
    grown = old.frames == before
    first = replace(old, frames=new.frames, n_shards=new.n_shards) if grown else old
    _check_same(first, replace(new, parent=old.parent), where)
    return replace(new, parent=sealed or old.parent) if grown else old


def _check_same(old: EncodePlan, new: EncodePlan, where: str) -> None:
    differences = [
        f"{key} was {_short(before)}, is {_short(after)}"
        for key, before, after in _differences(old.tree(), new.tree(), "")
    ]
    if differences:
        raise ConfigError(
            f"{where}: planned otherwise: {'; '.join(differences)}; choose another encoder.name, "
            "or say --replace to encode anew what no longer fits"
        )


def assigned_shards(
    costs: Sequence[int], task: tuple[int, int], rank: int, size: int
) -> tuple[int, ...]:
    """Return the shards of one rank of one share, the most expensive first.

    Dealt in two steps, shares then ranks, so tasks with other numbers of ranks never overlap.

    Args:
        costs: What every shard of the set costs, done or not.
        task: ``(i, n)``: the i-th of n shares, from 0.
        rank: Of this process, within its task.
        size: Ranks of this task.
    """
    mine = assign_shards(costs, task[1])[task[0]]
    of_rank = assign_shards([costs[number] for number in mine], size)[rank]
    numbers = [mine[position] for position in of_rank]
    return tuple(sorted(numbers, key=lambda number: (-costs[number], number)))


def _differences(old: Any, new: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _short(value: object) -> str:
    # Of a digest, the first twelve characters say enough.
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else json.dumps(value)
