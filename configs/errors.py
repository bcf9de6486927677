"""Failures that are expected, each told in one line.

    MovieNetError       an expected failure; exit code 1
    ├── ConfigError     a key, type, path or combination is wrong; exit code 2
    ├── DataError       an input or a published data set is missing, cut or inconsistent
    ├── StateError      a checkpoint or stream state does not fit the data, labels or plan
    ├── MachineError    disk, quota, permission, launcher, library or network
    └── Interrupted     stopped on request with the state saved; exit code 75, run again

The message says what, where, what was got, what is wanted and what to do. Anything else that is
raised is a bug and shows its traceback.
"""

from __future__ import annotations


class MovieNetError(Exception):
    """An expected failure, shown as one line."""

    exit_code = 1


class ConfigError(MovieNetError):
    """A key, type, path or combination in the configuration or on the command line is wrong."""

    exit_code = 2


class DataError(MovieNetError):
    """An input or a published data set is missing, cut or inconsistent."""


class StateError(MovieNetError):
    """A checkpoint or stream state does not fit the data, labels or plan at hand."""


class MachineError(MovieNetError):
    """The machine says no: disk, quota, permission, launcher, library or network."""


class Interrupted(MovieNetError):  # noqa: N818  # a request obeyed, not an error
    """Stopped on request with the state saved; run the same command again to go on."""

    exit_code = 75
