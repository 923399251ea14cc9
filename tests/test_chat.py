"""Chapter 11: turns, votes and threads in SQLite; streaming, stopping, failing; the page in a real browser."""

import contextlib
import http.server
import importlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmcourse.chat import feel, thumbs
from llmcourse.chatdb import as_text, export_votes, newest, open_db, path_to, save_turn, save_vote, votes, writing
from llmcourse.cli import main
from llmcourse.core import UserError, read_jsonl, weights
from llmcourse.desk import Desk
from llmcourse.page import READ_ALOUD, launch
from llmcourse.replies import shorten, stream_reply, take_turn
from llmcourse.serve import connect
from llmcourse.tutor import SYSTEM
from llmcourse.views import FLAG, TUTOR_QUESTIONS, view, welcome

REPLY = "47+38: ones 7+8=15, carry 1, tens 4+3+1=8, so 85.\nAnswer: 85"
CHAT = [{"role": "system", "content": "You are a tutor."}, {"role": "user", "content": "What is 47 + 38?"}]


class Fake:
    "An OpenAI-compatible server that says what it is told to say, as slowly, as badly as it is told to."

    def __init__(self, reply=REPLY):
        self.reply, self.delay, self.room, self.dies_after, self.finish, self.usage, self.status = (
            reply,
            0,
            10_000,
            None,
            "stop",
            True,
            200,
        )
        self.requests, self.closed = [], threading.Event()
        self.models = [{"id": "tutor", "object": "model", "created": 0, "owned_by": "us"}]
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_GET(self):
                self.say({"object": "list", "data": fake.models})

            def do_POST(self):
                fake.chat(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def say(self, body, status=200):
                body = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.client = connect(self.url, max_retries=0)

    def chat(self, to, body):
        self.requests.append(body)
        n = sum(len(m["content"]) + 5 for m in body["messages"])
        if self.status != 200:
            return to.say({"error": {"message": "no such luck", "code": self.status}}, self.status)
        if n > self.room:
            return to.say(
                {
                    "error": {
                        "code": 400,
                        "type": "exceed_context_size_error",
                        "message": f"request ({n} tokens) exceeds the available context size",
                    }
                },
                400,
            )
        to.send_response(200)
        to.send_header("Content-Type", "text/event-stream")
        to.end_headers()
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "fake", "choices": []}
        event = lambda **more: to.wfile.write(f"data: {json.dumps(chunk | more)}\n\n".encode())
        delta = lambda content, end=None: event(
            choices=[{"index": 0, "delta": {"content": content}, "finish_reason": end}]
        )
        words = (self.reply(body) if callable(self.reply) else self.reply).replace(" ", " \0").split("\0")
        with contextlib.suppress(OSError):
            for i, word in enumerate(words):
                if i == self.dies_after:
                    return
                time.sleep(self.delay)
                delta(word)
            delta(None, self.finish)
            if self.usage:
                event(usage={"prompt_tokens": n, "completion_tokens": len(words), "total_tokens": n + len(words)})
            to.wfile.write(b"data: [DONE]\n\n")
            return
        self.closed.set()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake():
    fake = Fake()
    yield fake
    fake.stop()


@pytest.fixture
def db(tmp_path):
    return tmp_path / "chat.db"


def ask(fake, db, messages=CHAT, stop=None, **options):
    *_, path = take_turn(db, fake.client, "fake", messages, stop, **options)
    return path


def sql(db, text):
    con = open_db(db)
    try:
        return [tuple(row) for row in con.exec_driver_sql(text)]
    finally:
        con.close()


def test_exported_prompt_is_what_the_model_saw(fake, db, tmp_path):
    with pytest.raises(UserError, match="no votes"):
        export_votes(db, tmp_path / "votes.jsonl")
    fake.room = 160
    path = ask(fake, db)
    path = ask(fake, db, path + [{"role": "user", "content": "And 30 + 41? " * 4}])
    save_vote(db, path[-1]["id"], vote=-1, correction="Answer: 71")
    (row,) = read_jsonl(export_votes(db, tmp_path / "votes.jsonl"))
    assert row["prompt"] == fake.requests[-1]["messages"] and len(row["prompt"]) == 2 and row["prompt"][0] == CHAT[0]
    assert (row["reply"], row["vote"], row["correction"], row["model"], row["status"]) == (
        REPLY,
        -1,
        "Answer: 71",
        "fake",
        "done",
    )
    assert list(row) == ["prompt", "reply", "vote", "correction", "model", "status", "message", "rater"]


def test_how_it_felt(fake, db):
    with pytest.raises(UserError, match="no replies yet"):
        feel(db)
    path = ask(fake, db)
    fake.status = 500
    ask(fake, db, path + [{"role": "user", "content": "again"}])
    felt = feel(db)
    assert (felt["replies"], felt["conversations"], felt["unfinished"]) == (2, 1, 0.5) and 0 <= felt[
        "first_ms"
    ] <= felt["whole_ms"]
    for message, vote in ((3, 1), (5, -1)):
        save_vote(db, message, vote=vote)
    assert (thumbs(db)["correct"], thumbs(db)["n"]) == (1, 2)


# streaming


def test_a_turn_is_saved_with_its_facts(fake, db):
    looks = list(take_turn(db, fake.client, "fake", CHAT, temperature=0.5))
    assert fake.requests[0]["messages"] == CHAT and fake.requests[0]["temperature"] == 0.5
    texts = [path[-1]["content"] for path in looks[1:]]
    assert len(set(texts)) > 5 and all(b.startswith(a) for a, b in zip(texts, texts[1:])) and texts[-1] == REPLY
    saved = path_to(db, looks[-1][-1]["id"])[-1]
    assert (saved["model"], saved["status"], saved["completion_tokens"], saved["dropped"]) == ("fake", "done", 10, 0)
    assert 0 < saved["ttft"] <= saved["seconds"] < 30 and saved["prompt_tokens"] > 20


