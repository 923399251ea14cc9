"""The site can be made: everything up to quarto runs for every notebook."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rules import NOTEBOOKS, ROOT

NBS = ROOT / "nbs"


def fake_quarto(folder: Path) -> dict[str, str]:
    "An environment in which quarto is there and does nothing, so that nbdev does not try to install it."
    folder.mkdir()
    (folder / "quarto").write_text("#!/bin/sh\nexit 0\n")
    (folder / "quarto").chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "What `make docs` runs before quarto, on a copy: the prepared folder, and what was said."
    folder = tmp_path_factory.mktemp("docs")
    copy = folder / "repo"
    left_out = shutil.ignore_patterns(".venv*", ".git", "artifacts", "runs", "weights", "_docs", "_proc")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    done = subprocess.run([Path(sys.executable).parent / "nbdev-proc-nbs", "--n-workers", "1"], cwd=copy,
                          env=fake_quarto(folder / "bin"), capture_output=True, text=True)
    return copy / "_proc", done


def test_every_notebook_is_prepared(site):
    folder, done = site
    assert done.returncode == 0, done.stderr[-2000:]      # it names the notebook and the cell
    missing = [path.name for path in NOTEBOOKS if not (folder / path.relative_to(NBS)).is_file()]
    assert missing == []


def test_without_quarto_nothing_is_installed(tmp_path):
    "`make docs` says what to install, before nbdev gets as far as sudo."
    for name in ("env", "sudo"):
        (tmp_path / name).write_text('#!/bin/sh\ntouch "$(dirname "$0")/called"\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([sys.executable, ROOT / "tests/build_docs.py"], cwd=tmp_path, env={"PATH": str(tmp_path)},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "quarto.org" in done.stderr and done.stdout == ""
    assert not (tmp_path / "called").exists()
