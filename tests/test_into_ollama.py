"""`llmcourse export --ollama NAME`, with Ollama's own client, at a server that speaks Ollama's documented API: it
checks each blob's digest, renders the template with Go's own engine, and answers with llama.cpp on the bytes it got."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_ollama import ollama as go  # noqa: F401  (a fixture: Go's templates)

from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.engine import Engine
from llmcourse.ollama import Ollama, into_ollama, read_modelfile
from llmcourse.shipping import export_folder


class Served(BaseHTTPRequestHandler):
    "One request. `self.server` has: folder, go, models {name: what create sent}, blobs {digest: path}, twist."

    def log_message(self, *_): ...

    def answer(self, status: int, *lines: dict):
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def do_GET(self):
        assert self.path == "/api/tags"
        self.answer(200, {"models": [{"model": name} for name in self.server.models]})

    def do_POST(self):
        body = self.body()
        if self.path.startswith("/api/blobs/"):
            return self.keep(self.path.removeprefix("/api/blobs/"), body)
        return getattr(self, self.path.removeprefix("/api/"))(json.loads(body))

    def keep(self, digest: str, body: bytes):
        if self.server.twist == "damaged":
            body = body[:-1]
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
            return self.answer(400, {"error": "digest mismatch"})
        self.server.blobs[digest] = self.server.folder / f"{len(self.server.blobs)}.gguf"
        self.server.blobs[digest].write_bytes(body)
        self.answer(201)

    def create(self, job: dict):
        [digest] = job["files"].values()
        for needed in (digest, *job.get("adapters", {}).values()):
            if needed not in self.server.blobs:
                return self.answer(400, {"error": f"blob {needed} not found"})
        if self.server.twist == "template":
            job["template"] = job["template"].replace("user", "usr")
        if self.server.twist == "space":
            job["template"] = job["template"].replace("{{ .Content }}", " {{ .Content }}", 1)
        self.server.models[f"{job['model']}:latest"] = job
        self.answer(200, *({"status": s} for s in ("parsing GGUF", "using existing layer", "success")))

    def chat(self, job: dict):
        made = self.server.models[f"{job['model']}:latest"]
        [text] = self.server.go(made["template"], [(job["messages"], None)])
        base, *beside = (self.server.blobs[d] for d in (*made["files"].values(), *made.get("adapters", {}).values()))
        with Engine(base, adapter=beside[0] if beside else None) as engine:
            ids = engine.tokenize(text)
            body = {"prompt": ids, "n_predict": job["options"]["num_predict"], "temperature": 0}
            reply = engine.post("/completion", stop=made["parameters"]["stop"], **body)["content"]
        count = {} if self.server.twist == "silent" else {"prompt_eval_count": len(ids)}
        message = {"role": "assistant", "content": reply}
        self.answer(200, {"model": job["model"], "message": message, "done": True} | count)


@pytest.fixture
def server(tmp_path, go, monkeypatch):  # noqa: F811
    with ThreadingHTTPServer(("127.0.0.1", 0), Served) as running:
        running.folder, running.go, running.twist = tmp_path, go, ""
        running.models, running.blobs = {}, {}
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("OLLAMA_HOST", f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return export_folder("tutor/sft", tmp_path_factory.mktemp("export"), "Q8_0")


def test_from_a_checkpoint_to_ollama(server, tmp_path, capsys):
    assert main(["export", "--model", "tutor/sft", "--output", str(tmp_path / "out"), "--ollama", "tutor"]) == 0
    said = capsys.readouterr().out
    assert "tutor in Ollama: prompts as long as in training: 4 of 4; replies equal: 4 of 4" in said
    sent = server.models["tutor:latest"]
    assert sent["parameters"] == {"stop": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "num_ctx": 1024}
    [blob] = server.blobs.values()
    assert blob.read_bytes() == (tmp_path / "out/sft-Q8_0.gguf").read_bytes()


def test_an_adapter_beside_its_base(server, tmp_path, capsys):
    words = ["export", "--model", "tutor/sft", "--adapter", "--output", str(tmp_path / "out"), "--ollama", "tutor"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "tutor in Ollama: prompts as long as in training: 4 of 4; replies equal: 4 of 4" in said
    sent = server.models["tutor:latest"]
    kept = {name: server.blobs[digest] for name, digest in (sent["files"] | sent["adapters"]).items()}
    assert set(kept) == {"base-Q8_0.gguf", "sft-lora.gguf"}
    assert all(blob.read_bytes() == (tmp_path / "out" / name).read_bytes() for name, blob in kept.items())


@pytest.mark.parametrize("twist", ["template", "space"])
def test_another_template_is_noticed(server, made, twist):
    server.twist = twist
    line, good = into_ollama(Ollama(), "tutor", made)
    assert not good and "another template" in line and "\n" not in line


def test_an_ollama_that_counts_nothing(server, made):
    server.twist = "silent"
    line, good = into_ollama(Ollama(), "tutor", made)
    assert not good and "0 of 0" in line


def test_damaged_on_the_way(server, made):
    server.twist = "damaged"
    with pytest.raises(UserError, match=r"digest mismatch \(status 400\)"):
        into_ollama(Ollama(), "tutor", made)
    assert not server.models


def test_a_name_that_is_taken(server, tmp_path, capsys):
    "Before the work: nothing is exported."
    server.models["tutor:latest"] = {}
    assert main(["export", "--output", str(tmp_path / "out"), "--ollama", "tutor"]) == 2
    assert "ollama rm tutor" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_ollama_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    assert main(["export", "--output", str(tmp_path / "out"), "--ollama", "tutor"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "ollama serve" in said and not (tmp_path / "out").exists()


def test_without_its_client(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ollama", None)
    assert main(["export", "--output", str(tmp_path / "out"), "--ollama", "tutor"]) == 2
    assert "pip install 'llmcourse[ollama]'" in capsys.readouterr().err


def test_an_export_without_a_modelfile(server, made):
    with pytest.raises(UserError, match="no Modelfile"):
        into_ollama(Ollama(), "tutor", made[:1])


@pytest.mark.parametrize("text", ["", "FROM ./a.gguf\n", 'TEMPLATE """{{ .Prompt }}"""\n'])
def test_a_modelfile_that_is_none(tmp_path, text):
    (tmp_path / "Modelfile").write_text(text)
    with pytest.raises(UserError, match="no FROM or no TEMPLATE"):
        read_modelfile(tmp_path / "Modelfile")
