"""The exceptions that the command line turns into a message instead of a traceback."""

from typing import ClassVar

INTERRUPTED = 130  # exit code of a process that was asked to end (docs/scripting.md)


class AthenaError(Exception):
    """Something the user can act on; the text names the file or tensor and what to do."""

    exit_code: ClassVar[int] = 1  # of the command line (docs/scripting.md)


class UsageError(AthenaError):
    """A value that an option cannot have, or options that exclude each other, whatever the model and the machine."""

    exit_code: ClassVar[int] = 2
