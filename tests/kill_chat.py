"""Kill a chat's server with -9 while many people ask and vote, again and again, and count what its database kept.

    python tests/kill_chat.py 20 32 7      20 kills, 32 users, seed 7; on SQLite, then on PostgreSQL

A turn or a vote is *acknowledged* when its HTTP answer has arrived. Each acknowledged one must be there, once; and
nothing may be there twice, acknowledged or not.
"""

import collections
import http.client
import http.server
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from postgres import Postgres, free_port

from llmcourse.chatdb import MESSAGES, VOTES, reading, save_vote
from llmcourse.desk import Desk


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def say(self, text, kind="application/json", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class Model(Handler):
    "A model that answers at once, in three pieces."

    def do_GET(self):
        self.say(json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode())

    def do_POST(self):
        question = self.body()["messages"][-1]["content"]
        choice = lambda text, end: {"index": 0, "delta": {"content": text}, "finish_reason": end}
        choices = [choice("Answer ", None), choice("to ", None), choice(question, "stop")]
        events = [json.dumps({"choices": [each]}) for each in choices] + ["[DONE]"]
        self.say("".join(f"data: {event}\n\n" for event in events).encode(), "text/event-stream")


def listen(handler, port=0):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def chat_server(model: str, db, port: int) -> None:
    "The process that is killed: what the page's buttons do, by HTTP. It answers when the database has written."
    desk = Desk(model, db)

    class Page(Handler):
        def do_POST(self):
            said = self.body()
            try:
                self.say(json.dumps(getattr(self, self.path[1:])(**said)).encode())
            except Exception as e:
                self.say(json.dumps(f"{type(e).__name__}: {e}").encode(), status=500)

        def ask(self, text, leaf, tab):
            *_, path = desk.ask(text, leaf, "", tab)
            assert path[-1]["status"] == "done", path[-1]
            return path[-1]["id"]

        def vote(self, message, leaf, **changes):
            assert desk.mine(message, leaf)
            return save_vote(db, message, **changes)

    listen(Page, port)
    signal.pause()


class User(threading.Thread):
    "Asks, votes, and remembers what was acknowledged. After a broken connection it asks something else."

    def __init__(self, name: str, port: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.name, self.port, self.done, self.rng = name, port, stop, random.Random(name)
        self.leaf, self.asked = None, 0
        self.turns, self.votes, self.refused = {}, {}, []  # text → reply or None; reply → [(change, acknowledged)]

    def post(self, path, **body):
        "The answer, or None if there was none. Waits while nobody is there: then nothing was sent."
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not link.sock and not self.done.is_set():
            try:
                link.connect()
            except OSError:
                time.sleep(0.02)
        try:
            link.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = link.getresponse()
            said = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        if answer.status != 200:
            self.refused.append(said)
            return None
        return said

    def run(self):
        while not self.done.is_set():
            self.asked += 1
            text = f"{self.name} asks {self.asked}"
            reply = self.turns[text] = self.post("/ask", text=text, leaf=self.leaf, tab=f"{self.name} {self.asked}")
            if reply is None:
                continue
            self.leaf = reply
            for _ in range(self.rng.randrange(3)):
                self.vote(reply)

    def vote(self, reply):
        change = self.rng.choice([{"vote": 1}, {"vote": -1, "correction": f"{self.name} {self.rng.random()}"}])
        standing = {"correction": None} | change
        given = self.votes.setdefault(reply, [])
        given.append((standing, self.post("/vote", message=reply, leaf=reply, **change) == standing))


def count(db, users: list[User]) -> dict:
    "Compare what was acknowledged with what is there."
    with reading(db) as con:
        messages = [dict(row) for row in con.execute(MESSAGES.select()).mappings()]
        standing = {row["message"]: row for row in con.execute(VOTES.select()).mappings()}
    questions = collections.Counter(m["content"] for m in messages if m["role"] == "user")
    text_of = {m["id"]: m["content"] for m in messages}
    replies = collections.Counter(text_of[m["parent"]] for m in messages if m["role"] == "assistant")
    right = {m["id"] for m in messages if m["parent"] and m["content"] == f"Answer to {text_of[m['parent']]}"}
    turns = {text: reply for user in users for text, reply in user.turns.items()}
    votes = {reply: given for user in users for reply, given in user.votes.items()}
    acknowledged = [text for text, reply in turns.items() if reply]
    found = dict(
        turns=len(acknowledged),
        turns_lost=sum(questions[text] != 1 or replies[text] != 1 or turns[text] not in right for text in acknowledged),
        doubled=sum(n > 1 for n in questions.values()) + sum(n > 1 for n in replies.values()),
        votes=sum(ok for given in votes.values() for _, ok in given),
        votes_lost=0,
        cut_off=len(turns) - len(acknowledged),
        cut_off_but_there=sum(questions[text] for text in turns if not turns[text]),
        refused=sum(len(user.refused) for user in users),
    )
    for reply, given in votes.items():
        last = max((i for i, (_, ok) in enumerate(given) if ok), default=None)
        if last is None:
            continue
        row = standing.get(reply)
        now = row and {k: row[k] for k in ("vote", "correction")}
        found["votes_lost"] += now not in [change for change, _ in given[last:]]
    return found


def wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            http.client.HTTPConnection("127.0.0.1", port, timeout=1).connect()
            return
        except OSError:
            time.sleep(0.01)
    raise TimeoutError(port)


def drill(db, kills: int, n_users: int, seed: int, longest: float = 1.5) -> tuple[dict, list[User]]:
    "Let them chat; kill the server `kills` times, each time after 0.2 to `longest` seconds. Returns `count` and users."
    rng, start = random.Random(seed), time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_chat"])
    model, port, stop = listen(Model), free_port(), threading.Event()
    url = f"http://127.0.0.1:{model.server_address[1]}/v1"
    users = [User(f"user {seed}-{i}", port, stop) for i in range(n_users)]
    for life in range(kills + 1):
        server = context.Process(target=chat_server, args=(url, db, port))
        server.start()
        wait_for(port)
        if life == 0:
            for user in users:
                user.start()
        time.sleep(rng.uniform(0.2, longest))
        if life == kills:  # the last one may finish
            stop.set()
            for user in users:
                user.join(60)
        server.kill()
        server.join()
    model.shutdown()
    found = {"kills": kills, "users": n_users} | count(db, users) | {"seconds": round(time.monotonic() - start)}
    return found, users


if __name__ == "__main__":
    kills, n_users, seed = (*map(int, sys.argv[1:]), *(20, 32, 7)[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as folder:
        print("sqlite    ", drill(Path(folder) / "chat.db", kills, n_users, seed)[0], flush=True)
    postgres = Postgres(fsync="on")
    try:
        print("postgresql", drill(postgres.fresh(), kills, n_users, seed)[0], flush=True)
    finally:
        postgres.close()
