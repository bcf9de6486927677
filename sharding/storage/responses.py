"""Responses of object stores: errors, and bodies that do not match their request. Pure."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from configs.one_line import one_line
from configs.redaction import redact_urls

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_ROTATED = {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
"""Codes of a key that was replaced by another one since the client was made, or is wrong."""

_WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint"}
_METADATA_SERVER = "169.254.169.254"
_PERMANENT = {"FileNotFoundError", "InvalidPathError", "UnknownConfigurationKeyError", "ValueError"}
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
_CAUSES = {
    "ConnectionRefused": "connection refused",
    "dns error": "unknown host",
    "kind: Timeout": "no response",
    "kind: Connect": "no connection",
    "IncompleteMessage": "the body was truncated",
    "end of file before message length reached": "the body was truncated",
}


Versions = tuple[str, ...]
"""ETag of a file, or its size and time, or both; any of them identifies its contents."""


class InvalidResponseError(Exception):
    """A response that does not match its request; its body is never used as data."""


@dataclass(frozen=True)
class ErrorResponse:
    """An error of obstore in its parts; obstore keeps status and code in the message only."""

    status: int | None
    """HTTP status; None without a response."""

    code: str
    """Code of the store, such as ``NoSuchBucket``; empty without one."""

    text: str
    kind: str
    """Name of the exception class."""

    @classmethod
    def parse(cls, error: Exception) -> ErrorResponse:
        """Return the parts of an error."""
        text = str(error)
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>(\w+)</Code>", text)
        return cls(
            int(status[1]) if status else None, code[1] if code else "", text, type(error).__name__
        )

    @property
    def summary(self) -> str:
        """The error in a few words."""
        message = re.search(r"<Message>(.*?)</Message>", self.text, re.DOTALL)
        if self.status is not None:
            detail = f"({message[1]})" if message and message[1] else ""
            return " ".join(word for word in (str(self.status), self.code, detail) if word)
        if self.certificate_fault:
            return f"its certificate is not trusted ({self.certificate_fault})"
        for pattern, cause in _CAUSES.items():
            if pattern in self.text:
                return cause
        line = self.text.partition("\n\nDebug source")[0].removeprefix("Generic ")
        return one_line(redact_urls(line))[-200:]

    @property
    def certificate_fault(self) -> str:
        """Why the certificate of the server is not trusted, e.g. ``UnknownIssuer``; else empty."""
        match = _CERTIFICATE.search(self.text)
        return match[1] if match else ""

    @property
    def redirected(self) -> bool:
        """Return whether the store redirects to another endpoint."""
        return self.status in (301, 307) or "redirect without LOCATION" in self.text

    @property
    def wrong_region(self) -> bool:
        """Return whether the bucket is in another region."""
        return self.redirected or self.code in _WRONG_REGION

    @property
    def unauthenticated(self) -> bool:
        """Return whether the request carried no valid credentials."""
        # Without credentials, obstore queries the metadata server of a cloud machine.
        no_login = self.kind == "UnauthenticatedError" or _METADATA_SERVER in self.text
        return self.status == 401 or no_login

    @property
    def expired(self) -> bool:
        """Return whether the store reports expired credentials."""
        return self.code in _EXPIRED

    @property
    def may_be_expired(self) -> bool:
        """Return whether renewed credentials may help: a refused HEAD contains no reason."""
        no_reason = self.status in (400, 401, 403) and not self.code
        return self.expired or self.code in _ROTATED or no_reason

    @property
    def permanent(self) -> bool:
        """Return whether a retry would fail the same way."""
        if self.code == "RequestTimeout":  # of S3, with status 400
            return False
        if self.kind in _PERMANENT or self.unauthenticated or self.redirected:
            return True
        if self.certificate_fault:
            return True
        if self.status in (501, 505):  # not implemented
            return True
        return self.status is not None and self.status < 500 and self.status not in (408, 429)

    @property
    def denies_file(self) -> bool:
        """Return whether the file is reported as missing or forbidden.

        A store does so for a moment where a request reaches a server that lags behind, or that
        cannot reach the service of the logins.
        """
        is_login = self.expired or self.code in _ROTATED
        denies = self.status in (403, 404) or self.kind == "FileNotFoundError"
        return denies and not is_login

    @property
    def invalid(self) -> bool:
        """Return whether obstore refused a response because of its range."""
        line = self.text.partition("\n")[0].lower()
        return self.status is None and ("range" in line or "requested" in line)


def check_version(versions: MutableMapping[str, Versions], name: str, now: Versions) -> None:
    """Raise ``InvalidResponseError`` if a file has changed; the first version seen is kept.

    Args:
        versions: Of each file, as first seen.
        name: The file.
        now: Its versions in the present response; one of them must be the same.
    """
    first = versions.setdefault(name, now)
    if not any(version in first for version in now):
        raise InvalidResponseError(f"changed while it was read ({first[0]}, now {now[0]})")


def check_length(got: int, expected: int) -> None:
    """Raise ``InvalidResponseError`` unless a body has the requested length in bytes."""
    if got != expected:
        raise InvalidResponseError(f"got a body of {got} bytes, want {expected}")
