"""Two branches that change one notebook merge to a notebook that opens, and nothing outside the clone is touched."""
import json
import os
import subprocess
import sys

import pytest
from rules import ROOT

CONFLICT = "<<<<<<<"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository of one notebook, in a home of its own."
    (tmp_path / "home").mkdir()
    for key in [k for k in os.environ if k.startswith("GIT_")]: monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    git("init", "-q", "-b", "main")
    git("config", "user.name", "a")
    git("config", "user.email", "a@example.org")
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    write(1)
    git("add", "-A")
    git("commit", "-qm", "one")
    return folder


def git(*words, ok=True):
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    assert done.returncode == 0 or not ok, done.stderr
    return done


def write(value):
    cells = [{"cell_type": "code", "id": "aaaa", "metadata": {}, "source": [f"x = {value}"], "execution_count": value,
              "outputs": []}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    with open("a.ipynb", "w") as file: file.write(json.dumps(notebook, indent=1) + "\n")


def merge_two():
    git("checkout", "-qb", "other")
    write(2)
    git("commit", "-qam", "two")
    git("checkout", "-q", "main")
    write(3)
    git("commit", "-qam", "three")
    git("merge", "other", ok=False)
    return open("a.ipynb").read()


def hooks():
    return subprocess.run([sys.executable, ROOT / "tests/hooks.py"], capture_output=True, text=True, check=True)


def test_without_the_driver_a_merge_breaks_the_notebook(clone):
    with pytest.raises(json.JSONDecodeError):
        json.loads(merge_two())


def test_with_the_driver_a_notebook_still_opens(clone, tmp_path):
    hooks()
    hooks()
    merged = json.loads(merge_two())
    source = "".join("".join(cell["source"]) for cell in merged["cells"])
    assert "x = 2" in source and "x = 3" in source and CONFLICT in source
    assert (clone / ".git/info/attributes").read_text().count("ipynb") == 1
    assert list((tmp_path / "home").iterdir()) == []
    assert git("status", "--porcelain").stdout.split() == ["UU", "a.ipynb"]


def test_outside_a_clone_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert hooks().stdout == "" and list(tmp_path.iterdir()) == []
