"""A reward of the reader's own: tried on replies of known worth, trained with, and repeated from its card."""

import json

import pytest
from test_cli import bad, jsonl
from test_rewards import TINY

from llmcourse.card import read_card
from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.methods import rerun
from llmcourse.rewardcheck import check_rewards, known_replies
from llmcourse.rl import grpo
from llmcourse.tutor import problems

MINE = """
import math, time
from llmcourse.questions import final_answer
def _said(c): return final_answer(c[-1]["content"])
def exact(completions, answer, **columns): return [float(_said(c) == a) for c, a in zip(completions, answer)]
def form(completions, **columns): return [float(_said(c) is not None) for c in completions]
def brief(completions, **columns): return [1 / (1 + len(c[-1]["content"])) for c in completions]
def const(completions, **columns): return [0.5] * len(completions)
def odd(completions, **columns):
    odd.calls = getattr(odd, "calls", 0) + 1
    return [float(odd.calls)] * len(completions)
def abstains(completions, **columns): return [None] * len(completions)
def nan(completions, **columns): return [math.nan] * len(completions)
def infinite(completions, **columns): return [math.inf] * len(completions)
def short(completions, **columns): return [1.0]
def number(completions, **columns): return 1.0
def tensor(completions, **columns):
    import torch
    return torch.ones(len(completions))
def raises(completions, **columns): return [1 / len(c[-1]["content"]) for c in completions]
def leaves(completions, **columns): raise SystemExit(0)
def slow(completions, **columns): time.sleep(20)
def narrow(completions, answer): return [1.0] * len(completions)
def wants(completions, colour, **columns): return [1.0] * len(completions)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return "mine.py"


def said(capsys, *words) -> tuple[int, str]:
    code = main(["reward", "check", *words])
    return code, capsys.readouterr().out


def test_a_good_reward_passes_and_says_what_it_does_not_tell_apart(mine, capsys):
    code, out = said(capsys, "mine.py:exact")
    assert code == 0 and "✓ the reference earns more than a wrong, a stranger's, half and no reply, in every row" in out
    assert "exact: 72 replies of known worth to 8 rows" in out and "ms a reply" in out
    lines = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert lines["the reference"] == ["1.00"] and lines["a wrong answer"] == ["0.00", "less", "in", "8"]
    assert lines["right, no working"] == lines["far too long"] == ["1.00", "equal", "in", "8"]
    assert lines["right, no answer line"] == lines["two answers"] == ["0.00", "less", "in", "8"]


@pytest.mark.parametrize(
    "name,fault",
    [
        ("form", "✗ a wrong answer does not earn less than the reference in 8 of 8 rows"),
        ("brief", "✗ right, no working earns more than the reference in 8 of 8 rows"),
        ("const", "✗ constant: every reply got 0.5, so nothing can be learned"),
        ("odd", "✗ constant"),
    ],
)
def test_a_reward_that_would_spoil_a_training_is_code_1(name, fault, mine, capsys):
    code, out = said(capsys, f"mine.py:{name}")
    assert code == 1 and fault in out and "✓" not in out


def test_a_reward_that_changes_its_mind_is_named(tmp_path):
    (tmp_path / "r.py").write_text(
        "import itertools\nn = itertools.count()\n"
        "def moody(completions, **columns): return [float(next(n)) for c in completions]\n"
    )
    (found,) = check_rewards(str(tmp_path / "r.py"))
    assert found["faults"][-1] == "the same call twice gave different rewards"


@pytest.mark.parametrize(
    "name,hint",
    [
        ("abstains", "the reward abstains returned None for all 72 replies"),
        ("nan", "rows[0]: the reward nan gave nan to the reply"),
        ("infinite", "rows[0]: the reward infinite gave inf to the reply"),
        ("short", "the reward short returned 1 scores for 72 replies"),
        ("number", "the reward number returned a float"),
        ("tensor", "the reward tensor returned a Tensor"),
        ("raises", "the reward raises failed (ZeroDivisionError: division by zero) on the reply ''"),
        ("leaves", "the reward leaves failed (SystemExit"),
        ("narrow", "unexpected keyword argument"),
        ("wants", "no 'colour', which the reward asks for"),
        ("exat", "did you mean 'exact'"),
    ],
)
def test_a_broken_reward_is_one_line(name, hint, mine, capsys):
    assert hint in bad(capsys, "reward", "check", f"mine.py:{name}")


def test_a_slow_reward_is_named(mine, capsys):
    words = ["reward", "check", "mine.py:slow", "--timeout", "0.3"]
    assert "the reward slow was not done with 72 replies in 0.3 s" in bad(capsys, *words)


@pytest.mark.parametrize(
    "text,hint",
    [
        ("def f(:\n", "no Python"),
        ("import nowhere_at_all\n", "stops while it is loaded (ModuleNotFoundError"),
        ("raise SystemExit(0)\n", "stops while it is loaded (SystemExit"),
        ("def helper(x): return x\n", "no reward in it"),
    ],
)
def test_a_broken_file_is_one_line(text, hint, tmp_path, capsys):
    (tmp_path / "r.py").write_text(text)
    assert hint in bad(capsys, "reward", "check", tmp_path / "r.py")
    assert hint in bad(capsys, "grpo", "--reward", tmp_path / "r.py", "--output", tmp_path / "run")


def test_the_rows_have_to_have_answers(mine, tmp_path, capsys):
    words = ["reward", "check", "mine.py:exact", "--data"]
    one = {"question": "What is 1 plus 1?", "answer": "2"}
    assert "no such file" in bad(capsys, *words, "nowhere.jsonl")
    assert "the only row" in bad(capsys, *words, jsonl(tmp_path / "one.jsonl", one))
    chats = [{"messages": [{"role": "user", "content": f"Hello {i}"}]} for i in range(3)]
    assert "no answer" in bad(capsys, "reward", "check", "mine.py:form", "--data", jsonl(tmp_path / "c.jsonl", *chats))


def test_published_rows_and_answers_that_are_texts(mine, tmp_path, capsys):
    gsm8k = [{"question": f"What is {n} plus 4?", "answer": f"{n}+4=<<{n}+4={n + 4}>>{n + 4}\n#### {n + 4}"}
             for n in range(10, 20)]  # fmt: skip
    (tmp_path / "r.py").write_text(
        "def last(completions, answer, **columns):\n"
        "    return [float(c[-1]['content'].strip().endswith('#### ' + a)) for c, a in zip(completions, answer)]\n"
    )
    code, out = said(capsys, "r.py", "--data", str(jsonl(tmp_path / "g.jsonl", *gsm8k)), "--n", "4", "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["rows"] == 4 and found["scores"]["the reference"] == [1.0] * 4
    texts = known_replies("Answer: the cow", "the cow", "Answer: the dog", "the dog")
    assert texts["a wrong answer"] == "Answer: the dog" and texts["right, no answer line"] == "the cow"


def test_grpo_takes_the_file_and_its_card_repeats_it(mine, tmp_path):
    rows = problems(8, 1, ["add"])
    run = grpo(rows, "run", reward_funcs="mine.py:brief", **TINY | {"temperature": 1.5})
    place = read_card(run).settings["reward_funcs"]
    assert len(place) == 1 and place[0].startswith(f"{tmp_path / 'mine.py'}:brief#")
    again = rerun(run, "again")
    assert read_card(again).files["model.safetensors"] == read_card(run).files["model.safetensors"]
    (tmp_path / "mine.py").write_text(MINE.replace("1 / (1 +", "2 / (1 +"))
    with pytest.raises(UserError, match="changed since the run"):
        rerun(run, "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("name,hint", [("abstains", "returned None for all"), ("slow", "the reward slow was not done")])
def test_the_look_before_the_first_step_finds_it(name, hint, mine, monkeypatch):
    monkeypatch.setattr("llmcourse.probe.LONGEST_CALL", 0.3)
    with pytest.raises(UserError, match=hint):
        grpo(problems(8, 1, ["add"]), "run", reward_funcs=f"mine.py:{name}", **TINY)