def test_stop_works_between_tokens(fake, db):
    fake.delay, stop = 0.05, threading.Event()
    for path in take_turn(db, fake.client, "fake", CHAT, stop):
        if path[-1]["content"].count(" ") == 3:
            stop.set()
    saved = path_to(db, path[-1]["id"])[-1]
    assert (
        saved["status"] == "stopped" and REPLY.startswith(saved["content"]) and 0 < len(saved["content"]) < len(REPLY)
    )
    assert fake.closed.wait(5), "the server was not told to stop"


def test_stop_works_before_the_first_token(fake, db):
    fake.delay, stop = 20, threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.perf_counter()
    assert ask(fake, db, stop=stop)[-1]["status"] == "stopped"
    assert time.perf_counter() - start < 10


def test_a_page_that_is_closed_leaves_a_stopped_turn(fake, db):
    fake.delay = 0.05
    turn = take_turn(db, fake.client, "fake", CHAT)
    for _ in range(4):
        next(turn)
    turn.close()
    assert sql(db, "SELECT role, status FROM messages WHERE id > 1") == [("user", None), ("assistant", "stopped")]


def test_a_server_that_dies_in_the_middle(fake, db):
    fake.dies_after = 3
    reply = ask(fake, db)[-1]
    assert (
        reply["status"] == "failed"
        and "broke off" in reply["note"]
        and REPLY.startswith(reply["content"])
        and reply["content"]
    )


def test_a_server_that_is_gone(fake, db):
    path = ask(fake, db)
    fake.stop()
    reply = ask(fake, db, path + [{"role": "user", "content": "Still there?"}])[-1]
    assert (
        reply["status"] == "failed"
        and "does not answer" in reply["note"]
        and fake.url in reply["note"]
        and not reply["content"]
    )
    assert "does not answer" in view(path_to(db, reply["id"]))[-1]["content"]


@pytest.mark.parametrize("status, say", [(401, "key"), (404, "404"), (500, "500"), (400, "no such luck")])
def test_a_server_that_refuses(fake, db, status, say):
    fake.status = status
    assert say in ask(fake, db)[-1]["note"]


def test_cut_and_full(fake):
    fake.finish = "length"
    assert [*stream_reply(fake.client, "fake", CHAT, max_tokens=9)][-1]["status"] == "cut"
    assert [*stream_reply(fake.client, "fake", CHAT, max_tokens=500)][-1]["status"] == "full"
    fake.usage = False
    assert [*stream_reply(fake.client, "fake", CHAT, max_tokens=500)][-1]["status"] == "cut"
    fake.finish = "stop"
    last = [*stream_reply(fake.client, "fake", CHAT)][-1]
    assert last["status"] == "done" and "completion_tokens" not in last


def test_oldest_turns_are_left_out_and_stay_out(fake, db):
    fake.room, path = 200, CHAT[:1]
    for i in range(5):
        path = ask(fake, db, path + [{"role": "user", "content": f"question {i}"}])
        assert (
            fake.requests[-1]["messages"][0] == CHAT[0]
            and fake.requests[-1]["messages"][-1]["content"] == f"question {i}"
        )
    assert path[-1]["status"] == "done" and path[-1]["dropped"] > 0
    refused = sum(sum(len(m["content"]) + 5 for m in r["messages"]) > fake.room for r in fake.requests)
    assert refused <= 3, "each turn begins with what was left out before"
    assert f"{path[-1]['dropped']} oldest messages were not sent" in view(path)[-1]["content"]


def test_a_question_that_is_too_long_alone(fake, db):
    fake.room = 30
    reply = ask(fake, db)[-1]
    assert reply["status"] == "full" and len(fake.requests) == 1 and "no room" in view([reply])[0]["content"]


def test_remember(fake, db):
    path = CHAT[:1]
    for i, sent in ((0, 2), (1, 4), (2, 4), (3, 4)):
        path = ask(fake, db, path + [{"role": "user", "content": f"question {i}"}], remember=1)
        assert len(fake.requests[-1]["messages"]) == sent and fake.requests[-1]["messages"][0] == CHAT[0]
    assert path[-1]["dropped"] == 4
    path = ask(fake, db, path + [{"role": "user", "content": "alone"}], remember=0)
    assert fake.requests[-1]["messages"] == [CHAT[0], {"role": "user", "content": "alone"}] and len(path) == 11


def test_shorten():
    u, a = ({"role": r, "content": "x"} for r in ("user", "assistant"))
    s = CHAT[0]
    assert shorten([s, u, a, u]) == [s, u] and shorten([s, u]) == [s, u] and shorten([u, a, a, u, a, u]) == [u, a, u]


# the desk behind the page


def test_retry_edit_and_dead_branches(fake, db):
    desk = Desk(fake.url, db)
    *_, path = desk.ask("first", None, "sys", "tab")
    assert fake.requests[-1]["temperature"] == 0
    *_, again = desk.retry(path[-1]["id"], "tab")
    assert fake.requests[-1]["temperature"] > 0 and again[1]["id"] == path[1]["id"] and again[2]["id"] != path[2]["id"]
    *_, other = desk.edit("second", path[1]["id"], again[-1]["id"], "tab")
    assert [m["content"] for m in other] == ["sys", "second", REPLY]
    fake.status = 500
    *_, dead = desk.ask("third", other[-1]["id"], "sys", "tab")
    fake.status = 200
    *_, alive = desk.ask("fourth", dead[-1]["id"], "sys", "tab")
    assert [m["content"] for m in fake.requests[-1]["messages"]] == ["sys", "second", REPLY, "fourth"]
    assert [*desk.ask("  ", None, "sys", "tab")] == [*desk.retry(None, "tab")] == []
    (restored,) = desk.restore(path_to(db, alive[-1]["id"])[0]["token"])
    assert as_text(restored) == as_text(alive) and [*desk.restore("guess")] == [*desk.restore(None)] == [[]]


