"""Every test runs offline, with its own home, and on the threads of this machine."""
import logging
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "Progress and chat databases of a test go to its own folder."
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(logging, "raiseExceptions", False)   # a library may hold a stream that pytest has closed


def pytest_collection_modifyitems(items):
    "Fast tests first; whole notebooks and the browser last."
    late = ("test_notebooks", "test_demo", "test_checkpoints")
    items.sort(key=lambda i: next((k + 1 for k, name in enumerate(late) if name in str(i.fspath)), 0))
