"""Rounds: questions that teach, a gate that is not fooled, and an interruption anywhere that costs nothing."""

import random

import pytest
from transformers import TrainerCallback

from llmcourse.card import read_card
from llmcourse.core import UserError, read_jsonl
from llmcourse.rl import exact_reward, grpo
from llmcourse.rounds import gate, next_rows, rounds, sample_groups, thread_reward
from llmcourse.tutor import held_out, stories

TINY = dict(num_generations=2, per_device_train_batch_size=4, max_steps=3, warmup_steps=0, max_completion_length=12,
            save_steps=1, temperature=1.5)  # fmt: skip


def results(right, kind="all"):
    return [{"task": kind, "question": f"{kind} {i}", "right": bool(r)} for i, r in enumerate(right)]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("steps", [3, 4, 6])
def test_stories(steps, split):
    rows = stories(60, steps, 3, split)
    assert rows == stories(60, steps, 3, split) != stories(60, steps, 4, split)
    assert len({row["messages"][-1]["content"] for row in rows}) == 60
    for row in rows:
        words = row["messages"][-1]["content"].replace(".", "").split()
        numbers = [(i, int(w)) for i, w in enumerate(words) if w.isdigit()]
        assert len(numbers) == steps + 1 and row["task"] == f"{steps} steps"
        a = numbers[0][1]
        for i, b in numbers[1:]:
            op = "-" if {"loses", "sells", "away", "uses", "drops", "breaks"} & set(words[i - 2 : i]) else "+"
            assert held_out(a, op, b) == (split == "test")
            a = a + b if op == "+" else a - b
        assert str(a) == row["answer"]


def test_questions_that_teach_are_kept():
    rows = [{"messages": [], "answer": "1", "rewards": r} for r in ([1, 1], [0, 1], [0, 0], [0.5, 0.25])]
    assert next_rows(rows) == [{"messages": [], "answer": "1"}] * 2
    with pytest.raises(UserError, match="all 2 groups are silent"):
        next_rows([rows[0], rows[2]])


def test_each_question_is_tried_and_its_replies_stay_with_it():
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(3)]
    calls = []

    def ask(model, asked, temperature):
        calls.append((model, len(asked), temperature))
        return [{"reply": f"Answer: {2 * (n % 2)}"} for n in range(len(asked))]

    found = sample_groups(ask, "m", rows, exact_reward, group=4)
    assert calls == [("m", 12, 1.0)]
    assert [row["rewards"] for row in found] == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("rows,group", [([], 4), ([{"messages": [], "answer": "1"}], 1)])
def test_an_empty_group_is_one_line(rows, group):
    with pytest.raises(UserError, match="give some, and two replies each"):
        sample_groups(None, "m", rows, exact_reward, group)


