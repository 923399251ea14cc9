"""`make setup`: the right torch for this machine, pip's settings for uv, and extras that resolve."""

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import install
import pytest

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints/default.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"lab", "test"}  # extras for work on the course itself
BESIDE = {"bnb", "fast", "tracking"}  # extras that go with every other


# --- the right torch


class PyTorch:
    "A stand-in for PyTorch's index behind a proxy that answers for any host: {backend: version of torch}."

    def __init__(self, folder: Path, has: dict[str, str]):
        self.folder, self.has, self.asked = folder, has, []
        self.lock, self.contexts = threading.Lock(), {}
        self.openssl("req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=a test", *self.NEW)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Proxy,), {"index": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def openssl(self, *words):
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)

    def context(self, host: str) -> ssl.SSLContext:
        "A certificate for the host that was asked for, made once."
        with self.lock:
            if host not in self.contexts:
                self.contexts[host] = self.certified(host)
            return self.contexts[host]

    def certified(self, host: str) -> ssl.SSLContext:
        self.openssl("req", "-new", "-keyout", "host.key", "-out", "host.csr", "-subj", "/CN=host", *self.NEW)
        (self.folder / "names").write_text(f"subjectAltName=DNS:{host}\nbasicConstraints=CA:FALSE\n")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        self.openssl("x509", "-req", "-in", "host.csr", "-out", "host.pem", *sign)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "host.pem", self.folder / "host.key")
        return context

    def page(self, path: str) -> str | None:
        "A project's page, or the metadata of its file."
        self.asked.append(path)
        _, backend, name, *file = path.strip("/").split("/")
        version = self.has.get(backend)
        if version is None or name != "torch":
            return None
        if file:
            return f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        wheel = f"torch-{version.replace('+', '%2B')}-py3-none-any.whl"
        return f'<a href="{wheel}" data-core-metadata="true">{wheel.replace("%2B", "+")}</a>'

    def environ(self, driver: str | None) -> dict[str, str]:
        return os.environ | {
            "HTTPS_PROXY": f"http://127.0.0.1:{self.server.server_port}",
            "SSL_CERT_FILE": str(self.folder / "ca.pem"),
            "UV_CACHE_DIR": str(self.folder / "cache"),
            "UV_NO_CONFIG": "1",
            **({"UV_CUDA_DRIVER_VERSION": driver} if driver else {}),
        }


class Proxy(BaseHTTPRequestHandler):
    index: PyTorch

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.connection = self.index.context(self.path.split(":")[0]).wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def do_GET(self):
        body = self.index.page(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len((body or "").encode())))
        self.end_headers()
        self.wfile.write((body or "").encode())

    do_HEAD = do_GET


BUILDS = {"cpu": "2.13.0+cpu", "cu130": "2.13.0+cu130", "cu126": "2.13.0+cu126", "cu118": "2.7.1+cu118"}


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one build of torch only")
@pytest.mark.parametrize(
    "driver,build",
    [(None, "cpu"), ("580.65.06", "cu130"), ("560.35.05", "cu126"), ("470.82.01", "cpu")],
)
def test_the_torch_that_the_driver_can_run(tmp_path, driver, build):
    "The lock's release, built for the newest CUDA that this driver runs; for the CPU if it is too old for any."
    if driver is None and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        pytest.skip("this machine has a driver")
    index = PyTorch(tmp_path, BUILDS)
    found = install.right_torch(index.environ(driver), LOCK.read_text())
    assert index.asked and found == f"torch==2.13.0+{build}"
    index.server.shutdown()


def test_out_of_reach_means_the_package_index(tmp_path, capsys):
    "No proxy there: refused at once. torch then comes from where everything else does, and pip is the last resort."
    environ = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "UV_CACHE_DIR": str(tmp_path)}
    first, last = install.attempts(LOCK, str(ROOT), environ)
    assert "--torch-backend" not in first and first[2:5] == ["uv", "pip", "install"]
    assert last[:4] == [sys.executable, "-m", "pip", "install"] and str(LOCK) in last
    assert "out of reach" in capsys.readouterr().out


