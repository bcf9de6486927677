"""What a config names by ``pkg.mod:Name`` or ``./file.py:Name``: a user's own code."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError


@dataclass(frozen=True)
class UserFile:
    """A user's own file, kept with what it made."""

    text: str
    sha256: str


def user_file(name: str) -> UserFile | None:
    """Return the file of a ``/path/net.py:Net``; None for an installed module."""
    place = name.rpartition(":")[0]
    if not place.endswith(".py"):
        return None
    data = Path(place).read_bytes()
    return UserFile(data.decode(), hashlib.sha256(data).hexdigest())


def load_object(name: str, *, key: str) -> Any:
    """Return what ``pkg.mod:attribute`` or ``/path/file.py:attribute`` names.

    Raises:
        ConfigError: there is no such file, module or attribute; the line begins with ``key``.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise ConfigError(f"{key}: got {name!r}, want 'pkg.mod:Name' or './file.py:Name'")
    module = _load_file(Path(place), key) if place.endswith(".py") else _load_module(place, key)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}: {place} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _load_module(place: str, key: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key}: no module {error.name!r} for {place!r}") from None
    except Exception as error:
        raise _import_failed(key, place, error) from error


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{key}: no file {str(path)!r}")
    # Named by its path, so that two files of one name do not meet; kept, so that it is one module.
    module_name = f"user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_failed(key, str(path), error) from error
    return module


def _import_failed(key: str, place: str, error: Exception) -> ConfigError:
    line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
    kind = type(error).__name__
    return ConfigError(f"{key}: {place} fails on import, at line {line}: {kind}: {error}")
