"""What differs when an application leaves OpenAI: on an engine, and on a server with planted differences."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.differences import FEATURES, differs_from_openai
from llmcourse.export import to_gguf
from llmcourse.serve import serve

PAGES = {"files": "/v1/files", "batches": "/v1/batches", "page": "/v1/models/m"}


def states(url: str, **options) -> dict:
    return {one.feature: one.state for one in differs_from_openai(url, **options)}


# ---- what OpenAI says


def flat(text: str) -> str:
    return re.sub(r'(\s|"""|#)+', " ", text)


@pytest.mark.parametrize("name", FEATURES)
def test_the_words_are_in_the_client(name):
    "Of every feature: OpenAI's words are in the file that is named, or there is a page."
    one = FEATURES[name]
    assert one.says and one.way_out
    if not one.source.startswith("https://"):
        assert flat(one.says) in flat((Path(openai.__file__).parent / one.source).read_text(encoding="utf-8"))


# ---- a server that does what OpenAI says, of a model that always says the same


def usage(prompt: int, reply: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def length(messages: list) -> int:
    "A made-up count that sees names, images and text, and takes developer for system."
    size = 0
    for m in messages:
        parts = m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"] or ""}]
        size += 3 + ("name" in m) + sum(len(part["text"].split()) if "text" in part else 9 for part in parts)
    return size


def text_of(body: dict) -> str:
    if "logit_bias" in body:
        return "5555"
    if "response_format" in body:
        return '{"city": "Oslo", "days": 3}'
    said = " ".join("one two three".split()[: body.get("max_completion_tokens", body.get("max_tokens", 9))])
    for stop in body.get("stop") or []:
        said = said.split(stop)[0]
    return said


def choice_of(body: dict) -> dict:
    text = text_of(body)
    message, end = {"role": "assistant", "content": text}, "stop"
    if len(text.split()) < 3 and not body.get("stop"):
        end = "length"
    if body.get("tool_choice"):
        name = body["tool_choice"]["function"]["name"] if isinstance(body["tool_choice"], dict) else "get_weather"
        call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": '{"city": "Rome"}'}}
        message, end = {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    found = {"index": 0, "message": message, "finish_reason": end}
    if body.get("logprobs"):
        top = [{"token": "one", "logprob": x, "bytes": None} for x in (-0.1, -3.0, -4.0)]
        found["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
    return found


def whole(body: dict) -> dict:
    found = choice_of(body)
    used = usage(length(body["messages"]), len((found["message"]["content"] or "").split()))
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": used,
            "choices": [found | {"index": i} for i in range(body.get("n") or 1)]}  # fmt: skip


def chunks(body: dict) -> list[dict]:
    made = whole(body)
    text, end = made["choices"][0]["message"]["content"], made["choices"][0]["finish_reason"]
    asked = (body.get("stream_options") or {}).get("include_usage")
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": text[:2]}, None),
              ({"content": text[2:]}, None), ({}, end)]  # fmt: skip
    found = [{"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m",
              "choices": [{"index": 0, "delta": delta, "finish_reason": why}]} for delta, why in deltas]  # fmt: skip
    if asked:
        found = [one | {"usage": None} for one in found] + [found[0] | {"choices": [], "usage": made["usage"]}]
    return found


KNOWN = set("""model messages temperature max_tokens max_completion_tokens n seed stop logprobs top_logprobs logit_bias
    response_format tools tool_choice stream stream_options user metadata store service_tier safety_identifier
    prompt_cache_key parallel_tool_calls reasoning_effort verbosity""".split())


def refusal(body: dict, server) -> tuple[int, str] | None:
    "Status and code of what OpenAI refuses; None if all is well."
    if body["model"] != "m":
        return 404, "model_not_found"
    if set(body) - KNOWN and "fields" not in server.broken:
        return 400, "unknown"
    if not isinstance(body.get("temperature", 0), (int, float)):
        return (500, "crash") if "types" in server.broken else (400, "type")
    if length(body["messages"]) > 90 and "room" not in server.broken:
        return 400, "too_long" if "code" in server.broken else "context_length_exceeded"
    return None


class OpenAIs(BaseHTTPRequestHandler):
    def log_message(self, *_): ...

    def send(self, status: int, said, kind: str = "application/json"):
        text = said if isinstance(said, str) else json.dumps(said)
        self.send_response(status)
        for name in {"x-request-id", "x-ratelimit-remaining-requests"} - self.server.broken:
            self.send_header(name, "7")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def refused(self) -> bool:
        if self.headers["Authorization"] == "Bearer right" or self.server.broken & {"door", "open"}:
            return False
        self.send(401, {"error": {"message": "no", "code": "invalid_api_key"}})
        return True

    def do_GET(self):
        gone = {PAGES[name] for name in PAGES if name in self.server.broken}
        model = {"id": "m", "object": "model", "created": 0, "owned_by": "us", "max_model_len": 100}
        if "unsaid" in self.server.broken:
            del model["max_model_len"]
        if self.refused():
            return
        if self.path.split("?")[0] in gone:
            return self.send(404, {"error": {"message": "no such page"}})
        if self.path == "/v1/models/m":
            return self.send(200, model)
        self.send(200, {"object": "list", "has_more": False, "data": [model] if self.path == "/v1/models" else []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if self.path != "/v1/chat/completions":
            return self.other(body)
        for name in self.server.ignores:
            body.pop(name, None)
        if "model" in self.server.broken:
            body["model"] = "m"
        if found := refusal(body, self.server):
            return self.send(found[0], {"error": {"message": "no", "code": found[1]}})
        body = self.server.spoil(body)
        if not body.get("stream"):
            return self.send(200, whole(body))
        said = "".join(f"data: {json.dumps(one)}\n\n" for one in self.server.spoil_chunks(chunks(body)))
        self.send(200, said + "data: [DONE]\n\n", "text/event-stream")

    def other(self, body: dict):
        if self.path in self.server.broken:
            return self.send(404, {"error": {"message": "no such page"}})
        part = {"type": "output_text", "text": "one", "annotations": []}
        message = {"type": "message", "id": "m1", "role": "assistant", "status": "completed", "content": [part]}
        self.send(200, {
            "/v1/responses": {"id": "r", "object": "response", "created_at": 0, "model": "m", "output": [message]},
            "/v1/embeddings": {"object": "list", "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1},
                               "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.5]}]},
            "/v1/moderations": {"id": "m", "model": "m", "results": [{"flagged": False}]},
        }[self.path])  # fmt: skip


@pytest.fixture
def theirs():
    with ThreadingHTTPServer(("127.0.0.1", 0), OpenAIs) as server:
        server.ignores, server.broken = (), set()
        server.spoil = server.spoil_chunks = lambda said: said
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server
        server.shutdown()


def different(url: str) -> set[str]:
    return {name for name, state in states(url, key="right").items() if state != "same"}


def test_nothing_differs_where_nothing_does(theirs):
    found = list(differs_from_openai(theirs.url, key="right"))
    assert [one for one in found if one.state != "same"] == [] and [one.feature for one in found] == list(FEATURES)
    assert not any(one.how or one.way_out for one in found)


@pytest.mark.parametrize(
    "field, noticed",
    [
        ("max_completion_tokens", "max_completion_tokens"),
        ("max_tokens", "max_tokens"),
        ("n", "n > 1"),
        ("stop", "stop"),
        ("logprobs", "logprobs"),
        ("logit_bias", "logit_bias"),
        ("response_format", "json_schema"),
        ("response_format", "json_object"),
        ("tool_choice", "tools required"),
        ("tool_choice", "tools by name"),
        ("stream_options", "stream usage"),
    ],
)
def test_a_field_that_is_taken_and_not_used(theirs, field, noticed):
    theirs.ignores = (field,)
    assert states(theirs.url, key="right", only=[noticed]) == {noticed: "differs"}


@pytest.mark.parametrize(
    "broken, noticed, state",
    [
        ("model", "model names", "differs"),
        ("fields", "unknown fields", "differs"),
        ("types", "wrong types", "differs"),
        ("code", "prompt too long", "differs"),
        ("room", "prompt too long", "differs"),
        ("door", "wrong key", "differs"),
        ("x-request-id", "request id", "missing"),
        ("x-ratelimit-remaining-requests", "rate-limit headers", "missing"),
        ("/v1/responses", "/v1/responses", "missing"),
        ("/v1/embeddings", "/v1/embeddings", "missing"),
        ("/v1/moderations", "/v1/moderations", "missing"),
        ("page", "/v1/models/NAME", "missing"),
        ("files", "/v1/files", "missing"),
        ("batches", "/v1/batches", "missing"),
    ],
)
def test_a_planted_difference_is_the_one_that_is_found(theirs, broken, noticed, state):
    theirs.broken = {broken}
    found = {one.feature: one for one in differs_from_openai(theirs.url, key="right")}
    assert {name for name, one in found.items() if one.state != "same"} == {noticed}
    assert found[noticed].state == state and found[noticed].how and found[noticed].way_out


def difference(url: str, name: str):
    return next(differs_from_openai(url, key="right", only=[name]))


def test_the_status_of_a_refusal_is_told(theirs):
    theirs.broken = {"/v1/embeddings", "files"}
    assert {difference(theirs.url, name).how for name in ("/v1/embeddings", "/v1/files")} == {"404: no such page"}


def test_a_long_prompt_is_sent_where_no_limit_is_said(theirs):
    theirs.broken = {"unsaid"}
    assert difference(theirs.url, "prompt too long").state == "same"
    theirs.broken = {"unsaid", "room"}
    found = difference(theirs.url, "prompt too long")
    assert found.state == "differs" and re.match(r"2,\d{3} tokens taken, and the server does not say", found.how)


def test_how_many_replies_came(theirs):
    theirs.ignores = ("n",)
    assert difference(theirs.url, "n > 1").how == "asked for two replies, and 1 came"


def without(what):
    def spoil(body):
        for m in body["messages"]:
            if what == "name":
                m.pop("name", None)
            if what == "image" and isinstance(m["content"], list):
                m["content"] = [part for part in m["content"] if part["type"] == "text"]
            if what == "parts" and isinstance(m["content"], list):
                m["content"] = "[object Object] " + str(m["content"])
        if what == "developer":
            body["messages"] = [m for m in body["messages"] if m["role"] != "developer"]
        return body

    return spoil


@pytest.mark.parametrize(
    "what, noticed",
    [("name", "name in a message"), ("image", "images"), ("parts", "content in parts"),
     ("developer", "role developer")],  # fmt: skip
)
def test_what_becomes_of_a_message(theirs, what, noticed):
    theirs.spoil = without(what)
    assert different(theirs.url) == {noticed}


def own_ids(said):
    return [one | {"id": str(i)} for i, one in enumerate(said)]


def count_in_the_last(said):
    used = said[-1].get("usage")
    return said if not used else [*said[:-2], said[-2] | {"usage": used}]


def count_always(said):
    return said if said[-1].get("usage") else [*said[:-1], said[-1] | {"usage": usage(3, 3)}]


@pytest.mark.parametrize(
    "spoil, noticed",
    [(own_ids, "stream chunks"), (count_in_the_last, "stream usage"), (count_always, "stream usage unasked")],
)
def test_chunks_of_another_shape(theirs, spoil, noticed):
    theirs.spoil_chunks = spoil
    assert different(theirs.url) == {noticed}


# ---- the engines


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    gguf = to_gguf("tutor/tools", tmp_path_factory.mktemp("gguf") / "tools.gguf", "Q8_0")
    with serve(gguf, key="s3cret", n_parallel=4) as server:
        yield server


def test_llama_cpp(llama):
    found = states(llama.url, key="s3cret")
    assert {name for name, state in found.items() if state == "missing"} == {
        "rate-limit headers", "request id", "/v1/embeddings", "/v1/models/NAME", "/v1/files", "/v1/batches",
        "/v1/moderations"}  # fmt: skip
    assert {name for name, state in found.items() if state == "differs"} == {
        "model names", "unknown fields", "tools by name", "name in a message", "images", "stream usage",
        "prompt too long"}  # fmt: skip


def test_the_command(llama, capsys, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_API_KEY", "s3cret")
    asked = ["contract", llama.url, "--differences", "--only", "seed,/v1/files"]
    assert main(asked) == 0
    same, missing, last = capsys.readouterr().out.splitlines()
    assert last == "1 the same, 0 differ, 1 is missing"
    assert same.split() == ["same", "seed"] and missing.startswith("missing   /v1/files") and "→ a folder" in missing
    assert main([*asked, "--json"]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["same", "missing"]
    assert main([*asked[:-1], "sead"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err


def test_what_is_not_asked_is_said(theirs, capsys, monkeypatch):
    monkeypatch.delenv("LLMCOURSE_API_KEY", raising=False)
    theirs.broken = {"open", "fields", "page", "files"}
    asked = ["contract", theirs.url, "--differences"]
    assert main([*asked, "--only", "unknown fields,wrong key,/v1/files,/v1/models/NAME"]) == 0
    differs, unasked, *_, last = capsys.readouterr().out.splitlines()
    assert differs.startswith("differs   unknown fields") and unasked.startswith("not asked wrong key")
    assert last == "0 the same, 1 differs, 2 are missing, 1 not asked"
    assert main([*asked, "--json", "--only", "wrong key"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "not asked"


def test_nothing_there():
    with pytest.raises(UserError, match="nothing answers there"):
        list(differs_from_openai("http://127.0.0.1:9/v1"))
