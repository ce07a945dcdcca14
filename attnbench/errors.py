"""Every error attnbench raises on purpose, in one tree, and the exit codes of the command line.

    AttnBenchError                    exit 2 unless a child says otherwise
    ├── UsageError                    what the user typed or wrote in a file
    │   ├── WorkloadError             a batch spec, shape, feature or workload text
    │   ├── SettingsError             attnbench.toml or an environment variable
    │   ├── UnknownBackendError       a backend name nobody registered
    │   └── DeviceError               a device text, or a device that is not here
    ├── SelectionError                no backend accepts it, or the requested one refuses
    ├── TimerError                    a timer that cannot time this call; a stored row's reason
    ├── DataError                     what is stored, or cannot be
    │   ├── SchemaError               a file of a newer schema version, or not of ours
    │   ├── CorruptDataError          a checksum or a file that cannot be read
    │   └── ResultsFolderError        the results folder cannot be read or written
    └── InfrastructureError           exit 4: the machine failed us (full disk, a lost worker)
        └── BackendUnavailableError   a registered backend whose library is missing or broken

A wrong output, a crash, a timeout or noise are not exceptions but statuses of stored rows.
Each message names the input and ends with the mend.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every verb. One number when several hold: 2, else 1, else 4, else 3, else 0."""

    OK = 0
    REGRESSION = 1
    USAGE = 2
    UNDECIDED = 3
    INCOMPLETE = 4

    @classmethod
    def join(cls, *codes: ExitCode) -> ExitCode:
        """The one code to exit with when several hold."""
        for code in (cls.USAGE, cls.REGRESSION, cls.INCOMPLETE, cls.UNDECIDED):
            if code in codes:
                return code
        return cls.OK


class AttnBenchError(Exception):
    """Base of every error raised on purpose. `str(error)` is one line: the input and the mend."""

    exit_code: ExitCode = ExitCode.USAGE


class UsageError(AttnBenchError):
    """What the user typed, or wrote in a file, is not valid."""


class WorkloadError(UsageError):
    """A batch spec, shape, feature or workload text is not valid."""


class SettingsError(UsageError):
    """attnbench.toml or an environment variable is not valid."""


class UnknownBackendError(UsageError):
    """A backend name that nobody registered."""


class DeviceError(UsageError):
    """A device text that cannot be read, or a device that is not here."""


class SelectionError(AttnBenchError):
    """No backend accepts the configuration, or the requested one refuses it."""


class TimerError(AttnBenchError):
    """A timer cannot time this call honestly, and nothing takes its place unasked."""


class DataError(AttnBenchError):
    """What is stored is not usable, or what is asked for is not stored."""


class SchemaError(DataError):
    """A file of a newer schema version, or one that is not ours."""


class CorruptDataError(DataError):
    """A checksum does not match, or a file cannot be read."""


class ResultsFolderError(DataError):
    """The results folder cannot be read or written."""


class InfrastructureError(AttnBenchError):
    """The machine failed us: a full disk, a worker that cannot be started."""

    exit_code = ExitCode.INCOMPLETE


class BackendUnavailableError(InfrastructureError):
    """A registered backend whose library is missing or broken; the message says how to mend it."""