def test_only_messages_of_this_page_are_mine(fake, db):
    desk = Desk(fake.url, db)
    (*_, mine), (*_, yours) = desk.ask("a", None, "", "me"), desk.ask("b", None, "", "you")
    assert desk.mine(mine[-1]["id"], mine[-1]["id"]) and desk.mine(yours[-1]["id"], mine[-1]["id"]) is None
    assert [*desk.edit("c", yours[0]["id"], mine[-1]["id"], "me")] == []


def test_one_turn_at_a_time_in_a_tab(fake, db):
    fake.delay, desk = 0.02, Desk(fake.url, db)
    turn = desk.ask("a", None, "", "tab")
    next(turn)
    assert [*desk.ask("b", None, "", "tab")] == [] and desk.busy(None, "tab") and not desk.busy(None, "other")
    desk.stop(None, "tab")
    *_, path = turn
    assert path[-1]["status"] == "stopped" and desk.running == {}
    desk.stop(None, "tab")


def test_a_turn_goes_on_without_its_page_and_a_reload_watches_it(fake, db):
    fake.delay, desk = 0.05, Desk(fake.url, db)
    first = desk.ask("a", None, "", "tab")
    question = next(first)[-1]["id"]
    next(first)
    first.close()  # the page is reloaded
    token = path_to(db, question)[0]["token"]
    looks = list(desk.restore(token))
    assert [m["role"] for m in looks[0]] == ["user"] and len(looks) > 2
    assert looks[-1][-1]["status"] == "done" and looks[-1][-1]["content"] == REPLY and desk.running == {}
    assert len(list(desk.restore(token))) == 1
    second = desk.ask("b", looks[-1][-1]["id"], "", "tab")
    question = next(second)[-1]["id"]
    second.close()  # the page is closed, and opened again when all is said
    until(lambda: not desk.running)
    (restored,) = desk.restore(token)
    assert [m["content"] for m in restored] == ["a", REPLY, "b", REPLY] and newest(db, token) == restored[-1]["id"]


def test_another_tab_of_the_same_conversation_watches_and_stops(fake, db):
    fake.delay, desk = 0.05, Desk(fake.url, db)
    here = desk.ask("a", None, "", "tab 1")
    question = next(here)[-1]["id"]
    there = desk.restore(path_to(db, question)[0]["token"])
    next(there)
    assert desk.busy(question, "tab 2") and [*desk.retry(question, "tab 2")] == []
    desk.stop(question, "tab 2")
    assert [*here][-1][-1]["status"] == [*there][-1][-1]["status"] == "stopped"


def test_closing_the_desk_saves_what_there_is(fake, db):
    fake.delay, desk = 0.2, Desk(fake.url, db)
    turn = desk.ask("a", None, "", "tab")
    next(turn), next(turn)
    desk.close()
    assert sql(db, "SELECT status FROM messages WHERE role = 'assistant'") == [("stopped",)]


def test_an_error_while_saving_reaches_the_page(fake, db, monkeypatch):
    desk = Desk(fake.url, db)

    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    turn = desk.ask("a", None, "", "tab")
    monkeypatch.setattr("llmcourse.replies.save_turn", full)
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        fake.delay = 0.01
        list(turn)
    assert desk.running == {}


def test_a_desk_on_postgresql(fake, postgres):
    "Ask, retry, edit, reload in the middle: as on SQLite."
    url, fake.delay = postgres.fresh(), 0.02
    desk = Desk(fake.url, url)
    *_, path = desk.ask("first", None, "sys", "tab")
    *_, again = desk.retry(path[-1]["id"], "tab")
    *_, other = desk.edit("second", path[1]["id"], again[-1]["id"], "tab")
    assert [m["content"] for m in path_to(url, other[-1]["id"])] == ["sys", "second", REPLY]
    asked = desk.ask("third", other[-1]["id"], "sys", "tab")
    question = next(asked)[-1]["id"]
    asked.close()
    token = path_to(url, question)[0]["token"]
    *_, restored = desk.restore(token)
    assert [m["content"] for m in restored[-2:]] == ["third", REPLY] and newest(url, token) == restored[-1]["id"]
    desk.close()


@pytest.mark.parametrize("heard", [True, False])
def test_a_reply_that_the_database_refused_is_saved_later_and_once(fake, db, monkeypatch, heard):
    "Also if it was saved, but the database went away before it could say so."
    desk = Desk(fake.url, db)
    turn = desk.ask("a", None, "", "tab")
    question = next(turn)[-1]["id"]

    def away(*args):
        if not heard:
            save_turn(*args)
        raise UserError("chat.db: the database does not answer")

    monkeypatch.setattr("llmcourse.replies.save_turn", away)
    fake.delay = 0.01
    with pytest.raises(UserError, match="does not answer"):
        list(turn)
    monkeypatch.undo()
    with ThreadPoolExecutor(4) as pool:  # and whatever comes first brings it
        restored = list(pool.map(lambda _: [*desk.restore(path_to(db, question)[0]["token"])][-1], range(4)))
    assert [[m["content"] for m in path] for path in restored] == [["a", REPLY]] * 4
    *_, path = desk.ask("b", question, "", "tab")
    assert sql(db, "SELECT count(*) FROM messages") == [(4,)]


