"""Where this program keeps things of its own."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """`athena-gguf` in the user's cache directory."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "athena-gguf"
