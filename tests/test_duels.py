"""Blind comparisons, feedback in one form, earlier chats and branches: on SQLite and on a real PostgreSQL."""

import collections
import contextlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from test_chat import REPLY, Fake, until

from llmcourse.chatdb import (
    COMPARISONS,
    CONVERSATIONS,
    newest,
    open_db,
    path_to,
    rater_of,
    reading,
    save_pair,
    save_turn,
    save_vote,
    votes,
    writing,
)
from llmcourse.cli import main
from llmcourse.core import UserError, read_jsonl
from llmcourse.desk import Desk
from llmcourse.duels import chosen_side, duel_of, save_verdict
from llmcourse.earlier import adopt, branches, earlier, may_open, owner_of, tokens_of
from llmcourse.feedback import duel_counts, export_feedback, feedback
from llmcourse.fleet import Fleet
from llmcourse.flywheel import capped
from llmcourse.keeping import everything_said, forget
from llmcourse.opinions import read_feedback
from llmcourse.views import OUT, after_verdict, changes
from llmcourse.yourdata import take_along

QUESTION = [{"role": "user", "content": "What is 47 + 38?"}]


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request, tmp_path):
    "A new database of each kind."
    return tmp_path / "chat.db" if request.param == "sqlite" else request.getfixturevalue("postgres").emptied()


@pytest.fixture
def two():
    "Two servers, whose models are called good and bad."
    good, bad = Fake("Answer: 85"), Fake("Answer: 75")
    for fake, name in ((good, "good"), (bad, "bad")):
        fake.models[0] = fake.models[0] | {"id": name}
    yield good, bad
    for fake in (good, bad):
        with contextlib.suppress(OSError):
            fake.stop()


def count(db, table):
    with reading(db) as con:
        return con.scalar(sa.select(sa.func.count()).select_from(sa.text(table)))


def reply(text, model="m", **more):
    return {"role": "assistant", "content": text, "model": model, "status": "done"} | more


def side(both, model):
    return next(letter for letter in "ab" if both[letter]["model"] == model)


def test_two_models_answer_blind_and_a_verdict_tells_their_names(db, two):
    desk = Desk(two[0].url, db, against=two[1].url)
    *_, path = desk.ask("What is 47 + 38?", None, "", "tab", owner="name:ada")
    question = path[0]["id"]
    token = path_to(db, question)[0]["token"]
    assert two[0].requests[0]["messages"] == two[1].requests[0]["messages"] == QUESTION
    shown = re.sub(r"0x\w+", "", str(changes(desk, path, running=True)))  # an address may well be 0x7f74aa0bad50
    assert "Answer: 85" in shown and "Answer: 75" in shown and "good" not in shown and "bad" not in shown
    lines, _ = take_along(desk, token)
    assert "Answer: 75" in lines and "good" not in lines and '"bad"' not in lines, "a download must not give it away"
    assert newest(db, token) == question, "a reload leads back to the choice"
    with pytest.raises(UserError, match="Choose first"):
        list(desk.ask("And now?", question, "", "tab"))
    good = side(duel_of(db, question), "good")
    said = after_verdict(desk, question, good)[OUT.index("said")]
    assert f"{good.upper()} was **good**" in said and "**bad**" in said and "a second" in said
    assert path_to(db, newest(db, token))[-1]["content"] == "Answer: 85"
    *_, path = desk.ask("And now?", question, "", "tab")  # from a tab that has not heard of the verdict
    assert [m["content"] for m in two[1].requests[-1]["messages"]] == [QUESTION[0]["content"], "Answer: 85", "And now?"]
    assert count(db, "messages") == 6 and count(db, "comparisons") == 2
    desk.close()


def test_the_order_is_random(tmp_path, two):
    desk, found = Desk(two[0].url, tmp_path / "chat.db", against=two[1].url), set()
    for i in range(60):
        *_, path = desk.ask("?", None, "", f"tab {i}")
        found.add(path[-1]["replies"][0]["model"])
        if len(found) == 2:
            break
    assert found == {"good", "bad"}  # by chance alone the same 60 times: 2 in 10**18
    desk.close()


