"""The flywheel: whom to believe, what the gate stops, a swap that nobody notices, and a kill that loses nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmcourse.chatdb import export_votes, save_turn, save_vote
from llmcourse.cli import main
from llmcourse.core import UserError, is_run, read_jsonl, weights, write_jsonl
from llmcourse.export import to_gguf
from llmcourse.opinions import chats_of, pairs_of, read_feedback, thumbs_of
from llmcourse.feedback import export_feedback
from llmcourse.flywheel import capped, cleaned, latest, majority, may_serve, trusted
from llmcourse.following import Following
from llmcourse.live import LIVE, live_model, read_live, rollback, swap
from llmcourse.pairs import take_pairs, take_thumbs
from llmcourse.rounds import gate
from llmcourse.rows import read
from llmcourse.serve import remote
from llmcourse.users import pleases, rated, user_questions

QUESTION = [{"role": "user", "content": "What is 47 + 38?"}]


def vote(rater, reply="Answer: 85", up=1, correction=None):
    return {"prompt": QUESTION, "reply": reply, "vote": up, "correction": correction, "rater": rater}


def opinions(*rows):
    return read_feedback(list(rows))[0]


# Whom to believe


def test_the_last_word_counts_once():
    rows = opinions(vote("a"), vote("a", up=-1), vote("a", up=-1))
    assert [row["from"] for row in latest(rows)] == ["rows[2]"]


def test_a_tie_is_nobodys_opinion():
    assert majority(opinions(vote("a"), vote("b", up=-1))) == []
    (row,) = majority(opinions(vote("a"), vote("b", up=-1), vote("c", up=-1, correction="85.")))
    assert row["vote"] == -1 and row["raters"] == ["b", "c"] and row["correction"] == "85."


def test_corrections_that_contradict_each_other_are_left_out():
    (row,) = majority(opinions(vote("a", up=-1, correction="85."), vote("b", up=-1, correction="58.")))
    assert row["correction"] is None and chats_of([row]) == []


def test_comparisons_that_contradict_each_other_are_left_out():
    one = {"prompt": QUESTION, "chosen": "85", "rejected": "58", "rater": "a"}
    other = one | {"chosen": "58", "rejected": "85", "rater": "b"}
    assert majority(opinions(one, other)) == []
    assert majority(opinions(one, one | {"rater": "c"}, other))[0]["chosen"] == "85"


def test_people_nobody_knows_are_many():
    "A file without names: each line is somebody, so the same reply rated twice is two opinions."
    rows = [{"prompt": "2+2?", "completion": "4", "label": True}] * 2
    assert len(latest(opinions(*rows))) == 2


@pytest.mark.parametrize("seed", range(5))
def test_hostile_raters_are_found_and_honest_ones_are_not(seed):
    asked = user_questions(12, seed)
    replies = [row["answer"] if i % 3 else "Answer: 7" for i, row in enumerate(asked)]
    said = opinions(*rated(asked, replies, seed, hostile=0.3))
    bad = trusted(said)[1]
    assert set(bad) == {"user 0", "user 1", "user 2"}
    right = {row["messages"][-1]["content"]: pleases(row, reply) for row, reply in zip(asked, replies)}
    rows = cleaned(said)[0]
    wrong = [row for row in rows if (row["vote"] == 1) != right[row["prompt"][-1]["content"]]]
    assert len(wrong) / len(rows) < 0.1


def test_the_loudest_gets_no_more_than_others():
    rows = opinions(*[vote("loud", reply=str(i)) for i in range(50)], vote("quiet"))
    assert [row["rater"] for row in capped(rows, 5)].count("loud") == 5
    assert [row["rater"] for row in capped(rows, 5)].count("quiet") == 1


def test_rows_are_what_the_trainers_take(tmp_path):
    rows = cleaned(opinions(vote("a", up=-1, correction="85."), vote("b", reply="It is 85.")))[0]
    for make, take in ((pairs_of, take_pairs), (thumbs_of, take_thumbs)):
        assert take(read(make(rows), "train"))
    assert all(row["from"] and row["raters"] for row in chats_of(rows))


def test_secrets_do_not_come_in():
    rows, hidden = read_feedback([vote("a", up=-1, correction="Mail ada@lovelace.org, key sk-" + "a1" * 20)])
    assert hidden["EMAIL"] == hidden["KEY"] == 1 and "lovelace" not in json.dumps(rows)


def test_what_a_chat_has_kept(tmp_path):
    "Straight from its database, and from the file that `llmcourse chatlog` writes: the same opinions."
    db = tmp_path / "chat.db"
    votes = {"Answer: 85": {"vote": 1}, "Answer: 7": {"vote": -1}, "85": {"correction": "85."}}
    for said, vote_and_more in votes.items():
        path = save_turn(db, [*QUESTION, {"role": "assistant", "content": said, "status": "done"}])
        save_vote(db, path[-1]["id"], **vote_and_more)
    found, _ = read_feedback(db, database=True)
    assert [(o["reply"], o["vote"], o["correction"]) for o in found] == [
        ("Answer: 85", 1, None),
        ("Answer: 7", -1, None),
        ("85", -1, "85."),
    ]
    for write in (export_feedback, export_votes):
        again, _ = read_feedback(write(db, tmp_path / f"{write.__name__}.jsonl"))
        assert [(o["reply"], o["vote"], o["correction"]) for o in again] == [
            (o["reply"], o["vote"], o["correction"]) for o in found
        ]


TALK = [*QUESTION, {"role": "assistant", "content": "85"}]


@pytest.mark.parametrize(
    ("row", "up"),
    [
        ({"messages": TALK, "vote": 1}, 1),
        ({"messages": TALK, "vote": -1}, -1),
        ({"messages": TALK, "thumb": "Down"}, -1),
        ({"messages": TALK, "label": True}, 1),
        ({"prompt": QUESTION[0]["content"], "response": "85", "thumb": "up"}, 1),
        ({"prompt": QUESTION, "completion": "85", "vote": -1}, -1),
        ({"prompt": QUESTION, "reply": "85", "thumb": "up"}, 1),
    ],
)
def test_a_vote_in_other_words(row, up):
    (found,) = opinions(row | {"rater": "ada"})
    assert (found["prompt"], found["reply"], found["vote"], found["rater"]) == (QUESTION, "85", up, "ada")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": TALK, "vote": 0}, '"vote" is 0'),     # a thumb down, or none
        ({"messages": QUESTION, "vote": 1}, "not feedback. Give prompt, reply and vote"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": None}], "vote": 1}, '"reply" is no text'),
        ({"messages": "85", "vote": 1}, "Feedback is prompt, reply and vote"),
        ({"said": "85", "good": 1}, "Feedback is prompt, reply and vote"),
    ],
)
def test_what_is_no_feedback_is_told_what_is(row, says):
    with pytest.raises(UserError) as e:
        opinions(row)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_correction_that_corrects_nothing_is_no_pair():
    assert pairs_of(majority(opinions(vote("a", up=-1, correction="Answer: 85")))) == []


# The gate


@pytest.mark.parametrize(("n", "least"), [(2, 2.0), (4, 1.0), (15, 4 / 15), (60, 5 / 60)])
def test_the_least_gain_that_a_gate_sees(n, least):
    "Checked against the gate itself: that gain passes, and one answer less does not."
    from llmcourse.turning import least_gain

    assert least_gain(n) == pytest.approx(least)
    sees = lambda k: gate(*[[{"task": "a", "question": i, "right": i < r} for i in range(n)] for r in (0, 0, k)])
    assert all(sees(k)["passed"] == (k >= round(least * n)) for k in range(n + 1))


def test_a_round_says_what_it_learned_from_and_what_its_exam_could_see():
    from llmcourse.turning import said

    line = {"round": 2, "opinions": 16, "kept": 16, "used": 8, "of earlier rounds": 3, "earlier chats": 500}
    line |= {"kinds": [{"n": 8}], "before": 0.75, "after": 0.75, "low": -0.2, "high": 0.2, "faults": []}
    line |= {"passed": False, "why": "not measurably better"}
    text = said(line)
    assert "16 opinions, 8 rows to learn from + 3 of earlier rounds + 500 earlier chats; exam of 8: 75% → 75%" in text
    assert "with 8 questions nothing could pass" in text
    assert "of 50 points or more" in said(line | {"before": 0.25, "after": 0.25})
    assert "questions" not in said(line | {"passed": True, "why": "better"})
    del line["used"], line["of earlier rounds"], line["earlier chats"]
    assert "16 opinions, 16 rows to learn from; exam of 8" in said(line), "a line of an earlier version"


def results(shares, rng, n=60):
    return [{"task": k, "question": (k, i), "right": rng.random() < p} for k, p in shares.items() for i in range(n)]


def test_a_lucky_round_is_stopped_19_times_of_20():
    rng, shares = random.Random(7), {"sums": 1.0, "stories": 0.9, "hints": 0.3, "off topic": 0.9}
    passed = 0
    for _ in range(1000):
        old = results(shares, rng)
        passed += gate(old, old, results(shares, rng))["passed"]
    assert passed <= 50


@pytest.mark.parametrize("what", ["faults", "slower", "longer"])
def test_a_better_model_can_be_stopped_too(what):
    better = {"passed": True, "why": "better"}
    fine = {"faults": [], "slower": 1.0, "longer": 1.0}
    assert may_serve(better, **fine)["passed"]
    found = may_serve(better, **fine | {what: ["another rope"] if what == "faults" else 2.0})
    assert not found["passed"] and found["why"] != "better"
    assert what != "faults" or found["why"] == "the export: another rope"


@pytest.mark.parametrize("fault", [False, True], ids=["healthy", "q and k not dealt"])
def test_a_broken_export_stops_the_round(fault, tmp_path, monkeypatch):
    "The same round, with and without a fault on the way to the file."
    from llmcourse import converter, turning

    def answers(gguf, exam):
        asked = [(row, row["messages"][-1]["content"]) for row in exam[0]]
        return [row | {"question": text, "right": "round1" in str(gguf), "reply": "yes"} for row, text in asked]

    def learned(*_, **__):
        shutil.copytree(weights() / "grpo", tmp_path / "round1/run")

    for name, stand_in in (("asked_of", answers), ("learn", learned), ("slower_than", lambda *_: 1.0)):
        monkeypatch.setattr(turning, name, stand_in)
    exam = turning.exam_of(None, "tutor/sft", 4)
    turning.begin(tmp_path, "tutor/base", exam, "Q8_0")
    if fault:
        monkeypatch.setattr(converter, "permute", lambda w, heads: w)
    said = opinions(vote("a"))
    line = turning.turn(tmp_path, 1, lambda: said, exam, "tutor/base", "sft", "Q8_0", 42, [])
    assert line["passed"] != fault and bool(line["faults"]) == fault
    assert read_live(tmp_path)["live"] == ("round0/round0.gguf" if fault else "round1/round1.gguf")
    if fault:
        assert "the export: " in line["why"] and "nats from the model" in line["why"]
        assert "the export: " in turning.said(line)
    else:
        assert "its file against its model: the same model: " in turning.said(line)


# The swap


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("sft", "grpo"):
        to_gguf(f"tutor/{name}", folder / f"{name}.gguf", "Q8_0", verify=False)
    return folder


def test_no_reply_is_dropped(wheel):
    "Three clients ask while the model is swapped, swapped back, and swapped to a file that is none."
    swap(wheel, wheel / "sft.gguf")
    (wheel / "broken.gguf").write_bytes(b"GGUF but no more")
    heard, over = [], threading.Event()

    def client(url):
        ask = remote(url)
        while not over.is_set():
            heard.append("".join(ask.stream(QUESTION)))

    def until(name):
        end = time.monotonic() + 120
        while server.answers.stem != name and time.monotonic() < end:
            time.sleep(0.05)
        before = len(heard)
        while len(heard) < before + 6 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(heard) >= before + 6

    with Following(wheel, n_parallel=3) as server, ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(client, server.url) for _ in range(3)]
        try:
            for move in (lambda: swap(wheel, wheel / "grpo.gguf"), lambda: rollback(wheel)):
                move()
                until(live_model(wheel).stem)
            swap(wheel, wheel / "broken.gguf")
            end = time.monotonic() + 120
            while not server.said and time.monotonic() < end:
                time.sleep(0.05)
            assert "broken" in server.said
            until("sft")
            names, end = [], time.monotonic() + 60
            while names != ["sft"] and time.monotonic() < end:     # an engine goes when its last reply is out
                time.sleep(0.05)
                names = [engine.name for engine, _ in server.seats.engines]
            assert names == ["sft"], "the old one stays"
            assert all(job.running() for job in jobs)
        finally:
            over.set()
            rollback(wheel) if live_model(wheel).stem == "broken" else None
    assert all(job.exception() is None for job in jobs)
    assert all(text.strip().startswith("47+38") or "Answer" in text for text in heard)


def test_a_model_that_is_loading_does_not_answer_yet(tmp_path, monkeypatch):
    "`answers` names the model of the newest engine: not one that is being started, nor one that did not start."
    import llmcourse.following as following

    for name in ("old", "new", "bad"):
        (tmp_path / name).write_text(name)
    swap(tmp_path, tmp_path / "old")
    said = []

    class Engine:
        def __init__(self, model):
            said.append((model.name, seats.model.name if seats else None))
            if model.name == "bad":
                raise UserError("bad: no model")

    seats = None
    monkeypatch.setattr(following, "serve", Engine)
    seats = following.Seats(tmp_path)
    swap(tmp_path, tmp_path / "new")
    assert seats.look() and seats.model.name == "new"
    swap(tmp_path, tmp_path / "bad")
    with pytest.raises(UserError):
        seats.look()
    assert not seats.look(), "one try each"
    assert seats.model.name == "new"
    assert said == [("old", None), ("new", "old"), ("bad", "new")]


def test_the_pointer_is_old_or_new_whoever_reads_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    swap(tmp_path, tmp_path / "a")
    over, seen = threading.Event(), set()

    def look():
        while not over.is_set():
            seen.add(json.loads((tmp_path / LIVE).read_bytes())["live"])

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(look)
        for _ in range(100):
            swap(tmp_path, tmp_path / "b")
            rollback(tmp_path)
        over.set()
    assert job.exception() is None and seen <= {"a", "b"}
    assert read_live(tmp_path)["before"] == []


# The command

SMALL = ["--n", "4", "--rounds", "1", "--replay", "data/splits.jsonl"]


def turning(output, *more):
    code = "import sys; from llmcourse.cli import cli; sys.argv[0] = 'llmcourse'; cli()"
    words = [sys.executable, "-c", code, "flywheel", "run", "--output", str(output), *SMALL, *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def test_killed_between_training_and_swap(tmp_path):
    "The same command goes on: what was live stays so, nothing is trained twice, and the round is done."
    folder = tmp_path / "wheel"
    first = turning(folder)
    end = time.monotonic() + 300
    while not is_run(folder / "round1/run") and first.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert is_run(folder / "round1/run") and not (folder / "round1/done.jsonl").exists()
    assert read_live(folder)["live"] == "round0/round0.gguf"
    trained = (folder / "round1/run/run.yaml").stat().st_mtime_ns
    said = read_jsonl(folder / "round1/opinions.jsonl")

    again = turning(folder)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert "round 1:" in out and "live:" in out
    assert (folder / "round1/run/run.yaml").stat().st_mtime_ns == trained
    assert read_jsonl(folder / "round1/opinions.jsonl") == said
    done = read_jsonl(folder / "round1/done.jsonl")[0]
    assert done["passed"] == (read_live(folder)["live"] == "round1/round1.gguf")
    assert (folder / "rounds.svg").is_file()
    assert main(["flywheel", "status", "--output", str(folder)]) == 0
    if done["passed"]:
        assert main(["flywheel", "rollback", "--output", str(folder)]) == 0
        assert turning(folder).wait(300) == 0
        assert read_live(folder)["live"] == "round0/round0.gguf", "a round that is done is not swapped in again"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["turn"], "unknown action 'turn'"),
        (["status"], "nothing is live"),
        (["rollback"], "nothing is live"),
        (["gate", "--model", "tutor/rl"], "nothing is live"),
        (["run", "--method", "grop"], "unknown method"),
        (["run", "--hostile", "3"], "a share from 0 to 1"),
        (["run", "--n", "1000"], "--n 1000"),
        (["run", "--quant", "Q9"], "GGUF type"),
        (["run", "--model", "tutor/stf", "--data", "votes.jsonl"], "did you mean"),
        (["run", "--replay", "missing.jsonl"], "missing.jsonl: no such file"),
        (["run", "--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["run", "--data", "bad.jsonl"], 'bad.jsonl:2: "vote" is 7'),
        (["run", "--data", "chats.jsonl"], "not feedback"),
        (["run", "--data", "empty.jsonl"], "no feedback"),
        (["run", "--data", "pairs.jsonl"], "sft learns nothing from feedback of this kind. Take --method dpo"),
        (["run", "--data", "pairs.jsonl", "--method", "kto"], "Take --method dpo"),
        (["run", "--data", "votes.jsonl", "--model", "runs/mine"], "--exam"),
        (["run", "--data", "votes.jsonl", "--database", "chat.db"], "Give one of them"),
        (["run", "--data", "same.jsonl", "--method", "dpo"], "dpo learns nothing"),
        (["run", "--data", "tie.jsonl"], "sft learns nothing from these 2 opinions"),
        (["run", "--data", "zero.jsonl"], "All of them: workshop/opinions"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = json.dumps(vote("a"))
    (tmp_path / "votes.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(good + "\n" + json.dumps(vote("a", up=7)))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [*QUESTION, {"role": "assistant", "content": "85"}]}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "2+2?", "chosen": "4", "rejected": "5"}))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": "2+2?", "chosen": "4", "rejected": "4"}))
    (tmp_path / "tie.jsonl").write_text(good + "\n" + json.dumps(vote("b", up=-1)))
    (tmp_path / "zero.jsonl").write_text(json.dumps({"prompt": "2+2?", "response": "4", "thumb": "sideways"}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["flywheel", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_exam_is_not_learned(capsys):
    from llmcourse.opinions import unseen

    said = opinions(vote("a"), vote("b") | {"prompt": "Only a hint,  please. 2+2?"})
    exam = ([{"messages": [{"role": "user", "content": "only a hint, please. 2+2?"}]}], None)
    assert unseen(said, exam) == said[:1] and "of the exam: 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="--exam"):
        unseen(said[1:], exam)


def test_two_do_not_turn_the_same_wheel(tmp_path):
    from llmcourse.live import alone

    with alone(tmp_path), pytest.raises(UserError, match="another process"), alone(tmp_path):
        pass


def test_a_wheel_that_was_stopped_keeps_what_is_live_and_nobody_elses_files(tmp_path):
    from llmcourse.live import alone

    for place in (tmp_path / "a/wheel", tmp_path / "b"):
        with pytest.raises(UserError), alone(place):
            (place / "settings.jsonl").write_text("{}")
            if place.name == "b":
                (place / "model.gguf").write_text("")
                swap(place, place / "model.gguf")
            raise UserError("stopped")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", LIVE, "model.gguf", "settings.jsonl"]
    with alone(tmp_path / "b"):
        pass
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine.txt").write_text("mine")
    with alone(tmp_path / "c"):
        pass
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine.txt"] and (tmp_path / "b" / LIVE).is_file()


def test_new_feedback_is_not_learned_as_the_old_one_again(tmp_path, monkeypatch, capsys):
    "The pool has rows of earlier rounds, so what matters is whether there are any in the new file."
    from llmcourse import turning

    monkeypatch.setattr(turning, "begin", lambda *_: pytest.fail("something was written"))
    write_jsonl(tmp_path / "round1/opinions.jsonl", opinions(vote("a")))
    write_jsonl(tmp_path / "round1/rows.jsonl", cleaned(opinions(vote("a")))[0])
    down = [vote(str(i), reply=f"Answer: {i}", up=-1) for i in range(16)]
    write_jsonl(tmp_path / "new.jsonl", [*down, vote("x"), vote("y", up=-1)])
    before = sorted(tmp_path.rglob("*"))
    words = ["run", "--data", str(tmp_path / "new.jsonl"), "--output", str(tmp_path), "--n", "4"]
    assert main(["flywheel", *words]) == 2
    assert "sft learns nothing from these 18 opinions" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_of_this_round_are_counted_apart(tmp_path, monkeypatch):
    from llmcourse import turning

    write_jsonl(tmp_path / "round0/answers.jsonl", [{"right": True}])
    swap(tmp_path, tmp_path / "round0/answers.jsonl")
    old, new = opinions(vote("a")), opinions(vote("b", reply="85"), vote("c", reply="7", up=-1))
    write_jsonl(tmp_path / "round1/rows.jsonl", cleaned(old)[0])
    verdict = {"passed": False, "why": "worse"}
    for name, value in (("learn", None), ("to_gguf", None), ("asked_of", [{"right": True}]), ("judged", verdict)):
        monkeypatch.setattr(turning, name, lambda *_, value=value, **__: value)
    line = turning.turn(tmp_path, 2, lambda: new, None, "tutor/sft", "sft", "Q8_0", 42, [{}] * 5)
    assert [line[k] for k in ("kept", "used", "of earlier rounds", "earlier chats")] == [2, 1, 1, 5]


@pytest.mark.parametrize("action", ["gate", "run"])
def test_another_exam_is_named(action, tmp_path, capsys):
    "Before anything is asked, and without a word about --grade, which flywheel does not have."
    rows = [{"messages": [{"role": "user", "content": f"{i}+1?"}], "answer": str(i + 1)} for i in range(15)]
    write_jsonl(tmp_path / "other.jsonl", rows)
    write_jsonl(tmp_path / "votes.jsonl", [vote("a")])
    wheel = tmp_path / "wheel"
    asked = user_questions(4, 9042, "test")
    write_jsonl(wheel / "round0/answers.jsonl", [{"question": row["messages"][-1]["content"]} for row in asked])
    swap(wheel, wheel / "round0/answers.jsonl")
    write_jsonl(wheel / "settings.jsonl", [{"model": "tutor/sft", "exam": len(asked)}])
    more = ["--data", str(tmp_path / "votes.jsonl")] if action == "run" else ["--model", "tutor/rl"]
    words = ["flywheel", action, "--output", str(wheel), *more]
    assert main([*words, "--exam", str(tmp_path / "other.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "started with another exam. Leave --exam out" in err and "--grade" not in err
    assert main([*words, "--n", "5"]) == 2
    assert "started with another exam. Give --exam, --n and --seed as at its start" in capsys.readouterr().err


def test_an_interrupt_that_a_finalizer_swallows_is_sent_again():
    code = """
        import signal, time
        from llmcourse.exits import in_one_line
        class Held:
            def __del__(self): signal.raise_signal(signal.SIGINT)
        def call():
            Held()
            time.sleep(100)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise SystemExit(in_one_line(call))"""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr.strip()) == (130, "llmcourse: interrupted")


def test_a_damaged_pointer_is_named(tmp_path):
    (tmp_path / LIVE).write_text('{"live":')
    with pytest.raises(UserError, match="not a pointer"):
        read_live(tmp_path)
