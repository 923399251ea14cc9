"""The recording proxy: nothing changes, nobody is recorded unasked, nothing is lost, and the log becomes rows."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest

from llmcourse.assembly import assembled
from llmcourse.cli import main
from llmcourse.contract import CHECKS, TOOL, asked_everything
from llmcourse.core import UserError, read_jsonl
from llmcourse.export import to_gguf
from llmcourse.gateway import Passing, by_name, forward, listener
from llmcourse.harvest import harvest
from llmcourse.proxy import Collecting, Collector
from llmcourse.serve import connect, free_port, serve
from llmcourse.turnlog import TurnLog, logged_turns

KEY = "s3cret-of-the-provider"
YES = {"x-collect": "yes"}
SUM = [{"role": "user", "content": "What is 47 plus 38?"}]
WEATHER = [{"role": "user", "content": "How is the weather in Rome?"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    gguf = to_gguf("tutor/tools", tmp_path_factory.mktemp("gguf") / "tools.gguf", "Q8_0")
    with serve(gguf, key=KEY, n_parallel=4) as server:
        yield server


@pytest.fixture(scope="module")
def collector(llama, tmp_path_factory):
    with Collecting(llama.url, tmp_path_factory.mktemp("log") / "log.jsonl") as collecting:
        yield collecting


def lines_of(path, n):
    "The lines of a log, once there are `n`: a line is written after its reply."
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = [turn for _, turn in logged_turns(path)]
        if len(found) >= n:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{len(found)} lines of {n}")


class Upstream:
    "A server behind, made of one function of the handler."

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                size = int(self.headers.get("content-length") or 0)
                self.body = self.rfile.read(size)
                answer(self)

            do_POST = do_GET = do_DELETE = do_PUT = handle_one

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def send(handler, status=200, body=b"{}", **headers):
    handler.send_response(status)
    for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def piece(text, end=None):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": end}
    return b"data: " + json.dumps({"model": "m", "choices": [choice]}).encode() + b"\n\n"


def chunk(handler, data):
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()


def stream_head(handler):
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()


# ---- nothing changes


def test_the_contract_holds_through_it(collector):
    found = list(asked_everything(collector.url, key=KEY))
    assert [one.name for one in found] == list(CHECKS) and all(one.state == "ok" for one in found), found


ASKS = [
    dict(messages=SUM),
    dict(messages=SUM, stream=True, stream_options={"include_usage": True}),
    dict(messages=SUM, n=2, temperature=1, seed=3),
    dict(messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100),
    dict(messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True),
    dict(messages=SUM, logprobs=True, top_logprobs=2),
    dict(messages=SUM, max_tokens=3),
    dict(messages=[]),
    dict(messages="no list"),
    dict(messages=SUM, response_format={"type": "json_schema", "json_schema": {"schema": 3}}),
]
CHANCE = ("id", "created", "timings", "system_fingerprint", "prompt_tokens_details")


def plain(value):
    "A body without what differs by chance."
    if isinstance(value, list):
        return [plain(one) for one in value]
    return {k: plain(v) for k, v in value.items() if k not in CHANCE} if isinstance(value, dict) else value


def answer(url, ask, key=KEY, **headers):
    body = {"model": "tools", "temperature": 0, "max_tokens": 48} | ask
    headers = {"Authorization": f"Bearer {key}", **headers}
    found = httpx.post(url + "/chat/completions", json=body, headers=headers, trust_env=False, timeout=60)
    datas = [line[6:] for line in found.text.splitlines() if line.startswith("data: ")]
    said = [json.loads(x) for x in datas if x != "[DONE]"] if datas else found.json()
    heads = {k: v for k, v in found.headers.items() if k not in ("content-length", "keep-alive", "connection")}
    return found.status_code, heads, plain(said)


@pytest.mark.parametrize("ask", ASKS, ids=[str(i) for i in range(len(ASKS))])
@pytest.mark.parametrize("headers", [{}, YES], ids=["unrecorded", "recorded"])
def test_status_headers_and_body_are_those_of_the_server(llama, collector, ask, headers):
    assert answer(collector.url, ask, **headers) == answer(llama.url, ask)


def test_errors_come_as_they_came(llama, collector):
    for url in (llama.url, collector.url):
        with pytest.raises(openai.AuthenticationError, match="Invalid API Key"):
            connect(url, "guess").chat.completions.create(model="tools", messages=SUM)
        with pytest.raises(openai.NotFoundError):
            connect(url, KEY).get("/nowhere", cast_to=object)
        health = httpx.get(url.removesuffix("/v1") + "/health?x=1%2F2", trust_env=False)
        assert health.status_code == 200 and health.json() == {"status": "ok"}


def test_everything_passes_and_our_own_headers_stay(tmp_path):
    seen = []

    def echo(handler):
        seen.append((handler.command, handler.path, dict(handler.headers), handler.body))
        send(handler, 418, b"\xff\x00 bytes", x_request_id="r-1", retry_after="7", set_cookie="a=b")

    with Upstream(echo) as up, Collecting(up.url, tmp_path / "log.jsonl", key="door") as collecting:
        url = collecting.url + "/files/a%2Fb?limit=3&x=%20y"
        refused = httpx.delete(url, trust_env=False)
        assert refused.status_code == 401 and "x-collect-key" in refused.json()["error"]["message"] and not seen
        headers = {"Authorization": f"Bearer {KEY}", "x-collect-key": "door", "openai-organization": "org", **YES}
        found = httpx.request("DELETE", url, headers=headers, content=b"\x00raw\xff", trust_env=False)
    assert (found.status_code, found.content) == (418, b"\xff\x00 bytes")
    assert [found.headers[k] for k in ("x-request-id", "retry-after", "set-cookie")] == ["r-1", "7", "a=b"]
    assert "date" in found.headers and len(found.headers.get_list("server")) == 1
    method, path, given, body = seen[0]
    assert (method, path, body) == ("DELETE", "/v1/files/a%2Fb?limit=3&x=%20y", b"\x00raw\xff")
    given = {k.lower(): v for k, v in given.items()}
    assert given["authorization"] == f"Bearer {KEY}" and given["openai-organization"] == "org"
    assert not [name for name in given if name.startswith("x-collect")] and given["host"] in up.url


def test_a_piece_passes_before_the_next_is_made(tmp_path):
    "The second piece is only made once the client has said that it has the first."
    got = threading.Event()

    def slow(handler):
        stream_head(handler)
        chunk(handler, piece("one"))
        assert got.wait(20)
        chunk(handler, piece(" two", "stop") + b"data: [DONE]\n\n")
        chunk(handler, b"")

    with Upstream(slow) as up, Collecting(up.url, tmp_path / "log.jsonl", consent="all") as collecting:
        stream = connect(collecting.url).chat.completions.create(model="m", messages=SUM, stream=True)
        said = []
        for event in stream:
            said.append(event.choices[0].delta.content)
            got.set()
        [line] = lines_of(tmp_path / "log.jsonl", 1)
    assert said == ["one", " two"] and line["reply"]["content"] == "one two" and line["finish_reason"] == "stop"


def test_who_hangs_up_stops_the_server(tmp_path):
    ended, begun = threading.Event(), threading.Event()

    def endless(handler):
        stream_head(handler)
        begun.set()
        try:
            while True:
                chunk(handler, piece("x"))
                time.sleep(0.01)
        except OSError:
            ended.set()

    with Upstream(endless) as up, Collecting(up.url, tmp_path / "log.jsonl", consent="all") as collecting:
        stream = connect(collecting.url).chat.completions.create(model="m", messages=SUM, stream=True)
        next(iter(stream))
        stream.close()
        assert ended.wait(20)
        [line] = lines_of(tmp_path / "log.jsonl", 1)
    assert line["finish_reason"] is None and line["reply"]["content"].startswith("x") and line["cut"] == "client"
    with pytest.raises(UserError, match="of 1 turns none can be a row, the client hung up 1"):
        harvest(tmp_path / "log.jsonl", tmp_path / "rows.jsonl")


def test_who_hangs_up_before_the_answer_stops_the_server_too(tmp_path):
    ended = threading.Event()

    def thinks(handler):
        handler.connection.settimeout(20)
        if handler.rfile.read(1) == b"":
            ended.set()

    with Upstream(thinks) as up, Collecting(up.url, tmp_path / "log.jsonl", consent="all") as collecting:
        with pytest.raises(openai.APITimeoutError):
            connect(collecting.url, timeout=0.5, max_retries=0).chat.completions.create(model="m", messages=SUM)
        assert ended.wait(20)
        [line] = lines_of(tmp_path / "log.jsonl", 1)
    assert line["status"] == 499 and line["reply"] is None and line["cut"] == "client"


def test_a_server_that_is_down_is_one_clear_error(tmp_path):
    with Collecting("http://127.0.0.1:9/v1", tmp_path / "log.jsonl", consent="all") as collecting:
        with pytest.raises(openai.InternalServerError) as caught:
            connect(collecting.url, max_retries=0).chat.completions.create(model="m", messages=SUM)
        [line] = lines_of(tmp_path / "log.jsonl", 1)
    assert caught.value.status_code == 502 and caught.value.body["type"] == "upstream_error"
    assert "http://127.0.0.1:9/v1 does not answer" in caught.value.body["message"] and line["status"] == 502


def test_a_server_that_breaks_off_breaks_off(tmp_path):
    def breaks(handler):
        stream_head(handler)
        chunk(handler, piece("one"))
        handler.close_connection = True
        handler.connection.close()

    with Upstream(breaks) as up, Collecting(up.url, tmp_path / "log.jsonl", consent="all") as collecting:
        with pytest.raises((httpx.RemoteProtocolError, openai.APIConnectionError)):
            list(connect(collecting.url).chat.completions.create(model="m", messages=SUM, stream=True))
        [line] = lines_of(tmp_path / "log.jsonl", 1)
    assert line["reply"]["content"] == "one" and line["finish_reason"] is None and line["cut"] == "server"
    with pytest.raises(UserError, match="of 1 turns none can be a row, the server broke off 1"):
        harvest(tmp_path / "log.jsonl", tmp_path / "rows.jsonl")


# ---- one way there and back: for names, for seats and for the collector


@contextlib.contextmanager
def in_front(kind, url, folder):
    "What adapters by name, the flywheel and the collector are, in a thread; yields its URL."
    root, log = url.removesuffix("/v1"), TurnLog(folder / f"{kind}.jsonl")
    app = {"names": lambda: forward(root, by_name({"m": {}, "tools": {}}), ["tools"]),
           "seats": lambda: forward(lambda: contextlib.nullcontext(root)),
           "collector": lambda: Collector(url, log, Passing(), "all")}[kind]()  # fmt: skip
    door = listener(app, "127.0.0.1", free_port(), log_level="critical")
    thread = threading.Thread(target=door.run, daemon=True)
    thread.start()
    while not door.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{door.config.port}/v1"
    finally:
        door.should_exit = True
        thread.join(20)
        log.close()
    assert not thread.is_alive()


FRONTS = pytest.mark.parametrize("kind", ["names", "seats", "collector"])


@FRONTS
def test_the_contract_holds_through_each(kind, llama, tmp_path):
    with in_front(kind, llama.url, tmp_path) as url:
        found = list(asked_everything(url, key=KEY))
    assert [one.name for one in found] == list(CHECKS) and not [one for one in found if one.state != "ok"]


@FRONTS
def test_headers_pass_but_those_of_one_hop(kind, tmp_path):
    seen = []

    def echo(handler):
        seen.append((handler.path, {k.lower(): v for k, v in handler.headers.items()}, handler.body))
        more = dict(connection="x-hop", x_hop="1", set_cookie="a=b", retry_after="7", content_encoding="gzip")
        send(handler, 418, b"no gzip", date="then", **more)

    with Upstream(echo) as up, in_front(kind, up.url, tmp_path) as url:
        head = {"Authorization": "Bearer mine", "connection": "x-mine, keep-alive", "x-mine": "1", "te": "trailers",
                "x-mine-too": "gr\u00fc\u00df"}  # fmt: skip
        head = [(k.encode(), v.encode()) for k, v in head.items()]
        with httpx.stream("PUT", url + "/a%2Fb?x=%20y", headers=head, content=b"\x00\xff", trust_env=False) as found:
            assert (found.status_code, b"".join(found.iter_raw())) == (418, b"no gzip")
            assert [found.headers.get(k) for k in ("set-cookie", "retry-after", "x-hop")] == ["a=b", "7", None]
            assert found.headers["content-encoding"] == "gzip" and found.headers.get_list("content-length") == ["7"]
            assert len(found.headers.get_list("server")) == 1 and "then" in found.headers.get_list("date")
    path, given, body = seen[0]
    assert (path, body) == ("/v1/a%2Fb?x=%20y", b"\x00\xff") and given["authorization"] == "Bearer mine"
    assert given["host"] in up.url and not {"x-mine", "te"} & given.keys()
    assert given["x-mine-too"].encode("latin-1").decode() == "gr\u00fc\u00df"


@FRONTS
def test_a_stream_comes_piece_by_piece_and_who_hangs_up_stops_it(kind, tmp_path):
    ended = threading.Event()

    def endless(handler):
        stream_head(handler)
        try:
            while True:
                chunk(handler, piece("x"))
                time.sleep(0.01)
        except OSError:
            ended.set()

    with Upstream(endless) as up, in_front(kind, up.url, tmp_path) as url:
        stream = connect(url).chat.completions.create(model="m", messages=SUM, stream=True)
        assert next(iter(stream)).choices[0].delta.content == "x"
        stream.close()
        assert ended.wait(20)


@FRONTS
def test_who_hangs_up_before_the_first_word_stops_it(kind, tmp_path):
    ended = threading.Event()

    def thinks(handler):
        handler.connection.settimeout(20)
        if handler.rfile.read(1) == b"":
            ended.set()

    with Upstream(thinks) as up, in_front(kind, up.url, tmp_path) as url:
        with pytest.raises(openai.APITimeoutError):
            connect(url, timeout=0.5, max_retries=0).chat.completions.create(model="m", messages=SUM)
        assert ended.wait(20)


@FRONTS
def test_a_server_that_is_gone_or_breaks_off(kind, tmp_path):
    def breaks(handler):
        stream_head(handler)
        chunk(handler, piece("one"))
        handler.close_connection = True
        handler.connection.close()

    with Upstream(breaks) as up, in_front(kind, up.url, tmp_path) as url:
        client = connect(url, max_retries=0)
        with pytest.raises((httpx.RemoteProtocolError, openai.APIConnectionError)):
            list(client.chat.completions.create(model="m", messages=SUM, stream=True))
        up.server.shutdown()
        up.server.server_close()
        with pytest.raises(openai.InternalServerError, match="does not answer") as caught:
            client.chat.completions.create(model="m", messages=SUM)
    assert caught.value.status_code == 502 and caught.value.body["type"] == "upstream_error"
    assert {"message", "type", "param", "code"} == caught.value.body.keys()


# ---- who is recorded, and what


def test_nobody_is_recorded_unasked(llama, tmp_path):
    log = tmp_path / "log.jsonl"
    with Collecting(llama.url, log) as collecting:
        for headers in ({}, {"x-collect": "no"}, {"x-collect": ""}, {"x-collect": "maybe"}):
            answer(collecting.url, dict(messages=SUM), **headers)
        answer(collecting.url, dict(messages=SUM), **YES)
        assert len(lines_of(log, 1)) == 1
    assert len(read_jsonl(log)) == 1
    with Collecting(llama.url, log, consent="all") as collecting:
        answer(collecting.url, dict(messages=SUM), **{"x-collect": "no"})
        answer(collecting.url, dict(messages=SUM))
    assert len(read_jsonl(log)) == 2


def test_a_sample_is_a_share_of_the_turns():
    random.seed(7)
    scope = {"method": "POST", "path": "/v1/chat/completions"}
    for share in (0.1, 0.5, 1.0):
        app = Collector("http://h/v1", None, None, "all", share)
        n = sum(app.turn(scope, b"", b"{}") is not None for _ in range(4000))
        assert abs(n / 4000 - share) < 0.04  # more than five standard errors
    assert app.turn(scope, b"", b"no JSON") is None and app.turn(scope | {"path": "/v1/embeddings"}, b"", b"{}") is None


def test_what_is_in_a_line(llama, tmp_path):
    "The reply as the client sees it, in a stream or not; nobody's name, no key, nothing that belongs to somebody."
    log = tmp_path / "log.jsonl"
    asks = [{"role": "user", "content": "I am ana@school.org, my key is hf_" + "a1" * 17 + ". What is 47 plus 38?"}]
    with Collecting(llama.url, log) as collecting:
        client = connect(collecting.url, KEY)
        options = dict(model="tools", temperature=0, extra_headers=YES, user="ana-17", metadata={"name": "Ana"})
        whole = client.chat.completions.create(messages=asks, **options)
        stream = [*client.chat.completions.create(messages=asks, stream=True, **options)]
        called = client.chat.completions.create(
            messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True, **options
        )
        calls = [one for event in called for one in event.choices[0].delta.tool_calls or []]
        lines = lines_of(log, 3)
    text = log.read_text()
    assert not [word for word in (KEY, "ana@", "ana-17", "Ana", "a1a1a1", "Bearer") if word in text]
    assert log.stat().st_mode & 0o777 == 0o600
    said = whole.choices[0].message.content
    assert lines[0]["reply"] == lines[1]["reply"] == {"role": "assistant", "content": said}
    assert "".join(e.choices[0].delta.content or "" for e in stream if e.choices) == said
    for line in lines[:2]:
        content = "I am [EMAIL_1], my key is [KEY_1]. What is 47 plus 38?"
        assert line["request"]["messages"] == [{"role": "user", "content": content}]
        assert line["status"] == 200 and line["finish_reason"] == "stop" and 0 < line["first"] <= line["seconds"] < 60
        assert line["model"] == "tools" and line["cut"] is None and line["hidden"] == {"EMAIL": 1, "KEY": 1}
    assert lines[0]["usage"]["total_tokens"] == whole.usage.total_tokens
    [call] = lines[2]["reply"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": "".join(c.function.arguments or "" for c in calls)}
    assert lines[2]["request"]["tools"] == [TOOL] and lines[2]["finish_reason"] == "tool_calls" and call["id"]


def test_a_reply_is_put_together_as_the_official_client_does(llama):
    from openai.lib.streaming.chat import ChatCompletionStreamState
    from openai.types.chat import ChatCompletionChunk

    for ask in (dict(messages=SUM), dict(messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100)):
        body = {"model": "tools", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}} | ask
        headers = {"Authorization": f"Bearer {KEY}"}
        raw = httpx.post(llama.url + "/chat/completions", json=body, headers=headers, trust_env=False).content
        state = ChatCompletionStreamState()
        for line in raw.splitlines():
            if line.startswith(b"data: {"):
                state.handle_chunk(ChatCompletionChunk.model_validate_json(line[6:]))
        whole, made = state.get_final_completion(), assembled(raw, stream=True)
        message = whole.choices[0].message.model_dump(exclude_none=True)
        calls = [{k: v for k, v in c.items() if k != "index"} for c in message.get("tool_calls", [])]
        for call in calls:
            call["function"].pop("parsed_arguments", None)
        assert (made.reply["content"] or None) == message.get("content") and made.reply.get("tool_calls", []) == calls
        assert made.finish_reason == whole.choices[0].finish_reason and made.model == whole.model
        assert made.usage["total_tokens"] == whole.usage.total_tokens


# ---- nothing is lost


def test_a_kill_loses_no_reply_that_a_client_has(llama, tmp_path):
    "At a random moment under 8 clients: each whole reply has one line, and no line stops `harvest`."
    log, whole, asked = tmp_path / "log.jsonl", [], itertools.count(100)
    rng = random.Random()      # another moment each time

    def client(url):
        with contextlib.suppress(httpx.HTTPError):
            while True:
                n = next(asked)
                body = {"model": "tools", "max_tokens": 6, "stream": n % 2 == 0, "stop": ["zzz"],
                        "messages": [{"role": "user", "content": f"What is {n} plus {n}?"}]}  # fmt: skip
                headers = {"Authorization": f"Bearer {KEY}"}
                found = httpx.post(url + "/chat/completions", json=body, headers=headers, trust_env=False, timeout=60)
                if found.status_code == 200:
                    whole.append(n)

    for _ in range(3):
        collecting, before = Collecting(llama.url, log, consent="all"), len(whole)
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(client, collecting.url)
            for _ in range(2000):
                if len(whole) < before + 8:
                    time.sleep(0.01)
            time.sleep(rng.random() / 4)
            collecting.process.send_signal(signal.SIGKILL)
        collecting.stop()
        found = [turn for _, turn in logged_turns(log)]
        assert all(isinstance(turn, dict) for turn in found)
        count = Counter(int(turn["request"]["messages"][0]["content"].split()[2]) for turn in found)
        assert set(whole) <= count.keys() and set(count.values()) == {1}
    with contextlib.suppress(UserError):       # replies of 6 tokens may all be cut off, and then it says so
        assert harvest(log, tmp_path / "rows.jsonl")["turns"] == len(found)


def test_a_reply_is_whole_once_its_turn_is_on_the_disk(tmp_path, monkeypatch):
    "Not before fsync has returned; in a stream, the pieces before the last come at once."
    order, real = [], os.fsync

    def slow(file):
        time.sleep(0.05)
        real(file)
        order.append("disk")

    def answers(handler):
        if b'"stream": true' not in handler.body:
            return send(handler, body=json.dumps({"choices": [{"index": 0, "message": {"content": "4"}}]}).encode())
        stream_head(handler)
        for one in (piece("4", "stop"), b"data: [DO", b"NE]\n\n", b""):
            chunk(handler, one)
            time.sleep(0.05)

    async def ask(url, stream):
        log = TurnLog(tmp_path / f"{stream}.jsonl")
        app = Collector(url, log, Passing(), "all")
        monkeypatch.setattr("llmcourse.turnlog.os.fsync", slow)
        coming = iter([{"type": "http.request", "body": json.dumps({"messages": SUM, "stream": stream}).encode()}])

        async def receive():
            return next(coming, None) or await asyncio.Event().wait()

        async def hear(message):
            order.append(message.get("body"))

        path = "/v1/chat/completions"
        scope = dict(type="http", method="POST", path=path, raw_path=path.encode(), query_string=b"", headers=[])
        await app(scope, receive, hear)
        monkeypatch.undo()
        await app.passing.session.close()
        log.close()
        assert len(read_jsonl(log.path)) == 1

    with Upstream(answers) as up:
        for stream in (False, True):
            asyncio.run(ask(up.url, stream))
    one, said = order[:3], order[3:]
    assert one[:2] == [None, "disk"] and b'"4"' in one[2]
    assert said[:2] == [None, piece("4", "stop")] and said[2] == b"data: [DO" and said[3:5] == ["disk", b"NE]\n\n"]


def test_one_fsync_takes_along_who_waits(tmp_path, monkeypatch):
    log, n, real = TurnLog(tmp_path / "log.jsonl"), [], os.fsync
    line = dict(time="t", seconds=1, status=200, request={"messages": SUM}, reply=None)

    def slow(file):
        n.append(file)
        time.sleep(0.02)
        real(file)

    monkeypatch.setattr("llmcourse.turnlog.os.fsync", slow)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: log.add(line), range(160)))
    monkeypatch.undo()
    log.close()
    assert len(read_jsonl(log.path)) == 160 and len(n) < 80


def test_half_a_line_is_cut_off_at_the_next_start(tmp_path):
    line = dict(time="t", seconds=1, status=200, request={"messages": SUM}, reply=None)
    for n in (1, 65_536, 200_000):
        log = TurnLog(tmp_path / f"{n}.jsonl")
        log.add(line)
        os.write(log.file, b'{"time": "' + b"x" * n)
        log.close()
        assert [number for number, _ in logged_turns(log.path)] == [1]
        log = TurnLog(log.path)
        log.add(line)
        log.close()
        assert [turn for _, turn in logged_turns(log.path)] == [line, line]
    only = TurnLog(tmp_path / "only.jsonl")
    os.write(only.file, b'{"time": "')
    only.close()
    TurnLog(only.path).close()
    assert only.path.read_bytes() == b""


def test_a_full_disk_costs_no_reply_and_leaves_no_half_line(tmp_path, monkeypatch, capsys):
    log = TurnLog(tmp_path / "log.jsonl")
    app = Collector("http://h/v1", log, None, "all")
    turn = app.turn({"method": "POST", "path": "/v1/chat/completions"}, b"", json.dumps({"messages": SUM}).encode())
    app.keep(turn)
    before, real = log.path.read_bytes(), os.write

    def full(file, data):
        real(file, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmcourse.turnlog.os.write", full)
    for _ in range(3):
        app.keep(turn)
    monkeypatch.undo()
    assert log.path.read_bytes() == before and app.lost == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no space left on the disk" in err
    app.keep(turn)
    log.close()
    assert len(read_jsonl(log.path)) == 2


def test_one_log_one_collector_and_nobody_elses_file(tmp_path):
    log = TurnLog(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="another collector"):
        TurnLog(tmp_path / "log.jsonl")
    log.close()
    for name, text in (("a.jsonl", '{"messages": []}\n'), ("b.txt", "my only notes"), ("c.json", "[1]\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="no log of"):
            TurnLog(tmp_path / name)
        assert (tmp_path / name).read_text() == text


# ---- the command


def test_the_command_ends_well(llama, tmp_path):
    "It prints what to set, records, and on SIGTERM ends what is on its way."
    log = tmp_path / "log.jsonl"
    words = ["collect", "--url", llama.url, "--log", log, "--consent", "all", "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", "from llmcourse.cli import cli; cli()", *map(str, words)],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    said = [process.stdout.readline() for _ in range(4)]
    url = said[1].strip().partition("OPENAI_BASE_URL=")[2]
    for _ in range(100):
        try:
            status = answer(url, dict(messages=SUM))[0]
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    process.terminate()
    assert status == 200 and process.wait(20) in (143, -15)
    process.stdout.close()
    assert len(read_jsonl(log)) == 1 and "into " + str(log) in said[0]
    assert said[2] == ("recorded: /v1/chat/completions and /v1/completions; "
                       "everything else passes untouched, unrecorded\n")  # fmt: skip


@pytest.mark.parametrize(
    "words,say",
    [
        ([], "--url"),
        (["--url", "api.openai.com/v1"], "--url"),
        (["--url", "http://h/v1", "--consent", "some"], "unknown consent"),
        (["--url", "http://h/v1", "--sample", "10"], "--sample 10"),
        (["--url", "http://h/v1", "--sample", "0"], "--sample 0"),
        (["--url", "http://h/v1", "--host", "0.0.0.0"], "needs a key"),
        (["--url", "http://127.0.0.1:8081/v1"], "itself is to listen"),
        (["--url", "http://h/v1", "--port", "70000"], "port 70000"),
        (["--url", "http://h/v1", "--port", "0", "--log", "README.md"], "no log of"),
        (["--url", "http://h/v1", "--port", "0", "--log", "README.md/log"], "README.md/log"),
        (["record", "log.jsonl", "--url", "http://h/v1"], "one word too many"),
        (["rows"], "of which log"),
        (["rows", "nowhere.jsonl"], "no such file"),
        (["row", "log.jsonl"], "did you mean 'rows'"),
    ],
)
def test_bad_input_is_one_line(words, say, capsys, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMCOURSE_COLLECT_KEY", raising=False)
    assert main(["collect", *words]) == 2
    err = capsys.readouterr().err
    assert say in err and err.count("\n") == 1
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


# ---- from the log to a model


def logged(path, *asks):
    "A log as the collector writes it: (status, finish_reason, n, messages with the reply)."
    with path.open("w") as f:
        for status, end, n, messages, more in asks:
            line = dict(time="t", seconds=1, status=status, finish_reason=end, n=n, reply=messages[-1] or None)
            f.write(json.dumps(line | {"request": {"messages": messages[:-1]} | more}) + "\n")


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_counts_add_up(tmp_path, capsys):
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{'a'"}}
    bad = {"role": "assistant", "content": None, "tool_calls": [call]}
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://h/x.png"}}]}]
    log, rows = tmp_path / "log.jsonl", tmp_path / "rows.jsonl"
    logged(
        log,
        (200, "stop", 1, said("2+2?", "4"), {}),
        (200, "stop", 1, said("2+2?", "4"), {}),                       # the same again
        (200, "stop", 1, said("2+2?", "4", "And 3?", "7"), {}),        # goes on
        (200, "stop", 1, said("2+2?", "4", "And 3?", "7", "And 1?", "8"), {}),
        (200, "stop", 1, said("2+2?", "four"), {}),                    # asked again
        (200, "length", 1, said("5+5?", "1"), {}),
        (200, None, 1, said("5+5?", "1"), {}),
        (200, "content_filter", 1, said("5+5?", "1"), {}),
        (429, None, None, said("5+5?", ""), {}),
        (502, None, None, [*said("5+5?"), None], {}),
        (499, None, None, [*said("5+5?"), None], {}),
        (200, "stop", 2, said("6+6?", "12"), {}),
        (200, "stop", 1, said("7+7?", ""), {}),
        (200, "stop", 1, said("8+8?", "sixteen"), {"response_format": schema}),
        (200, "stop", 1, said("8+8?", "16"), {"response_format": schema}),
        (200, "tool_calls", 1, [*said("9+9?"), bad], {}),
        (200, "stop", 1, [*image, *said("x", "a tree")[1:]], {}),
    )  # fmt: skip
    with log.open("a") as f:
        f.write('{"some": "other line"}\nno JSON\n{"time": "half')
    assert main(["collect", "rows", str(log), "--output", str(rows)]) == 0
    table = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()[:-1]]
    counts = {what: int(n) for n, what in table}
    total = counts.pop("turns")
    assert total == 19 == sum(counts.values())
    assert counts == {"cut off": 3, "failed": 2, "the client hung up": 1, "several replies at once": 1, "empty": 1,
                      "not usable as a row": 3, "not readable": 2, "asked again": 2, "continued in another": 1,
                      "rows": 3}  # fmt: skip
    texts = [[m["content"] for m in row["messages"]] for row in read_jsonl(rows)]
    wanted = ["2+2?", "four"], ["2+2?", "4", "And 3?", "7", "And 1?", "8"], ["8+8?", "16"]
    assert sorted(texts) == sorted(wanted)


def test_a_completion_is_a_turn_and_the_rest_only_passes(llama, tmp_path):
    "Streamed or not; embeddings, templates and the list of models leave no line."
    log, rows = tmp_path / "log.jsonl", tmp_path / "rows.jsonl"
    with Collecting(llama.url, log, consent="all") as collecting:
        client = connect(collecting.url, KEY)
        asked = dict(model="tools", prompt="3+4, ana@school.org=", temperature=0, max_tokens=6, logit_bias={"0": 0})
        whole = client.completions.create(**asked).choices[0]
        pieces = [e.choices[0].text for e in client.completions.create(**asked, stream=True) if e.choices]
        assert client.models.list().data and client.post("/../apply-template", cast_to=object, body={"messages": SUM})
        with pytest.raises(openai.APIStatusError):
            client.embeddings.create(model="tools", input="x")
        lines = lines_of(log, 2)
    assert len(read_jsonl(log)) == 2 and "".join(pieces) == whole.text
    for line in lines:
        assert line["request"]["prompt"] == "3+4, [EMAIL_1]=" and line["finish_reason"] == whole.finish_reason
        assert line["reply"]["content"] == whole.text and line["cut"] is None
    log.write_text(log.read_text().replace('"finish_reason": "length"', '"finish_reason": "stop"'))
    assert harvest(log, rows)["rows"] == 1
    asks, reply = read_jsonl(rows)[0]["messages"]
    assert asks["content"] == "3+4, [EMAIL_1]=" and reply == {"role": "assistant", "content": whole.text}


@pytest.mark.parametrize(
    "asked, text, row",
    [
        ({"prompt": "2+2="}, "4", "4"),
        ({"prompt": "2+2=", "echo": True}, "2+2=4", "4"),
        ({"prompt": ["2+2=", "3+3="]}, "4", None),
        ({"prompt": [50, 10]}, "4", None),
        ({"prompt": "2+", "suffix": "=4"}, "2", None),
    ],
)
def test_which_completions_are_rows(asked, text, row, tmp_path):
    reply = {"role": "assistant", "content": text}
    line = dict(time="t", seconds=1, status=200, finish_reason="stop", n=1, reply=reply, request=asked)
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    if row is None:
        with pytest.raises(UserError, match="not usable as a row 1"):
            harvest(tmp_path / "log.jsonl", tmp_path / "rows.jsonl")
    else:
        harvest(tmp_path / "log.jsonl", tmp_path / "rows.jsonl")
        assert read_jsonl(tmp_path / "rows.jsonl")[0]["messages"][-1]["content"] == row


def test_a_log_without_a_row_is_one_line(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    logged(log, (429, None, None, [*said("5+5?"), None], {}))
    assert main(["collect", "rows", str(log), "--output", str(tmp_path / "rows.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "of 1 turns none can be a row, failed 1" in err and not (tmp_path / "rows.jsonl").exists()


def test_real_conversations_become_rows_that_train(llama, tmp_path, capsys):
    "An application talks through the proxy, a call and its result among it; its log passes the doctor and trains."
    log, rows = tmp_path / "log.jsonl", tmp_path / "rows.jsonl"
    with Collecting(llama.url, log, consent="all") as collecting:
        client = connect(collecting.url, KEY)
        ask = lambda messages, **options: client.chat.completions.create(
            model="tools", messages=messages, temperature=0, **options
        )
        for n in range(6):
            turns_so_far = [{"role": "user", "content": f"What is {n + 12} plus 30?"}]
            for more in (f"What is {n + 20} minus 7?", f"What is {n + 3} times 4?"):
                reply = ask(turns_so_far).choices[0].message
                turns_so_far += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": more}]
            ask(turns_so_far)
        reply = ask(WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100).choices[0].message
        call = reply.model_dump(exclude_none=True)
        answered = [*WEATHER, call, {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "sunny"}]
        ask(answered, tools=[TOOL])
    assert main(["collect", "rows", str(log), "--output", str(rows)]) == 0
    said = capsys.readouterr().out.split()
    assert said[:2] == ["20", "turns"] and len(read_jsonl(rows)) == 7
    assert main(["data", "check", str(rows), "--model", "tutor/tools", "--purpose", "sft"]) < 2, capsys.readouterr().out
    train = ["sft", "--model", "tutor/tools", "--data", str(rows), "--steps", "3", "--batch-size", "2"]
    assert main([*train, "--output", str(tmp_path / "run")]) == 0
