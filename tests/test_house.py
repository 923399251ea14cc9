"""The house is in order: exported, clean, layered, light to import, linked."""
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fold
import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
LEVEL = {"core": 0, "check": 1, "tutor": 1, "pretrained": 0.5, "batches": 0.5, "configs": 0.5, "tables": 0.5, "asking": 1.5, "models": 1, "files": 1, "data": 2, "datacheck": 3, "llamacpp": 2, "serve": 2, "evals": 2, "runs": 2, "sft": 3, "lora": 4, "rl": 4, "export": 4, "chat": 4,
         "checkpoints": 5, "demo": 6, "cli": 7, "exercises": 7}
FOLD_ALL = False   # True: every notebook is folded; False: only the map and workshop/check
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "gradio", "openai", "gguf", "xllamacpp", "matplotlib", "pandas", "numpy", "fastapi"}


def modules():
    return [p for p in sorted((ROOT / "llmcourse").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


def run(*words, cwd=ROOT, **env):
    return subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, env=os.environ | env)


def imports(path: Path, top_only: bool):
    "Names of the modules that a file imports, relative ones written out."
    tree = ast.parse(path.read_text())
    package = "llmcourse" + (".exercises" if path.parent.name == "exercises" else "")
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package if node.level else ""
            name = ".".join(x for x in (base, node.module) if x)
            yield name
            if name == "llmcourse":
                yield from (f"llmcourse.{a.name}" for a in node.names)


def test_modules_are_exported(tmp_path):
    "Exporting the notebooks again changes nothing."
    copy = tmp_path / "repo"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "artifacts", "runs", "weights", "_docs", "_proc"))
    before = {p.relative_to(copy): p.read_text() for p in (copy / "llmcourse").rglob("*.py")}
    done = run(Path(sys.executable).parent / "nbdev-export", cwd=copy)
    assert done.returncode == 0, done.stderr
    after = {p.relative_to(copy): p.read_text() for p in (copy / "llmcourse").rglob("*.py")}
    assert sorted(before) == sorted(after)
    assert [str(k) for k in after if after[k] != before[k]] == []


def test_notebooks_are_clean(tmp_path):
    "Cleaning the notebooks changes nothing, and no stored output is an error or holds a path of somebody's machine."
    for path in NOTEBOOKS:
        copy = tmp_path / path.name
        shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert run(Path(sys.executable).parent / "nbdev-clean", "--fname", tmp_path, cwd=ROOT).returncode == 0
    for path in NOTEBOOKS:
        assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text()), f"{path}: run nbdev-clean"
        text = path.read_text()
        assert '"output_type": "error"' not in text
        assert not re.search(r"/(work|home|root|Users)/\w+", text), f"{path} holds a path of a machine"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_go_down(path):
    own = "exercises" if path.parent.name == "exercises" else path.stem
    for name in imports(path, top_only=False):
        if name.startswith("llmcourse."):
            other = name.split(".")[1]
            if other in LEVEL and other != own:
                allowed = LEVEL[other] < LEVEL[own] or (own, other) in {("rl", "lora")}
                assert allowed, f"{own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_heavy_imports_are_inside_functions(path):
    assert {n.split(".")[0] for n in imports(path, top_only=True)} & HEAVY == set()


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_functions_are_short(path):
    long = [(n.name, n.end_lineno - n.lineno + 1) for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.end_lineno - n.lineno + 1 > 32]
    assert long == []


@pytest.mark.parametrize("words", [["-c", "import llmcourse"], ["-c", "from llmcourse.cli import main; main(['--help'])"], ["-c", "from llmcourse.cli import main; main(['sft', '--help'])"]], ids=["import", "help", "sft-help"])
def test_answers_at_once(words):
    run(sys.executable, *words)
    start = time.perf_counter()
    assert run(sys.executable, *words).returncode == 0
    assert time.perf_counter() - start < 1.5


def test_chapter_form():
    for path in (p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)):
        cells = json.loads(path.read_text())["cells"]
        code = [c for c in cells if c["cell_type"] == "code"]
        first = "".join(cells[0]["source"]).strip().splitlines()
        assert first[0].startswith("# ") and first[-1].startswith("> "), f"{path.name}: first cell"
        assert any("parameters" in c["metadata"].get("tags", []) for c in code), f"{path.name}: no parameters cell"
        assert 35 <= len(cells) <= 125, f"{path.name}: {len(cells)} cells"
        assert not any("import *" in "".join(c["source"]) for c in code), f"{path.name}: import *"


