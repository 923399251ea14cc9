"""The house is in order: exported, clean, layered, light to import, linked."""
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fold
import levels
import pytest
import rules
import yaml
from rules import NOTEBOOKS, ROOT

# Who may import whom: only what is on a lower level. `make levels` draws it.
LEVEL = {
    "assembly": 0, "core": 0, "decoder": 0, "pretend": 0, "progress": 0, "redact": 0, "tables": 0, "turns": 0,
    "amounts": 1, "batches": 1, "bfcl": 1, "calls": 1, "card": 1, "cards": 1, "check": 1, "children": 1, "choices": 1,
    "configs": 1, "database": 1, "exits": 1, "faults": 1, "fetching": 1, "figures": 1, "files": 1, "gateway": 1,
    "gguf_file": 1, "gojson": 1, "gpus": 1, "live": 1, "memory": 1, "options": 1, "ownrewards": 1, "passwords": 1,
    "resume": 1, "scoring": 1, "spelling": 1, "tally": 1, "tensors": 1, "tutor": 1,
    "aliases": 2, "asking": 2, "chatdb": 2, "forms": 2, "gotools": 2, "launchers": 2, "manners": 2, "pretrained": 2,
    "pretraining": 2, "prices": 2, "quantizers": 2, "rehearsal": 2, "report": 2, "turnlog": 2,
    "adapted": 3, "byfield": 3, "earlier": 3, "keeping": 3, "letters": 3, "lookalike": 3, "models": 3, "parcel": 3,
    "prompts": 3, "replies": 3, "rows": 3, "shapes": 3, "templates": 3, "users": 3,
    "copies": 4, "drafting": 4, "duels": 4, "engine": 4, "intake": 4, "labels": 4, "loading": 4, "meter": 4,
    "promptfiles": 4, "pushing": 4, "questions": 4, "recorder": 4, "requested": 4, "runs": 4, "saves": 4, "servers": 4,
    "yourdata": 4,
    "data": 5, "entrance": 5, "flight": 5, "following": 5, "gguf_tokens": 5, "harvest": 5, "jobcheck": 5, "merging": 5,
    "plan": 5, "proxy": 5, "scorer": 5, "serve": 5, "synthesis": 5, "training": 5, "views": 5,
    "calculator": 6, "chats": 6, "collect": 6, "contract": 6, "converter": 6, "explain": 6, "fleet": 6, "footprint": 6,
    "graders": 6, "kl": 6, "lora": 6, "methods": 6, "modelfile": 6, "ollama": 6, "probe": 6, "xray": 6,
    "comparing": 7, "desk": 7, "drill": 7, "evals": 7, "export": 7, "gguf_adapter": 7, "pairs": 7, "planner": 7,
    "rewardcheck": 7, "rl": 7, "scales": 7, "sft": 7,
    "checkpoints": 8, "exam": 8, "exercises": 8, "feedback": 8, "judging": 8, "page": 8, "parityruns": 8,
    "planreport": 8, "ppo": 8, "preference": 8, "published": 8, "rounds": 8, "shipping": 8, "trial": 8,
    "acts": 9, "chat": 9, "chatting": 9, "datacheck": 9, "opinions": 9, "paritygate": 9, "pporun": 9, "promptgate": 9,
    "demo": 10, "doctor": 10, "flywheel": 10, "paritypage": 10, "runthrough": 10,
    "delivery": 11, "turning": 11,
    "cli": 12,
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "gradio", "openai", "gguf", "xllamacpp", "matplotlib",
         "pandas", "numpy", "fastapi"}


def run(*words, cwd=ROOT, **env):
    return subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, env=os.environ | env)


def test_modules_are_exported(tmp_path):
    "Exporting the notebooks again changes nothing."
    copy = tmp_path / "repo"
    left_out = shutil.ignore_patterns(".venv*", ".git", "artifacts", "runs", "weights", "_docs", "_proc")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
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
        text = path.read_text()
        assert json.loads((tmp_path / path.name).read_text()) == json.loads(text), f"{path}: run nbdev-clean"
        assert '"output_type": "error"' not in text
        assert not re.search(r"/(work|home|root|Users)/\w+", text), f"{path} holds a path of a machine"


def test_every_module_can_be_imported():
    "Names that another notebook has lost are found here, and not by a reader."
    code = "import importlib, sys; [importlib.import_module(f'llmcourse.{name}') for name in sys.argv[1:]]"
    done = run(sys.executable, "-c", code, *levels.modules())
    assert done.returncode == 0, done.stderr[-800:]


def test_every_module_has_a_level():
    assert set(levels.modules()) <= set(LEVEL), "give it a level in tests/test_house.py"


def test_imports_go_down():
    up = {f"{own} → {other}" for own, other in levels.edges() if LEVEL[other] >= LEVEL[own]}
    assert up == set(), "imports of the same level or a higher one"