def test_the_lock_names_the_build(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "right_torch", lambda *_: "torch==2.13.0+cu126")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    first = next(install.attempts(LOCK, str(ROOT), {}))
    assert first[first.index("--torch-backend") + 1] == "auto"
    written = Path(first[first.index("-c") + 1]).read_text()
    assert "\ntorch==2.13.0+cu126 " in written and "\ntransformers==5.17.0\n" in written


def test_a_gpu_that_no_build_can_use_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "right_torch", lambda *_: "torch==2.13.0+cpu")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    next(install.attempts(LOCK, str(ROOT), {}))
    assert "No build of it runs on this GPU's driver" in capsys.readouterr().out


# --- pip's settings for uv

LISTED = """:env:.index-url='https://me:secret@mirror.example/simple'
global.index-url='https://other.example/simple'
global.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'
global.find-links='/wheels /more'
global.cert='/ca.pem'
global.constraint='/c.txt'
global.timeout='60'
install.trusted-host='mirror.example'
"""


def test_pip_settings_become_uv_settings():
    found = install.for_uv(install.pip_settings(LISTED), {})
    assert found == dict(
        UV_DEFAULT_INDEX="https://me:secret@mirror.example/simple",
        UV_INDEX="https://a.example/simple https://b.example/simple",
        UV_INDEX_STRATEGY="unsafe-best-match",
        UV_FIND_LINKS="/wheels,/more",
        UV_INSECURE_HOST="mirror.example",
        UV_CONSTRAINT="/c.txt",
        SSL_CERT_FILE="/ca.pem",
    )


def test_what_is_set_for_uv_stays():
    mine = dict(UV_INDEX_URL="https://mine.example/simple", UV_FIND_LINKS="/mine")
    found = install.for_uv(install.pip_settings(LISTED), mine)
    assert "UV_DEFAULT_INDEX" not in found and "UV_FIND_LINKS" not in found