def test_the_first_verdict_counts_whoever_clicks(db):
    path = save_turn(db, QUESTION)
    save_pair(db, path, [reply("Answer: 85", "good"), reply("Answer: 75", "bad")])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: save_verdict(db, path[0]["id"], "ab"[i % 2])["verdict"], range(8)))
    assert len(set(found)) == 1 and count(db, "comparisons") == 1
    assert chosen_side(duel_of(db, path[0]["id"]))["content"] == {"a": "Answer: 85", "b": "Answer: 75"}[found[0]]
    with pytest.raises(UserError, match="unknown verdict"):
        save_verdict(db, path[0]["id"], "c")


def test_a_verdict_on_what_was_deleted_is_one_line(db):
    path = save_turn(db, QUESTION)
    save_pair(db, path, [reply("a"), reply("b")])
    assert forget(db, [path_to(db, path[0]["id"])[0]["token"]]) == 1
    assert count(db, "comparisons") == count(db, "messages") == 0
    with pytest.raises(UserError, match="were deleted"):
        save_verdict(db, path[0]["id"], "a")
    with pytest.raises(UserError, match="deleted, so nothing can follow"):
        save_pair(db, path, [reply("a"), reply("b")])


def test_both_replies_or_none(db, monkeypatch):
    path = save_turn(db, QUESTION)
    with pytest.raises(sa.exc.IntegrityError):
        save_pair(db, path, [reply("a"), reply("b", role="robot")])
    assert count(db, "messages") == 1 and count(db, "comparisons") == 0


@pytest.mark.parametrize("heard", [True, False])
def test_two_replies_that_the_database_refused_are_saved_later_and_once(db, two, monkeypatch, heard):
    desk = Desk(two[0].url, db, against=two[1].url)
    turn = desk.ask("a", None, "", "tab")
    question = next(turn)[-1]["id"]

    def away(*args):
        if not heard:
            save_pair(*args)
        raise UserError("chat.db: the database does not answer")

    monkeypatch.setattr("llmcourse.duels.save_pair", away)
    with pytest.raises(UserError, match="does not answer"):
        list(turn)
    monkeypatch.undo()
    token = path_to(db, question)[0]["token"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: list(desk.restore(token)), range(4)))
    assert count(db, "comparisons") == 1 and count(db, "messages") == 3
    assert {duel_of(db, question)[letter]["content"] for letter in "ab"} == {"Answer: 85", "Answer: 75"}
    desk.close()


def test_one_of_two_servers_dies(db, two):
    two[1].dies_after = 1
    desk = Desk(two[0].url, db, against=two[1].url)
    *_, path = desk.ask("a", None, "", "tab")
    both = duel_of(db, path[0]["id"])
    assert (both[side(both, "good")]["status"], both[side(both, "bad")]["status"]) == ("done", "failed")
    save_verdict(db, path[0]["id"], side(both, "good"))
    assert feedback(db) == [], "to be better than an error is no preference"
    desk.close()


def test_stop_stops_both(db, two):
    for fake in two:
        fake.delay = 0.5
    desk = Desk(two[0].url, db, against=two[1].url)
    turn = desk.ask("a", None, "", "tab")
    next(turn)
    desk.stop(None, "tab")
    *_, path = turn
    assert {r["status"] for r in path[-1]["replies"]} == {"stopped"} and desk.running == {}
    desk.close()


def test_a_reload_in_the_middle_watches_both_replies(db, two):
    for fake in two:
        fake.delay = 0.3
    desk = Desk(two[0].url, db, against=two[1].url)
    turn = desk.ask("a", None, "", "tab")
    question = next(turn)[-1]["id"]
    next(turn)
    turn.close()  # the page is reloaded
    looks = list(desk.restore(path_to(db, question)[0]["token"]))
    assert len(looks) > 1 and {r["content"] for r in looks[-1][-1]["replies"]} == {"Answer: 85", "Answer: 75"}
    assert count(db, "messages") == 3 and count(db, "comparisons") == 1
    desk.close()