def test_the_picture_of_the_levels_is_up_to_date():
    assert levels.PICTURE.read_text(encoding="utf-8") == levels.draw(LEVEL), "run make levels"
    assert levels.PICTURE.relative_to(ROOT).as_posix() in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def offenders():
    return rules.offenders()


@pytest.mark.parametrize("rule", [*rules.RULES, rules.ONE_MEANING])
def test_the_rules_of_the_house(rule, offenders):
    assert offenders[rule] == set(), rule


def test_names_that_may_be_defined_twice_are():
    assert all(len(rules.defined_in().get(name, ())) > 1 for name in rules.SAME_NAME)


@pytest.mark.parametrize("path", rules.MODULES, ids=lambda p: p.stem)
def test_heavy_imports_are_inside_functions(path):
    assert {n.split(".")[0] for n in levels.imports(path, top_only=True)} & HEAVY == set()


@pytest.mark.parametrize("words", [[], ["--help"], ["sft", "--help"]], ids=["import", "help", "sft-help"])
def test_help_loads_nothing_heavy(words):
    "That is why it answers at once."
    code = f"""import sys
from llmcourse.cli import main
try: {words} and main({words})
except SystemExit as e: assert not e.code
print({{*sys.modules}} & {HEAVY | {"sqlalchemy"}}, file=sys.stderr)"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0 and done.stderr.strip() == "set()", done.stderr


def test_chapter_form():
    for path in (p for p in NOTEBOOKS if re.match(r"\d\d[a-z]?_", p.name)):
        cells = json.loads(path.read_text())["cells"]
        code = [c for c in cells if c["cell_type"] == "code"]
        first = "".join(cells[0]["source"]).strip().splitlines()
        assert first[0].startswith("# ") and first[-1].startswith("> "), f"{path.name}: first cell"
        assert any("parameters" in c["metadata"].get("tags", []) for c in code), f"{path.name}: no parameters cell"
        assert len(cells) >= 35, f"{path.name}: {len(cells)} cells"
        assert not any("import *" in "".join(c["source"]) for c in code), f"{path.name}: import *"


def test_chapters_hold_outputs():
    for path in (p for p in NOTEBOOKS if re.match(r"\d\d[a-z]?_", p.name)):
        assert any(c.get("outputs") for c in json.loads(path.read_text())["cells"]), f"{path.name}: no stored outputs"


def test_what_is_expected_to_fail_is_tried():
    "`expect_fail(f, UserError)` makes a context and throws it away: nothing is called, and nothing can fail."
    for path in NOTEBOOKS:
        calls = [line for cell in json.loads(path.read_text())["cells"] for line in cell["source"]
                 if line.lstrip().startswith("expect_fail(")]  # fmt: skip
        assert not calls, f"{path.name}: write `with expect_fail(…): …` instead of {calls}"


def test_site():
    "Every sidebar entry exists, and every link between notebooks leads somewhere."
    assert (ROOT / "nbs/_quarto.yml").is_symlink()
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    entries = re.findall(r"[\w/]+\.ipynb", json.dumps(site))
    assert entries and all((ROOT / "nbs" / e).is_file() for e in entries), entries
    chapters = {p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert chapters <= set(entries)
    workshop = sorted(f"workshop/{p.name}" for p in (ROOT / "nbs/workshop").glob("*.ipynb"))
    assert sorted(e for e in entries if e.startswith("workshop/")) == workshop, "each page once"
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
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")]
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    steps = [step.get("run", "") for job in jobs for step in job["steps"]]
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
    copy = Path(shutil.copy(path, tmp_path))
    assert not fold.fold(copy), f"{path.name}: run make fold"


def test_folding(tmp_path):
    "What is folded, that a reader's own folding goes, and that cleaning keeps it."
    closed, seen = {"source_hidden": True}, {"outputs_hidden": True}
    cases = {
        "import os\nfrom pathlib import Path": closed, "#| export\nimport os": closed, "#| hide\nx = 1": closed,
        'def f(): ...\ncheck("06.1", f, strict=True)': closed, 'check("06.1", f)': {},
        "def check(id, strict=True): ...": {},
        'check("06.1", f, strict=False)': {}, 'score = 3\nmeasured("06.a", score)': seen, "measured(rows)": {},
        'predict("06.a", ...)': {}, "import os\nx = 1": {}, "": {}, "#| default_exp x": {}, "%matplotlib inline": {},
        "#| hide_input\nx = 1": {}}
    before = {"tags": ["a"], "jupyter": {"source_hidden": False}, "collapsed": True}
    cells = [{"cell_type": "code", "id": "a", "metadata": dict(before), "source": source.splitlines(keepends=True),
              "outputs": []} for source in cases]
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


def test_code_and_notebooks_are_linted():
    done = run(Path(sys.executable).parent / "ruff", "check", "llmcourse", "tests", "deployment", "benchmarks", "nbs")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_citation_is_of_this_version():
    from llmcourse import __version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "authors", "repository-code"} <= set(cited)
