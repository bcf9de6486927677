"""Secrets in URLs: passwords (``https://user:password@host``), signed queries (``?sig=…``). Pure.

Every error message, log line, suggested command and stored configuration passes through
``redact_urls``. Datasets store the ``bare_url`` of their sources.
"""

from __future__ import annotations

import re

_LOGIN = re.compile(
    r"(?<=://)(?:"
    r"[^\s/?#@]*(?:@[^\s/?#@]*)*@"
    # A password may contain a slash, which ends the host of a correct URL. A port is no password.
    r"|[^\s/?#@\[:]*:(?!\d+(?:[/?#,}]|$))\S*@"
    r")"
)
_QUERY = re.compile(
    r"(?P<url>https?://[^\s?\"'`<>]*)\?[^\s\"'`<>]*?(?=[:;,.)\]]*(?:[\s\"'`<>]|$))", re.IGNORECASE
)
_WEB = ("http://", "https://")


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
