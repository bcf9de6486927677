"""Old names of configuration keys, values, commands and options, and their present names.

Also removed keys, which are ignored: every configuration that is stored with a run has them.

The only table of renames. The loader and the command line answer an old name with one line that
contains the new one. Later releases add entries and never remove any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS: Mapping[str, str] = {
    "data.arrays": "data.feature_arrays",
    "data.field": "data.feature_key",
    "data.tars": "data.feature_tars",
    "encoder.frames": "encoder.frame_storage",
    "encoder.like": "encoder.pretrained_like",
    "encoder.source": "encoder.frames_url",
    "encoder.stop_within": "encoder.shutdown_grace",
    "sharding.validate": "sharding.image_check",
    "stream.ahead_bytes": "stream.prefetch_bytes",
    "stream.blocks": "stream.shuffle_block_shards",
    "stream.cache": "stream.cache_dir",
    "stream.frames": "stream.window",
    "stream.kind": "stream.reader",
    "stream.max_bytes": "stream.cache_bytes",
    "stream.pool": "stream.bucket_batches",
    "stream.row": "stream.unit",
    "stream.sample": "stream.sampling",
    "stream.source": "stream.features_url",
    "training.accumulation": "training.grad_accumulation",
    "training.drop_features": "training.feature_dropout",
    "training.expect_world": "training.expected_world_size",
    "training.gamma": "training.lr_gamma",
    "training.hide_frames": "training.frame_dropout",
    "training.keep": "training.keep_checkpoints",
    "training.noise": "training.feature_noise",
    "training.run": "training.run_name",
    "training.step_epochs": "training.lr_step_epochs",
    "training.watch": "training.monitor_split",
}
"""Old dotted key -> present key."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "encoder.frame_storage": {"keep": "persistent", "scratch": "temporary"},
    "stream.sampling": {
        "windows": "random_window",
        "spaced": "uniform_windows",
        "movies": "full_movie",
        "random": "random_frames",
    },
}
"""Present dotted key -> old value -> present value."""

REMOVED: Mapping[str, tuple[str, str]] = {
    "encoder.preprocess": ("exact", "the pixels are always those of exact, at the speed of fast"),
}
"""Removed dotted key -> the value that is now the only one, and what replaced the others."""

COMMANDS: Mapping[str, str] = {
    "movienet-shard index": "movienet-shard index-tars",
    "movienet-train plan": "movienet-train preview",
}
"""Old program and command -> present ones."""

OPTIONS: Mapping[str, str] = {
    "--expect-world": "--expected-world-size",
    "--share": "--task",
}
"""Old command-line option -> present option."""


def without_removed_keys(tree: Any) -> tuple[Any, list[str]]:
    """Return a configuration tree without removed keys, and a line per value that has no effect.

    Args:
        tree: Sections of keys, as parsed from YAML; not modified.
    """
    lines = []
    for dotted, (kept, reason) in REMOVED.items():
        section, _, key = dotted.partition(".")
        keys = tree.get(section) if isinstance(tree, dict) else None
        if isinstance(keys, dict) and key in keys:
            tree = {**tree, section: {name: keys[name] for name in keys if name != key}}
            if keys[key] != kept:
                lines.append(f"{dotted}: {keys[key]} has no effect any more: {reason}")
    return tree, lines


def removed_key(dotted: str) -> str | None:
    """Return what replaced a removed key; None for any other."""
    return f"{dotted} was removed: {REMOVED[dotted][1]}" if dotted in REMOVED else None


def renamed_key(dotted: str, value: object) -> str | None:
    """Return ``old: value -> new: value`` for an old key or value; None if both are up to date.

    Args:
        dotted: Key with its section, e.g. ``stream.frames``.
        value: Value of the key, as parsed from YAML.
    """
    new = KEYS.get(dotted, dotted)
    new_value = VALUES.get(new, {}).get(value) if isinstance(value, str) else None
    if new_value is not None:
        return f"{dotted}: {value} -> {new}: {new_value}"
    return f"{dotted} -> {new}" if new != dotted else None
