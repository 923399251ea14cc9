"""Every test runs offline, with its own home, on the threads of this machine. At the end: what was not tested."""
import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "PYTEST_XDIST_WORKER" in os.environ:     # side by side: one thread each, before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="llmcourse-tests-")   # its own
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "Progress and chat databases of a test go to its own folder."
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(logging, "raiseExceptions", False)   # a library may hold a stream that pytest has closed


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A stand-in for the Hub, for this process and, by `hub.env`, for its children."
    from hub import Hub

    with Hub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch)
        yield hub


@pytest.fixture(scope="session")
def postgres():
    "A PostgreSQL of our own, started when the first test asks for it."
    from postgres import Postgres

    server = Postgres()
    yield server
    server.close()


def pytest_collection_modifyitems(items):
    "Fast tests first, whole notebooks last."
    late = ("test_notebooks", "test_demo", "test_checkpoints")
    items.sort(key=lambda i: next((k + 1 for k, name in enumerate(late) if name in str(i.fspath)), 0))


@pytest.hookimpl(optionalhook=True)   # only where pytest-xdist is installed
def pytest_xdist_make_scheduler(config, log):
    "Side by side, the tests of a file go to one worker, but each notebook goes alone."
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if file.endswith("test_notebooks.py") else file

    return Together(config, log)


def pytest_terminal_summary(terminalreporter):
    "Say what was not tested, and the one command that brings it."
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    browser = sum("Chromium" in reason or "playwright" in reason for reason in reasons)
    if browser: terminalreporter.write_line(f"NOT TESTED: {browser} tests in a browser. They run after: make browser")
    if len(reasons) > browser: terminalreporter.write_line(f"NOT TESTED: {len(reasons) - browser} more, listed below")
