"""Clients of object stores: the only module that imports obstore and boto3.

obstore sends the requests, without retries of its own. boto3 finds AWS credentials, because it
supports every kind of login. Errors are obstore's, as parsed by ``responses.ErrorResponse``.
"""

from __future__ import annotations

import asyncio
import base64
import netrc
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from configs.errors import ConfigError, DataError, MachineError

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

    from configs.schema import StorageConfig
    from sharding.storage.location import ObjectLocation

ClientError = BaseError
"""Any error of a request; a missing file is a ``FileNotFoundError``."""
ExistsError = AlreadyExistsError
"""A create-only write to an existing file."""
ATTEMPTS_PER_TIMEOUT = 4
"""A silent attempt is cancelled after this fraction of ``storage.timeout``."""
CHUNK_BYTES = 256 * 1024
"""A body is received in chunks of at least this size."""
_PARALLEL_PARTS = 2
"""Parts of one file that are uploaded at once."""
_CREDENTIAL_LIFE = timedelta(minutes=10)
_NO_RANGE = re.compile(r"status code: 416|Range request not supported|non-partial response")
"""An empty file, which has no range, or a server that ignores ranges."""
_EMPTY_SEGMENT = "contained empty path segment"
"""obstore's message about a key with ``//``."""


class FileInfo(NamedTuple):
    """Metadata of a file, as reported by the store."""

    size: int
    """In bytes."""

    version: str | None
    """ETag; None if the server sends none."""

    modified: datetime


class Download:
    """The response to a GET whose body has not been received yet."""

    def __init__(self, result: GetResult) -> None:
        self._result = result
        self.begin, self.end = result.range
        meta = result.meta
        self.file = FileInfo(meta["size"], meta["e_tag"], meta["last_modified"])

    def receive(self) -> memoryview:
        """Receive the body in this thread."""
        return memoryview(self._result.bytes())

    async def receive_async(self) -> bytes:
        """Receive the body."""
        return bytes(await self._result.bytes_async())

    def chunks(self) -> AsyncIterator[bytes]:
        """Return the chunks of the body as they arrive."""
        return self._result.stream(min_chunk_size=CHUNK_BYTES)


@dataclass(frozen=True)
class Client:
    """The requests of one bucket or server; each is sent once."""

    store: ObjectStore
    signed: bool
    """Whether requests carry credentials; those for public files need none."""

    endpoint: str = ""
    """The URL of the service and the setting that it is from, for messages."""

    head_by_get: bool = False
    """Whether GET replaces HEAD: a signed URL permits one method only."""

    list_with_boto3: Callable[[str], list[str]] | None = None
    """``list_names`` by boto3, for keys that obstore refuses; None without boto3."""

    def get_range(self, key: str, begin: int, end: int) -> Download:
        """Request bytes ``begin`` to ``end`` of a file in this thread."""
        return Download(obstore.get(self.store, key, options={"range": (begin, end)}))

    async def get_range_async(self, key: str, begin: int, end: int) -> Download:
        """Request bytes ``begin`` to ``end`` of a file."""
        result = await obstore.get_async(self.store, key, options={"range": (begin, end)})
        return Download(result)

    async def get_beginning(self, key: str, n_bytes: int) -> Download:
        """Request the first bytes of a file, and with them its size.

        It is a range even if the complete file is wanted: of other responses obstore checks
        neither status nor range, so a piece of a file would pass for the file. Without ranges the
        response is the complete file.
        """
        try:
            return await self.get_range_async(key, 0, n_bytes)
        except BaseError as error:
            if not _NO_RANGE.search(str(error)):
                raise
        return Download(await obstore.get_async(self.store, key))

    async def head(self, key: str) -> FileInfo:
        """Return size and version of a file."""
        if self.head_by_get:
            return (await self.get_beginning(key, 1)).file
        meta = await obstore.head_async(self.store, key)
        return FileInfo(meta["size"], meta["e_tag"], meta["last_modified"])

    async def list_names(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix.

        Raises:
            DataError: a key contains ``//`` and boto3 is missing.
        """
        try:
            listing = await obstore.list_with_delimiter_async(self.store, prefix or None)
        except BaseError as error:
            if _EMPTY_SEGMENT not in str(error):
                raise
            # One such key makes obstore refuse the complete listing.
            if self.list_with_boto3 is None:
                raise DataError(
                    f"{prefix or 'bucket'}: cannot list it, because a key in it contains '//'; "
                    "remove that key, or for S3 install boto3: pip install 'movienet-stream[s3]'"
                ) from None
            return await asyncio.to_thread(self.list_with_boto3, prefix)
        return [str(entry["path"]).rpartition("/")[2] for entry in listing["objects"]]

    async def try_list(self, prefix: str) -> None:
        """Request one page of a listing, to see the store's error if it refuses."""
        try:
            async for _ in obstore.list(self.store, prefix or None, chunk_size=1):
                break
        except BaseError as error:
            if _EMPTY_SEGMENT not in str(error):  # such a key was listed: the store permits it
                raise

    async def put(self, key: str, data: bytes, *, create: bool) -> None:
        """Upload a file in one request; with ``create`` only if it does not exist."""
        mode: obstore.PutMode = "create" if create else "overwrite"
        await obstore.put_async(self.store, key, data, mode=mode, use_multipart=False)

    async def put_parts(self, key: str, parts: Iterator[bytes], part_bytes: int) -> None:
        """Upload a file as parts of this size; an existing file is overwritten."""
        await obstore.put_async(
            self.store,
            key,
            parts,
            use_multipart=True,
            chunk_size=part_bytes,
            max_concurrency=_PARALLEL_PARTS,
        )

    async def copy(self, from_key: str, to_key: str) -> None:
        """Copy a file within the store, only if the target does not exist."""
        await obstore.copy_async(self.store, from_key, to_key, overwrite=False)

    async def delete(self, key: str) -> None:
        """Delete a file."""
        await obstore.delete_async(self.store, key)


_NO_RETRIES: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(0)}


