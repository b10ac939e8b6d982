"""The one exception that the command line turns into a message instead of a traceback."""


class AthenaError(Exception):
    """Something the user can act on; the text names the file or tensor and what to do."""