def test_pip_lists_its_settings_as_we_read_them(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.delenv("UV_INDEX_URL", raising=False)
    assert install.uv_environ()["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"


def test_a_secret_of_the_index_is_on_no_command_line(monkeypatch):
    monkeypatch.setattr(install, "right_torch", lambda *_: None)
    environ = install.for_uv(install.pip_settings(LISTED), {})
    assert not [x for command in install.attempts(LOCK, str(ROOT), environ) for x in command if "secret" in x]


# --- stages


@pytest.mark.parametrize("stage,whole", [("demo", 1), ("lab", 2), ("test", 3)])
def test_a_stage_is_stamped_when_it_is_whole(tmp_path, monkeypatch, stage, whole):
    ran = []
    monkeypatch.setattr(install, "right_torch", lambda *_: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda c, **kw: ran.append(c) or subprocess.CompletedProcess(c, 0, ""))
    assert install.main("default", stage) == 0
    assert len(list(tmp_path.glob(".ready-*"))) == whole and (tmp_path / f".ready-{stage}").exists()


def test_a_failed_or_interrupted_stage_is_not(tmp_path, monkeypatch):
    def run(command, **_):
        if "uv" in command and "pip" in command[3:4]:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 1, "")

    monkeypatch.setattr(install, "right_torch", lambda *_: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        install.main("default", "demo")
    monkeypatch.setattr(subprocess, "run", lambda c, **kw: subprocess.CompletedProcess(c, 1, ""))
    assert install.main("default", "demo") == 1 and not list(tmp_path.glob(".ready-*"))


def test_the_demo_needs_nothing_of_the_laboratory():
    "What `make demo` installs is the package and nothing else."
    assert install.STAGES["demo"] == ""
    names = {re.match(r"[\w-]+", x)[0] for x in PROJECT["dependencies"]}
    assert not names & {"jupyterlab", "playwright", "tensorboard", "papermill", "pytest", "bitsandbytes", "nbdev"}


def test_every_target_asks_for_what_it_needs():
    text = (ROOT / "Makefile").read_text()
    needs = dict(re.findall(r"^(\w+): \$\(VENV\)/\.ready-(\w+)", text, re.M))
    assert needs["demo"] == needs["checkpoints"] == "demo" and needs["lab"] == needs["course"] == "lab"
    assert {needs[x] for x in ("setup", "test", "browser", "check", "fold", "docs", "levels", "hooks")} == {"test"}


# --- extras


def resolve(*words: str) -> subprocess.CompletedProcess:
    "What an install on Linux would bring, under the default lock. Nothing is installed."
    ask = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "-c", str(LOCK)]
    ask += ["--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"]
    return subprocess.run([*ask, *words], cwd=ROOT, capture_output=True, text=True, env=install.uv_environ())


@pytest.fixture(scope="module")
def package_index(tmp_path_factory):
    asked = tmp_path_factory.mktemp("asked") / "requirements.in"
    asked.write_text("packaging\n")
    if resolve(str(asked)).returncode:
        pytest.skip("no package index in reach: the extras were not resolved")


@pytest.mark.parametrize("extra", sorted(set(PROJECT["optional-dependencies"]) - OURS))
def test_an_extra_resolves(package_index, extra):
    "Each in a resolution of its own: no two engines agree. `bnb`, `fast` and `tracking` go with all of them."
    words = [w for name in sorted({extra} | BESIDE) for w in ("--extra", name)]
    done = resolve("pyproject.toml", *words)
    assert done.returncode == 0, done.stderr
    found = dict(x.split("==") for x in done.stdout.splitlines() if "==" in x and " ;" not in x)
    assert found["transformers"] == "5.17.0" and found["trl"] == "1.14.0"
    for need in PROJECT["optional-dependencies"][extra]:
        name = re.match(r"([\w-]+)(\[(\w+)\])?", need)
        brings = {name[3], f"{name[1]}-{name[3]}"} if name[3] else {name[1]}  # trl[vllm], psycopg[binary]
        assert brings & found.keys(), f"{need} is not in what {extra} brings"


def test_the_extras_are_said_in_the_readme():
    text = (ROOT / "README.md").read_text()
    missing = [x for x in set(PROJECT["optional-dependencies"]) - OURS if f"`{x}`" not in text]
    assert not missing


def test_stopped_while_the_environment_is_made(tmp_path):
    "One line, no traceback; what is there already is no obstacle."
    command = [sys.executable, str(ROOT / "tests/install.py"), str(tmp_path / "env"), "default", "demo"]
    allowed = dict(start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **allowed) as running:
        while not (tmp_path / "env/bin/python").exists():
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=60)[0]
    assert running.returncode == 1 and said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in said and not list((tmp_path / "env").glob(".ready-*"))


WITHOUT_OPENMP = """
from llmcourse.converter import to_gguf
from llmcourse.serve import remote
from llmcourse.servers import serve
to_gguf("tutor/sft", "sft.gguf", "Q4_K_M")
with serve("sft.gguf") as server:
    print(server.engine, remote(server.url)([{"role": "user", "content": "What is 47 + 38?"}])[-10:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="hides a library as Linux can")
def test_a_machine_without_openmp(tmp_path):
    "A slim image has no libgomp.so.1, which llama.cpp wants; the one inside torch will do."
    # in a process of its own, where torch has not brought its copy
    find = "import ctypes; ctypes.CDLL('libgomp.so.1'); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True).stdout
    where = next((line.split()[-1] for line in maps.splitlines() if "/libgomp.so.1" in line), None)
    if not where:
        pytest.skip("this machine has none")

    def hidden(code):
        words = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'mount --bind /dev/null {where} && "$@"', "-"]
        return subprocess.run([*words, sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    if hidden("").returncode:
        pytest.skip("no namespaces here")
    assert "libgomp.so.1: file too short" in hidden("import xllamacpp").stderr
    done = hidden(WITHOUT_OPENMP)
    assert done.stdout.split() == ["llama.cpp", "Answer:", "85"], done.stderr
