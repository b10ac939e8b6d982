"""Text files."""

from pathlib import Path

from athena_gguf.errors import AthenaError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises AthenaError if it cannot be read or is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AthenaError(f"{path}: cannot read the text: {error}") from error
