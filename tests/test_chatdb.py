"""The chat's database: turns, votes, upgrades and faults, each on SQLite and on a real PostgreSQL."""

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from llmcourse.chatdb import (
    CONVERSATIONS,
    MESSAGES,
    MIGRATIONS,
    VOTES,
    as_text,
    export_votes,
    newest,
    open_db,
    path_to,
    reading,
    save_turn,
    save_vote,
    votes,
    writing,
)
from llmcourse.core import UserError, read_jsonl
from llmcourse.database import address, db_name, steps_taken, which_db

CHAT = [{"role": "system", "content": "You are a tutor."}, {"role": "user", "content": "What is 47 + 38?"}]
ANSWER = {"role": "assistant", "content": "Answer: 75"}
OLD = sorted((Path(__file__).parent / "data").glob("chat_v*.sql"))


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request, tmp_path):
    "A new database of each kind."
    if request.param == "sqlite":
        yield tmp_path / "chat.db"
        return
    server = request.getfixturevalue("postgres")
    url = server.fresh()
    yield url
    server.execute(f"DROP DATABASE {address(url).database} WITH (FORCE)")


def sql(db, text):
    with contextlib.closing(open_db(db)) as con:
        return [tuple(row) for row in con.exec_driver_sql(text)]


def version(db):
    with reading(db) as con:
        return steps_taken(con)


# the schema


@pytest.mark.parametrize("old", OLD, ids=lambda p: p.stem)
def test_a_file_of_each_older_version_is_upgraded_and_keeps_its_rows(old, tmp_path):
    db = tmp_path / "chat.db"
    with contextlib.closing(sqlite3.connect(db)) as con:
        con.executescript(old.read_text(encoding="utf-8"))
        rows = con.execute("SELECT id, parent, role, content, ttft FROM messages ORDER BY id").fetchall()
    assert version(db) == len(MIGRATIONS) > int(old.stem[-1])
    assert sql(db, "PRAGMA journal_mode") == [("wal",)] and sql(db, "PRAGMA foreign_key_check") == []
    assert sql(db, "SELECT id, parent, role, content, ttft FROM messages ORDER BY id") == rows and len(rows) == 8
    given = {r["message"]: (r["vote"], r["correction"]) for r in votes(db)}
    assert given == {3: (-1, "Answer: 35"), 4: (1, None)} | ({6: (1, None)} if old.stem[-1] in "12" else {})
    assert newest(db, "first-token") == 6 and [m["id"] for m in path_to(db, 6)] == [1, 2, 4, 5, 6]
    path = save_turn(db, path_to(db, 6) + [{"role": "user", "content": "more"}])
    assert path[-1]["id"] == 9 and len(path_to(db, 9)) == 6


def test_there_is_a_stored_file_of_every_older_version():
    assert [int(p.stem[-1]) for p in OLD] == [*range(1, len(MIGRATIONS))]


def test_a_postgresql_at_an_older_version_is_upgraded(postgres, monkeypatch):
    url = postgres.fresh()
    for n in range(1, len(MIGRATIONS) + 1):
        with monkeypatch.context() as patch:
            patch.setattr("llmcourse.chatdb.MIGRATIONS", MIGRATIONS[:n])
            assert version(url) == n
            if n == 1:
                with writing(url) as con:
                    for row in (
                        "conversations (token) VALUES ('t')",
                        "messages (conversation, role, content) VALUES (1, 'assistant', 'a')",
                        "votes (message, vote, correction) VALUES (1, 1, 'x')",
                    ):
                        con.exec_driver_sql(f"INSERT INTO {row}")
    assert [(r["vote"], r["correction"], r["reply"]) for r in votes(url)] == [(1, None, "a")]


def test_the_names_in_python_are_those_in_the_database(db):
    with reading(db) as con:
        for table in (CONVERSATIONS, MESSAGES, VOTES):
            assert {c["name"] for c in sa.inspect(con).get_columns(table.name)} == set(table.c.keys())


