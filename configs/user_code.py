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
from configs.one_line import one_line


@dataclass(frozen=True)
class UserFile:
    """Python file of a user, copied next to the results that depend on it."""

    text: str
    sha256: str
    """Digest of the file's bytes, 64 hexadecimal digits."""


def user_file(name: str, *, key: str) -> UserFile | None:
    """Return the file of ``/path/net.py:Net``; None for an installed module.

    Args:
        name: As for ``load_object``.
        key: As for ``load_object``.

    Raises:
        ConfigError: The file does not exist, or is not UTF-8.
        OSError: The file cannot be read.
    """
    module = name.rpartition(":")[0]
    if not module.endswith(".py"):
        return None
    data = _existing(Path(module), key).read_bytes()
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
    try:
        module = _load_file(Path(origin), key) if is_file else _load_module(name, key)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        where = raised_at(error, name)
        raise ConfigError(f"{key}: {origin} fails on import: {where}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}: {origin} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _load_module(name: str, key: str) -> Any:
    module = name.rpartition(":")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Of the module itself or a package above it; any other import is one of its own lines.
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key}: no module {error.name!r} for {module!r}") from None
        raise


def _load_file(path: Path, key: str) -> Any:
    _existing(path, key)
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
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _existing(path: Path, key: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{key}: no file {str(path)!r}")
    return path


def raised_at(error: BaseException, name: str) -> str:
    """Return where an error left custom code, its type and its message.

    Libraries raise most errors: the innermost line of the custom code is the one to look at.

    Args:
        error: The error, caught.
        name: ``pkg.mod:Name`` or ``/path/file.py:Name``, as for ``load_object``.

    Returns:
        ``/path/file.py:12: KeyError: 'x'``; without file and line if the error was raised before
        a line of the custom code was reached.
    """
    reason = one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {reason}"
    folder = _folder_of(name.rpartition(":")[0])
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame for frame in frames if folder is not None and Path(frame.filename).parent == folder
    ]
    return f"{own[-1].filename}:{own[-1].lineno}: {reason}" if own else reason


def _folder_of(origin: str) -> Path | None:
    """Return the folder of a file or module; a custom class may use files next to its own."""
    if origin.endswith(".py"):
        return Path(origin).parent
    try:
        spec = importlib.util.find_spec(origin)
    except Exception:  # noqa: BLE001  # its package may raise anything on import
        return None
    return Path(spec.origin).parent if spec and spec.origin else None