def test_two_names_are_needed(tmp_path, two):
    db = tmp_path / "chat.db"
    with pytest.raises(UserError, match="the same model twice"):
        Desk(two[0].url, db, against=two[0].url)
    two[1].models[0] = two[1].models[0] | {"id": "good"}
    desk = Desk(two[0].url, db, against=two[1].url)
    assert desk.server.label != desk.rival.label and two[1].url in desk.rival.label
    named = Desk({"x": two[0].url}, db, against={"y": two[1].url})
    assert (named.server.label, named.rival.label) == ("x", "y")
    for each in (desk, named):
        each.close()


# feedback in one form


def test_feedback_has_one_form_and_says_where_it_comes_from(db, tmp_path):
    with pytest.raises(UserError, match="no feedback yet"):
        export_feedback(db, tmp_path / "f.jsonl")
    system = [{"role": "system", "content": "Add."}]
    path = save_turn(db, system + QUESTION + [reply("Answer: 75", "sft")], "name:ada")
    save_vote(db, 3, vote=-1, correction="Answer: 85")
    again = save_turn(db, path[:2] + [reply("It is 85.", "rl")])
    save_vote(db, again[-1]["id"], vote=1)
    other = save_turn(db, QUESTION + [reply("Hm.", "sft", status="stopped")], "name:bob")
    save_vote(db, other[-1]["id"], vote=-1)
    with pytest.raises(UserError, match="unknown part"):
        save_vote(db, 3, verdict="a")
    for verdict, texts in (("b", ("81", "71")), ("tie", ("1", "2")), ("a", ("same", "same"))):
        asked = save_turn(db, QUESTION, "name:bob")
        save_pair(db, asked, [reply(texts[0], "sft"), reply(texts[1], "rl")])
        save_verdict(db, asked[0]["id"], verdict)
    rows = read_jsonl(export_feedback(db, tmp_path / "f.jsonl"))
    assert [r["kind"] for r in rows] == ["correction", "thumb", "comparison", "comparison"]
    assert all(list(r) == list(rows[0]) for r in rows)
    correction, thumb, comparison, _ = rows
    assert correction["prompt"] == system + QUESTION and correction["chosen_model"] is None
    assert (correction["chosen"][0]["content"], correction["rejected"][0]["content"]) == ("Answer: 85", "Answer: 75")
    assert thumb["rejected"] is None and thumb["chosen_model"] == "rl"
    assert (comparison["chosen_model"], comparison["rejected_model"]) == ("rl", "sft")
    assert len(comparison["message_ids"]) == 2 and len(comparison["when"]) == len("2026-11-29 13:33:45")
    assert comparison["rater"] == rater_of("name:bob", "x") != correction["rater"] == rater_of("name:ada", "y")
    assert "ada" not in str(rows) and "bob" not in str(rows)
    pairs = read_jsonl(export_feedback(db, tmp_path / "p.jsonl", only_pairs=True))
    assert [r["chosen"][0]["content"] for r in pairs] == ["Answer: 85", "71"], "two equal texts teach nothing"
    (won,) = duel_counts(db)
    assert won == {"models": ["rl", "sft"], "wins": 1, "losses": 1, "ties": 1, "neither": 0, "a": 1}
    said = {r["message"]: r["compared"] for r in everything_said(db, [path_to(db, asked[0]["id"])[0]["token"]])}
    assert [*said.values()] == [None, "chosen", "beaten"]


def test_one_person_is_one_rater_in_all_their_conversations_and_in_every_file(db):
    "A name, or where nobody logs in the browser; where nobody knows, the conversation."
    owners = [owner_of("ada", None)] * 2 + [owner_of(None, "a browser")] * 2 + [None] * 2
    for n, owner in enumerate(owners):
        path = save_turn(db, [{"role": "user", "content": f"What is {n} + 1?"}, reply("Answer: 0", "sft")], owner)
        save_vote(db, path[-1]["id"], vote=-1, correction=f"Answer: {n + 1}")
        again = save_turn(db, path + [{"role": "user", "content": f"And {n} + 2?"}])
        save_pair(db, again, [reply(f"Answer: {n + 2}", "rl"), reply("Answer: 0", "sft")])
        save_verdict(db, again[-1]["id"], "a")
    by_vote = [row["rater"] for row in votes(db)]
    corrections = [row["rater"] for row in feedback(db) if row["kind"] == "correction"]
    pairs = [row["rater"] for row in feedback(db) if row["kind"] == "comparison"]
    assert by_vote == corrections == pairs and len(set(by_vote)) == 4
    assert by_vote[0] == by_vote[1] != by_vote[2] == by_vote[3] and len(set(by_vote[4:])) == 2
    tokens = [path_to(db, row["message"])[0]["token"] for row in votes(db)]
    assert not any(rater in token for rater in by_vote for token in tokens), "a token opens a conversation"
    opinions, _ = read_feedback(db, database=True)
    loud = collections.Counter(o["rater"] for o in capped(opinions, most=1))
    assert [loud[rater] for rater in dict.fromkeys(by_vote)] == [1, 1, 1, 1], "the cap on one rater does something"


