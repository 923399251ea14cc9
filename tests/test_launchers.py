"""Engines that are programs: stand-ins on PATH write down how they were called, answer, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.launchers import LAUNCHERS, check_program, flags
from llmcourse.serve import connect, resolve, serve
from llmcourse.shipping import best_engine, served

STAND_IN = """#!PYTHON
# A program that writes down how it was called, starts a helper in a session of its own, and answers HTTP.
import http.server, json, os, subprocess, sys, time
here = os.path.dirname(os.path.abspath(__file__))
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
env = {k: os.environ[k] for k in ("VLLM_API_KEY", "API_KEY", "OLLAMA_HOST", "OLLAMA_MODELS") if k in os.environ}
helper = None
if "create" not in argv:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(os.path.join(here, "calls.jsonl"), "a") as f:
    f.write(json.dumps({"argv": argv, "env": env, "pid": os.getpid(), "helper": helper and helper.pid}) + chr(10))
how = os.environ.get("STAND_IN", "")
if "create" in argv:
    os.makedirs(env["OLLAMA_MODELS"], exist_ok=True)
    if how == "no create": sys.exit("Error: no FROM line")
    sys.exit(0)
if how == "dies": sys.exit("CUDA error: no kernel image")
if how == "stubborn":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
port = int(argv[argv.index("--port") + 1]) if "--port" in argv else int(env["OLLAMA_HOST"].rsplit(":", 1)[1])

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = {"data": [{"id": "stand-in", "object": "model"}], "object": "list", "version": "0"}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""
PROGRAMS = {"vllm": "vllm", "ollama": "ollama", "tgi": "text-generation-launcher"}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    "A folder on PATH with a stand-in for each program; its calls, one a line."
    for name in PROGRAMS.values():
        (tmp_path / name).write_text(STAND_IN.replace("PYTHON", sys.executable))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def all_gone(calls: list, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    pids = [pid for call in calls for pid in (call["pid"], call["helper"]) if pid]
    while time.monotonic() < end and any(map(runs, pids)):
        time.sleep(0.05)
    return not any(map(runs, pids))


def test_vllm_with_adapters_by_name(planted):
    from llmcourse.core import weights

    ours = {"sums": "tutor/sft"}
    with serve("tutor/base", engine="vllm", key="s3cret", adapters=ours, max_model_len=512) as one:
        assert connect(one.url, "s3cret").models.list().data[0].id == "stand-in"
        assert one.names == ["base", "sums"]
        port = one.root.rsplit(":", 1)[1]
    (call,) = planted()
    assert call["argv"][:5] == ["vllm", "serve", str(weights() / "base"), "--served-model-name", "base"]
    assert call["argv"][5:9] == ["--host", "127.0.0.1", "--port", port]
    assert call["argv"][9:14] == ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "16"]
    assert call["argv"][14:] == ["--lora-modules", f"sums={weights() / 'sft'}", "--max-model-len", "512"]
    assert call["env"] == {"VLLM_API_KEY": "s3cret"} and all_gone([call])


def test_tgi(planted):
    with serve("tutor/base", engine="tgi", key="s3cret") as one:
        port = one.root.rsplit(":", 1)[1]
    (call,) = planted()
    assert call["argv"][0] == "text-generation-launcher" and call["argv"][1] == "--model-id"
    assert call["argv"][3:] == ["--hostname", "127.0.0.1", "--port", port]
    assert call["env"] == {"API_KEY": "s3cret"} and all_gone([call])


def test_ollama_makes_the_model_then_the_door_opens(planted):
    import openai

    with served("tutor/sft", engine="ollama", key="s3cret") as one:
        assert connect(one.url, "s3cret").models.list().data[0].id == "stand-in"
        with pytest.raises(openai.AuthenticationError):
            connect(one.url, "guess").models.list()
        (_, create) = planted()
        assert Path(create["env"]["OLLAMA_MODELS"]).is_dir()
    started, create = planted()
    assert started["argv"] == ["ollama", "serve"] and create["argv"][:3] == ["ollama", "create", one.name]
    assert create["argv"][3] == "-f" and create["argv"][4].endswith("Modelfile") and one.name == "sft-Q8_0"
    assert started["env"]["OLLAMA_HOST"].startswith("127.0.0.1:") and started["env"] == create["env"]
    assert not Path(create["env"]["OLLAMA_MODELS"]).exists() and all_gone([started])


@pytest.mark.parametrize(
    "engine, how, why",
    [
        ("vllm", "dies", "base: the vllm server died while starting: CUDA error: no kernel image"),
        ("tgi", "dies", "base: the tgi server died while starting: CUDA error: no kernel image"),
        ("ollama", "no create", "`ollama create sft-Q8_0` ended with code 1"),
    ],
)
def test_a_program_that_fails_says_why_and_leaves_nothing(planted, monkeypatch, engine, how, why):
    monkeypatch.setenv("STAND_IN", how)
    with pytest.raises(UserError, match=why) as e:
        with served("tutor/sft" if engine == "ollama" else "tutor/base", engine=engine):
            pass
    assert "\n" not in str(e.value) and all_gone(planted())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "sigterm", "sigkill"])
def test_no_orphan_of_a_program(planted, how):
    "However the command ends, so do the program, even a stubborn one, and the helper that it has started elsewhere."
    manner = "stubborn" if how == signal.SIGTERM else ""
    env = os.environ | {"STAND_IN": manner, "PYTHONPATH": str(Path(__file__).parent.parent)}
    words = ["serve", "tutor/base", "--engine", "vllm", "--port", "0"]
    command = subprocess.Popen(
        [sys.executable, "-c", "from llmcourse.cli import cli; cli()", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    lines = [command.stdout.readline() for _ in range(4)]
    assert "serving base at http://127.0.0.1:" in lines[0] and "curl http://127.0.0.1:" in lines[3], lines
    os.killpg(command.pid, how)
    command.communicate(timeout=30)
    assert all_gone(planted())


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_a_program_that_is_not_here(engine, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"{engine}: no `{PROGRAMS[engine]}` on this machine. "):
        check_program(engine)
    assert main(["serve", "tutor/base", "--engine", engine, "--port", "0"]) == 2
    assert f"{engine}: no `{PROGRAMS[engine]}` on this machine" in capsys.readouterr().err


def test_which_engine_takes_what(planted, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve("tutor/base", "vllm")[0] == "vllm" and resolve(tmp_path / "m.gguf", "ollama")[0] == "ollama"
    for model, engine in [(tmp_path / "m.gguf", "vllm"), (tmp_path / "m.gguf", "tgi"), ("tutor/base", "ollama")]:
        with pytest.raises(UserError, match=f"{engine} takes a "):
            resolve(model, engine)
    with pytest.raises(UserError, match="no Modelfile beside it"):
        serve(tmp_path / "m.gguf", engine="ollama")


def test_auto_is_vllm_only_beside_a_gpu(planted, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_engine("tutor/base") == "vllm" and best_engine("m.gguf") == "llama.cpp"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_engine("tutor/base") == "llama.cpp"


def test_flags():
    assert flags({"max_model_len": 4096, "enforce_eager": True, "trust_remote_code": False}) == [
        "--max-model-len", "4096", "--enforce-eager"]  # fmt: skip
