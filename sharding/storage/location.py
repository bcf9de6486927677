"""Locations of datasets on object stores and HTTP servers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from configs.errors import ConfigError

_SCHEMES = ("s3", "gs", "az", "http", "https")


@dataclass(frozen=True)
class ObjectLocation:
    """The parts of the URL of a dataset."""

    scheme: str
    bucket: str
    """Bucket, container, or host with port."""

    prefix: str
    """Path below the bucket, without slashes at its ends; may be empty."""

    @classmethod
    def parse(cls, url: str) -> ObjectLocation:
        """Split a URL such as ``s3://BUCKET/PREFIX``.

        Raises:
            ConfigError: the scheme is not supported, or there is no bucket or host.
        """
        scheme, _, path = url.partition("://")
        bucket, _, prefix = path.partition("/")
        if scheme not in _SCHEMES:
            raise ConfigError(
                f"{url}: got a URL of {scheme}://, want s3://, gs://, az:// or http(s)://"
            )
        if not bucket:
            raise ConfigError(f"{url}: no bucket or host, want e.g. s3://BUCKET/PREFIX")
        return cls(scheme, bucket, "/".join(part for part in prefix.split("/") if part))

    @property
    def is_http(self) -> bool:
        """Return whether this is an HTTP server, which is read-only and lists no files."""
        return self.scheme in ("http", "https")

    def key(self, name: str) -> str:
        """Return the key of a file of the dataset."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        return unquote(path) if self.is_http else path  # a URL is percent-encoded, a key is not
