"""A connection to an object store: retries, renewed credentials and explained errors.

A failed request is retried after increasing pauses, for ``storage.timeout`` seconds in total.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from math import inf
from typing import TYPE_CHECKING, TypeVar

from configs.errors import ConfigError, DataError, MachineError, MovieNetError
from configs.redaction import bare_url
from sharding.storage.base import missing_file
from sharding.storage.clients import (
    ATTEMPTS_PER_TIMEOUT,
    Client,
    ClientError,
    ExistsError,
    make_client,
)
from sharding.storage.location import ObjectLocation
from sharding.storage.responses import ErrorResponse, InvalidResponseError
from sharding.storage.transfer import Progress, wait_unless_stalled

if TYPE_CHECKING:
    from configs.schema import StorageConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
Request = Callable[[Client], Awaitable[T]]
"""One attempt at a request."""
MAX_INVALID_RESPONSES = 4
"""Invalid responses until a request fails: a server that ignores ranges never recovers."""
_WEB_LOGIN = "write USER:PASSWORD@ before the host, or add the host to ~/.netrc"
_LOGIN = {
    "s3": "log in, or set storage.profile or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or run `az login` and set AZURE_USE_AZURE_CLI=true",
    "http": _WEB_LOGIN,
    "https": _WEB_LOGIN,
}
"""How to obtain credentials, by scheme."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0


