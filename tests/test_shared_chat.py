"""A chat page that others can reach: names, passwords, limits; and in a browser what a shared or blind page shows."""

import contextlib
import http.cookiejar
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from test_chat import FLAGS, REPLY, Fake, chromium, said_in, say, settled, sql, until

from llmcourse.chatdb import path_to, save_turn
from llmcourse.chatting import chat_models
from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.desk import Desk
from llmcourse.entrance import Small, check_auth
from llmcourse.feedback import feedback
from llmcourse.page import SHARED, launch
from llmcourse.passwords import PEOPLE, Pace, add_person, is_password, people_here, read_people

SECRET = "correct horse battery"


@pytest.fixture
def fake():
    fake = Fake()
    yield fake
    with contextlib.suppress(OSError):
        fake.stop()


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "people.txt"
    add_person(path, "ada", SECRET)
    return path


@pytest.fixture
def long_minutes(monkeypatch):
    "A slow machine may take a minute between two questions."
    monkeypatch.setattr(Pace.__init__, "__defaults__", (3600, time.monotonic))


# names and passwords


def test_the_command_writes_hashes_for_its_owner_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for password, words in ((SECRET, "can log in now"), ("another one", "a new password")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(password + "\n"))
        assert main(["passwd", "ada", "people.txt"]) == 0
        assert words in capsys.readouterr().out
    text = Path("people.txt").read_text()
    assert text.count("\n") == 1 and "another" not in text and SECRET not in text
    assert oct(os.stat("people.txt").st_mode)[-3:] == "600"
    assert is_password("another one", read_people("people.txt")["ada"])
    for name, password, words in (("a b", SECRET, "no space"), ("bob", "short", "8 characters")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(password + "\n"))
        assert main(["passwd", name, "people.txt"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert Path("people.txt").read_text() == text


def test_a_line_that_cannot_be_read_is_named_and_not_repeated(people, tmp_path):
    people.write_text(people.read_text() + "\n# a comment\nbob:my real password\n")
    with pytest.raises(UserError, match="line 4: not name:hash") as error:
        read_people(people)
    assert "real" not in str(error.value)
    for text, words in (("# nobody\n", "nobody in it"), (None, "No such file")):
        path = tmp_path / "other.txt"
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match=words):
            check_auth(None, "0.0.0.0", path)
        path.unlink(missing_ok=True)


def test_passwords_in_the_environment_are_taken_out_of_it(monkeypatch):
    monkeypatch.setenv(PEOPLE, f"ada:{SECRET}\nbob:with:colons inside\n")
    found = people_here()
    assert PEOPLE not in os.environ and list(found) == ["ada", "bob"]
    assert is_password("with:colons inside", found["bob"]) and SECRET not in str(found)
    monkeypatch.setenv(PEOPLE, "just-a-name")
    with pytest.raises(UserError, match="ada:secret") as error:
        people_here()
    assert "just-a-name" not in str(error.value)


def test_an_open_host_needs_people_before_anything_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmcourse.shipping.served", lambda *words, **more: pytest.fail("a model was loaded"))
    assert main(["chat", "--host", "0.0.0.0", "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert "--people" in err and "llmcourse passwd" in err and "auth=" not in err and err.count("\n") == 1


def test_pace_counts_by_name_and_forgets():
    now = [0.0]
    pace = Pace(3, clock=lambda: now[0])
    assert [pace.wait("ada") for _ in range(4)] == [0, 0, 0, 60] and pace.wait("bob") == 0
    now[0] = 59
    assert pace.wait("ada") == 1
    now[0] = 61
    assert pace.wait("ada") == 0 and list(pace.times) == ["ada"]


class Visitor:
    "Somebody with cookies."

    def __init__(self, page):
        self.page, self.jar = page, http.cookiejar.CookieJar()
        cookies = urllib.request.HTTPCookieProcessor(self.jar)
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)

    def status(self, path, body=None, **headers):
        request = urllib.request.Request(self.page + path, data=body, headers=headers)
        try:
            return self.open.open(request, timeout=30).status
        except urllib.error.HTTPError as e:
            return e.code

    def login(self, name, password):
        return self.status("login", urllib.parse.urlencode({"username": name, "password": password}).encode())


def test_only_people_come_in_and_a_new_one_without_a_restart(fake, people, tmp_path, capfd, long_minutes):
    app = launch(fake.url, tmp_path / "chat.db", port=0, host="0.0.0.0", people=people, block=False)
    try:
        page = f"http://127.0.0.1:{app.server_port}/"
        ada, eve = Visitor(page), Visitor(page)
        assert ada.status("config") == eve.status("config") == 401
        assert ada.login("ada", SECRET) == 200 and ada.status("config") == 200
        assert [eve.login(*guess) for guess in (("ada", "guess"), ("eve", ""), ("eve", "x"), ("", ""))] == [
            400, 422, 400, 422]
        assert eve.status("config") == 401
        add_person(people, "eve", "eves own password")
        assert eve.login("eve", "eves own password") == 200 and eve.status("config") == 200
        assert {Visitor(page).login("ada", f"guess {n}") for n in range(12)} == {400}
        assert Visitor(page).login("ada", SECRET) == 400, "while somebody guesses, nobody comes in by this name"
        assert ada.status("config") == 200, "who is in stays in"
    finally:
        app.close()
        app.desk.close()
    said = "".join(capfd.readouterr())
    assert SECRET not in said and "guess" not in said and app.desk.pace.most == SHARED


def test_a_page_takes_no_files_and_no_giants(fake, people, tmp_path):
    app = launch(fake.url, tmp_path / "chat.db", port=0, people=people, block=False)
    try:
        ada = Visitor(app.local_url)
        ada.login("ada", SECRET)
        kind = {"Content-Type": "application/json"}
        assert ada.status("gradio_api/upload", b"x", **kind) == 403
        assert ada.status("gradio_api/queue/join", b" " * (Small.most + 1), **kind) == 413
        assert ada.status("gradio_api/queue/join", b"{}", **kind) == 422, "the door lets small ones through"
    finally:
        app.close()
        app.desk.close()


def test_a_file_of_people_that_is_spoilt_while_the_page_is_open_lets_nobody_in(fake, people, tmp_path, capfd):
    app = launch(fake.url, tmp_path / "chat.db", port=0, people=people, block=False)
    try:
        page, right = app.local_url, people.read_text()
        people.write_text("ada:typed by hand\n")
        assert Visitor(page).login("ada", SECRET) == 400, "no crash"
        people.write_text(right)
        assert Visitor(page).login("ada", SECRET) == 200
    finally:
        app.close()
        app.desk.close()
    said = capfd.readouterr().err
    assert "line 1: not name:hash" in said and "by hand" not in said and "Traceback" not in said


def test_who_logs_out_is_out_and_so_is_whoever_kept_the_cookie(fake, people, tmp_path):
    app = launch(fake.url, tmp_path / "chat.db", port=0, people=people, block=False)
    try:
        ada = Visitor(app.local_url)
        ada.login("ada", SECRET)
        kept = Visitor(app.local_url)
        for cookie in ada.jar:
            kept.jar.set_cookie(cookie)
        assert kept.status("config") == 200 and ada.status("logout") == 200
        assert ada.status("config") == kept.status("config") == 401
    finally:
        app.close()
        app.desk.close()


def test_limits_are_one_line_and_nothing_is_saved(fake, tmp_path, long_minutes):
    db = tmp_path / "chat.db"
    desk = Desk(fake.url, db, per_minute=2, max_chars=100)
    with pytest.raises(UserError, match="101 characters: a message may have 100"):
        list(desk.ask("x" * 101, None, "", "tab", owner="name:ada"))
    with pytest.raises(UserError, match="characters"):
        list(desk.ask("x", None, "y" * 101, "tab", owner="name:ada"))
    *_, path = desk.ask("one", None, "", "tab", owner="name:ada")
    list(desk.retry(path[-1]["id"], "tab", owner="name:ada"))
    with pytest.raises(UserError, match="2 questions a minute.*Wait"):
        list(desk.ask("three", path[-1]["id"], "", "tab", owner="name:ada"))
    assert sql(db, "SELECT count(*) FROM messages") == [(3,)] and desk.running == {}
    list(desk.ask("mine", None, "", "tab", owner="name:bob"))
    desk.close()


def test_no_password_in_the_process_list_nor_the_log(fake, tmp_path):
    words = ["chat", "--port", "0", "--host", "0.0.0.0", "--url", fake.url, "--database", tmp_path / "chat.db"]
    env = os.environ | {"PYTHONUNBUFFERED": "1", PEOPLE: f"ada:{SECRET}"}
    code = "from llmcourse.cli import cli; cli()"
    with subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env=env) as run:
        said = ""
        for line in run.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        port = re.search(r":(\d+)/?\n", said)
        listed = Path(f"/proc/{run.pid}/cmdline")
        seen = listed.read_text() if listed.exists() else ""
        visitor = Visitor(f"http://127.0.0.1:{port[1]}/") if port else None
        codes = [visitor.login("ada", word) for word in ("wrong", SECRET)] if visitor else said
        run.terminate()
        said += run.stdout.read()
    assert codes == [400, 200] and SECRET not in said + seen


def test_a_folder_of_runs_stands_for_those_in_it(tmp_path):
    for name in ("b", "a", "marks", "empty"):
        (tmp_path / name).mkdir()
    for name in ("b", "a"):
        (tmp_path / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "marks/config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    assert chat_models(f"{tmp_path}, tutor/sft ,tutor/sft") == [str(tmp_path / "a"), str(tmp_path / "b"), "tutor/sft"]
    for names, words in ((str(tmp_path / "empty"), "no model in it"), (" , ", "none was named")):
        with pytest.raises(UserError, match=words):
            chat_models(names)


def test_models_are_named_with_commas_or_one_option_each(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("llmcourse.page.launch", lambda there, *words, **options: seen.append(there))
    monkeypatch.setattr("llmcourse.shipping.served", lambda *words, **more: contextlib.nullcontext(fake_server))
    fake_server = type("Served", (), {"url": "http://127.0.0.1:1/v1"})
    words = ["chat", "--port", "0", "--database", str(tmp_path / "chat.db")]
    for models in (["tutor/sft,tutor/rl"], ["tutor/sft", "tutor/rl"], ["tutor/sft", "tutor/rl,tutor/sft"], []):
        assert main([*words, *(word for model in models for word in ("--model", model))]) == 0
    assert [list(there) for there in seen[:3]] == [["tutor/sft", "tutor/rl"]] * 3 and seen[3] == fake_server.url


@pytest.mark.parametrize("words, why", [
    (["--model", "tutor/sft,tutor/rl", "--against", "tutor/grpo"], "one model with one other"),
    (["--model", "tutor/sft", "--model", "tutor/rl", "--against", "tutor/grpo"], "one model with one other"),
    (["--against", "tutor/sft"], "the same model twice"),
    (["--per-minute", "0"], "at least 1"),
    (["--max-chars", "0"], "at least 1"),
    (["--people", "nowhere.txt"], "llmcourse passwd"),
    (["--host", "no such host"], "needs names"),
])
def test_the_command_with_bad_words(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "--port", "0", *words]) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


def test_a_database_of_a_newer_version_is_one_line(fake, tmp_path, capsys):
    import sqlite3

    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as con:
        con.execute("PRAGMA user_version = 99")
    assert main(["chat", "--port", "0", "--url", fake.url, "--database", str(tmp_path / "newer.db")]) == 2
    err = capsys.readouterr().err
    assert "written by a newer llmcourse. Upgrade" in err and err.count("\n") == 1


def test_all_of_one_person_can_be_taken_out_and_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text, owner in (("one", "name:ada"), ("two", "name:ada"), ("theirs", "name:bob")):
        save_turn("runs/chat.db", [{"role": "user", "content": text}], owner)
    assert main(["chatlog", "export", "--person", "ada", "--output", "ada.jsonl"]) == 0
    assert [json.loads(line)["content"] for line in Path("ada.jsonl").read_text().splitlines()] == ["one", "two"]
    assert main(["chatlog", "delete", "--person", "ada"]) == 0 and "2 conversations deleted" in capsys.readouterr().out
    assert sql("runs/chat.db", "SELECT content FROM messages") == [("theirs",)]
    assert main(["chatlog", "export", "--person", "ada"]) == 2


# in a browser


@contextlib.contextmanager
def browser_on():
    "Chromium, and a maker of pages."
    name = "playwright.sync_api"
    api = importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(playwright), args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(context, *words, **options):
    "A chat page, started and open."
    app = launch(*words, port=options.pop("port", 0), block=False, **options)
    page = context.new_page()
    page.goto(app.local_url)
    try:
        yield page, app
    finally:
        page.close()
        app.close()
        app.desk.close()


def ready(page):
    page.get_by_placeholder("Ask, and press Enter").wait_for(timeout=60_000)


WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select, [role=button]")]
  .filter(e => e.offsetParent && getComputedStyle(e).visibility !== "hidden" && e.type !== "hidden")
  .filter(e => !(e.innerText?.trim() || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.title
                 || e.placeholder || [...(e.labels || [])].some(l => l.innerText.trim())))
  .map(e => e.outerHTML.slice(0, 200))"""


def test_browser_two_models_blind_by_keyboard_alone(tmp_path):
    good, bad, db = Fake("Answer: 85"), Fake("It is \\(7^2\\) or 75"), tmp_path / "chat.db"
    names = {"good one": good.url}, db
    with browser_on() as browser, page_of(browser, *names, against={"bad one": bad.url}) as (page, app):
        ready(page)
        say(page, "What is 47 + 38?")
        page.get_by_role("button", name="A is better").wait_for(timeout=30_000)
        page.locator(".katex").first.wait_for(timeout=10_000)
        for width, height in ((1280, 900), (820, 1100), (390, 800)):
            page.set_viewport_size({"width": width, "height": height})
            assert page.evaluate(WIDER) <= 0, f"wider than {width} pixels"
        assert page.evaluate(NAMELESS) == []
        assert "good one" not in page.content() and "bad one" not in page.content()
        page.reload()
        page.get_by_role("button", name="A is better").wait_for(timeout=30_000)
        say(page, "And now?")
        page.get_by_text("Choose first, then ask on").wait_for(timeout=10_000)
        ((a,),) = sql(db, "SELECT m.model FROM comparisons JOIN messages m ON m.id = a")
        word = "A is better" if a == "good one" else "B is better"
        page.get_by_placeholder("Ask, and press Enter").focus()
        for _ in range(30):  # backwards, with the keyboard
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.innerText") == word:
                break
        page.keyboard.press("Enter")
        page.get_by_text("was good one").wait_for(timeout=10_000)
        assert page.get_by_role("button", name="A is better").is_hidden() and said_in(page, "Answer: 85").is_visible()
    (row,) = feedback(db)
    assert (row["chosen_model"], row["rejected_model"], row["kind"]) == ("good one", "bad one", "comparison")
    assert len(row["rater"]) == 12
    good.stop(), bad.stop()


def test_browser_finds_earlier_chats_after_a_restart_and_switches_branches(fake, tmp_path):
    db = tmp_path / "chat.db"
    with browser_on() as browser:
        context = browser.new_context()
        with page_of(context, fake.url, db) as (page, app):
            ready(page)
            port = app.server_port
            fake.reply = "First answer"
            say(page, "What is 47 + 38?")
            settled(page, "First answer")
            page.get_by_text("a second").wait_for(timeout=10_000)
            fake.reply = "Second answer"
            page.get_by_label("Retry", exact=True).click()
            settled(page, "Second answer")
            branch = page.get_by_label("Branches of this conversation")
            branch.wait_for(timeout=10_000)
            branch.click()
            page.get_by_role("option").filter(has_text="First answer").click()
            said_in(page, "First answer").wait_for(timeout=10_000)
            page.get_by_role("button", name="New chat", exact=True).click()
            page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)
        with page_of(context, fake.url, db, port=port) as (page, app):
            ready(page)
            page.get_by_role("button", name="Earlier chats").click()
            page.get_by_role("radio", name="What is 47 + 38?").check(timeout=20_000)
            said_in(page, "Second answer").wait_for(timeout=20_000)
    assert sql(db, "SELECT count(*) FROM conversations") == [(1,)]


def test_browser_settings_are_sent_and_an_edited_reply_is_a_correction(fake, tmp_path):
    other, db = Fake("From the other one"), tmp_path / "chat.db"
    with browser_on() as browser, page_of(browser, {"one": fake.url, "other": other.url}, db) as (page, app):
        ready(page)
        assert page.evaluate(NAMELESS) == []
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt of the next new chat").fill("Be brief.")
        page.get_by_label("number input for Temperature").fill("0.7")
        say(page, "What is 47 + 38?")
        settled(page, "Answer: 85")
        assert fake.requests[-1]["temperature"] == 0.7 and fake.requests[-1]["messages"][0]["content"] == "Be brief."
        page.get_by_label("Model", exact=True).click()
        page.get_by_role("option", name="other").click()
        page.get_by_text("answers from the next question on").wait_for(timeout=20_000)
        say(page, "And now?")
        settled(page, "From the other one")
        until(lambda: sql(db, "SELECT model FROM messages WHERE role = 'assistant'") == [("one",), ("other",)])
        page.get_by_label("Edit", exact=True).last.click()
        page.locator("textarea.edit-textarea").fill("Answer: 12")
        page.get_by_label("Submit", exact=True).click()
        page.get_by_text("corrected by you").wait_for(timeout=10_000)
        until(lambda: [(r["kind"], r["chosen"][0]["content"]) for r in feedback(db)] == [("correction", "Answer: 12")])
    other.stop()


MARKED_UP = """One: $$7^2$$ and `code`, [a link](https://example.org), *so*.

```python
@cache
class Sum:  # of two
    def __str__(self, width: int) -> str:
        return f"{self.a + 3.5:{width}}" if width > 4 and True else "the same, in a line that is too long for a phone"
```

| a | b |
|---|---|
| 1 | 2 |

> Answer: 85"""
# What axe-core calls serious or critical in Gradio's own parts, with no option and no style that would mend it
GRADIOS = {
    ("aria-required-children", ".examples"),  # the examples on an empty page: buttons in a list, without list items
    ("document-title", "html"),  # the page that asks for a password has no title until somebody is in
}


def serious(page, axe):
    "What axe-core finds on the page as it is now: (rule, place) of whatever is serious or critical."
    page.wait_for_timeout(200)  # until nothing fades in any more
    found = axe.run(page, options={"resultTypes": ["violations"]}).response
    assert len(found["passes"]) > 10, "it looked at nothing"
    bad = [rule for rule in found["violations"] if rule["impact"] in ("serious", "critical")]
    return {(rule["id"], " ".join(map(str, node["target"]))) for rule in bad for node in rule["nodes"]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_axe_finds_nothing_serious_that_we_could_mend(people, tmp_path, scheme):
    "At three widths: the empty page, one with a conversation and all of it open, one with two models; and the door."
    name = "axe_playwright_python.sync_playwright"
    axe = (importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)).Axe()
    good, bad, found = Fake(MARKED_UP), Fake("Answer: 75"), {}

    def look(page, where, widths=(390, 820, 1280)):
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            found[where, width] = serious(page, axe)

    with browser_on() as browser:
        context = browser.new_context(color_scheme=scheme)
        with page_of(context, {"good": good.url, "bad": bad.url}, tmp_path / "one.db", people=people) as (page, app):
            page.get_by_label("username").wait_for(timeout=60_000)
            look(page, "door", [390])
            enter(page, "ada", SECRET)
            page.get_by_role("button", name="Log out ada").wait_for(timeout=60_000)
            page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)
            look(page, "empty")
            say(page, "What is 47 + 38?")
            settled(page, "Answer: 85")
            page.get_by_label("Dislike", exact=True).click()
            page.get_by_label("What should it have said?").wait_for(timeout=10_000)
            for word in ("Earlier chats", "Settings", "Your data"):
                page.get_by_role("button", name=word).first.click()
            page.get_by_role("button", name="Delete all my conversations").wait_for()
            look(page, "full")
            page.evaluate("document.querySelector('#said').innerHTML = '<button></button><img src=\"data:,\">'")
            assert {rule for rule, _ in serious(page, axe)} >= {"button-name", "image-alt"}, "it finds what is wrong"
        with page_of(context, good.url, tmp_path / "two.db", against={"bad": bad.url}) as (page, app):
            ready(page)
            say(page, "What is 47 + 38?")
            page.get_by_role("button", name="A is better").wait_for(timeout=30_000)
            look(page, "two models")
    good.stop(), bad.stop()
    assert {place: left for place, now in found.items() if (left := now - GRADIOS)} == {} and len(found) == 10


def enter(page, name, password):
    page.get_by_label("username").fill(name, timeout=60_000)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def test_browser_logs_out_by_keyboard_and_the_next_person_sees_nothing(fake, people, tmp_path):
    "Not after going back, not in the list of earlier chats, and not in the memory of the browser."
    add_person(people, "eve", "eves own password")
    mine = "What is Ada's secret?"
    db = tmp_path / "chat.db"
    with browser_on() as browser, page_of(browser.new_context(), fake.url, db, people=people) as (page, app):
        enter(page, "ada", SECRET)
        ready(page)
        say(page, mine)
        settled(page, "Answer: 85")
        page.get_by_role("button", name="Log out ada", exact=True).wait_for(timeout=10_000)
        page.get_by_placeholder("Ask, and press Enter").focus()
        for _ in range(15):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.innerText") == "Log out ada":
                break
        page.keyboard.press("Enter")
        page.get_by_label("username").wait_for(timeout=20_000)
        assert "wait for the next one" in page.inner_text("body")
        page.go_back()
        page.go_forward()
        page.get_by_label("username").wait_for(timeout=20_000)
        assert mine not in page.content()
        enter(page, "eve", "eves own password")
        ready(page)
        page.get_by_role("button", name="Log out eve", exact=True).wait_for(timeout=10_000)
        page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)
        page.get_by_role("button", name="Earlier chats").click()
        page.wait_for_timeout(500)
        assert page.get_by_role("radio").count() == 0 and mine not in page.content()


def test_browser_shows_no_way_out_where_nobody_came_in_by_name(fake, tmp_path):
    with browser_on() as browser, page_of(browser, fake.url, tmp_path / "chat.db") as (page, app):
        ready(page)
        page.get_by_role("heading", name="Hello!").wait_for(timeout=10_000)
        assert page.get_by_role("button", name="Log out").count() == 0


def test_browser_asks_for_a_password_and_slows_down_the_hasty(fake, people, tmp_path, long_minutes):
    db = tmp_path / "chat.db"
    with browser_on() as browser, page_of(browser, fake.url, db, people=people, per_minute=1) as (page, app):
        for password in ("wrong", SECRET):
            enter(page, "ada", password)
            if password == "wrong":
                page.get_by_text("Incorrect").wait_for(timeout=20_000)
        ready(page)
        say(page, "What is 47 + 38?")
        settled(page, "Answer: 85")
        say(page, "And 30 + 41?")
        page.get_by_text("1 questions a minute are the limit").wait_for(timeout=10_000)
        assert page.get_by_placeholder("Ask, and press Enter").input_value() == "And 30 + 41?", "nothing typed is lost"
        assert sql(db, "SELECT owner FROM conversations") == [("name:ada",)]


def test_browser_says_that_the_database_is_locked_and_goes_on(fake, tmp_path, monkeypatch):
    import sqlite3

    monkeypatch.setattr("llmcourse.database.WAIT", 0.3)
    db = tmp_path / "chat.db"
    with browser_on() as browser, page_of(browser, fake.url, db) as (page, app):
        ready(page)
        say(page, "What is 47 + 38?")
        settled(page, "Answer: 85")
        lock = sqlite3.connect(db, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        say(page, "And 30 + 41?")
        page.get_by_text("locked by somebody else").wait_for(timeout=20_000)
        lock.execute("ROLLBACK")
        lock.close()
        assert page.get_by_placeholder("Ask, and press Enter").input_value() == "And 30 + 41?"
        page.get_by_placeholder("Ask, and press Enter").press("Enter")
        until(lambda: sql(db, "SELECT count(*) FROM messages") == [(4,)])
        assert [m["content"] for m in path_to(db, 4)] == ["What is 47 + 38?", REPLY, "And 30 + 41?", REPLY]