def test_a_conversation_is_deleted_while_its_reply_streams(fake, db):
    fake.delay, desk = 0.2, Desk(fake.url, db)
    turn = desk.ask("a", None, "", "tab")
    question = next(turn)[-1]["id"]
    assert desk.forget(path_to(db, question)[0]["token"]) == 1
    assert list(turn)[-1][-1]["status"] == "stopped" and desk.running == {}
    assert sql(db, "SELECT count(*) FROM messages") == [(0,)]


def test_a_desk_deletes_what_is_too_old_when_it_opens_and_later(fake, db):
    path = ask(fake, db)
    with writing(db) as con:
        for table in ("conversations", "messages"):
            con.exec_driver_sql(f"UPDATE {table} SET created = '2020-01-01 00:00:00'")
    Desk(fake.url, db).close()
    assert path_to(db, path[-1]["id"]), "without the setting, nothing is deleted"
    desk = Desk(fake.url, db, keep_days=30)
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(0,)])
    desk.close()
    assert "keep_days" not in str(fake.requests)


def test_only_the_tutor_gets_the_tutors_system_prompt(fake, db):
    config = json.loads((weights() / "base/config.json").read_text())
    assert Desk(fake.url, db).system == "" and not Desk(fake.url, db).tutor, "a name proves nothing"
    fake.models[0]["meta"] = {"n_vocab": config["vocab_size"], "n_embd": config["hidden_size"], "n_params": 1}
    tutor = Desk(fake.url, db)
    assert tutor.system == SYSTEM and SYSTEM in tutor.prompt_line() and "trained with" in tutor.prompt_line()
    fake.models[0]["meta"] = {"n_vocab": 128256, "n_embd": config["hidden_size"]}
    other = Desk(fake.url, db)
    assert other.system == "" and "none" in other.prompt_line() and "--system" in other.prompt_line()
    [*other.ask("Hi", None, other.system, "tab")]
    assert [m["role"] for m in fake.requests[-1]["messages"]] == ["user"]
    own = Desk(fake.url, db, system="Speak like a pirate. " * 9)
    assert "yours" in own.prompt_line() and len(own.prompt_line()) < 120 and "\n" not in own.prompt_line()
    assert Desk(fake.url, db, system="").prompt_line() == "system prompt: none"


def test_the_empty_page_greets_and_offers_three_questions():
    for tutor in (True, False):
        greeting, questions = welcome(tutor, "llama")
        assert greeting.startswith("## Hello!") and len(set(questions)) == 3 and ("llama" in greeting) is not tutor
    assert set(TUTOR_QUESTIONS) & set(welcome(False, "x")[1]) == set()


def test_servers_that_are_none(db):
    class Site(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if "json" in self.path else "text/html")
            self.end_headers()
            self.wfile.write(b'{"data": []}' if "json" in self.path else b"<h1>Welcome</h1>")

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
    for path in ("", "/json"):
        with pytest.raises(UserError, match="lists no models"):
            Desk(f"http://127.0.0.1:{site.server_address[1]}{path}", db)
    site.shutdown()


# the command


