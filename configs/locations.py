"""The paths of a configuration: expansion, and checks that they are files in separate places.

The search of a dump covers its subfolders: shards, runs or cached files in it would be read as
movies. A dump or features in a folder of results would be overwritten.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config

_PATHS = (
    *(("data", key) for key in ("dump", "feature_arrays", "feature_tars", "metadata", "split")),
    *(("data", key) for key in ("root", "runs")),
    *(("encoder", key) for key in ("model", "pretrained", "weights_dir", "frames_url")),
    *(("encoder", "scratch_dir"), ("stream", "features_url"), ("stream", "cache_dir")),
    *(("model", "class"), ("model", "init_from"), ("training", "split"), ("training", "loss")),
    ("eval", "prompts"),
    ("slurm", "site"),
)
"""Keys that may contain a path."""


def expand_paths(tree: dict[str, Any]) -> None:
    """Replace ``~`` and ``$VARIABLE`` in the paths of a configuration, as a shell would.

    Raises:
        ConfigError: a variable is not set; otherwise a folder of that literal name would be made.
    """
    for key, section, name, value in _paths(tree):
        expanded = os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111  # of text
        if unset := re.search(r"\$\{?(\w+)", expanded):
            raise ConfigError(
                f"{key}: got {value}, but {unset[1]} is not set; set it, or write the folder"
            )
        section[name] = expanded


def reject_pipes(tree: dict[str, Any]) -> None:
    """Raise ``ConfigError`` if a path leads to a pipe or device, whose end would never be read."""
    for key, _, _, value in _paths(tree):
        path = value.rpartition(":")[0] if ".py:" in value else value
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116  # of text
        except (OSError, ValueError):
            continue  # whatever opens it reports it
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ConfigError(f"{key}: got {value}, a pipe or device, want a file or folder")


_LOCAL = (
    *(("data", "metadata"), ("data", "split"), ("training", "split")),
    *(("encoder", "weights_dir"), ("encoder", "scratch_dir"), ("stream", "cache_dir")),
)
"""Keys whose files are opened by path."""


def reject_urls(tree: dict[str, Any]) -> None:
    """Raise ``ConfigError`` if a key of local files has a URL, before any command uses it."""
    for section, name in _LOCAL:
        value = tree.get(section, {}).get(name)
        if isinstance(value, str):
            require_local(f"{section}.{name}", value)


def require_local(key: str, path: str) -> None:
    """Raise ``ConfigError`` if a path is a URL."""
    if "://" in path:
        raise ConfigError(f"{key}: got {path}, want a file or folder on disk; download it first")


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Yield dotted key, section, name and value of each path that is set."""
    for section, name in _PATHS:
        values = tree.get(section, {})
        value = values.get(name)
        if isinstance(value, str) and "://" not in value:
            yield f"{section}.{name}", values, name, value


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
