"""The wheel holds the tutor and the dial, and admits both sets of libraries without moving torch."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
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