def make_client(location: ObjectLocation, config: StorageConfig) -> Client:
    """Return a client; nothing is requested from the store yet.

    Raises:
        ClientError, ValueError: obstore refuses the options.
        ConfigError: the endpoint has no scheme, the profile does not exist, or a file of
            certificates cannot be read.
        MachineError: the login of the profile has expired.
    """
    session = _boto3_session(config.profile) if location.scheme == "s3" else None
    endpoint, setting = _endpoint(location.scheme, config, session)
    options: ClientConfig = {
        # storage.timeout limits all attempts; this one only bounds a lost connection.
        "timeout": timedelta(seconds=config.timeout + 1),
        "read_timeout": timedelta(seconds=config.timeout / ATTEMPTS_PER_TIMEOUT),
        "connect_timeout": timedelta(seconds=config.timeout / ATTEMPTS_PER_TIMEOUT),
        "allow_http": location.scheme == "http" or (endpoint or "").startswith("http:"),
    }
    certificates = _root_certificates(location.scheme, session)
    if certificates is not None:
        options["root_certificate"] = certificates
    shown = f"{setting} ({endpoint or 'default'})"
    if location.scheme == "s3":
        return _make_s3_client(location.bucket, config, options, session, endpoint, shown)
    if location.is_http:
        return Client(
            _make_http_store(location, options),
            signed=True,
            endpoint=location.bucket,
            head_by_get=True,
        )
    where = {} if endpoint is None else {_ENDPOINT_OPTION[location.scheme]: endpoint}
    make: Callable[..., ObjectStore] = GCSStore if location.scheme == "gs" else AzureStore
    store = make(location.bucket, client_options=options, retry_config=_NO_RETRIES, **where)
    return Client(store, signed=True, endpoint=shown)


_ENDPOINT_OPTION = {"gs": "base_url", "az": "endpoint"}


def _endpoint(scheme: str, config: StorageConfig, session: Any) -> tuple[str | None, str]:
    """Return the URL of the service, None for the default, and the setting that it is from.

    For S3 in the order of boto3: ``storage.endpoint_url``, environment, services of the profile,
    profile.

    Raises:
        ConfigError: the URL has no scheme.
    """
    candidates = {"storage.endpoint_url": config.endpoint_url}
    if scheme == "s3":
        candidates |= {name: os.environ.get(name) for name in _AWS_ENDPOINTS}
        candidates["endpoint_url of the AWS profile"] = session and _profile_endpoint(session)
    setting = next((key for key, url in candidates.items() if url), "storage.endpoint_url")
    endpoint = candidates[setting] or None
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"{setting}: got {endpoint!r}, want http://… or https://…")
    return endpoint, setting


_AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def _profile_endpoint(session: Any) -> str | None:
    """Return ``endpoint_url`` of a profile, or of S3 in the ``services`` section that it names."""
    profile = session._session.get_scoped_config()
    services = session._session.full_config.get("services", {}).get(profile.get("services"), {})
    of_s3 = services.get("s3") or {}
    url: str | None = of_s3.get("endpoint_url") or profile.get("endpoint_url")
    return url


def _root_certificates(scheme: str, session: Any) -> bytes | None:
    """Return the certificates to trust in addition to those of the system; None without any.

    For S3 as boto3: ``AWS_CA_BUNDLE``, ``ca_bundle`` of the profile, ``REQUESTS_CA_BUNDLE``.

    Raises:
        ConfigError: the file cannot be read.
    """
    candidates = {}
    if scheme == "s3":
        candidates["AWS_CA_BUNDLE"] = os.environ.get("AWS_CA_BUNDLE")
        of_profile = session and session._session.get_config_variable("ca_bundle")
        candidates["ca_bundle of the AWS profile"] = of_profile
    candidates["REQUESTS_CA_BUNDLE"] = os.environ.get("REQUESTS_CA_BUNDLE")
    for setting, path in candidates.items():
        if path:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(
                    f"{setting}: got {path}: {error.strerror}, want a PEM file of certificates"
                ) from None
    return None