def chat(*words):
    "Run `llmcourse chat` until it waits for Ctrl-C; returns what it printed."
    env = os.environ | {"PYTHONUNBUFFERED": "1", "LLMCOURSE_API_KEY": ""}
    with subprocess.Popen(
        [sys.executable, "-c", "from llmcourse.cli import cli; cli()", "chat", "--port", "0", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as run:
        said = ""
        for line in run.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        run.terminate()
        return said + run.stdout.read()


def test_the_command_says_which_system_prompt_is_sent(fake, db):
    assert "system prompt: none" in chat("--url", fake.url, "--database", db)
    own = ("--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9")
    said = chat("--url", fake.url, "--database", db, *own)
    assert "system prompt: 'Be brief.' (yours)" in said and said.count("system prompt") == 1


def test_the_command_hands_its_options_on(fake, db, monkeypatch):
    seen = {}
    monkeypatch.setattr("llmcourse.page.launch", lambda url, db, port, **options: seen.update(options, url=url, db=db))
    monkeypatch.setenv("LLMCOURSE_API_KEY", "from-the-environment")
    words = ["chat", "--port", "0", "--url", fake.url, "--database", str(db)]
    assert main(words) == 0 and seen["key"] == "from-the-environment" and seen["system"] is None
    assert (seen["db"], seen["keep_days"]) == (str(db), None)
    assert main([*words, "--key", "mine", "--system", "", "--temperature", "0.5", "--max-tokens", "9"]) == 0
    assert (seen["key"], seen["system"], seen["temperature"], seen["max_tokens"]) == ("mine", "", 0.5, 9)
    monkeypatch.setenv("DATABASE_URL", "postgresql://host/chat")
    assert main([*words, "--keep-days", "90"]) == 0 and (seen["db"], seen["keep_days"]) == (str(db), 90)
    assert main(words[:-2]) == 0 and seen["db"] == "postgresql://host/chat"


@pytest.mark.parametrize(
    "words, say",
    [
        (["--temperature", "3"], "from 0 to 2"),
        (["--temperature", "hot"], "temperature"),
        (["--temperature", "nan"], "from 0 up"),
        (["--max-tokens", "0"], "at least 1"),
        (["--keep-days", "0"], "above 0"),
        (["--database", "postgresql://me:secret@127.0.0.1:1/chat"], "postgresql://me:***@127.0.0.1:1/chat"),
        (["--database", "mysql://me:secret@127.0.0.1:1/chat"], "PostgreSQL"),
        (["--max-tokens", "many"], "max-tokens"),
        (["--key", "two words"], "key"),
        (["--port", "70000"], "port"),
        (["--database", "/dev/null/chat.db"], "database"),
        (["--url", "http://127.0.0.1:9/v1"], "nothing answers"),
        (["--url", "nonsense"], "not the URL"),
        (["--url", ""], "not the URL"),
        (["--sytem", "x"], "--system"),
    ],
)
def test_the_command_with_bad_input(fake, capsys, monkeypatch, tmp_path, words, say):
    monkeypatch.chdir(tmp_path)
    url = [] if "--url" in words else ["--url", fake.url]
    port = [] if "--port" in words else ["--port", "0"]
    assert main(["chat", *url, *port, *words]) == 2
    err = capsys.readouterr().err
    assert say in err and err.count("\n") == 1 and "secret" not in err


def test_view_shows_what_happened_and_carries_ids():
    rows = view([CHAT[0], {"role": "assistant", "content": "x", "status": "stopped", "dropped": 2, "id": 7}])
    assert rows == [
        {
            "role": "assistant",
            "content": f"x\n\n*{FLAG} the 2 oldest messages were not sent to the model*\n\n*{FLAG} stopped*",
            "metadata": {"id": 7},
        }
    ]
    assert FLAG in READ_ALOUD


# the page


def test_open_hosts_bad_passwords_and_ports_in_use(fake, db):
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(UserError, match="--people FILE .*--host 127.0.0.1"):
            launch(fake.url, db, host=host)
    for auth in (("me", ""), ("", "x"), [("me", "x"), ("you", "")]):
        with pytest.raises(UserError, match="empty"):
            launch(fake.url, db, host="0.0.0.0", auth=auth)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(UserError, match=str(s.getsockname()[1])):
            launch(fake.url, db, port=s.getsockname()[1])
    fake.stop()
    with pytest.raises(UserError, match="Start a server"):
        launch(fake.url, db, port=0)


def get(url, **headers):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        urllib.request.Request(url, headers=headers), timeout=30
    ) as page:
        return page.headers, page.read().decode()


def test_the_page_is_private(fake, db):
    app = launch(fake.url, db, port=0, block=False, auth=("me", "secret"))
    try:
        headers, text = get(app.local_url)
        assert "default-src 'self'" in headers["content-security-policy"] and "secret" not in text
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(app.local_url + "config")
        assert app.share is False and app.analytics_enabled is False and app.local_url.startswith("http://127.0.0.1:")
    finally:
        app.close()


def test_the_page_names_its_database_without_the_password(fake, postgres, capsys):
    from postgres import PASSWORD

    app = launch(fake.url, postgres.fresh(), port=0, block=False)
    try:
        headers, text = get(app.local_url + "config")
        assert "postgresql://teacher:***@127.0.0.1" in text and PASSWORD not in text and "s3cret" not in text
        assert "s3cret" not in str(capsys.readouterr())
    finally:
        app.close()
        app.desk.close()


def chromium(playwright) -> str:
    "The browser's path. Where there is none: CI installs one, anywhere else the test is skipped."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    find = lambda: next(
        (p for p in [*map(shutil.which, names), playwright.chromium.executable_path] if p and Path(p).exists()), None
    )
    if not find() and os.environ.get("CI"):
        root = [] if not hasattr(os, "geteuid") or os.geteuid() == 0 else ["sudo"]
        if shutil.which("apt-get"):
            subprocess.run([*root, "apt-get", "install", "-y", "chromium"], check=False)
        if not find():
            subprocess.run([sys.executable, "-m", "playwright", "install", "--with-deps", "chromium"], check=True)
    return find() or pytest.skip("no Chromium here; install one to run the browser tests: apt-get install chromium")


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextlib.contextmanager
def opened(url, db):
    "The page in a browser."
    api = (
        pytest.importorskip("playwright.sync_api")
        if not os.environ.get("CI")
        else importlib.import_module("playwright.sync_api")
    )
    app = launch(url, db, port=0, block=False)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(playwright), args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(app.local_url)
        page.get_by_placeholder("Ask, and press Enter").wait_for(timeout=60_000)
        yield page
        browser.close()
    app.close()


@pytest.fixture
def page(fake, db, monkeypatch):
    monkeypatch.chdir(db.parent)
    with opened(fake.url, db.name) as page:
        yield page


def say(page, text):
    page.get_by_placeholder("Ask, and press Enter").fill(text)
    page.get_by_placeholder("Ask, and press Enter").press("Enter")


def said_in(page, text):
    "A text in the conversation: a question is also the title of an earlier chat."
    return page.get_by_role("log", name="chatbot conversation").first.get_by_text(text)


def shoot(page, name):
    "A picture of the page in artifacts/, or with UPDATE_PICTURES=1 where the chapter shows it."
    folder = Path(__file__).parent.parent / ("nbs/images" if os.environ.get("UPDATE_PICTURES") else "artifacts")
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / name)


def until(condition, seconds=20):
    "Wait for the database or the server to get there."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def settled(page, text):
    "Wait until the reply is there and has its id: then the question box can send again."
    page.get_by_text(text).wait_for(timeout=30_000)
    page.locator("button.stop-button").wait_for(state="hidden", timeout=30_000)