def test_pairs_of_the_chat_are_rows_for_dpo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        asked = save_turn("runs/chat.db", [{"role": "user", "content": f"What is 1{n} + 1?"}])
        save_pair("runs/chat.db", asked, [reply(f"Answer: 1{n + 1}", "rl"), reply("Answer: 0", "sft")])
        save_verdict("runs/chat.db", asked[0]["id"], "a")
    assert main(["chatlog", "pairs"]) == main(["chatlog", "feedback"]) == main(["chatlog", "wins"]) == 0
    out = capsys.readouterr().out
    assert "runs/pairs.jsonl" in out and "rl against sft: 4 won, 0 lost: 100% (51%–100%, n=4)" in out
    assert main(["data", "check", "runs/pairs.jsonl", "--purpose", "dpo"]) == 0
    assert main(["dpo", "--data", "runs/pairs.jsonl", "--steps", "2", "--output", "runs/dpo"]) == 0


# whose, which, where


def test_earlier_chats_and_branches_belong_to_their_owner(db):
    ada, bob = owner_of("ada", None), owner_of(None, "a secret of a browser")
    assert "secret" not in bob and owner_of(None, None) is None and owner_of(None, "name:ada") != ada
    first = save_turn(db, QUESTION + [reply("one")], ada)
    save_turn(db, first[:1] + [reply("two")])
    second = save_turn(db, [{"role": "user", "content": "Long " * 40}, reply("x")], ada)
    other = save_turn(db, QUESTION + [reply("theirs")], bob)
    tokens = [path_to(db, path[-1]["id"])[0]["token"] for path in (first, second, other)]
    assert [token for _, token in earlier(db, ada)] == [tokens[1], tokens[0]]
    assert all(len(text) <= 48 and "\n" not in text for text, _ in earlier(db, ada))
    assert earlier(db, None) == [] and not may_open(db, tokens[2], ada) and may_open(db, tokens[2], bob)
    ends = branches(db, first[0]["id"])
    assert [id for _, id in ends] == [2, 3] and "one" in ends[0][0] and "two" in ends[1][0]
    with writing(db) as con:
        con.execute(sa.update(CONVERSATIONS).values(owner=None))
    assert earlier(db, None) == tokens_of(db, None) == [], "what is nobody's is in nobody's list"
    for owner in (None, bob, ada):
        adopt(db, tokens[0], owner)
    assert [token for _, token in earlier(db, bob)] == [tokens[0]] and earlier(db, ada) == []


def test_a_branch_of_another_conversation_is_not_shown(tmp_path, two):
    desk = Desk(two[0].url, tmp_path / "chat.db")
    (*_, mine), (*_, yours) = desk.ask("a", None, "", "me"), desk.ask("b", None, "", "you")
    *_, again = desk.retry(mine[-1]["id"], "me")
    assert desk.switch(again[-1]["id"], mine[-1]["id"])[-1]["id"] == mine[-1]["id"]
    assert desk.switch(mine[-1]["id"], yours[-1]["id"])[-1]["id"] == mine[-1]["id"]
    assert [*desk.edit("as if I had said it", mine[-1]["id"], mine[-1]["id"], "me")] == [], "a reply is no question"
    desk.close()