def test_a_failed_upgrade_changes_nothing(db, monkeypatch):
    open_db(db).close()
    step = "ALTER TABLE messages ADD COLUMN mood TEXT; ALTER TABLE nowhere ADD COLUMN x TEXT"
    monkeypatch.setattr("llmcourse.chatdb.MIGRATIONS", [*MIGRATIONS, step])
    with pytest.raises(UserError, match="nowhere"):
        open_db(db)
    monkeypatch.undo()
    assert version(db) == len(MIGRATIONS)
    with reading(db) as con:
        assert "mood" not in str(sa.inspect(con).get_columns("messages"))


def test_twelve_programs_start_at_once_and_make_one_database(db):
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda k: save_turn(db, CHAT), range(12)))
    found = sql(db, "SELECT count(*), count(DISTINCT conversation), count(DISTINCT id) FROM messages")
    assert found == [(24, 12, 24)]


# whose database it is


def test_files_that_are_not_ours_are_refused_and_left_alone(tmp_path):
    text, other, newer = tmp_path / "notes.txt", tmp_path / "other.db", tmp_path / "newer.db"
    text.write_text("these are my notes, not a database at all, and they are long enough " * 20)
    for path, script in ((other, "CREATE TABLE mine (x)"), (newer, "PRAGMA user_version = 99")):
        con = sqlite3.connect(path)
        con.executescript(script)
        con.close()
    for path, say in (
        (text, "not a database"),
        (other, "another program"),
        (newer, "newer"),
        (tmp_path, "Give another file"),
        (text / "chat.db", "Give another file"),
    ):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(UserError, match=say) as error:
            open_db(path)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
        assert not path.is_file() or path.read_bytes() == before


def test_postgresqls_that_are_not_ours_are_refused_and_left_alone(postgres):
    url = postgres.fresh()
    name = address(url).database
    postgres.execute("CREATE TABLE mine (x int)", name)
    with pytest.raises(UserError, match="another program"):
        save_turn(url, CHAT)
    tables = "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public'"
    assert postgres.execute(tables, name) == [("mine",)]
    newer = postgres.fresh()
    open_db(newer).close()
    postgres.execute("UPDATE llmcourse_schema SET version = 99", address(newer).database)
    with pytest.raises(UserError, match="written by a newer llmcourse"):
        url_again = newer + "?application_name=another"  # a connection that has not looked yet
        save_turn(url_again, CHAT)


# turns


def test_eight_threads_write_and_nothing_is_lost_or_mixed(db):
    def talk(who):
        path = []
        for i in range(6):
            said = [("user", f"{who}?{i}"), ("assistant", f"{who}!{i}")]
            path = save_turn(db, path + [{"role": role, "content": text} for role, text in said])
            save_vote(db, path[-1]["id"], vote=1 if i % 2 else -1)
        return path

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(talk, range(8)))
    for who, path in enumerate(paths):
        found = path_to(db, path[-1]["id"])
        assert [m["content"] for m in found] == [f"{who}{mark}{i}" for i in range(6) for mark in "?!"]
        assert [m["vote"] for m in found] == [None, -1, None, 1] * 3
    assert isinstance(db, str) or sql(db, "PRAGMA integrity_check") == [("ok",)]


def test_a_turn_that_cannot_be_saved_leaves_nothing(db):
    with pytest.raises(sa.exc.IntegrityError):
        save_turn(db, CHAT + [{"role": "robot", "content": "beep"}])
    assert sql(db, "SELECT count(*) FROM messages") == sql(db, "SELECT count(*) FROM conversations") == [(0,)]


def test_a_conversation_is_a_tree(db):
    first = save_turn(db, CHAT + [{"role": "assistant", "content": "one"}])
    second = save_turn(db, first[:2] + [{"role": "assistant", "content": "two"}])
    edited = save_turn(
        db, first[:1] + [{"role": "user", "content": "other"}, {"role": "assistant", "content": "three"}]
    )
    for path in (first, second, edited):
        assert as_text(path_to(db, path[-1]["id"])) == as_text(path)
    assert sql(db, "SELECT count(*), count(DISTINCT conversation) FROM messages") == [(6, 1)]
    assert save_turn(db, first) == first
    assert path_to(db, None) == path_to(db, 99) == []


