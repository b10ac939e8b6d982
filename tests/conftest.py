"""Fixtures shared by the tests; the scripts of tools/ are importable by name."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    """The demo model under the git-ignored demo/, where scripts/quickstart puts it too; a 93 MB download, once."""
    import demo_model

    directory = ROOT / "demo" / "SmolLM2-135M-Instruct"
    demo_model.make(directory)
    return directory
