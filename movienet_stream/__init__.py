"""The Python interface: every name that is stable for programs outside this repository.

Names exported here keep their meaning, signature and return type within a major version; what is
imported from any other package may change in every release. Importing this package is cheap: each
name loads its module, and torch where that module needs it, on first access.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    """Version of the installed distribution, e.g. ``0.1.0``; pyproject.toml defines it."""

    from configs.errors import MovieNetError
    from configs.load import load_config
    from configs.schema import Config
    from eval.predict import Predictor
    from eval.prediction import Prediction, read_prediction
    from sharding.features import FeatureSet, MovieRows, open_features
    from training.export import Exported, load_exported
    from training.stream.batch import Batch
    from training.stream.loader import FeatureStream, score_batches
    from training.stream.view import View
    from training.stream.webdataset_stream import WebDatasetStream

__all__ = [
    "Batch",
    "Config",
    "Exported",
    "FeatureSet",
    "FeatureStream",
    "MovieNetError",
    "MovieRows",
    "Prediction",
    "Predictor",
    "View",
    "WebDatasetStream",
    "load_config",
    "load_exported",
    "open_features",
    "read_prediction",
    "score_batches",
]

_MODULES = {
    "Batch": "training.stream.batch",
    "Config": "configs.schema",
    "Exported": "training.export",
    "FeatureSet": "sharding.features",
    "FeatureStream": "training.stream.loader",
    "MovieNetError": "configs.errors",
    "MovieRows": "sharding.features",
    "Prediction": "eval.prediction",
    "Predictor": "eval.predict",
    "View": "training.stream.view",
    "WebDatasetStream": "training.stream.webdataset_stream",
    "load_config": "configs.load",
    "load_exported": "training.export",
    "open_features": "sharding.features",
    "read_prediction": "eval.prediction",
    "score_batches": "training.stream.loader",
}


if not TYPE_CHECKING:  # or a type checker would accept every name

    def __getattr__(name: str) -> Any:
        # PEP 562: called only for names that are not in the module yet.
        if name == "__version__":
            from importlib.metadata import version

            return version("movienet-stream")
        if name not in _MODULES:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; see {__name__}.__all__"
            )
        exported = getattr(import_module(_MODULES[name]), name)
        globals()[name] = exported
        return exported


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