def test_a_prompt_longer_than_the_context_and_a_group_of_one(tmp_path):
    long = [{"messages": [{"role": "user", "content": "1 " * 1100}], "answer": "1"}] * 4
    with pytest.raises(UserError, match=r"rows\[0\]: a prompt of 2\d+ tokens, and the model has room for"):
        grpo(long, tmp_path / "run", reward_funcs=exact_reward, **TINY)
    short = [{"messages": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}] * 4
    with pytest.raises(UserError) as e:
        grpo(short, tmp_path / "run", reward_funcs=exact_reward, **TINY | {"num_generations": 1})
    assert "generation" in str(e.value) and len(str(e.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_thread_of_a_story():
    question = [{"role": "user", "content": "Ana has 47 coins. She finds 38. Then she loses 29. How many?"}]
    said = {
        "47+38: so 85. 85-29: so 56.\nAnswer: 56": 1.0,
        "47+38: so 85. 85-29: so 46.\nAnswer: 46": 0.5,
        "47+38: so 85.\nAnswer: 85": 0.25,
        "38+47: so 85.\nAnswer: 85": 0.0,
        "47-29: so 18. 18+38: so 56.\nAnswer: 56": 0.5,  # another order that comes to the same
        "Answer: 56": 0.5,
        "": 0.0,
        "47+38: so 85. 85-29: so 56. 56+1: so 57.\nAnswer: 57": 0.5,
    }
    replies = [[{"role": "assistant", "content": text}] for text in said]
    assert thread_reward(replies, [question] * len(said), ["56"] * len(said)) == list(said.values())


def test_the_gate():
    rng = random.Random(0)
    half = [rng.random() < 0.5 for _ in range(100)]
    more = [r or rng.random() < 0.6 for r in half]
    whole = lambda stories, sums: results(stories, "stories") + results(sums, "sums")
    start = whole(half, [1] * 60)
    assert gate(start, start, whole(more, [1] * 60))["why"] == "better"
    same = gate(start, start, start)
    assert not same["passed"] and same["why"] == "not measurably better" and same["gain"] == 0
    back = gate(start, whole(more, [1] * 60), start)  # as at the start, and worse than the best so far
    assert not back["passed"] and back["why"] == "worse" and back["high"] < 0
    lost = gate(start, start, whole(more, [1] * 45 + [0] * 15))
    assert not lost["passed"] and lost["why"] == "worse: sums" and lost["low"] > 0
    best = whole(half, [1] * 52 + [0] * 8)  # two rounds that each lose eight sums: only the start shows it
    new = whole(more, [1] * 44 + [0] * 16)
    assert gate(best, best, whole(more, [1] * 47 + [0] * 13))["passed"]
    assert gate(start, best, new)["why"] == "worse: sums"


def test_more_kinds_make_the_gate_stricter_about_each():
    kinds = lambda n, lost: sum((results([1] * (50 - lost * (k == 0)) + [0] * lost * (k == 0), str(k))
                                 for k in range(n)), []) + results([0] * 50, "new")  # fmt: skip
    better = lambda rows: rows[:-50] + results([1] * 50, "new")
    assert gate(kinds(1, 0), kinds(1, 0), better(kinds(1, 6)))["why"] == "worse: 0"
    assert gate(kinds(12, 0), kinds(12, 0), better(kinds(12, 6)))["why"] == "better"


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 2:
            raise KeyboardInterrupt


def never_solved(completions, answer, **columns):
    return [0.0] * len(completions)


def odd(completions, **columns):
    return [float(len(c[-1]["content"]) % 2) for c in completions]


def test_interrupted_rounds_go_on_to_the_same_weights(tmp_path, monkeypatch):
    "Round 1 passes the gate and round 2 does not; round 2 is interrupted in its training."
    calls = []

    def ask(model, rows, temperature):
        calls.append(model)
        if temperature:
            return [{"reply": "x" * (i % 2)} for i in range(len(rows))]
        return results([str(model) != "tutor/sft"] * len(rows))

    told = dict(pool=lambda i: stories(6, 3, i), frozen=stories(20, 3, 9, "test"), ask=ask, n=2, seed=5, reward=odd)
    whole = rounds("tutor/sft", folder=tmp_path / "whole", **told, **TINY)
    assert [row["passed"] for row in whole] == [True, False]
    assert [row["model"] for row in whole] == ["tutor/sft", str(tmp_path / "whole/round1")]
    assert whole[1]["champion"] == str(tmp_path / "whole/round1")
    with pytest.raises(KeyboardInterrupt):
        rounds("tutor/sft", folder=tmp_path / "again", callbacks=[Stop()], **told | {"n": 1}, **TINY)
    assert (tmp_path / "again/round1.unfinished").is_dir() and not (tmp_path / "again/round1").exists()
    before = len(calls)
    again = rounds("tutor/sft", folder=tmp_path / "again", **told, **TINY)
    assert len(calls) - before == 3  # nothing is asked twice: gate 1, tried 2, gate 2
    assert [row["passed"] for row in again] == [True, False]
    weights = [read_card(tmp_path / f"{name}/round1").files["model.safetensors"] for name in ("whole", "again")]
    assert weights[0] == weights[1]
    assert rounds("tutor/sft", folder=tmp_path / "again", **told, **TINY) == again and len(calls) - before == 3
    assert [row["rewards"] for row in read_jsonl(tmp_path / "again/tried1.jsonl")] == [[0.0, 1.0, 0.0, 1.0]] * 6
    with pytest.raises(UserError, match="rounds with other settings"):
        rounds("tutor/sft", folder=tmp_path / "again", **told | {"seed": 6}, **TINY)
    with pytest.raises(UserError, match="all 6 groups are silent"):
        rounds("tutor/sft", folder=tmp_path / "none", **told | {"reward": never_solved}, **TINY)
