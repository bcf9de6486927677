"""Comparison of what the ranks were started with, before their first step.

Ranks that read other files (a home folder per node, a stale copy of the features, an edited model)
train different models without an error: gradients have the same shapes. Each rank therefore
describes its configuration, code, data and checkpoint, and all ranks compare the descriptions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import StateError

if TYPE_CHECKING:
    from configs.runtime.launch import DistributedContext
    from configs.schema import Config
    from sharding.features import FeatureSet
    from training.checkpoint import Saved

OWN = {
    "training": {"threads", "device", "expected_world_size", "run_name"},
    "stream": {"features_url", "prefetch", "threads", "cache_dir", "cache_bytes"},
}
"""Keys that may differ between the ranks of a run: nodes have different disks and cores."""

_LONGEST_VALUE = 60


def check_agreement(distributed: DistributedContext, facts: Mapping[str, Any]) -> None:
    """Compare the facts of all ranks. A collective method.

    Args:
        distributed: The ranks.
        facts: What this rank was started with: short JSON values by name.

    Raises:
        StateError: the ranks differ. Every rank raises the same line.
    """
    texts = distributed.all_gather_bytes(json.dumps(facts, sort_keys=True, default=str).encode())
    if difference := first_difference([json.loads(text) for text in texts]):
        raise StateError(
            f"{difference}; start all ranks with the same configuration, code, data and run folder"
        )


def first_difference(ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first name, in order, whose value differs from rank 0's, with both values."""
    names = sorted({name for facts in ranks for name in facts})
    for name in names:
        values = [json.dumps(facts.get(name)) for facts in ranks]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            return (
                f"ranks differ in {name}: rank 0 has {_short(values[0])}, "
                f"rank {other} has {_short(values[other])}"
            )
    return None


def startup_facts(config: Config, saved: Saved | None) -> dict[str, Any]:
    """Return configuration, code and checkpoint of this rank."""
    training = config.training.model_dump(mode="json", exclude=OWN["training"])
    stream = config.stream.model_dump(mode="json", exclude=OWN["stream"])
    model = config.model.model_dump(mode="json", by_alias=True)
    sections = {"training": training, "stream": stream, "model": model}
    sections["eval"] = {"windows": config.eval.windows}  # the best checkpoint depends on them
    code = {"model.class": config.model.class_, "training.loss": config.training.loss}
    return {
        **{
            f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
        },
        # Nodes may have a custom file in different places: its content counts.
        **{key: name.rpartition("/")[2] for key, name in code.items()},
        **{f"the file of {key}": _code_digest(name) for key, name in code.items()},
        "the version of torch": version("torch"),
        "the checkpoint": None if saved is None else _folder_digest(saved.folder),
    }


def data_facts(features: FeatureSet, stream_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests of data, labels and plan of this rank."""
    return {
        "the features (digest of their manifest)": features.digest[:12],
        "the labels": features.labels.digest[:12],
        "the order of the windows (digest of the plan)": str(stream_state.get("plan"))[:12],
    }


def _code_digest(name: str) -> str | None:
    """Return the digest of the file that a name refers to; None if there is none."""
    origin = name.rpartition(":")[0]
    path = origin if origin.endswith(".py") else _module_file(origin)
    if path is None or not Path(path).is_file():
        return None  # a built-in loss; or an error that the ranks report when they load it
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _module_file(module: str) -> str | None:
    try:
        spec = find_spec(module) if module else None
    except (ImportError, ValueError):
        return None
    return spec.origin if spec else None


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"
