"""The chat's database: turns, votes, upgrades and faults, each on SQLite and on a real PostgreSQL."""

import contextlib
import logging
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa
from kill_chat import count, drill
from postgres import PASSWORD, free_port

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
from llmcourse.cli import main
from llmcourse.core import UserError, read_jsonl
from llmcourse.database import address, db_name, one_line, steps_taken, which_db
from llmcourse.keeping import everything_said, expire, export_conversations, forget

CHAT = [{"role": "system", "content": "You are a tutor."}, {"role": "user", "content": "What is 47 + 38?"}]
ANSWER = {"role": "assistant", "content": "Answer: 75"}
OLD = sorted((Path(__file__).parent / "data").glob("chat_v*.sql"))


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request, tmp_path):
    "A new database of each kind."
    return tmp_path / "chat.db" if request.param == "sqlite" else request.getfixturevalue("postgres").emptied()


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


def test_an_open_connection_spares_the_others_the_tidying(tmp_path):
    "Closing the last connection writes the log into the file, which takes as long as saving a turn."
    db = tmp_path / "chat.db"
    with contextlib.closing(open_db(db)):
        save_turn(db, CHAT)
        assert (tmp_path / "chat.db-wal").stat().st_size > 0
    assert not (tmp_path / "chat.db-wal").exists()


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


# faults, each in one line


def refused(db, act, *say):
    "What `act` says when the database refuses it: one line, without the password."
    with pytest.raises(UserError) as error:
        act()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in say), said
    assert not any(secret in said for secret in ("s3cret", "%2F", "pass@word", "pass%40word")), said
    assert said.startswith(db_name(db)), said
    return said


