"""Prompts: templates that refuse, files that are read before anything is asked, votes, the gate and its exit codes."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import notebooks
import pytest
import yaml

from llmcourse import promptgate
from llmcourse.cli import main
from llmcourse.core import UserError, write_jsonl
from llmcourse.evals import paired
from llmcourse.meter import Meter, usd
from llmcourse.promptfiles import read_prompt, read_prompts, write_score
from llmcourse.promptgate import prompt_report, tried
from llmcourse.prompts import Prompt, Voting, asked, filled, holm, vote
from llmcourse.serve import serve

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "data/prompts"
QUESTION = "What is 25 plus 31?"


# A template with named variables.


@pytest.mark.parametrize(
    ("template", "values", "said"),
    [
        ("{{ question }}", {}, "nothing given for {{ question }}"),
        ("{{ question }}", {"qestion": "?"}, "did you mean 'question'"),
        ("{{ question }}", {"question": "?", "context": "x"}, "unknown variable of template: 'context'"),
        ("no hole", {"question": "?"}, "no variable in it"),
        ("{{ question ", {"question": "?"}, "no Jinja template"),
        ("{% if question %}", {"question": "?"}, "no Jinja template"),
        ("{{ question.deep.er }}", {"question": "?"}, "cannot be filled in"),
        ("{{ question.__class__.__mro__ }}", {"question": "?"}, "cannot be filled in"),
    ],
)
def test_a_template_refuses(template, values, said):
    with pytest.raises(UserError) as e:
        filled(template, values)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["{{ answer }}", "{% raw %}", "a\n", "$5 {x} %s", "ü 😀", ""])
def test_what_is_filled_in_stays_as_it_is(text):
    assert filled("<{{ question }}>\n", {"question": text}) == f"<{text}>\n"


# The parts of a prompt.


def roles(messages):
    return [(m["role"], m["content"]) for m in messages]


def test_a_chat_and_a_text():
    shown = ({"question": "1+1?", "reply": "2"},)
    chat = Prompt("Q: {{ question }}", "Be brief.", shown)
    assert roles(chat.messages(question="2+2?")) == [
        ("system", "Be brief."), ("user", "Q: 1+1?"), ("assistant", "2"), ("user", "Q: 2+2?")]  # fmt: skip
    text = Prompt("Q: {{ question }}\nA:", examples=shown, form="text")
    assert roles(text.messages(question="2+2?")) == [("user", "Q: 1+1?\nA: 2\nQ: 2+2?\nA:")]


def turn(role, content):
    return {"role": role, "content": content}


def test_asked_keeps_earlier_turns_and_takes_columns_of_the_row():
    prompt = Prompt("{{ context }} {{ question }}", "Be brief.")
    row = {"messages": [turn("system", "old"), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Why?")],
           "context": "It rains.", "answer": "wet"}  # fmt: skip
    (one,) = asked(prompt, [row])
    assert [m["content"] for m in one["messages"]] == ["Be brief.", "Hi", "Hello", "It rains. Why?"]
    assert one["answer"] == "wet" and row["messages"][0]["content"] == "old"
    with pytest.raises(UserError, match="row 2: unknown variable of prompt 1: 'context'"):
        asked(prompt, [row, {"question": "Why?"}])
    with pytest.raises(UserError, match="row 1: a text has no place for earlier turns"):
        asked(Prompt("{{ question }}", form="text"), [row])


# Votes and several comparisons.


def number(reply):
    return reply.split()[-1] if reply[-1].isdigit() else None


@pytest.mark.parametrize(
    ("replies", "wanted"),
    [(["a 1", "b 2", "c 2"], "b 2"), (["a 1", "b 2"], "a 1"), (["hm", "b 2", "hm"], "b 2"), (["hm", "ho"], "hm")],
)
def test_a_vote(replies, wanted):
    assert vote(replies, number) == wanted


def test_voting_asks_k_times_and_keeps_the_questions_apart():
    said = itertools.cycle(["1", "2", "2"])
    voting = Voting(lambda messages: f"{messages[-1]['content']} {next(said)}", 3, number)
    voting.generate.batch = lambda chats: [f"{chat[-1]['content']} {next(said)}" for chat in chats]
    assert voting.batch([[turn("user", name)] for name in "abcd"]) == ["a 2", "b 2", "c 2", "d 2"]


def test_holm_keeps_its_promise():
    "In 2,000 draws of six comparisons without any effect, at most 5 in 100 draws hold a false alarm (± chance)."
    import random

    rng, alarms, plain = random.Random(1), 0, 0
    for _ in range(2000):
        ps = [rng.random() for _ in range(6)]
        alarms += min(holm(ps)) < 0.05
        plain += min(ps) < 0.05
    assert 60 < alarms < 140 and plain > 400
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


# The meter.


def test_a_meter_counts_what_the_model_reads_and_writes():
    from llmcourse.models import Local, encode, load

    tutor = Local(*load("tutor/sft"), max_new_tokens=60)
    meter, chat = Meter(tutor), [turn("user", QUESTION)]
    reply = meter(chat)
    read, written = meter.total()
    assert reply == tutor(chat) and read == len(encode(tutor.tokenizer, chat))
    assert written == len(tutor.tokenizer(reply, add_special_tokens=False)["input_ids"]) + 1
    meter.batch([chat, chat])
    assert meter.total() == (3 * read, 3 * written)
    outer = Meter(Voting(Meter(tutor), 2, number))
    outer.batch([chat])
    assert outer.total() == (2 * read, 2 * written) and Meter(meter)(chat) and meter.total() == (4 * read, 4 * written)
    assert usd((2_000_000, 1_000_000), 1, 4) == 6 and Meter(lambda m: "x").total() is None


# Files.

GOOD = "name: a\ntemplate: '{{ question }}'\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a", "no template"),
        ("template: '{{ question }}'", "no name"),
        ("- a", "not a prompt"),
        ("name: a: b", "p.yaml:1: not YAML"),
        (GOOD + "sytem: x", "did you mean 'system'"),
        (GOOD + "version: two", "version is 'two'. Give a whole number"),
        (GOOD + "version: 0", "Count from 1"),
        (GOOD + "form: chatt", "did you mean 'chat'"),
        (GOOD + "examples: [hello]", "example 1: no reply"),
        (GOOD + "examples: [{question: a}]", "example 1: no reply"),
        (GOOD + "examples: [{question: a, reply: b}, {qestion: a, reply: b}]", "example 2: unknown variable"),
        ("name: a\ntemplate: '{{ question'", "no Jinja template"),
        ("name: a\ntemplate: hello", "no variable in its template"),
    ],
)
def test_a_bad_file_is_one_line(text, said, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError) as e:
        read_prompt(tmp_path / "p.yaml")
    assert said in str(e.value) and "p.yaml" in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_two_files_with_one_name_and_version(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"b\.yaml: a 1 again, as in .*a\.yaml"):
        read_prompts(tmp_path)
    (tmp_path / "b.yaml").write_text(GOOD + "version: 2\n")
    assert [p.title() for _, p in read_prompts(tmp_path)] == ["a 1", "a 2"]


@pytest.mark.parametrize("tail", ["", "score: {n: 1, wrong: []}\n", "score:\n  n: 1\n\n  wrong:\n  - 1\n# the end\n"])
@pytest.mark.parametrize("after", ["", "about: later\n"])
def test_a_score_is_replaced_and_nothing_else(tail, after, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("# mine\n" + GOOD + tail + after)
    before = read_prompt(file)
    for n in (7, 8):
        write_score(file, {"n": n, "wrong": list(range(1, 60)), "model": "ü"})
    found = read_prompt(file)
    assert found.score["n"] == 8 and found.score["wrong"][-1] == 59 and found.about == before.about
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# mine\n") and text.count("score:") == 1 and list(tmp_path.iterdir()) == [file]


# The gate.


class Skill:
    "Knows the answers to some questions, in their order, if it is asked politely."

    def __init__(self, rude_knows):
        self.rude_knows = rude_knows

    def __call__(self, messages):
        said = messages[-1]["content"]
        i = int(said.split()[1])
        return f"so {i}" if said.endswith("please") or i < self.rude_knows else "no idea"


def numbered(n):
    return [{"question": f"q {i}", "answer": str(i)} for i in range(n)]


POLITE, RUDE = "{{ question }} please", "{{ question }}"


@pytest.mark.parametrize(("rude_knows", "wanted"), [(10, "worse"), (38, "no difference seen")])
def test_the_gate_sees_an_edit_that_hurts(rude_knows, wanted):
    prompts = [Prompt(POLITE, name="p"), Prompt(RUDE, name="p", version=2)]
    first, second = prompt_report(prompts, Skill(rude_knows), "skill", numbered(40))
    assert "p" not in first and second["against"] == "p 1" and second["verdict"] == wanted
    assert second["p"] == pytest.approx(paired([True] * 40, [i < rude_knows for i in range(40)])["p"])
    assert second["record"]["wrong"] == list(range(rude_knows + 1, 41))


def test_the_gate_compares_with_the_file_if_it_is_of_the_same_model_and_rows():
    (row,) = prompt_report([Prompt(POLITE, name="p")], Skill(0), "skill", numbered(40))
    edited = Prompt(RUDE, name="p", score=row["record"])
    (found,) = prompt_report([edited], Skill(5), "skill", numbered(40))
    assert found["against"] == "the score in its file" and found["verdict"] == "worse"
    for model, rows in (("another", numbered(40)), ("skill", numbered(39))):
        assert "p" not in prompt_report([edited], Skill(5), model, rows)[0]
    assert "p" not in prompt_report([edited], Skill(5), "skill", numbered(40), "contains")[0]


def test_many_prompts_raise_the_bar():
    "An edit with p = 0.03 alone is no alarm among ten."
    rows, skill = numbered(40), Skill(34)
    pairs = [Prompt(POLITE, name="a"), Prompt(RUDE, name="a", version=2)]
    assert prompt_report(pairs, skill, "skill", rows)[1]["verdict"] == "worse"
    same = [Prompt(POLITE, name=f"b{i}", version=v) for i in range(9) for v in (1, 2)]
    assert prompt_report([*pairs, *same], skill, "skill", rows)[1]["verdict"] == "no difference seen"


def test_tried_asks_a_text_as_a_text():
    heard = []

    def continues(prompt):
        heard.append(prompt)
        return "so 0"

    shown = ({"question": "x", "reply": "y"},)
    tried(Prompt("{{ question }}\nA:", form="text", examples=shown), continues, numbered(1))
    assert heard == ["x\nA: y\nq 0\nA:"]


def test_columns_of_a_file_are_variables(tmp_path, monkeypatch):
    rows = [{"question": f"q {i}", "context": f"c {i}", "answer": f"c {i}"} for i in range(3)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    (tmp_path / "p.yaml").write_text("name: a\ntemplate: '{{ question }} {{ context }}'\n")
    monkeypatch.setattr(promptgate, "examinee", lambda *who: lambda messages: messages[-1]["content"][4:])
    assert main(["prompts", "test", str(tmp_path / "p.yaml"), "--data", data, "--record"]) == 0
    assert read_prompt(tmp_path / "p.yaml").score["wrong"] == []


def lines_of(capsys):
    out = capsys.readouterr()
    return out.out, [line for line in out.err.splitlines() if line.startswith("llmcourse:")]


@pytest.fixture
def rows_file(tmp_path):
    from llmcourse.tutor import problems

    rows = problems(20, 5, ["story1", "story3"], split="test")
    return str(write_jsonl(tmp_path / "rows.jsonl", [{k: r[k] for k in ("question", "answer")} for r in rows]))


def test_the_shipped_prompts_on_the_tutor(rows_file, capsys):
    "The famous sentence is measurably worse for tutor/sft: exit code 1. Alone, version 1 passes."
    words = ["--data", rows_file, "--price-in", "1", "--price-out", "4"]
    assert main(["prompts", "test", str(SHIPPED / "tutor"), *words]) == 1
    out, _ = lines_of(capsys)
    assert "tutor 2: measurably worse than tutor 1" in out and "USD for 1,000" in out and "tokens in" in out
    assert main(["prompts", "test", str(SHIPPED / "tutor/1.yaml"), *words, "--json"]) == 0
    (row,) = json.loads(lines_of(capsys)[0])
    assert row["n"] == 40 and row["low"] > 0.5 and row["record"]["tokens_in"] > 40 * 30


def test_the_shipped_text_on_the_base_tutor(rows_file, capsys):
    assert main(["prompts", "test", str(SHIPPED / "worked.yaml"), "--data", rows_file, "--model", "tutor/base",
                 "--json"]) == 0  # fmt: skip
    (row,) = json.loads(lines_of(capsys)[0])
    assert row["low"] > 0.7


def test_an_edit_in_place_is_caught_by_the_recorded_score(rows_file, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text((SHIPPED / "tutor/1.yaml").read_text())
    words = ["prompts", "test", str(file), "--data", rows_file, "--record"]
    assert main(words) == 0
    score = read_prompt(file).score
    assert score["model"] == "tutor/sft" and score["n"] == 40 and "date" not in score
    assert main(words) == 0 and read_prompt(file).score == score  # greedy: the same again
    assert "no difference seen from the score in its file" in lines_of(capsys)[0]
    file.write_text(file.read_text().replace('"{{ question }}"', '"{{ question }} Think step by step."'))
    assert main(words) == 1
    assert read_prompt(file).score == score  # a worse one is not written down
    assert "measurably worse than the score in its file" in lines_of(capsys)[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompts", "tset", "x"], "did you mean 'test'"),
        (["prompts", "test", "nowhere.yaml"], "no such file"),
        (["prompts", "test", "empty"], "no prompt there"),
        (["prompts", "test", "good.yaml", "--price-in", "1"], "--price-out: missing"),
        (["prompts", "test", "good.yaml", "--data", "bare.jsonl"], "bare.jsonl:1"),
        (["prompts", "test", "context.yaml", "--data", "rows.jsonl"], "rows.jsonl:1: unknown variable of c 1"),
        (["prompts", "test", "good.yaml", "--data", "rows.jsonl", "--url", "http://127.0.0.1:9/v1"], "nothing answers"),
        (["prompts", "test", "good.yaml", "--data", "rows.jsonl", "--model", "tutor/sfd"], "did you mean"),
        (["prompts", "test", "twice"], "a 1 again"),
        (["prompts", "test", "long.yaml", "--data", "rows.jsonl"], "rows.jsonl:1"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x[2:]),
)
def test_bad_input_is_one_line_and_exit_code_2(words, said, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "context.yaml").write_text("name: c\ntemplate: '{{ context }} {{ question }}'\n")
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"name": "l", "template": "word " * 2000 + "{{ question }}"}))
    (tmp_path / "bare.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    for name in ("empty", "twice"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / "twice" / f"{name}.yaml").write_text(GOOD)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(words) == 2
    _, errors = lines_of(capsys)
    assert len(errors) == 1 and said in errors[0], errors
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_server_by_one_argument(rows_file, tmp_path, capsys):
    "The same command at a URL: the score of version 1 within a few rows of the local one, tokens as the server counts."
    from llmcourse.export import to_gguf

    gguf = to_gguf("tutor/sft", tmp_path / "tutor.gguf", dtype="f16")
    with serve(gguf, n_parallel=8) as server:
        words = ["prompts", "test", str(SHIPPED / "tutor/1.yaml"), "--data", rows_file, "--json"]
        assert main([*words, "--url", server.url]) == 0
        (there,) = json.loads(lines_of(capsys)[0])
        assert main(words) == 0
        (here,) = json.loads(lines_of(capsys)[0])
    assert abs(there["correct"] - here["correct"]) <= 3 and there["record"]["model"] == server.name
    assert abs(there["record"]["tokens_in"] - here["record"]["tokens_in"]) <= 40
    assert abs(there["record"]["tokens_out"] / here["record"]["tokens_out"] - 1) < 0.1


def test_an_interrupt_leaves_the_files_as_they_were(rows_file, tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(promptgate, "tried", interrupted)
    assert main(["prompts", "test", str(file), "--data", rows_file, "--record"]) == 130
    assert file.read_text() == GOOD and sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "rows.jsonl"]


class StandIn(BaseHTTPRequestHandler):
    "An OpenAI-compatible server that gives everybody the same answer, and counts as it likes."

    protocol_version = "HTTP/1.1"
    asked = 0

    def answer(self, body):
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/chat/completions", self.path  # most servers today have no other
        StandIn.asked += 1
        message = {"role": "assistant", "content": "Answer: 85"}
        usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
        self.answer({"id": "1", "object": "chat.completion", "created": 1, "model": "stand-in", "usage": usage,
                     "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})  # fmt: skip

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_the_chapter_asks_any_url(tmp_path):
    "One argument, the same cells: every question goes to the server, and its own count of tokens is on the board."
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "nbs").mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        nb = notebooks.run(ROOT / "nbs/03_prompts.ipynb", tmp_path / "out.ipynb", cwd=tmp_path / "nbs", url=url)
    finally:
        server.shutdown()
        server.server_close()
    assert StandIn.asked > 1500 and "✓ 03.3 done" in notebooks.text_outputs(nb)