class Connection:
    """One location on an object store or HTTP server, connected on first use.

    Args:
        url: Of a dataset.
        config: How the store is reached.

    Raises:
        ConfigError: the URL is not supported.
    """

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.location = ObjectLocation.parse(url)
        self.url = bare_url(url).rstrip("/")
        self.config = config
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._signed, self._endpoint = True, "storage.endpoint_url"
        self._bucket_exists = False
        self._counts = {"requests": 0, "retries": 0}

    def client(self) -> Client:
        """Return the client; make it on first use, which may run a login of boto3.

        Raises:
            ConfigError: the options do not fit the store.
            MachineError: the login has expired.
        """
        with self._lock:
            if self._client is None:
                try:
                    self._client = make_client(self.location, self.config)
                except (ClientError, ValueError) as error:
                    summary = ErrorResponse.parse(error).summary
                    raise ConfigError(f"{self.url}: {summary}") from None
                self._signed, self._endpoint = self._client.signed, self._client.endpoint
            return self._client

    def close(self) -> None:
        """Release the client; the next request makes another one, with renewed credentials."""
        with self._lock:
            self._client = None

    def counts(self) -> dict[str, int]:
        """Return the number of ``requests`` sent, and of ``retries`` among them."""
        return dict(self._counts)

    def count(self, *, retry: bool = False) -> None:
        """Count a request."""
        with self._lock:
            self._counts["requests"] += 1
            self._counts["retries"] += retry

    async def retry(
        self,
        name: str,
        request: Request[T],
        *,
        deadline: float | None = None,
        progress: Progress | None = None,
        was_read: bool = False,
    ) -> T:
        """Send a request until it succeeds, the store refuses it permanently, or time is up.

        Args:
            name: The file, for messages; empty: the request concerns none.
            request: One attempt.
            deadline: When time is up, by the loop's clock; default: ``storage.timeout`` from now,
                or from the last progress.
            progress: Of a long transfer, which is not stalled as long as it progresses.
            was_read: Whether this process has read the file before: then it is not taken for
                missing or forbidden before time is up.

        Raises:
            ExistsError: a create-only write met an existing file.
            MovieNetError: any other failure.
        """
        limit = _Deadline(self.config.timeout, deadline, progress)
        silence = self.config.timeout / ATTEMPTS_PER_TIMEOUT
        invalid, renewed = 0, False
        denied: Exception | None = None
        for attempt in itertools.count(1):
            self.count(retry=attempt > 1)
            try:
                send = self._send(request)
                return await wait_unless_stalled(send, silence, progress, limit.of_attempt)
            except TimeoutError:
                fault = "no response"
            except InvalidResponseError as error:
                fault, invalid = str(error), invalid + 1
            except (MovieNetError, ExistsError):
                raise
            except (ClientError, OSError, ValueError) as error:
                response = ErrorResponse.parse(error)
                fault = response.summary
                # The user may have logged in again since the client was made.
                if response.may_be_expired and not renewed and self.location.scheme == "s3":
                    self.close()
                    renewed = True
                    continue
                denied = error if was_read and response.denies_file else None
                if response.permanent and denied is None:
                    raise await self._reason(response, name, error) from None
                invalid += response.invalid
            left = limit.seconds_left()
            if denied is not None and left < _FIRST_PAUSE_S:
                raise await self._reason(ErrorResponse.parse(denied), name, denied) from None
            if invalid >= MAX_INVALID_RESPONSES or left < _FIRST_PAUSE_S:
                raise self._gave_up(name, fault, attempt, invalid=invalid)
            pause = _pause(attempt, left)
            logger.debug("%s/%s: %s; retrying in %.1f s", self.url, name, fault, pause)
            await asyncio.sleep(pause)
        raise AssertionError

    async def check_bucket(self, *, may_list: bool = False) -> None:
        """Raise an error if bucket or login is missing: the response to HEAD contains no reason.

        Args:
            may_list: Raise an error even if only the permission to list is missing.

        Raises:
            MovieNetError: the store refuses to list, and why.
        """
        if self.location.is_http or (self._bucket_exists and not may_list):
            return
        listing = self.client().try_list(self.location.prefix)
        try:
            await asyncio.wait_for(listing, self.config.timeout / ATTEMPTS_PER_TIMEOUT)
        except (ClientError, FileNotFoundError) as error:
            response = ErrorResponse.parse(error)
            if may_list or response.status != 403 or response.expired:
                raise self._explain(response, "") from None
        except TimeoutError:
            return
        self._bucket_exists = True

    async def _send(self, request: Request[T]) -> T:
        # boto3 may log in through the network, which must not block the loop.
        client = self._client
        if client is None:
            client = await asyncio.to_thread(self.client)
        return await request(client)

    def _gave_up(self, name: str, fault: str, attempts: int, *, invalid: int) -> MovieNetError:
        where = f"{self.url}/{name}".rstrip("/")
        if invalid >= MAX_INVALID_RESPONSES:
            return DataError(
                f"{where}: {fault}, {attempts} times; the server or a proxy sends invalid responses"
            )
        return MachineError(
            f"{where}: gave up after {attempts} tries in {self.config.timeout:g} s "
            f"(storage.timeout), last: {fault}; check "
            f"{self._endpoint} and the network"
        )

    async def _reason(self, response: ErrorResponse, name: str, error: Exception) -> MovieNetError:
        """Return the error for a refusal; if it contains no reason, that of a listing."""
        if response.certificate_fault:
            return self._explain(response, "")
        missing = isinstance(error, FileNotFoundError) and response.code != "NoSuchBucket"
        if missing or not response.code:
            try:
                await self.check_bucket(may_list=not missing)
            except MovieNetError as reason:
                return reason
        return missing_file(self.url, name) if missing else self._explain(response, name)

    def _explain(self, response: ErrorResponse, name: str) -> MovieNetError:
        where, summary = f"{self.url}/{name}".rstrip("/"), response.summary
        if response.code == "NoSuchBucket" or (response.status == 404 and not name):
            bucket = self.location.bucket
            return DataError(f"{where}: no bucket {bucket}; create it, or fix the URL")
        if response.certificate_fault:
            trusted = "AWS_CA_BUNDLE or ca_bundle of the AWS profile"
            setting = trusted if self.location.scheme == "s3" else "REQUESTS_CA_BUNDLE"
            return MachineError(
                f"{where}: {self._endpoint}: {summary}; set {setting} to the PEM file of the "
                "authority that signed it"
            )
        if response.wrong_region:
            region = self.config.region or "none"
            return ConfigError(
                f"{where}: wrong region: storage.region is {region}, the store responded: "
                f"{summary}; set storage.region to the bucket's"
            )
        if response.expired:
            return MachineError(f"{where}: credentials have expired: {summary}; log in again")
        if response.unauthenticated or (response.status == 403 and not self._signed):
            login = _LOGIN[self.location.scheme]
            return MachineError(f"{where}: no valid credentials: {summary}; {login}")
        if response.status == 403:
            remedy = f"use another {'storage.profile' if self.location.scheme == 's3' else 'login'}"
            if self.location.query:
                remedy = "sign the URL again, its signature is wrong or has expired"
            return MachineError(f"{where}: not permitted: {summary}; request access, or {remedy}")
        return MachineError(f"{where}: refused: {summary}")


class _Deadline:
    """End of all attempts: a fixed time, or some time after an upload last progressed."""

    def __init__(self, timeout: float, at: float | None, progress: Progress | None) -> None:
        self._clock = asyncio.get_running_loop().time
        self._timeout = timeout
        self._progress = progress if at is None else None
        self._at = self._clock() + timeout if at is None else at
        self._furthest = 0

    @property
    def of_attempt(self) -> float:
        """When the current attempt is cancelled; one that progresses may take any time."""
        return self._at if self._progress is None else inf

    def seconds_left(self) -> float:
        """Return the seconds left; progress restarts the timeout."""
        if self._progress is not None and self._progress.furthest > self._furthest:
            self._furthest = self._progress.furthest
            self._at = self._clock() + self._timeout
        return self._at - self._clock()


def _pause(attempt: int, left: float) -> float:
    """Return the seconds before the next attempt; random, so that clients do not synchronise."""
    pause = min(_FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 10), _LONGEST_PAUSE_S, left / 2)
    return pause * random.uniform(0.5, 1.0)