def test_chapters_hold_outputs():
    for path in (p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)):
        assert any(c.get("outputs") for c in json.loads(path.read_text())["cells"]), f"{path.name}: no stored outputs"


def test_site():
    "Every sidebar entry exists, and every link between notebooks leads somewhere."
    assert (ROOT / "nbs/_quarto.yml").is_symlink()
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    entries = re.findall(r"[\w/]+\.ipynb", json.dumps(site))
    assert entries and all((ROOT / "nbs" / e).is_file() for e in entries), entries
    chapters = {p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert chapters <= set(entries)
    for path in NOTEBOOKS:
        for link in re.findall(r"\]\(([\w./-]+\.ipynb)", path.read_text()):
            assert (path.parent / link).is_file(), f"{path.name} links to {link}"


def test_dial_and_locks():
    assert (ROOT / "settings.ini").resolve() == ROOT / "llmcourse/settings.ini"
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    assert {"cpu", "t4", "a100"} <= set(ini.sections())
    keys = [set(ini[s]) for s in ini.sections()]
    assert all(k == keys[0] for k in keys)
    for lock in ("default", "newest"):
        lines = (ROOT / f"constraints/{lock}.txt").read_text().splitlines()
        assert any(re.fullmatch(r"torch==[\d.]+", x.split("#")[0].strip()) for x in lines)


def test_workflows_call_make():
    steps = [s.get("run", "") for f in (ROOT / ".github/workflows").glob("*.yml") for j in yaml.safe_load(f.read_text())["jobs"].values() for s in j["steps"]]
    targets = set(re.findall(r"make (\w+)", " ".join(steps)))
    made = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"test", "check", "docs"} <= targets <= made
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_readme_names_the_two_commands_first():
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < 1500


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_folded(path, tmp_path):
    "Imports, hidden cells and solutions are folded, and answers too; folding keeps everything else."
    if not (FOLD_ALL or path.name in ("index.ipynb", "check.ipynb")):
        pytest.skip("not folded yet")
    copy = Path(shutil.copy(path, tmp_path))
    assert not fold.fold(copy), f"{path.name}: run make fold"


def test_folding(tmp_path):
    "What is folded, that a reader's own folding goes, and that cleaning keeps it."
    def cell(source, **more):
        return {"cell_type": "code", "id": "a", "metadata": {}, "source": source.splitlines(keepends=True), "outputs": []} | more
    closed, seen = {"source_hidden": True}, {"outputs_hidden": True}
    cases = {'import os\nfrom pathlib import Path': closed, '#| export\nimport os': closed, '#| hide\nx = 1': closed, 'import os\nx = 1': {},
             'def f(): ...\ncheck("06.1", f, strict=True)': closed, 'check("06.1", f)': {}, 'check("06.1", f, strict=False)': {},
             'def check(id, strict=True): ...': {}, 'score = 3\nmeasured("06.a", score)': seen, 'measured(rows)': {}, '': {}, '#| default_exp x': {},
             '%matplotlib inline': {}, 'predict("06.a", ...)': {}, '#| hide_input\nx = 1': {}}
    cells = [cell(source, metadata={"tags": ["a"], "jupyter": {"source_hidden": False}, "collapsed": True}) for source in cases]
    cells.append({"cell_type": "markdown", "id": "b", "metadata": {}, "source": ["import os"]})
    path = tmp_path / "06_x.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    assert fold.fold(path) and not fold.fold(path)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert run(Path(sys.executable).parent / "nbdev-clean", "--fname", path, cwd=tmp_path).returncode == 0
    after = json.loads(path.read_text())["cells"]
    for source, cell in zip(cases, after, strict=False):
        assert cell["metadata"] == {"tags": ["a"]} | ({"jupyter": cases[source]} if cases[source] else {}), source
    assert after[-1]["metadata"] == {} and not fold.fold(path)


def test_a_folded_solution_says_what_it_is():
    lines = ["#| code-fold: true\n", '#| code-summary: "Solution"\n', "x = 1\n"]
    assert fold.summary_first(lines) == [lines[1], lines[0], lines[2]]
    assert fold.summary_first(lines[2:]) == lines[2:]
