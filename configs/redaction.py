"""Secrets in URLs: passwords (``https://user:password@host``), signed queries (``?sig=…``). Pure.

Every error message, log line, suggested command and stored configuration passes through
``redact_urls``. Datasets store the ``bare_url`` of their sources. What leaves the machine, to wandb
and in an export, passes through ``redact``, which drops folders too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_LOGIN = re.compile(
    r"(?<=://)(?:"
    r"[^\s/?#@]*(?:@[^\s/?#@]*)*@"
    # A password may contain a slash, which ends the host of a correct URL. A port is no password.
    # The @ of FOLDER@DIGEST does not end it.
    r"|[^\s/?#@\[:]*:(?!\d+(?:[/?#,}]|$))"
    r"(?:\S*@(?=[^\s@]+/[^\s@]+@[0-9a-f]{12,64}(?![\w-]|\.\w))|\S*@)"
    r")"
)
_DOUBTFUL = re.compile(r"(?<=://)[^/@]*/[^@]*:\S*@")
"""Perhaps a user with a slash, and a password; perhaps a key with a colon and an ``@``."""

_QUERY = re.compile(
    r"(?P<url>https?://[^\s?\"'`<>]*)\?[^\s\"'`<>]*?(?=[:;,.)\]]*(?:[\s\"'`<>]|$))", re.IGNORECASE
)
_WEB = ("http://", "https://")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_FOLDER = re.compile(r"(?:~|\.{1,2})?/.*")


def redact_urls(text: str) -> str:
    """Return a text without the passwords and queries of its URLs.

    For example ``https://ada:secret@host/x.zip?sig=1`` becomes ``https://…@host/x.zip?…``. Keys of
    ``s3://``, ``gs://`` and ``az://`` may contain ``?`` and are kept.
    """
    if "://" not in text:
        return text
    return _QUERY.sub(r"\g<url>?…", _LOGIN.sub("…@", text))


def bare_url(url: str) -> str:
    """Return a URL without user, password and, for ``http(s)``, query."""
    scheme, separator, path = _LOGIN.sub("", url).partition("://")
    if f"{scheme.lower()}://" in _WEB:
        path = path.partition("?")[0]
    return f"{scheme}{separator}{path}"


def has_secret(text: str) -> bool:
    """Return whether a text contains a URL with a password or a query."""
    return redact_urls(text) != text


def redact(value: Any) -> Any:
    """Return JSON-like data without secrets and without folders of this machine.

    URLs lose user, password and query, and folders lose all but their last name. For example,
    ``s3://key:secret@bucket/films?sig=1`` becomes ``s3://bucket/films``, and ``/home/ada/films``
    becomes ``…/films``. A digest, as in ``s3://bucket/features@0123456789ab``, is kept.
    """
    if isinstance(value, Mapping):
        return {str(redact(key)): redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return _URL.sub(_location, value)
    return _last_name(value) if _FOLDER.fullmatch(value) else value


def _location(url: re.Match[str]) -> str:
    """Return the bare URL without anything in doubt: a ``?`` that a key may contain."""
    scheme, _, rest = _DOUBTFUL.sub("", bare_url(url[0])).partition("://")
    location = re.split(r"[?#]", rest)[0]
    return f"{scheme}://{_last_name(location) if scheme.lower() == 'file' else location}"


def _last_name(path: str) -> str:
    return f"…/{PurePath(path).name}"