def test_browser_asks_votes_and_reloads(page, fake, db):
    fake.delay = 0.3
    say(page, "What is 47 + 38?")
    page.get_by_text("47+38: ones").wait_for(timeout=30_000)
    assert "Answer: 85" not in page.content(), "the answer should grow before our eyes"
    fake.delay = 0
    page.get_by_text("Answer: 85").wait_for(timeout=30_000)
    until(
        lambda: (
            sql(db, "SELECT role, content, status FROM messages WHERE role != 'system'")
            == [("user", CHAT[1]["content"], None), ("assistant", REPLY, "done")]
        )
    )
    settled(page, "Answer: 85")
    page.get_by_label("Like", exact=True).click()
    until(lambda: sql(db, "SELECT message, vote FROM votes") == [(2, 1)])
    page.get_by_text("Saved. Thank you!").wait_for(timeout=10_000)
    page.reload()
    page.get_by_label("Liked", exact=True).wait_for(timeout=30_000)
    assert page.get_by_text("Answer: 85").is_visible()
    page.get_by_label("Liked", exact=True).click()
    until(lambda: sql(db, "SELECT message, vote FROM votes") == [(2, None)])
    say(page, "And 30 + 41?")
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(4,)])
    assert [m["content"] for m in fake.requests[-1]["messages"]] == ["What is 47 + 38?", REPLY, "And 30 + 41?"]
    assert [url for url in page.asked if not url.startswith((page.url, "data:", "blob:"))] == []


def test_browser_corrects(page, fake, db):
    "Takes the picture that the chapter shows: UPDATE_PICTURES=1 pytest tests/test_chat.py -k browser_corrects"
    say(page, "What is 47 + 38?")
    settled(page, "Answer: 85")
    page.get_by_label("Like", exact=True).click()
    until(lambda: sql(db, "SELECT vote FROM votes") == [(1,)])
    fake.reply = (wrong := "30+41: ones 0+1=1, carry 1, tens 3+4+1=8, so 81.\nAnswer: 81")
    say(page, "What is 30 + 41?")
    settled(page, "Answer: 81")
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(4,)])
    page.get_by_label("Dislike", exact=True).last.click()
    form = page.get_by_label("What should it have said?")
    form.wait_for()
    until(lambda: form.input_value() == wrong)
    form.fill("30+41: ones 0+1=1, carry 0, tens 3+4+0=7, so 71.\nAnswer: 71")
    shoot(page, "chat.png")
    page.get_by_role("button", name="Save correction").click()
    until(lambda: [(r["vote"], (r["correction"] or "")[-10:]) for r in votes(db)] == [(1, ""), (-1, "Answer: 71")])
    form.wait_for(state="hidden")
    page.get_by_text("Saved. Thank you!").wait_for(timeout=10_000)
    page.get_by_label("Like", exact=True).last.click()
    page.get_by_text("Your correction is withdrawn.").wait_for(timeout=10_000)
    assert [(r["vote"], r["correction"]) for r in votes(db)] == [(1, None), (1, None)]


def test_browser_keeps_a_question_that_was_asked_while_the_page_opened(page, fake, db, monkeypatch):
    restore, wait = Desk.restore, threading.Event()

    def slow(desk, token):
        wait.wait(30)
        yield from restore(desk, token)

    monkeypatch.setattr(Desk, "restore", slow)
    page.reload()
    say(page, "What is 47 + 38?")
    settled(page, "Answer: 85")
    wait.set()
    page.wait_for_timeout(1500)
    assert page.get_by_text("Answer: 85").is_visible()


def test_browser_greets_and_an_example_asks(page, fake, db):
    page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)
    if not os.environ.get("UPDATE_PICTURES"):
        shoot(page, "chat-empty.png")
    example = welcome(False, "tutor")[1][1]
    page.get_by_text(example).click()
    settled(page, "Answer: 85")
    until(lambda: sql(db, "SELECT role, content FROM messages") == [("user", example), ("assistant", REPLY)])
    page.get_by_role("button", name="New chat", exact=True).click()
    page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)


def test_browser_keeps_the_page_when_the_question_is_empty(page, fake, db):
    def say_nothing(text):
        say(page, text)
        page.get_by_text("Type a question first.").wait_for(timeout=10_000)

    for text in ("", "   "):
        say_nothing(text)
    say(page, "What is 47 + 38?")
    settled(page, "Answer: 85")
    page.get_by_text("Type a question first.").wait_for(state="hidden")
    say_nothing("  ")
    assert page.get_by_text("Answer: 85").is_visible() and said_in(page, "What is 47 + 38?").is_visible()
    say(page, "And 30 + 41?")
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(4,)])
    assert [m["content"] for m in fake.requests[-1]["messages"]] == ["What is 47 + 38?", REPLY, "And 30 + 41?"]


def test_browser_reload_brings_a_streaming_answer_back(page, fake, db):
    fake.delay = 0.5
    say(page, "What is 47 + 38?")
    page.get_by_text("47+38: ones").wait_for(timeout=30_000)
    page.reload()
    said_in(page, "What is 47 + 38?").wait_for(timeout=30_000)
    page.get_by_text("47+38: ones").wait_for(timeout=10_000)
    assert "Answer: 85" not in page.content() and sql(db, "SELECT count(*) FROM messages") == [(1,)], (
        "it should still stream"
    )
    settled(page, "Answer: 85")
    assert sql(db, "SELECT status FROM messages WHERE role = 'assistant'") == [("done",)]
    page.get_by_label("Like", exact=True).click()
    until(lambda: [v["vote"] for v in votes(db)] == [1])


def test_browser_stops_after_a_reload(page, fake, db):
    fake.delay = 0.5
    say(page, "What is 47 + 38?")
    page.get_by_text("47+38: ones").wait_for(timeout=30_000)
    page.reload()
    page.locator("button.stop-button").click(timeout=30_000)
    page.get_by_text(f"{FLAG} stopped").wait_for(timeout=10_000)
    until(lambda: sql(db, "SELECT status FROM messages WHERE role = 'assistant'") == [("stopped",)])


def test_browser_finds_an_answer_that_came_while_it_was_away(page, fake, db):
    home = page.url
    fake.delay = 0.2
    say(page, "What is 47 + 38?")
    page.get_by_text("47+38: ones").wait_for(timeout=30_000)
    page.goto("about:blank")
    until(lambda: sql(db, "SELECT content, status FROM messages WHERE role = 'assistant'") == [(REPLY, "done")])
    page.goto(home)
    page.get_by_text("Answer: 85").wait_for(timeout=30_000)
    assert said_in(page, "What is 47 + 38?").is_visible()