def test_somebody_elses_token_opens_and_deletes_nothing(tmp_path, two):
    desk = Desk(two[0].url, tmp_path / "chat.db")
    *_, path = desk.ask("private", None, "", "tab", owner="name:ada")
    token = path_to(desk.db, path[-1]["id"])[0]["token"]
    assert [*desk.restore(token, "name:eve")] == [[]] and desk.forget(token, "name:eve") == 0
    assert len([*desk.restore(token, "name:ada")][0]) == 2 and desk.forget(token, "name:ada") == 1
    desk.close()


def test_a_reload_watches_a_second_try(tmp_path, two):
    desk = Desk(two[0].url, tmp_path / "chat.db")
    *_, path = desk.ask("a", None, "", "tab")
    two[0].delay = 0.3
    again = desk.retry(path[-1]["id"], "tab")
    next(again)
    again.close()  # the page is reloaded while it streams
    *_, seen = desk.restore(path_to(desk.db, path[0]["id"])[0]["token"])
    assert seen[-1]["id"] != path[-1]["id"] and seen[-1]["status"] == "done"
    desk.close()


# many at once


def test_an_engine_that_dies_under_load_loses_nothing(db):
    "Twelve people, one server that dies in the middle: each sees one line, and all is there once when it is back."
    fake = Fake()
    fake.delay = 0.1
    desk = Desk(fake.url, db)
    started = threading.Barrier(13)

    def talk(who):
        turn = desk.ask(f"question {who}", None, "", f"tab {who}")
        first = next(turn)
        next(turn)
        started.wait(30)
        *_, path = turn
        return first[-1]["id"], path[-1]

    with ThreadPoolExecutor(12) as pool:
        turns = [pool.submit(talk, who) for who in range(12)]
        started.wait(30)
        fake.dies_after = 0  # every stream breaks off at its next word
        fake.stop()
        found = [turn.result(30) for turn in turns]
    lines = [last["note"] for _, last in found if last["status"] == "failed"]
    assert all("\n" not in line and fake.url in line for line in lines)
    assert count(db, "messages") == 24 and desk.running == {} and desk.unsaved == {}
    back = Fake()
    desk.server.client = back.client
    for question, last in found:
        path = [*desk.retry(last["id"], f"tab {question}")][-1]
        assert path[-1]["content"] == REPLY and path[0]["id"] == question
    assert count(db, "messages") == 36
    back.stop()
    desk.close()


# several models


def test_a_model_is_started_when_somebody_picks_it_and_once(tmp_path, two):
    started = []

    def start():
        started.append(1)
        return two[1].url

    desk = Desk({"first": two[0].url, "second": start}, tmp_path / "chat.db")
    assert desk.fleet.names == ["first", "second"] and not started
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(desk.fleet.get, ["second"] * 4))
    *_, path = desk.ask("a", None, "", "tab", model="second", temperature=0.7)
    assert started == [1] and path[-1]["model"] == "second" and two[1].requests[-1]["temperature"] == 0.7
    with pytest.raises(UserError, match="unknown model"):
        list(desk.ask("a", None, "", "tab", model="third"))
    desk.close()


def test_all_models_of_one_server_are_offered(tmp_path, two):
    two[0].models.append(two[0].models[0] | {"id": "better"})
    fleet = Fleet(two[0].url)
    assert fleet.names == ["good", "better"] and fleet.get("better").model == "better"
    assert Fleet(two[0].url, model="better").names == ["better"]


def test_a_model_that_cannot_be_started_is_one_line(tmp_path, two):
    def broken():
        raise UserError("runs/x: no such folder. Train one first")

    desk = Desk({"first": two[0].url, "broken": broken}, tmp_path / "chat.db")
    with pytest.raises(UserError, match="no such folder"):
        list(desk.ask("a", None, "", "tab", model="broken"))
    assert desk.running == {} and count(desk.db, "messages") == 0
    [*desk.ask("a", None, "", "tab", model="first")]
    desk.close()


def test_the_tables_of_a_comparison_exist_after_an_upgrade(db):
    open_db(db).close()
    with reading(db) as con:
        assert {c["name"] for c in sa.inspect(con).get_columns("comparisons")} == set(COMPARISONS.c.keys())
    assert until(lambda: count(db, "comparisons") == 0)
