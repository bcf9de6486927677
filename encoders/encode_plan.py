"""Plan of a feature set, ``plan.json``: everything that determines its bytes.

Pure functions; only ``make_plan`` reads attributes of an open tower and frame source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError
from configs.runtime.hints import hint
from sharding.assign import assign_shards
from sharding.format.encoding import FORMAT, canonical_json, sha256_hex

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.frame_source import FrameSource
    from encoders.registry import Tower

PLAN = "plan.json"

PREPROCESS = "exact"
"""Recorded, because older versions could also encode ``fast``, with pixels off by up to 2/255."""


@dataclass(frozen=True)
class EncodePlan:
    """Resolved encoder and frames of a feature set."""

    encoder: Mapping[str, object]
    """Name, architecture, weights digest, preprocessing and precision: must be equal in training
    and evaluation."""

    dim: int
    """Length of a row (D)."""

    batch_size: int
    """Frames per forward pass; affects only the last bit of a feature."""

    threads: int
    """Arithmetic threads on the CPU; affects only the last bit of a feature."""

    frames: str
    """Digest of the frame set: of its manifest, or for temporary frames of its plan."""

    n_shards: int
    """Number of shards of the frame set and of the feature set."""

    scratch: bool = False
    """Whether frame shards are temporary: built when needed, deleted after encoding."""

    parent: str | None = None
    """Digest of the manifest that the newest extension adds shards to."""

    def input_digest(self, frames_sha256: str) -> str:
        """Return the digest of the inputs of a feature shard.

        Args:
            frames_sha256: Digest of the tar of the frame shard.
        """
        inputs = {
            "format": FORMAT,
            "frames": frames_sha256,
            "encoder": dict(self.encoder),
            "batch_size": self.batch_size,
            "threads": self.threads,
        }
        return sha256_hex(canonical_json(inputs))

    def provenance(self, frames: str) -> dict[str, object]:
        """Return the ``provenance`` of the manifest.

        Args:
            frames: Digest of the manifest of the frames.
        """
        return {"encoder": dict(self.encoder), "dim": self.dim, "frames": frames}

    def to_bytes(self) -> bytes:
        """Return the content of ``plan.json``."""
        return canonical_json({"format": FORMAT, "kind": "features", **self.tree()})

    def tree(self) -> dict[str, object]:
        """Return the fields as plain values; ``scratch`` and ``parent`` only if set.

        They were added later: plans without them keep their bytes.
        """
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
            DataError: the data is corrupt or of another format version.
        """
        with report_corrupt(where, f"run {hint('movienet-encode plan --replace')}"):
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


def make_plan(
    config: EncoderConfig, tower: Tower, precision: str, frames: FrameSource
) -> EncodePlan:
    """Return the plan of a configuration with this tower, precision and frame set."""
    encoder = {
        **tower.provenance,
        "preprocess": PREPROCESS,
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
    """Return the plan to continue with: the existing one, or one with an extension.

    Args:
        old: The existing plan.
        new: The plan of the present configuration and frames.
        before: Digest of the frame set when it had as many shards as ``old``.
        sealed: Digest of the feature set if it is sealed.
        where: Location of the plan, for messages.

    Raises:
        ConfigError: the plans differ in more than added frames.
    """
    if old.encoder.get("preprocess") == "fast":
        # ``fast`` promises pixels within 2/255, which exact ones are: such a set can be continued.
        new = replace(new, encoder={**new.encoder, "preprocess": "fast"})
    if "pretrained" in old.encoder and "pretrained" not in new.encoder:
        # Older versions recorded it also for a custom encoder that does not take it.
        recorded = {**new.encoder, "pretrained": old.encoder["pretrained"]}
        new = replace(new, encoder=recorded)
    # An extension must use the same encoder, so the plans are compared as if the old one already
    # had the added frames.
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
            f"{where}: differs from the configuration: {'; '.join(differences)}; choose another "
            f"encoder.name, or run {hint('movienet-encode run --replace')} to encode again what "
            "no longer matches"
        )


def assigned_shards(
    costs: Sequence[int], task: tuple[int, int], rank: int, size: int
) -> tuple[int, ...]:
    """Return the shards of one rank of one task, the most expensive first.

    Shards are assigned in two steps, first to tasks and then to ranks, so tasks with different
    numbers of ranks never overlap.

    Args:
        costs: Cost of every shard of the set, completed or not.
        task: ``(i, n)``: the i-th of n tasks, from 0.
        rank: Rank of this process within its task.
        size: Number of ranks of this task.
    """
    mine = assign_shards(costs, task[1])[task[0]]
    of_rank = assign_shards([costs[number] for number in mine], size)[rank]
    numbers = [mine[position] for position in of_rank]
    # The longest shard last would let one rank run on while the others are done.
    return tuple(sorted(numbers, key=lambda number: (-costs[number], number)))


def _differences(old: Any, new: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _short(value: object) -> str:
    # Twelve characters identify a digest.
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else json.dumps(value)