def test_both_databases_keep_a_turn_to_the_letter(db):
    facts = {"model": "m", "status": "failed", "ttft": 0.1 + 0.2, "seconds": 1 / 3, "prompt_tokens": 38}
    facts |= {"completion_tokens": 2**31 - 1, "dropped": 4, "note": "it's 100 % :broken {key}"}
    text = 'Grüße 😀 "quotes" \\ %s :name {now}\r\n\ttabs ' + "long " * 50_000
    path = save_turn(db, [{"role": "assistant", "content": text} | facts])
    (found,) = path_to(db, path[0]["id"])
    assert {k: found[k] for k in ("content", *facts)} == {"content": text} | facts
    assert newest(db, found["token"]) == found["id"] and len(found["created"]) == len("2026-11-29 13:33:45")


def test_characters_that_a_database_cannot_hold_are_replaced(db):
    path = save_turn(db, [{"role": "assistant", "content": "a\0b\ud83dc"}])
    assert path_to(db, path[0]["id"])[0]["content"] == "a\ufffdb?c"
    assert save_vote(db, path[0]["id"], correction="x\0")["correction"] == "x\ufffd"


# votes


def test_a_vote_changes_and_is_taken_back_and_the_correction_stays(db):
    reply = save_turn(db, [*CHAT, ANSWER])[-1]["id"]
    for vote in (1, -1, 1, -1):
        save_vote(db, reply, vote=vote)
        assert [r["vote"] for r in votes(db)] == [vote]
    save_vote(db, reply, correction="Answer: 85")
    save_vote(db, reply, vote=None)
    assert [(r["vote"], r["correction"]) for r in votes(db)] == [(None, "Answer: 85")]
    save_vote(db, reply, correction=None)
    assert votes(db) == [] and sql(db, "SELECT count(*) FROM votes") == [(1,)]


def test_a_thumb_up_withdraws_the_correction(db):
    reply = save_turn(db, [*CHAT, ANSWER])[-1]["id"]
    save_vote(db, reply, vote=-1, correction="Answer: 85")
    assert save_vote(db, reply, vote=1) == {"vote": 1, "correction": None}
    assert sql(db, "SELECT vote, correction FROM votes") == [(1, None)]
    assert save_vote(db, reply, vote=-1) == {"vote": -1, "correction": None}, "it does not come back by itself"
    save_vote(db, reply, vote=1)
    assert save_vote(db, reply, correction="Answer: 85") == {"vote": None, "correction": "Answer: 85"}, (
        "the later one counts"
    )
    assert sql(db, "SELECT count(*) FROM votes WHERE vote = 1 AND correction IS NOT NULL") == [(0,)]


def test_clicks_of_many_threads_on_one_reply_never_contradict(db):
    reply = save_turn(db, [*CHAT, ANSWER])[-1]["id"]
    clicks = [{"vote": 1}, {"correction": "Answer: 85"}] * 12
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda click: save_vote(db, reply, **click), clicks))
    assert not any(s["vote"] == 1 and s["correction"] for s in said)
    assert sql(db, "SELECT count(*) FROM votes") == [(1,)]


@pytest.mark.parametrize(
    "message, change",
    [
        (2, {"vote": 1}),
        (99, {"vote": 1}),
        (None, {"vote": 1}),
        (3, {"vote": 2}),
        (3, {"vote": ""}),
        (3, {"mood": 1}),
        (3, {"vote": 1, "correction": "x"}),
    ],
)
def test_votes_that_mean_nothing_are_refused(db, message, change):
    save_turn(db, [*CHAT, ANSWER])
    with pytest.raises(UserError):
        save_vote(db, message, **change)
    assert sql(db, "SELECT count(*) FROM votes") == [(0,)]


def test_votes_are_exported(db, tmp_path):
    with pytest.raises(UserError, match="no votes") as error:
        export_votes(db, tmp_path / "votes.jsonl")
    assert "s3cret" not in str(error.value)
    reply = save_turn(db, [*CHAT, ANSWER])[-1]["id"]
    save_vote(db, reply, vote=-1, correction="Answer: 85")
    (row,) = read_jsonl(export_votes(db, tmp_path / "votes.jsonl"))
    assert row["prompt"] == CHAT and (row["reply"], row["vote"]) == ("Answer: 75", -1)
