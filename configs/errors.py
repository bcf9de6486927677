"""Expected failures, each reported in one line.

    MovieNetError       an expected failure; exit code 1
    ├── ConfigError     a wrong key, type, path or combination; exit code 2
    ├── DataError       a missing, truncated or inconsistent input or dataset
    ├── StateError      a checkpoint or stream state that does not match data, labels or plan
    ├── MachineError    disk, quota, permission, launcher, library or network
    └── Interrupted     stopped on request with the state saved; exit code 75, rerun to resume

A message contains what failed, where, the value it got, the value it wants and what to do. Any
other exception is a bug and shows its traceback.
"""

from __future__ import annotations

from configs.one_line import one_line
from configs.redaction import redact_urls


class MovieNetError(Exception):
    """Expected failure, shown as one line; the message contains no secret of a URL.

    Names and values of the input that it quotes cannot break the line; see ``one_line``.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        # Here, since messages go to terminals, logs, records of attempts, wandb and notebooks.
        super().__init__(one_line(redact_urls(message)))


class ConfigError(MovieNetError):
    """Wrong key, type, path or combination in the configuration or on the command line."""

    exit_code = 2


class DataError(MovieNetError):
    """Missing, truncated or inconsistent input or published dataset."""


class StateError(MovieNetError):
    """Checkpoint or stream state that does not match the data, labels or plan in use."""


class MachineError(MovieNetError):
    """Failure of the machine: disk, quota, permission, launcher, library or network."""


class Interrupted(MovieNetError):  # noqa: N818  # the answer to a request, not an error
    """Stop on request with the state saved; rerunning the command resumes."""

    exit_code = 75


def error_text(error: MovieNetError | OSError) -> str:
    """Return the message of an error, for one of the system with the name of the file."""
    # str(error) of a system error begins with its number, which means nothing to a user.
    if isinstance(error, OSError) and error.filename:
        return one_line(redact_urls(f"{error.filename}: {error.strerror}"))
    return one_line(redact_urls(str(error)))
