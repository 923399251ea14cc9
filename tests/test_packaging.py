"""The wheel holds the tutor and the dial, and admits both sets of libraries without moving torch."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from clean import TORCH, Machine
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy: building writes beside the sources, where other tests read at the same time."
    out = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".venv*", ".git", "artifacts", "runs", "build", "*.egg-info", "_docs", "_proc")
    shutil.copytree(ROOT, out / "repo", symlinks=True, ignore=left_out)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), str(out / "repo")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def requirements(wheel):
    name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    return [Requirement(x) for x in re.findall(r"^Requires-Dist: (.+)$", wheel.read(name).decode(), re.M)]


def test_wheel_holds_weights_and_dial(wheel):
    names = wheel.namelist()
    for part in (
        "settings.ini",
        "weights/base/model.safetensors",
        "weights/base/tokenizer.json",
        "weights/sft/adapter_model.safetensors",
        "weights/grpo/run.yaml",
        "weights/rl/model.safetensors",
        "weights/tools/adapter_model.safetensors",
        "weights/draft/model.safetensors",
        "exercises/sft.py",
        "cli.py",
    ):
        assert f"llmcourse/{part}" in names, part
    assert not [n for n in names if n.startswith(("tests/", "nbs/")) or ".ipynb" in n]
    assert sum(i.compress_size for i in wheel.infolist() if "/weights/" in i.filename) < 20e6


@pytest.mark.parametrize("lock", ["default", "newest"])
def test_ranges_admit_the_lock(wheel, lock):
    lines = [x.split("#")[0].strip() for x in (ROOT / f"constraints/{lock}.txt").read_text().splitlines()]
    pins = {canonicalize_name(x.split("==")[0]): x.split("==")[1] for x in lines if "==" in x}
    for need in requirements(wheel):
        pin = pins.get(canonicalize_name(need.name))
        if pin:
            assert need.specifier.contains(pin), f"{need} does not admit {pin}"


def test_an_installed_torch_stays(wheel):
    "Any torch since 2.9 satisfies us, CUDA builds too: nothing asks pip to move it."
    torch = next(r for r in requirements(wheel) if r.name == "torch")
    assert all(torch.specifier.contains(v) for v in ("2.9.0", "2.10.0+cu128", "2.13.0+cpu", "2.14.1+cu130"))


def test_unsloth_can_live_in_the_default_lock():
    "Unsloth 2026.10's own bounds: transformers<=5.17.0, trl<=1.15.0, datasets<5, torch<2.15, peft>=0.18."
    pins = dict(re.findall(r"^(\w+)==([\w.]+)", (ROOT / "constraints/default.txt").read_text(), re.M))
    for need in ("transformers<=5.17.0", "trl<=1.15.0", "datasets<5", "torch<2.15", "peft>=0.18"):
        r = Requirement(need)
        assert r.specifier.contains(pins[r.name]), need


# --- on somebody else's machine: the libraries and a torch are there, neither this checkout nor llmcourse


@pytest.fixture(scope="module")
def machine(wheel, tmp_path_factory):
    "Its index offers our wheel, and a newer torch that nobody may take."
    machine = Machine(tmp_path_factory.mktemp("machine"))
    newer = machine.folder / "torch-99.0-py3-none-any.whl"
    with zipfile.ZipFile(newer, "w") as z:
        z.writestr("torch-99.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n")
        z.writestr("torch-99.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("torch-99.0.dist-info/RECORD", "")
    machine.offer(Path(wheel.filename), newer)
    yield machine
    machine.close()


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def installed(machine, empty):
    "The wheel, by its name, from the index."
    before = machine.versions()
    assert "llmcourse" not in before and before["torch"] == TORCH
    machine.run("pip", "install", "-q", "llmcourse", cwd=empty)
    yield machine
    after = machine.versions()
    assert after.pop("llmcourse") and after == before, "something else was moved"
    machine.run("pip", "uninstall", "-q", "-y", "llmcourse", cwd=empty)


def test_the_wheel_works_in_an_empty_folder(installed, empty):
    place = installed.run("python", "-c", "import llmcourse; print(llmcourse.__file__)", cwd=empty).strip()
    assert Path(place).is_relative_to(installed.packages)
    assert "--output" in installed.run("llmcourse", "demo", "--help", cwd=empty)
    score = installed.run("llmcourse", "scores", "--checkpoints", "sft", "--n", "2", cwd=empty)
    assert "tutor/sft" in score and not list(empty.iterdir())


@pytest.mark.slow
def test_a_chapter_runs_with_nothing_but_the_wheel(installed, empty):
    nb = json.loads((ROOT / "nbs/01_models.ipynb").read_text())
    (empty / "01_models.ipynb").write_text(json.dumps(nb))
    run = ("papermill", "--no-progress-bar", "-k", "python3", "01_models.ipynb", "out.ipynb")
    installed.run(installed.python, "-m", *run, cwd=empty, LLMCOURSE_HOME=str(empty / "home"))
    done = json.loads((empty / "out.ipynb").read_text())
    assert all(c["execution_count"] for c in done["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip())


# --- on Colab


def colab_cells() -> dict[str, list[str]]:
    "Each way of installing: the chapters that have it."
    cells = {}
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb")):
        found = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        found = [x for x in found if "google.colab" in x]
        assert len(found) == 1, f"{path.name} has {len(found)} cells that install on Colab"
        cells.setdefault(found[0], []).append(path.stem)
    return cells


COLAB = """
import sys, types
sys.modules["google"], sys.modules["google.colab"] = types.ModuleType("google"), types.ModuleType("google.colab")
"""
RUN = """
import sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance().run_cell(sys.argv[1]).raise_error()
"""
THEN = """
import llmcourse
print("installed", llmcourse.__file__)
"""
WGET = """#!{python}
import os, shutil, sys
folder, url = sys.argv[sys.argv.index("-P") + 1], sys.argv[-1]
os.makedirs(folder, exist_ok=True)
shutil.copy("{root}/" + url.split("/main/", 1)[1], folder)
"""


@pytest.mark.parametrize("cell", [pytest.param(k, id=v[0]) for k, v in colab_cells().items()])
def test_the_cell_that_installs_on_colab(machine, empty, cell):
    "Run as it stands, where google.colab is imported: the wheel comes from the index, and torch stays what it is."
    before = machine.versions()
    wget = machine.python.parent / "wget"  # what a chapter fetches besides is in this checkout
    wget.write_text(WGET.format(python=sys.executable, root=ROOT))
    wget.chmod(0o755)
    try:
        said = machine.run("python", "-c", COLAB + RUN + THEN, cell, cwd=empty)
        assert f"installed {machine.packages}" in said
        after = machine.versions()
        assert after.pop("llmcourse") and after == before and after["torch"] == TORCH
        for name in re.findall(r"-P \.\./data \S+/data/(\S+)", cell):
            assert (empty.parent / "data" / name).exists()
    finally:
        machine.run("pip", "uninstall", "-q", "-y", "llmcourse", cwd=empty)


def test_the_cell_does_nothing_elsewhere(machine, empty):
    for cell in colab_cells():
        machine.run("python", "-c", RUN, cell, cwd=empty)
    assert "llmcourse" not in machine.versions()
