"""Check that a configuration reads and writes in separate places.

The search of a dump covers its subfolders: shards, runs or cached files in it would be read as
movies. A dump or features in a folder of results would be overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from configs.errors import ConfigError
from configs.schema import Config


def reject_overlaps(config: Config) -> None:
    """Raise ``ConfigError`` if a folder of results is in the dump, or an input in one of them.

    Links are followed. Metadata and split may be anywhere.
    """
    dump = config.data.dump
    for key, folder in _outputs(config):
        if dump is not None and _is_inside(folder, dump):
            raise ConfigError(
                f"{key}: got {folder}, want a folder outside data.dump ({dump}), whose subfolders "
                "are searched for movies"
            )
    for key, source in _inputs(config):
        for folder in _results(config):
            if _is_inside(source, folder):
                raise ConfigError(
                    f"{key}: got {source}, want a place outside {folder}, to which results are "
                    "written"
                )


def _outputs(config: Config) -> Iterator[tuple[str, str]]:
    """Yield key and value of each folder that is written."""
    yield "data.root", config.data.root
    for key, folder in (
        ("data.runs", config.data.runs),
        ("encoder.scratch_dir", config.encoder.scratch_dir),
        ("stream.cache_dir", config.stream.cache_dir),
    ):
        if folder not in (None, "auto", "off"):
            yield key, str(folder)


def _inputs(config: Config) -> Iterator[tuple[str, str]]:
    """Yield key and value of each input that contains tars or arrays."""
    data = config.data
    for key, source in (
        ("data.dump", data.dump),
        ("data.feature_arrays", data.feature_arrays),
        ("data.feature_tars", data.feature_tars),
    ):
        if source is not None:
            yield key, source


def _results(config: Config) -> tuple[str, ...]:
    return config.frames_dir, config.features_dir, str(config.run_dir)


def _is_inside(location: str, folder: str) -> bool:
    """Return whether a path or URL is a folder or in it."""
    inner, outer = _parts(location), _parts(folder)
    return inner[: len(outer)] == outer


def _parts(location: str) -> list[str]:
    """Return the components of a URL, or of a path without links."""
    if "://" not in location:
        location = os.path.realpath(location)
    return location.rstrip("/").split("/")
