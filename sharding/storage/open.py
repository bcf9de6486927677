"""The storage of a location; the only module that imports every back end."""

from __future__ import annotations

from pathlib import Path

from configs.schema import StorageConfig
from sharding.storage.base import Storage, is_url
from sharding.storage.local import DiskStorage


def open_storage(location: str, config: StorageConfig | None = None) -> Storage:
    """Return the storage of a folder or URL, which need not exist yet.

    Args:
        location: A folder, or ``s3://``, ``gs://``, ``az://``; ``http(s)://`` is read-only.
        config: How an object store is reached; a folder needs none.

    Raises:
        ConfigError: the URL's scheme is not supported.
    """
    if is_url(location):
        # Imported late: with local folders, obstore is neither needed nor loaded.
        from sharding.storage.object_store import ObjectStorage

        return ObjectStorage(location, config or StorageConfig())
    return DiskStorage(Path(location))