@contextlib.contextmanager
def locked(db):
    "Somebody else writes, and takes their time."
    if isinstance(db, Path):
        other = sqlite3.connect(db, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
    else:
        other = psycopg.connect(db)
        other.execute("LOCK TABLE conversations, messages, votes")
    yield
    other.close()


def test_a_database_that_is_locked_for_too_long(db, monkeypatch):
    path = save_turn(db, [*CHAT, ANSWER])
    monkeypatch.setattr("llmcourse.database.WAIT", 0.3)
    with locked(db):
        refused(db, lambda: save_vote(db, 3, vote=1), "locked by somebody else", "Try again")
        refused(db, lambda: save_turn(db, path + CHAT[1:]), "locked by somebody else")
    assert len(save_turn(db, path + CHAT[1:])) == 4 and sql(db, "SELECT count(*) FROM votes") == [(0,)]


def test_a_lock_that_ends_in_time_is_waited_for(db):
    save_turn(db, [*CHAT, ANSWER])
    with ThreadPoolExecutor(1) as pool:
        with locked(db):
            vote = pool.submit(save_vote, db, 3, vote=1)
            with pytest.raises(TimeoutError):
                vote.result(0.5)
        assert vote.result(10) == {"vote": 1, "correction": None}


def test_a_disk_that_is_full(db, request):
    path = save_turn(db, [*CHAT, ANSWER])
    if isinstance(db, Path):  # SQLite says the same of a file that may not grow

        def no_room(driver, record):
            driver.execute("PRAGMA max_page_count = 8")

        sa.event.listen(sa.engine.Engine, "connect", no_room)
        request.addfinalizer(lambda: sa.event.remove(sa.engine.Engine, "connect", no_room))
    else:  # the server's own words and code
        with writing(db) as con:
            con.exec_driver_sql("""CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION
                'could not extend file "base/5/16384": No space left on device' USING ERRCODE = 'disk_full'; END $$""")
            con.exec_driver_sql("CREATE TRIGGER fail AFTER INSERT ON messages EXECUTE FUNCTION fail()")
    more = [{"role": "user", "content": "long " * 50_000}]
    refused(db, lambda: save_turn(db, path + more), "no space left", "Free some")
    assert sql(db, "SELECT count(*) FROM messages") == [(3,)], "half written"


def test_a_file_that_may_only_be_read(tmp_path):
    db = tmp_path / "chat.db"
    save_turn(db, CHAT)
    with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as con:
        with pytest.raises(sqlite3.OperationalError) as error:
            con.execute("DELETE FROM messages")
    with pytest.raises(UserError, match="can be read but not written"), one_line(db):
        raise sa.exc.OperationalError("", {}, error.value)


def test_a_damaged_file(tmp_path):
    db = tmp_path / "chat.db"
    save_turn(db, CHAT * 300)
    whole = db.read_bytes()
    db.write_bytes(whole[:8192] + b"\0" * (len(whole) - 8192))
    refused(db, lambda: path_to(db, 600), "damaged", "Restore")


def test_a_server_that_is_away_and_comes_back(postgres):
    url = postgres.fresh()
    path = save_turn(url, [*CHAT, ANSWER])
    try:
        with pytest.raises(UserError, match="does not answer") as error, writing(url) as con:
            con.execute(sa.insert(CONVERSATIONS).values(token="half"))
            postgres.stop("immediate")  # in the middle of a transaction
            con.execute(sa.insert(CONVERSATIONS).values(token="half"))
        assert "s3cret" not in str(error.value)
        refused(url, lambda: save_vote(url, 3, vote=1), "does not answer", "Start it again")
    finally:
        postgres.start()
    assert save_vote(url, 3, vote=1)["vote"] == 1, "the next request reconnects"
    assert len(save_turn(url, path + CHAT[1:])) == 4
    assert sql(url, "SELECT count(*) FROM conversations WHERE token = 'half'") == [(0,)]


def test_a_server_that_refuses_us(postgres):
    for url, say in (
        (postgres.url(password="s3cret-but-wrong"), "password authentication failed"),
        (postgres.url(user="nobody"), "password authentication failed"),
        (postgres.url("nowhere"), 'database "nowhere" does not exist'),
        (f"postgresql://teacher:s3cret@127.0.0.1:{free_port()}/chat", "does not answer"),
        ("postgresql://teacher:s3cret@no.such.host.invalid/chat", "does not answer"),
    ):
        refused(url, lambda: open_db(url), say)


def test_somebody_who_may_not_make_tables(postgres):
    url = postgres.fresh()
    postgres.execute("DROP ROLE IF EXISTS guest")
    postgres.execute("CREATE ROLE guest LOGIN PASSWORD 's3cret'")
    guest = url.replace("teacher:" + quote(PASSWORD, safe=""), "guest:s3cret")
    refused(guest, lambda: save_turn(guest, CHAT), "can be read but not written", "permissions")


def test_a_driver_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql://teacher:s3cret@127.0.0.1:1/chat"
    refused(url, lambda: open_db(url), "pip install llmcourse[postgres]")


@pytest.mark.parametrize(
    "url, say",
    [
        ("postgresql://teacher:s3cret@host:port/chat", "cannot be read"),
        ("postgresql://teacher:s3@cret@host/chat", "%40"),
        ("postgresql:/teacher:s3cret@host/chat", "cannot be read"),
        ("mysql://teacher:s3cret@host/chat", "SQLite and PostgreSQL"),
        ("sqlite://", "SQLite and PostgreSQL"),
    ],
)
def test_urls_that_are_none_are_not_repeated(url, say, monkeypatch):
    with pytest.raises(UserError, match=say) as error:
        open_db(url)
    assert "cret" not in str(error.value) and "teacher" not in str(error.value) and "\n" not in str(error.value)


def test_passwords_are_in_no_name_and_no_log(postgres, caplog):
    url = postgres.fresh()
    with caplog.at_level(logging.DEBUG):
        save_turn(url, CHAT)
        repr(open_db(url).engine)
    assert "s3cret" not in caplog.text and "s3cret" not in repr(open_db(url).engine)
    assert db_name(url).startswith("postgresql://teacher:***@127.0.0.1:")
    secret = quote(PASSWORD, safe="")
    in_query = url.replace(f"teacher:{secret}@", "") + f"?user=teacher&password={secret}"
    assert path_to(in_query, 1) and "s3cret" not in db_name(in_query)


def test_the_option_wins_over_the_environment(monkeypatch):
    assert which_db(None, "runs/chat.db") == "runs/chat.db"
    monkeypatch.setenv("DATABASE_URL", "postgresql://host/chat")
    assert which_db(None, "runs/chat.db") == "postgresql://host/chat" and which_db("a.db", "runs/chat.db") == "a.db"
    assert address("sqlite:///a.db") == address("a.db") and db_name("sqlite:///a.db").endswith("a.db")


# what is kept, and for how long


def token_of(db, path):
    return path_to(db, path[-1]["id"])[0]["token"]


def test_everyone_can_take_along_what_they_said_and_no_more(db, tmp_path):
    mine, yours = save_turn(db, [*CHAT, ANSWER]), save_turn(db, [*CHAT, ANSWER])
    save_turn(db, mine[:2] + [ANSWER | {"content": "another branch", "model": "m"}])
    save_vote(db, 3, vote=-1, correction="Answer: 85")
    save_vote(db, 6, vote=1)
    rows = read_jsonl(export_conversations(db, [token_of(db, mine)], tmp_path / "mine.jsonl"))
    found = [(r["message"], r["parent"], r["vote"]) for r in rows]
    assert found == [(1, None, None), (2, 1, None), (3, 2, -1), (7, 2, None)]
    assert rows[2]["correction"] == "Answer: 85" and rows[3]["model"] == "m" and "token" not in rows[0]
    assert len(everything_said(db, [token_of(db, mine), token_of(db, yours)])) == 7
    assert everything_said(db, [None]) == everything_said(db, []) == everything_said(db, ["' OR 1=1 --"]) == []
    with pytest.raises(UserError, match="nothing is kept"):
        export_conversations(db, ["guess"], tmp_path / "none.jsonl")


def test_what_is_deleted_is_gone_and_the_rest_stays(db):
    mine, yours = save_turn(db, [*CHAT, ANSWER]), save_turn(db, [*CHAT, ANSWER | {"content": "theirs"}])
    for reply in (3, 6):
        save_vote(db, reply, vote=1, correction=None)
    token = token_of(db, mine)
    assert forget(db, [token]) == 1 and forget(db, [token]) == forget(db, []) == 0
    assert path_to(db, 3) == [] and newest(db, token) is None and [r["reply"] for r in votes(db)] == ["theirs"]
    assert sql(db, "SELECT count(*) FROM conversations") == [(1,)] and path_to(db, yours[-1]["id"])
    refused_vote = pytest.raises(UserError, match="it was deleted, so there is nothing to vote on")
    with refused_vote:
        save_vote(db, 3, vote=-1)
    with pytest.raises(UserError, match="deleted, so nothing can follow it"):
        save_turn(db, mine + CHAT[1:])
    assert sql(db, "SELECT count(*) FROM messages") == [(3,)]


def test_sqlite_overwrites_what_it_deletes(tmp_path):
    db = tmp_path / "chat.db"
    path = save_turn(db, [{"role": "user", "content": "my secret wish " * 9}])
    save_turn(db, CHAT)
    forget(db, [token_of(db, path)])
    assert [p.name for p in tmp_path.iterdir()] == ["chat.db"] and b"secret wish" not in db.read_bytes()


def test_a_reply_that_comes_after_its_conversation_was_deleted_leaves_nothing(db):
    "However the two meet, no row is left that points nowhere, and nobody sees more than one line."
    for _ in range(10):
        path = save_turn(db, CHAT)
        token = token_of(db, path)

        def late():
            with contextlib.suppress(UserError):
                save_turn(db, path + [ANSWER])

        with ThreadPoolExecutor(2) as pool:
            turns = [pool.submit(late), pool.submit(forget, db, [token])]
            assert [t.result() for t in turns][1] == 1
    assert sql(db, "SELECT count(*) FROM messages") == sql(db, "SELECT count(*) FROM conversations") == [(0,)]


def test_old_conversations_expire(db):
    old, used, new = (save_turn(db, [*CHAT, ANSWER]) for _ in range(3))
    save_vote(db, old[-1]["id"], vote=1)
    with writing(db) as con:
        for table, column, ids in (
            (CONVERSATIONS, CONVERSATIONS.c.id, (1, 2)),
            (MESSAGES, MESSAGES.c.conversation, (1, 2)),
        ):
            con.execute(sa.update(table).where(column.in_(ids)).values(created="2020-02-03 04:05:06"))
    save_turn(db, used + CHAT[1:])  # somebody came back to the second one
    assert expire(db, days=90) == 1 and expire(db, days=90) == 0
    assert path_to(db, old[-1]["id"]) == [] == votes(db) and path_to(db, used[-1]["id"]) and path_to(db, new[-1]["id"])


def test_many_old_conversations_expire_a_few_at_a_time(db):
    for _ in range(7):
        save_turn(db, CHAT)
    with writing(db) as con:
        for table in (CONVERSATIONS, MESSAGES):
            con.execute(sa.update(table).values(created="2020-02-03 04:05:06"))
    assert expire(db, days=1, at_once=3) == 7 and sql(db, "SELECT count(*) FROM messages") == [(0,)]


def test_the_command_works_on_both(db, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", str(db))
    path = save_turn(db, [*CHAT, ANSWER])
    save_vote(db, 3, vote=-1)
    token = token_of(db, path)
    said = {}
    for words in (
        ["votes", "--output", "v.jsonl"],
        ["export", "--token", token, "--output", "mine.jsonl"],
        ["expire", "--keep-days", "1"],
        ["delete", "--token", token],
    ):
        assert main(["chatlog", *words]) == 0
        said[words[0]] = capsys.readouterr().out.strip()
    assert said == {"votes": "v.jsonl", "export": "mine.jsonl", "expire": "0 conversations deleted",
                    "delete": "1 conversations deleted"}
    assert len(read_jsonl("v.jsonl")) == 1 and len(read_jsonl("mine.jsonl")) == 3
    for words, say in (
        (["votes"], "no votes yet"),
        (["export", "--token", token], "nothing is kept"),
        (["delete"], "--token"),
        (["expire"], "--keep-days"),
        (["expire", "--keep-days", "0"], "above 0"),
        (["votes", "--database", "postgresql://me:s3cret@127.0.0.1:1/x"], "does not answer"),
        (["forget"], "unknown action"),
    ):
        assert main(["chatlog", *words]) == 2
        err = capsys.readouterr().err
        assert say in err and err.count("\n") == 1 and "s3cret" not in err


# killed


def test_a_server_that_is_killed_loses_and_doubles_nothing(db):
    "The long form: python tests/kill_chat.py 20 32"
    found, users = drill(db, kills=4, n_users=32, seed=7, longest=0.6)
    assert found["turns"] > 20 and found["votes"] > 10, found
    assert found["cut_off"] > 4, "the kills hit nobody"
    assert {found[k] for k in ("turns_lost", "votes_lost", "doubled", "refused")} == {0}, found
    turn = next(reply for user in users for reply in user.turns.values() if reply)
    vote = next(reply for user in users for reply, given in user.votes.items() if given[-1][1])
    with writing(db) as con:  # the count must be able to fail
        row = con.execute(sa.select(MESSAGES).where(MESSAGES.c.id == turn)).mappings().one()
        con.execute(sa.insert(MESSAGES).values({k: v for k, v in row.items() if k != "id"}))
        con.execute(sa.delete(VOTES).where(VOTES.c.message == vote))
    worse = count(db, users)
    assert (worse["doubled"], worse["turns_lost"], worse["votes_lost"]) == (1, 1, 1)
