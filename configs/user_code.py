"""Custom code that a config names by ``pkg.mod:Name`` or ``./file.py:Name``."""

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

from configs.corrupt import report_corrupt
from configs.errors import ConfigError


@dataclass(frozen=True)
class UserFile:
    """Python file of a user, copied next to the results that depend on it."""

    text: str
    sha256: str
    """Digest of the file's bytes, 64 hexadecimal digits."""


def user_file(name: str) -> UserFile | None:
    """Return the file of ``/path/net.py:Net``; None for an installed module.

    Raises:
        OSError: The file cannot be read.
    """
    module = name.rpartition(":")[0]
    if not module.endswith(".py"):
        return None
    data = Path(module).read_bytes()
    with report_corrupt(module, "save it as UTF-8", ConfigError):
        return UserFile(data.decode(), hashlib.sha256(data).hexdigest())


def load_object(name: str, *, key: str) -> Any:
    """Import the object that ``pkg.mod:attribute`` or ``/path/file.py:attribute`` names.

    Args:
        name: Module or file, a colon and the attribute.
        key: Dotted key of the configuration, e.g. ``model.class``; error messages begin with it.

    Raises:
        ConfigError: The file, module or attribute does not exist, or its import fails.
    """
    origin, colon, attribute = name.rpartition(":")
    if not colon:
        raise ConfigError(f"{key}: got {name!r}, want 'pkg.mod:Name' or './file.py:Name'")
    is_file = origin.endswith(".py")
    module = _load_file(Path(origin), key) if is_file else _load_module(origin, key)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}: {origin} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _load_module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key}: no module {error.name!r} for {name!r}") from None
    except (Exception, SystemExit) as error:
        raise _import_error(key, name, error) from error


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{key}: no file {str(path)!r}")
    # Registered under a name derived from the path: two files called net.py do not collide, and
    # pickle and inspect find the module of the classes.
    module_name = f"user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _import_error(key, str(path), error) from error
    return module


def _import_error(key: str, origin: str, error: BaseException) -> ConfigError:
    line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
    reason = f"{type(error).__name__}: {error}"
    return ConfigError(f"{key}: {origin} fails on import, at line {line}: {reason}")
