"""What ships in deployment/ parses, imports, and says what it should."""

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deployment"


class Recorder:
    "Stands in for a Modal object: every attribute is a decorator or a factory, and calls are kept."

    def __init__(self, calls, name=""):
        self.calls, self.name = calls, name

    def __getattr__(self, name):
        return Recorder(self.calls, f"{self.name}.{name}".strip("."))

    def __call__(self, *args, **kwargs):
        self.calls.append((self.name, args, kwargs))
        return (
            args[0]
            if len(args) == 1 and callable(args[0]) and not kwargs and not isinstance(args[0], Recorder)
            else Recorder(self.calls, self.name + "()")
        )


@pytest.fixture
def load(monkeypatch):
    def load(name):
        calls, modal = [], types.ModuleType("modal")
        for part in ("App", "Volume", "Image", "Secret", "concurrent", "web_server"):
            setattr(modal, part, Recorder(calls, part))
        monkeypatch.setitem(sys.modules, "modal", modal)
        spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / "modal" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, calls

    return load


def test_modal_pair_shares_volume_and_model(load):
    (download, c1), (serve, c2) = load("download"), load("serve")
    volume = [args[0] for c in (c1, c2) for name, args, _ in c if name == "Volume.from_name"]
    assert len(volume) == 2 and len(set(volume)) == 1
    assert download.MODEL == serve.MODEL and download.FOLDER == serve.FOLDER
    assert any(kw.get("port") == serve.PORT for name, _, kw in c2 if name == "web_server")


def test_modal_serve_needs_a_key_and_hides_it(load, monkeypatch):
    serve, calls = load("serve")
    monkeypatch.delenv("LLMCOURSE_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="LLMCOURSE_API_KEY"):
        serve.environment()
    monkeypatch.setenv("LLMCOURSE_API_KEY", "k3y")
    assert serve.environment()["VLLM_API_KEY"] == "k3y" and "k3y" not in " ".join(serve.command())
    assert any(name == "Secret.from_name" for name, *_ in calls)


def test_download_takes_safetensors_only():
    text = (DEPLOY / "modal/download.py").read_text()
    patterns = re.search(r"allow_patterns=\[([^]]*)\]", text)[1]
    assert "safetensors" in patterns and ".bin" not in patterns and ".pt" not in patterns


def test_dockerfile():
    "Instructions are known, what is copied exists, it does not run as root, and it runs the demo under the lock."
    lines = [x for x in (DEPLOY / "Dockerfile").read_text().splitlines() if x and not x.startswith("#")]
    words = [x.split()[0] for x in lines if not x.startswith((" ", "\t"))]
    assert words[0] == "FROM" and set(words) <= {
        "FROM",
        "ARG",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "ENV",
        "EXPOSE",
        "ENTRYPOINT",
        "CMD",
    }
    for line in (x for x in lines if x.startswith("COPY")):
        assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"llmcourse", "constraints", "pyproject.toml"} & set(ignored)
    user = next(x for x in lines if x.startswith("USER")).split()[1]
    assert user != "root"
    text = "\n".join(lines)
    assert "constraints/default.txt" in text and '"demo"' in text and "LLMCOURSE_API_KEY=" not in text


def test_the_image_installs_the_package_for_the_cpu():
    "Plain pip on Linux would bring gigabytes of CUDA. uv knows each option, and both builds that are named."
    text = (DEPLOY / "Dockerfile").read_text()
    command = re.search(r"uv pip install (.+)$", text, re.M)[1].split()
    assert command[-1] == "." and (ROOT / command[command.index("-c") + 1]).exists()
    known = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f" {x}" in known for x in command if x.startswith("--"))
    named = re.findall(r"\bTORCH=(\w+)", text)
    assert "ARG TORCH=cpu" in text and command[command.index("--torch-backend") + 1] == "$TORCH"
    values = re.search(r"--torch-backend <.*?possible\s+values: (.*?)\]", known, re.S)[1]
    assert len(named) == 2 and all(re.search(rf"\b{x}\b", values) for x in named)


def test_modelfile():
    "The Ollama Modelfile that ships is the one that the export writes for the tutor."
    text = (DEPLOY / "ollama/Modelfile").read_text()
    assert "\nFROM ./" in text and "TEMPLATE" in text and "PARAMETER stop" in text and "<|eot_id|>" in text


def test_shipped_modelfile_is_the_exported_one(tmp_path):
    from llmcourse.shipping import export_folder

    written = export_folder("tutor/sft", tmp_path, "Q8_0")[1]
    assert written.read_text() == (DEPLOY / "ollama/Modelfile").read_text()
