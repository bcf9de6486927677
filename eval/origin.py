"""Origin of features: as text for people, and whether a model may be scored on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.errors import StateError
from configs.runtime.hints import hint

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from training.checkpoint import Trained


def describe_origin(provenance: Mapping[str, Any]) -> tuple[str, bool]:
    """Return where features come from, as text, and whether the tower was untrained."""
    dim = f"{provenance.get('dim')} values per row"
    if "import" in provenance:
        imported = provenance["import"]
        rows = "repeated and zero rows removed" if imported["dedup"] else "all rows kept"
        return f"imported arrays {imported['name']!r}, {rows}, {dim}", False
    encoder = provenance["encoder"]
    # A custom encoder that takes no ``pretrained`` has weights of its own.
    untrained = "pretrained" in encoder and encoder["pretrained"] is None
    weights = (
        f"UNTRAINED, random weights of seed {encoder.get('seed')}"
        if untrained
        else "pretrained" in encoder and f"weights {encoder['pretrained']}"
    )
    facts = [encoder.get("name"), weights, f"sha256 {str(encoder.get('weights'))[:12]}"]
    facts += [f"preprocessing {encoder.get('preprocess')}", encoder.get("precision"), dim]
    return ", ".join(str(fact) for fact in facts if fact), untrained


def check_scorable(trained: Trained, features: FeatureSet) -> None:
    """Check that the features were made in the same way as those that the model was trained on.

    Raises:
        StateError: tower, import, dimension or genres differ; one line names the difference.
    """
    where, run = features.storage.location, trained.where
    if tuple(features.labels.genres) != trained.genres:
        genres = json.dumps(trained.genres, ensure_ascii=False)
        relabel = hint("movienet-shard relabel", f"data.genres={genres}")
        raise StateError(
            f"{where}: got genres {_short(features.labels.genres)}, {run} was trained on "
            f"{_short(trained.genres)}; run {relabel}"
        )
    want, got = (_origin(tree) for tree in (trained.provenance, features.manifest.provenance))
    keys = want.keys() | got.keys()
    if "encoder.options" in want and "encoder.pretrained" not in want.keys() & got.keys():
        # Older versions recorded it also for a custom encoder that does not take it.
        keys -= {"encoder.pretrained"}
    for key in sorted(keys):
        if want.get(key) != got.get(key):
            raise StateError(
                f"{where}: {key}: got {got.get(key)!r}, {run} was trained on {want.get(key)!r}; "
                "set stream.features_url to features that were made in the same way"
            )


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must agree between trained and scored features, flattened by one level.

    The frames are not part of it: a model may be scored on other movies.
    """
    flat: dict[str, Any] = {"dim": provenance.get("dim")}
    for section in ("encoder", "import"):
        for key, value in dict(provenance.get(section) or {}).items():
            # Through JSON, as one side was read from a file: tuples become lists.
            flat[f"{section}.{key}"] = json.loads(json.dumps(value))
    return flat


def _short(genres: tuple[str, ...]) -> str:
    return f"{len(genres)} ({', '.join(genres[:3])}{', …' if len(genres) > 3 else ''})"
