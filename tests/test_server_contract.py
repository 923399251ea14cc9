"""The contract, on the servers that start here, and on one that breaks a promise at a time."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmcourse.cli import main
from llmcourse.contract import CHECKS, asked_everything
from llmcourse.core import UserError
from llmcourse.export import to_gguf
from llmcourse.serve import serve


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    gguf = to_gguf("tutor/tools", tmp_path_factory.mktemp("gguf") / "tools.gguf", "Q8_0")
    with serve(gguf, key="s3cret", n_parallel=4) as server:
        yield server


def states(url: str, **options) -> dict:
    return {one.name: one.state for one in asked_everything(url, **options)}


def test_llama_cpp_keeps_all_of_it(llama):
    found = list(asked_everything(llama.url, key="s3cret"))
    assert [one.name for one in found] == list(CHECKS) and all(one.state == "ok" for one in found), found


def test_what_transformers_serve_does_not_do():
    "It takes these fields and does nothing with them: what an application would not notice."
    with serve("tutor/tools", key="s3cret") as server:
        found = states(server.url, key="s3cret")
    assert {name for name, state in found.items() if state == "wrong"} == {
        "stops_at_a_text", "gives_logprobs", "draws_several", "keeps_to_a_schema", "calls_tools"}  # fmt: skip
    assert found["refuses_too_long"] == "not there"


def test_the_command(llama, capsys, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_API_KEY", "s3cret")
    assert main(["contract", llama.url, "--only", "replies,streams", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["state"]) for one in said] == [("replies", "ok"), ("streams", "ok")]
    assert main(["contract", llama.url, "--only", "stream"]) == 2
    assert "did you mean 'streams'" in capsys.readouterr().err
    assert main(["contract", llama.url, "--key", "guess"]) == 2
    assert "the key is missing or wrong" in capsys.readouterr().err


# ---- one broken promise at a time


def kept(body: dict, server) -> dict | list:
    "What a server that keeps its word says, of a model that always says the same."
    said = "one two three"
    words = said.split(" ")[: body.get("max_tokens", 9)]
    end = "length" if len(words) < 3 else "stop"
    text = " ".join(words)
    for stop in body.get("stop") or []:
        text = text.split(stop)[0]
    message = {"role": "assistant", "content": text}
    if body.get("tool_choice") == "required":
        call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        message, end = {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    if body.get("response_format"):
        message["content"] = '{"city": "Oslo", "days": 3}'
    choice = {"index": 0, "message": message, "finish_reason": end}
    if body.get("logprobs"):
        top = [{"token": "one", "logprob": x, "bytes": None} for x in (-0.1, -3.0, -4.0)]
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
    usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
             "choices": [dict(choice, index=i) for i in range(body.get("n") or 1)], "usage": usage}  # fmt: skip
    if not body.get("stream"):
        return whole
    piece = lambda delta, end=None: {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
    chunks = [piece({"content": text[:5]}), piece({"content": text[5:]}), piece({}, end)]
    return chunks + ([{"choices": [], "usage": usage}] if body.get("stream_options") else [])


class Promises(BaseHTTPRequestHandler):
    def log_message(self, *_): ...

    def send(self, status: int, text: str):
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if text.startswith("data:") else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def refused(self) -> bool:
        if self.headers["Authorization"] == "Bearer right" or self.server.broken == "door":
            return False
        self.send(401, '{"error": {"message": "no"}}')
        return True

    def do_GET(self):
        if not self.refused():
            self.send(200, json.dumps({"data": [{"id": "m", "object": "model", "max_model_len": 100}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if len(str(body["messages"])) > 400 and self.server.broken != "long":
            return self.send(400, '{"error": {"message": "too long"}}')
        for name in self.server.ignores:
            body.pop(name, None)
        said = self.server.spoil(kept(body, self.server))
        if isinstance(said, list):
            return self.send(200, "".join(f"data: {json.dumps(x)}\n\n" for x in said) + "data: [DONE]\n\n")
        self.send(200, json.dumps(said))


class Server(ThreadingHTTPServer):
    request_queue_size = 128


@pytest.fixture
def promises():
    with Server(("127.0.0.1", 0), Promises) as server:
        server.ignores, server.broken, server.spoil = (), "", lambda said: said
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server
        server.shutdown()


def test_a_server_that_keeps_its_word(promises):
    assert set(states(promises.url, key="right").values()) == {"ok"}


@pytest.mark.parametrize(
    "field, noticed",
    [
        ("stop", "stops_at_a_text"),
        ("max_tokens", "cuts_and_says_so"),
        ("logprobs", "gives_logprobs"),
        ("n", "draws_several"),
        ("response_format", "keeps_to_a_schema"),
        ("tool_choice", "calls_tools"),
        ("stream_options", "streams_the_count"),
    ],
)
def test_a_field_that_is_ignored(promises, field, noticed):
    promises.ignores = (field,)
    assert states(promises.url, key="right")[noticed] == "wrong"


def lost(said):
    return [said[0], *said[2:]] if isinstance(said, list) else said


def edited(**changes):
    def spoil(said):
        return said if isinstance(said, list) else said | changes

    return spoil


@pytest.mark.parametrize(
    "spoil, noticed",
    [
        (edited(usage=None), "counts_tokens"),
        (edited(usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 3}), "counts_tokens"),
        (edited(choices=[]), "replies"),
        (lost, "streams"),
    ],
    ids=["no usage", "wrong sum", "no choices", "a lost piece"],
)
def test_an_answer_that_is_off(promises, spoil, noticed):
    promises.spoil = spoil
    assert states(promises.url, key="right")[noticed] == "wrong"


def test_a_reply_that_changes(promises):
    "Neither a seed nor a crowd is to change what is said."
    count = iter(range(10**6))

    def spoil(said):
        if isinstance(said, dict):
            said["choices"][0]["message"]["content"] = f"number {next(count)}"
        return said

    promises.spoil = spoil
    found = states(promises.url, key="right")
    assert found["repeats_a_seed"] == found["bears_a_crowd"] == "wrong"


@pytest.mark.parametrize("broken, noticed", [("door", "refuses_a_wrong_key"), ("long", "refuses_too_long")])
def test_what_is_to_be_refused(promises, broken, noticed):
    promises.broken = broken
    assert states(promises.url, key="right")[noticed] == "wrong"


def test_gone_in_the_middle(promises):
    questions = asked_everything(promises.url, key="right")
    next(questions)
    promises.shutdown()
    promises.server_close()
    with pytest.raises(UserError, match="gone at counts_tokens"):
        list(questions)
