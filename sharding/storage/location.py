"""Locations of datasets on object stores and HTTP servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from configs.errors import ConfigError
from configs.redaction import bare_url

_WEB = ("http", "https")
_SCHEMES = ("s3", "gs", "az", *_WEB)


@dataclass(frozen=True)
class ObjectLocation:
    """The parts of the URL of a dataset."""

    scheme: str
    bucket: str
    """Bucket, container, or host with port."""

    prefix: str
    """Path below the bucket, without slashes at its ends; may be empty."""

    login: tuple[str, str] | None = field(default=None, repr=False)
    """User and password of ``https://user:password@host``."""

    query: str = field(default="", repr=False)
    """Query of a signed URL, which is sent with the request of each file."""

    @classmethod
    def parse(cls, url: str) -> ObjectLocation:
        """Split a URL such as ``s3://BUCKET/PREFIX`` or ``https://USER:PASSWORD@HOST/a?sig=…``.

        Raises:
            ConfigError: the scheme is not supported, or there is no bucket or host.
        """
        scheme, _, path = bare_url(url).partition("://")
        bucket, _, prefix = path.partition("/")
        if scheme not in _SCHEMES:
            raise ConfigError(
                f"{url}: got a URL of {scheme}://, want s3://, gs://, az:// or http(s)://"
            )
        if not bucket:
            raise ConfigError(f"{url}: no bucket or host, want e.g. s3://BUCKET/PREFIX")
        prefix = "/".join(part for part in prefix.split("/") if part)
        if scheme not in _WEB:
            return cls(scheme, bucket, prefix)
        parts = urlsplit(url)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        login = (user, password) if user or password else None
        return cls(scheme, bucket, prefix, login, parts.query)

    @property
    def is_http(self) -> bool:
        """Return whether this is an HTTP server, which is read-only and lists no files."""
        return self.scheme in _WEB

    def key(self, name: str) -> str:
        """Return the key of a file of the dataset."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        return unquote(path) if self.is_http else path  # a URL is percent-encoded, a key is not


def split_file(url: str) -> tuple[str, str]:
    """Return the folder of a file and its name; the query of a signed URL stays with the folder.

    For example ``https://host/a/x.zip?sig=1`` is ``x.zip`` in ``https://host/a?sig=1``.
    """
    is_http = url.partition("://")[0].lower() in _WEB
    path, mark, query = url.partition("?") if is_http else (url, "", "")
    folder, _, name = path.rpartition("/")
    return folder + mark + query, name
