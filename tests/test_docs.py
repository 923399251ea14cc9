"""The site can be made: everything up to quarto runs for every notebook. And CONTRIBUTING.md shows what is tested."""
import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from rules import NOTEBOOKS, ROOT

from llmcourse.training import Method

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


def the_entry(source: str) -> dict[str, str]:
    "The words of the call in `READ = Method(...)`, as code."
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign) and node.targets[0].id == "READ"]
    return {word.arg: ast.unparse(word.value) for word in nodes[0].value.keywords}


def test_the_method_that_contributing_shows_is_the_one_that_is_tested():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = textwrap.dedent(re.search(r"^( *)```python\n(.+?)```", text, re.M | re.S)[2])
    tests = (ROOT / "tests/test_methods.py").read_text(encoding="utf-8")
    assert the_entry(shown) == the_entry(tests)
    entry = tests.partition("# --- the entry")[2].partition("# --- and")[0]
    assert f"are {sum(bool(line.strip()) for line in entry.splitlines()[1:])} lines" in text


def test_contributing_names_every_field_of_a_method():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [f.name for f in fields(Method) if not re.search(rf"`{f.name}`|\b{f.name}=", text)]
    assert missing == [] and "placeholder" not in text