def test_browser_shows_a_question_that_lost_its_answer(page, fake, db):
    say(page, "What is 47 + 38?")
    settled(page, "Answer: 85")
    with writing(db) as con:
        con.exec_driver_sql("DELETE FROM messages WHERE role = 'assistant'")  # as if the power had failed
    page.reload()
    page.get_by_text("no answer was saved").wait_for(timeout=30_000)
    page.get_by_label("Retry", exact=True).click()
    settled(page, "Answer: 85")
    until(lambda: sql(db, "SELECT status FROM messages WHERE role = 'assistant'") == [("done",)])


def test_browser_stops_and_reads_on(page, fake, db):
    fake.delay = 0.3
    say(page, "What is 47 + 38?")
    page.get_by_text("47+38: ones").wait_for(timeout=30_000)
    page.locator("button.stop-button").click()
    page.get_by_text(f"{FLAG} stopped").wait_for(timeout=10_000)
    until(lambda: sql(db, "SELECT status FROM messages WHERE role = 'assistant'") == [("stopped",)])
    fake.delay = 0
    page.get_by_label("Retry", exact=True).click()
    page.get_by_text("Answer: 85").wait_for(timeout=30_000)
    until(
        lambda: sql(db, "SELECT parent, status FROM messages WHERE role = 'assistant'") == [(1, "stopped"), (1, "done")]
    )


def test_browser_edits_and_the_vote_goes_with_the_message(page, fake, db):
    fake.reply = lambda body: "Answer to " + body["messages"][-1]["content"]
    for i, text in enumerate(("first", "second"), 1):
        say(page, text)
        settled(page, f"Answer to {text}")
        until(lambda: sql(db, "SELECT count(*) FROM messages") == [(2 * i,)])
    page.get_by_label("Like", exact=True).first.click()
    until(lambda: [v["reply"] for v in votes(db)] == ["Answer to first"])
    page.get_by_label("Edit", exact=True).first.click()
    page.locator("textarea.edit-textarea").fill("third")
    page.get_by_label("Submit", exact=True).click()
    settled(page, "Answer to third")
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(6,)])
    page.get_by_text("Answer to second").wait_for(state="hidden")
    page.get_by_label("Dislike", exact=True).click()
    until(
        lambda: (
            [(v["reply"], v["vote"], len(v["prompt"])) for v in votes(db)]
            == [("Answer to first", 1, 1), ("Answer to third", -1, 1)]
        )
    )


def test_browser_survives_the_server(page, fake, db):
    say(page, "What is 47 + 38?")
    page.get_by_text("Answer: 85").wait_for(timeout=30_000)
    fake.stop()
    say(page, "Still there?")
    page.get_by_text("does not answer any more").wait_for(timeout=30_000)
    assert "Traceback" not in page.content() and page.get_by_text("Answer: 85").is_visible()
    page.get_by_role("button", name="New chat", exact=True).click()
    page.get_by_text("Answer: 85").wait_for(state="hidden")


def test_browser_loads_nothing_from_elsewhere_and_speaks_with_a_local_voice(page, fake, db):
    hits = []

    class Spy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            hits.append(self.path)
            self.send_error(404)

    spy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Spy)
    threading.Thread(target=spy.serve_forever, args=(0.05,), daemon=True).start()
    fake.reply = f"Look: ![a picture](http://127.0.0.1:{spy.server_address[1]}/who-reads-this.png) and that is all"
    say(page, "Show me a picture")
    page.get_by_text("and that is all").wait_for(timeout=30_000)
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(2,)])
    page.wait_for_timeout(500)
    assert page.locator("img[src*='who-reads-this']").count() == 1 and hits == []
    spy.shutdown()
    page.evaluate("""() => {
        window.spoken = [];
        const voices = [
            {name: "cloud", lang: "en-US", localService: false},
            {name: "here", lang: "en-GB", localService: true},
        ];
        window.SpeechSynthesisUtterance = function (text) { this.text = text; };
        const fake = {
            speaking: false,
            getVoices: () => voices,
            speak: say => { window.spoken.push([say.text, say.voice.name]); fake.speaking = true; },
            cancel: () => { fake.speaking = false; },
        };
        Object.defineProperty(window, "speechSynthesis", {value: fake, configurable: true});
    }""")
    for _ in range(2):
        page.get_by_role("button", name="Read aloud").click()
    until(lambda: page.evaluate("window.spoken.length === 1 && !window.speechSynthesis.speaking"))
    assert page.evaluate("window.spoken") == [[fake.reply, "here"]]


def test_browser_downloads_and_deletes_a_conversation(page, fake, db, tmp_path):
    say(page, "What is 47 + 38?")
    settled(page, "Answer: 85")
    page.get_by_label("Like", exact=True).click()
    until(lambda: votes(db))
    page.get_by_text("Your data").click()
    with page.expect_download(timeout=30_000) as download:
        page.get_by_role("button", name="Download this conversation").click()
    download.value.save_as(tmp_path / "mine.jsonl")
    rows = read_jsonl(tmp_path / "mine.jsonl")
    assert [(r["role"], r["content"], r["vote"]) for r in rows] == [
        ("user", "What is 47 + 38?", None),
        ("assistant", REPLY, 1),
    ]
    page.get_by_text("Downloaded: 2 messages.").wait_for(timeout=10_000)
    answers = iter(["dismiss", "accept"])
    page.on("dialog", lambda dialog: getattr(dialog, next(answers))())
    delete = page.get_by_role("button", name="Delete this conversation")
    delete.click()
    page.wait_for_timeout(1000)
    assert sql(db, "SELECT count(*) FROM messages") == [(2,)] and page.get_by_text("Answer: 85").is_visible()
    delete.click()
    page.get_by_text("Deleted.").wait_for(timeout=10_000)
    page.get_by_text("Answer: 85").wait_for(state="hidden")
    assert sql(db, "SELECT count(*) FROM messages") == sql(db, "SELECT count(*) FROM votes") == [(0,)]
    say(page, "And 30 + 41?")
    until(lambda: sql(db, "SELECT count(*) FROM messages") == [(2,)])