def _make_http_store(location: ObjectLocation, options: ClientConfig) -> HTTPStore:
    login = location.login or _netrc_login(location.bucket)
    if login is not None:
        encoded = base64.b64encode(":".join(login).encode()).decode()
        options["default_headers"] = {"authorization": f"Basic {encoded}"}
    # obstore keeps the query, and appends the keys of files to the path before it.
    query = f"/?{location.query}" if location.query else ""
    url = f"{location.scheme}://{location.bucket}{query}"
    return HTTPStore.from_url(url, client_options=options, retry_config=_NO_RETRIES)


def _netrc_login(host: str) -> tuple[str, str] | None:
    """Return user and password of a host in ``~/.netrc`` or ``$NETRC``, as for curl and wget.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        entry = netrc.netrc(path).authenticators(host.rpartition(":")[0] or host)
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; correct it") from None
    return None if entry is None else (entry[0], entry[2] or "")


def _make_s3_client(
    bucket: str,
    config: StorageConfig,
    client: ClientConfig,
    session: Any,
    endpoint: str | None,
    shown: str,
) -> Client:
    region = config.region or (session.region_name if session is not None else None)
    options: dict[str, Any] = {"copy_if_not_exists": "multipart"}
    options |= {"endpoint": endpoint} if endpoint else {}
    options |= {"region": region} if region else {}
    signed = session is None or _frozen_credentials(session) is not None
    if not signed:
        # boto3 has searched all sources; obstore would query the metadata server and time out.
        options["skip_signature"] = True
    elif session is not None:
        options["credential_provider"] = _CredentialProvider(config.profile)
    store = S3Store(bucket, client_options=client, retry_config=_NO_RETRIES, **options)
    list_names = None if session is None else _Boto3Listing(session, bucket, config, signed=signed)
    return Client(store, signed, endpoint=shown, list_with_boto3=list_names)


@dataclass(frozen=True)
class _Boto3Listing:
    """Listing of a bucket by boto3."""

    session: Any
    bucket: str
    config: StorageConfig
    signed: bool

    def __call__(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix; keys below another prefix are not listed.

        Raises:
            MachineError: the request failed, after boto3's own retries.
        """
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
        from botocore.exceptions import ClientError as RefusedError

        options: dict[str, Any] = {} if self.signed else {"signature_version": UNSIGNED}
        seconds = self.config.timeout / ATTEMPTS_PER_TIMEOUT
        client = self.session.client(
            "s3",
            endpoint_url=self.config.endpoint_url,
            region_name=self.config.region,
            config=Config(connect_timeout=seconds, read_timeout=seconds, **options),
        )
        folder = f"{prefix}/" if prefix else ""
        try:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=folder, Delimiter="/"
            )
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        except (BotoCoreError, RefusedError) as error:
            raise MachineError(f"s3://{self.bucket}/{prefix}: cannot be listed: {error}") from None
        return [key.removeprefix(folder) for key in keys]


def _boto3_session(profile: str | None) -> Any:
    """Return a boto3 session; None without boto3: obstore then searches for credentials itself.

    Raises:
        ConfigError: the profile does not exist, or needs boto3, which is not installed.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        if profile is not None:
            raise ConfigError(
                f"storage.profile: got {profile!r}, but boto3 is missing; "
                "install it: pip install 'movienet-stream[s3]'"
            ) from None
        return None
    try:
        return boto3.Session(profile_name=profile)
    except BotoCoreError as error:
        raise ConfigError(f"storage.profile: got {profile!r}: {error}") from None


def _frozen_credentials(session: Any) -> Any:
    """Return the present credentials of a session; None if it has none.

    Raises:
        MachineError: the login of the profile has expired.
    """
    from botocore.exceptions import BotoCoreError

    try:
        credentials = session.get_credentials()
        return None if credentials is None else credentials.get_frozen_credentials()
    except BotoCoreError as error:
        raise MachineError(f"AWS credentials: {error}; log in again") from None


class _CredentialProvider:
    """Credentials read by a new boto3 session every few minutes, so a new login takes effect."""

    def __init__(self, profile: str | None) -> None:
        self._profile = profile

    def __call__(self) -> S3Credential:
        frozen = _frozen_credentials(_boto3_session(self._profile))
        if frozen is None:
            raise MachineError("no AWS credentials any more; log in again")
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE,
        }