def test_browser_takes_along_and_deletes_all_of_its_own(page, fake, db, tmp_path):
    theirs = save_turn(db, [{"role": "user", "content": "of somebody else"}], "browser:another")
    nobodys = save_turn(db, [{"role": "user", "content": "of nobody"}])
    for text in ("What is 47 + 38?", "And 30 + 41?"):
        say(page, text)
        settled(page, "Answer: 85")
        page.get_by_role("button", name="New chat", exact=True).click()
        page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)
    page.get_by_role("button", name="Earlier chats").click()
    page.get_by_role("radio", name="And 30 + 41?").wait_for(timeout=20_000)
    page.get_by_text("Your data").click()
    with page.expect_download(timeout=30_000) as download:
        page.get_by_role("button", name="Download all my conversations").click()
    download.value.save_as(tmp_path / "mine.jsonl")
    said = [r["content"] for r in read_jsonl(tmp_path / "mine.jsonl")]
    assert said == ["What is 47 + 38?", REPLY, "And 30 + 41?", REPLY]
    answers, asked = iter(["dismiss", "accept"]), []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), getattr(dialog, next(answers))()))
    delete = page.get_by_role("button", name="Delete all my conversations")
    delete.click()
    page.wait_for_timeout(500)
    assert "all your conversations" in asked[0] and sql(db, "SELECT count(*) FROM messages") == [(6,)]
    delete.click()
    page.get_by_text("Deleted: 2 conversations.").wait_for(timeout=10_000)
    page.get_by_role("radio", name="And 30 + 41?").wait_for(state="detached", timeout=10_000)
    left = [path[0]["id"] for path in (theirs, nobodys)]
    assert sql(db, "SELECT id FROM messages ORDER BY id") == [(id,) for id in left]


def lit(page):
    "The thumbs that are lit in the page."
    return [name for name in ("Liked", "Disliked") for _ in range(page.get_by_label(name, exact=True).count())]


def test_browser_puts_a_thumb_out_that_the_database_refused(page, fake, db, monkeypatch):
    monkeypatch.setattr("llmcourse.database.WAIT", 0.3)
    for answer in ("First: 85", "Second: 71"):
        fake.reply = answer
        say(page, "What is 47 + 38?")
        settled(page, answer)
    page.get_by_label("Dislike", exact=True).first.click()
    until(lambda: [v["vote"] for v in votes(db)] == [-1])
    page.get_by_text("What should it have said?").first.wait_for(timeout=10_000)
    lock = sqlite3.connect(db, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        page.get_by_label("Like", exact=True).last.click()  # a new one
        page.get_by_text("locked by somebody else").wait_for(timeout=20_000)
        until(lambda: lit(page) == ["Disliked"])
        page.get_by_label("Like", exact=True).first.click()  # another than the one that is saved
        until(lambda: lit(page) == ["Disliked"])
        page.get_by_label("Disliked", exact=True).click()  # taken back
        until(lambda: lit(page) == ["Disliked"])
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert [(v["reply"], v["vote"]) for v in votes(db)] == [("First: 85", -1)]
    page.get_by_label("Like", exact=True).last.click()
    page.get_by_text("Saved. Thank you!").wait_for(timeout=10_000)
    assert sorted(lit(page)) == ["Disliked", "Liked"] and len(votes(db)) == 2


def test_browser_votes_for_a_turn_that_was_deleted_elsewhere(page, fake, db):
    say(page, "What is 47 + 38?")
    settled(page, "Answer: 85")
    with writing(db) as con:
        for table in ("votes", "messages", "conversations"):
            con.exec_driver_sql(f"DELETE FROM {table}")
    page.get_by_label("Like", exact=True).click()
    page.get_by_text("This answer was deleted.").wait_for(timeout=10_000)
    until(lambda: lit(page) == [])


def test_browser_says_so_when_the_database_goes_away_and_goes_on_when_it_is_back(fake, postgres):
    fake.delay, url = 0.3, postgres.fresh()
    with opened(fake.url, url) as page:
        say(page, "What is 47 + 38?")
        page.get_by_text("47+38: ones").wait_for(timeout=30_000)
        postgres.stop("immediate")
        try:
            page.get_by_text("the database does not answer").wait_for(timeout=30_000)
            assert page.get_by_text("Answer: 85").is_visible() and page.get_by_text("not saved").is_visible()
            assert "s3cret" not in page.content()
            say(page, "Still there?")
            page.get_by_text("the database does not answer").wait_for(timeout=30_000)
            assert page.get_by_text("Answer: 85").is_visible()
        finally:
            postgres.start()
        fake.delay, fake.reply = 0, "Answer: 71"
        say(page, "What is 30 + 41?")
        settled(page, "Answer: 71")
        texts = "SELECT content FROM messages ORDER BY id"
        talk = [("What is 47 + 38?",), (REPLY,), ("What is 30 + 41?",), ("Answer: 71",)]
        until(lambda: sql(url, texts) == talk)
        assert page.get_by_text("Answer: 85").is_visible(), "the reply that came meanwhile is saved now"
