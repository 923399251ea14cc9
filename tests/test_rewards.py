"""Graders as rewards: what is trained is what is measured, from the file as published, and what misbehaves is named."""

import json
import os
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from llmcourse import graders
from llmcourse.card import read_card
from llmcourse.cli import command, main
from llmcourse.core import UserError, read_jsonl
from llmcourse.graders import GRADERS, as_graded, reward, rewarded_rows
from llmcourse.methods import rerun
from llmcourse.options import parse
from llmcourse.probe import watched
from llmcourse.questions import problem_rows
from llmcourse.rl import GRPO, exact_reward, grpo
from llmcourse.rows import read, reference
from llmcourse.tutor import problems, to_chat
from llmcourse.training import from_card, to_card

TINY = dict(
    num_generations=2,
    per_device_train_batch_size=4,
    max_steps=2,
    warmup_steps=0,
    probe_groups=2,
    max_completion_length=40,
)
GSM8K = [  # as OpenAI published it: sums in << >>, the number after ####
    {
        "question": f"A box holds {n} clips and {m} more are added. How many clips are there?",
        "answer": f"There are {n}+{m} = <<{n}+{m}={n + m}>>{n + m} clips.\n#### {n + m:,}",
    }
    for n, m in zip(range(35, 51), range(960, 976))
]
SUBJECT = "elementary_mathematics"
MMLU = [  # as Hendrycks et al. published it
    {"question": f"What is {n} plus 5?", "subject": SUBJECT, "choices": [str(n + k) for k in (3, 4, 5, 6)], "answer": 2}
    for n in range(10, 26)
]
MINE = [{"question": f"Which animal says {sound}?", "answer": animal}
        for sound, animal in dict(moo="the cow", woof="the dog", meow="the cat", quack="the duck").items()]  # fmt: skip


def taken(rows, wanted=None) -> tuple[list[dict], list]:
    ours = {"reward_funcs": wanted}
    return rewarded_rows(read(rows, "train"), ours, exact_reward), ours["reward_funcs"]


def rewards_of(rows, replies, wanted=None) -> list[float]:
    "What TRL would get for these replies."
    ready, (f,) = taken(rows, wanted)
    columns = {k: [row[k] for row in ready] for k in ready[0] if k != "prompt"}
    said = [[{"role": "assistant", "content": reply}] for reply in replies]
    return f(prompts=[row["prompt"] for row in ready], completions=said, **columns)


# ---- published files


def test_gold_solutions_earn_a_whole_reward():
    assert rewards_of(GSM8K, [row["answer"] for row in GSM8K]) == [1.0] * 16
    assert rewards_of(GSM8K, [f"So there are {row['answer'].split()[-1]} clips." for row in GSM8K]) == [1.0] * 16
    assert rewards_of(GSM8K, [row["answer"] + "0" for row in GSM8K]) == [0.0] * 16
    assert rewards_of(MMLU, ["The answer is (C)."] * 16) == [1.0] * 16
    assert rewards_of(MMLU, ["B"] * 16) == [0.0] * 16
    assert rewards_of(MINE, ["The cow.", "Answer: the dog", "a cat", "The duck!"]) == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("rows,name", [(GSM8K, "number"), (MMLU, "choice"), (MINE, "exact")])
def test_what_is_trained_is_what_is_measured(rows, name):
    from llmcourse.evals import evaluate

    chats = [row.data | {"place": row.place} for row in read(rows, "exam")]
    replies = [str(reference(row)) if i % 2 else "nothing" for i, row in enumerate(chats)]
    said = dict(zip((chat["messages"][-2]["content"] for chat in chats), replies))
    results = evaluate(lambda messages: said[messages[-1]["content"]], chats, progress=False)
    assert [float(r["right"]) for r in results] == rewards_of(rows, replies)
    assert taken(rows)[1][0].__name__ == f"{name}_reward"
    assert sum(r["right"] for r in results) == len(rows) // 2


def test_a_share_is_a_reward_and_a_score():
    from llmcourse.evals import evaluate, summary

    rows = [{"question": "As JSON?", "answer": '{"a": 1, "b": 2}'}] * 2
    replies = iter(['{"a": 1, "b": 2}', '{"a": 1, "b": 3}'])
    results = evaluate(lambda messages: next(replies), rows, progress=False)
    assert [(r["right"], r["score"]) for r in results] == [(True, 1.0), (False, 0.5)]
    (line,) = summary(results)
    assert (line["n"], line["correct"], line["score"]) == (2, 1, 0.75)
    assert rewards_of(rows, ['{"a": 1, "b": 2}', '{"a": 1, "b": 3}']) == [1.0, 0.5]


def test_rows_of_several_kinds_are_each_graded_by_their_own():
    rows = [GSM8K[0], MMLU[0], MINE[0]]
    assert taken(rows)[1][0].__name__ == "mixed_reward"
    assert rewards_of(rows, ["995", "C", "the cow"]) == [1.0, 1.0, 1.0]
    assert rewards_of(rows, ["996", "A", "a cow"]) == [0.0, 0.0, 0.0]


def test_the_guess_is_kept_with_its_reason():
    assert taken(GSM8K)[1][0].why == "graded by number: the answer is a number"


def test_the_tutors_own_reward_is_what_it_was():
    rows = [to_chat(p, answered=False) for p in problems(4, 1, ("add", "story3"))]
    before = problem_rows(read(rows, "train"), {"reward_funcs": [exact_reward]})
    assert taken(rows) == (before, [exact_reward]) == taken(rows, ["tutor"])
    assert GRPO.settings["reward_funcs"] is None


def test_rows_that_a_reward_cannot_grade_are_named_before_training(tmp_path):
    with pytest.raises(UserError, match=r"rows\[0\]: no number in the reference 'the cow'"):
        grpo(MINE, tmp_path / "run", reward_funcs="number")
    with pytest.raises(UserError, match="unknown reward 'numbr': did you mean 'number'"):
        grpo(GSM8K, tmp_path / "run", reward_funcs="numbr")
    assert list(tmp_path.iterdir()) == []


# ---- cards


def test_every_reward_has_an_import_name():
    for name in GRADERS:
        (written,) = to_card("reward_funcs", [reward(name)])
        assert written == f"llmcourse.graders.{name}_reward"
        (again,) = from_card("reward_funcs", [written])
        assert again.__name__ == f"{name}_reward"
    assert from_card("reward_funcs", ["llmcourse.rl.exact_reward"]) == [exact_reward]
    with pytest.raises(UserError, match="cannot be imported"):
        from_card("reward_funcs", ["llmcourse.graders.numbr_reward"])
    with pytest.raises(AttributeError):
        getattr(graders, "nothing_reward")  # noqa: B009


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_by_name_repeats_from_its_card(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"What is {a} plus {a + 3}?", "answer": f"{a}+{a + 3}\n#### {2 * a + 3}"} for a in range(30, 46)
    ]
    run = grpo(rows, "run", reward_funcs="contains", method=method, **TINY | {"temperature": 1.5, "probe_groups": 0})
    card = read_card(run)
    assert card.settings["reward_funcs"] == ["llmcourse.graders.contains_reward"]
    kept = read_jsonl(run / "train.jsonl")
    assert [as_graded(row)["messages"][-1]["content"] for row in read(run / "train.jsonl")] == [
        r["answer"] for r in rows
    ]
    again = rerun(run, "again")
    assert read_jsonl(again / "train.jsonl") == kept
    assert read_card(again).files["model.safetensors"] == card.files["model.safetensors"]


def test_only_reinforcement_takes_a_reward(capsys):
    assert parse(command("grpo"), "llmcourse grpo", ["--reward", "number"])["reward"] == "number"
    assert parse(command("rloo"), "llmcourse rloo", ["--reward", "number"])["reward"] == "number"
    assert main(["sft", "--reward", "number"]) == 2 and "unknown option" in capsys.readouterr().err


# ---- rewards that misbehave in the middle of a training


@pytest.mark.parametrize(
    "scored,what",
    [
        (lambda n: [1.0] * (n - 1), "scores for"),
        (lambda n: [float("nan")] * n, "gave nan to the reply"),
        (lambda n: [float("-inf")] * n, "gave -inf to the reply"),
        (lambda n: [True, "good"] * (n // 2), "gave 'good' to the reply"),
        (lambda n: None, "returned a NoneType"),
        (lambda n: __import__("torch").ones(n), "returned a Tensor"),
        (lambda n: 1 / 0, "failed (ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("probe_groups", [0, 2])
def test_it_is_named_with_the_row_and_the_reply(scored, what, probe_groups, tmp_path):
    calls = []

    def mine(completions, **columns):
        calls.append(len(completions))
        if len(calls) <= bool(probe_groups):
            return [float(i % 2) for i in range(len(completions))]  # healthy while it is probed
        return scored(len(completions))

    rows = [{"question": f"What is {a} plus {a}?", "answer": str(2 * a)} for a in range(10, 18)]
    given = TINY | dict(max_completion_length=4, probe_groups=probe_groups)
    with pytest.raises(UserError, match="the reward mine") as e:
        grpo(rows, tmp_path / "run", reward_funcs=mine, **given)
    line = str(e.value)
    assert what in line and "\n" not in line and not (tmp_path / "run").exists() and len(calls) > bool(probe_groups)
    if "gave" in what or "failed" in what:
        assert line.startswith("rows[") and "the reply" in line


def test_the_reply_that_a_reward_fails_on_is_found():
    def fragile(prompts, completions, answer, **columns):
        return [1 / (len(c) - 1) for c in completions]

    looked = watched(fragile, {"Q2": "a.jsonl:2"})
    assert looked(prompts=["Q1", "Q2"], completions=["abc", "de"], answer=["1", "2"]) == [0.5, 1.0]
    with pytest.raises(
        UserError, match=r"^a.jsonl:2: the reward fragile failed \(ZeroDivisionError.* on the reply 'd'"
    ):
        looked(prompts=["Q1", "Q2"], completions=["abc", "d"], answer=["1", "2"])
    assert looked.__name__ == "fragile" and not math.isnan(looked(prompts=["Q"], completions=["abc"], answer=["1"])[0])


# ---- the command line


def test_eval_says_how_it_grades(capsys, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GSM8K[:2]))
    assert main(["eval", "--data", str(file), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["n"] == 2
    assert f"{file}: graded by number: the answer is a number. Another one: --grade NAME" in said.err
    assert main(["eval", "--data", str(file), "--grade", "choice"]) == 2
    assert "own.jsonl:1: no choice in the reference" in capsys.readouterr().err
    assert main(["eval", "--data", str(file), "--grade", "exakt"]) == 2
    assert "did you mean 'exact'" in capsys.readouterr().err


def test_eval_takes_mmlu_and_shares_as_they_are_published(capsys, tmp_path):
    file, out = tmp_path / "mmlu.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MMLU[:2]))
    assert main(["eval", "--data", str(file), "--output", str(out)]) == 0
    assert "graded by choice: the question offers choices" in capsys.readouterr().err
    row = read_jsonl(out)[0]
    assert row["question"] == "What is 10 plus 5?\nA. 13\nB. 14\nC. 15\nD. 16\nAnswer:" and row["answer"] == "C"
    order = tmp_path / "json.jsonl"
    order.write_text(json.dumps({"question": "Who, as JSON?", "answer": '{"who": "Ana"}'}) + "\n")
    assert main(["eval", "--data", str(order), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["score"] == 0.0


# ---- a judge behind a URL


@pytest.fixture
def judge_url(monkeypatch):
    "A server in OpenAI's form: a friendly answer gets 8 of 10, a rude one 0, a silly one no mark."

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): ...

        def answer(self, body):
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self):
            self.answer(
                {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "us"}]}
            )

        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = sent["messages"][-1]["content"].partition("Answer:\n")[2].partition("\n\n")[0]
            said = "No mark for that." if "silly" in asked else f"Score: {8 if 'Hello' in asked else 0}"
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer({"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("LLMCOURSE_JUDGE_URL", url)
    yield url
    server.shutdown()


def test_grpo_reports_the_reward_of_validation_rows(tmp_path, capsys):
    from llmcourse.cli import main
    from llmcourse.tutor import problems

    paths = [tmp_path / "train.jsonl", tmp_path / "held.jsonl"]
    stories = [{"question": p["question"], "answer": str(p["answer"])} for p in problems(12, 5, ("story2",))]
    for path, rows in zip(paths, (stories[:8], stories[8:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["grpo", "--data", paths[0], "--validation", paths[1], "--output", tmp_path / "run", "--steps", 2]
    words += ["--batch-size", 8, "--grad-accum", 1, "--max-length", 96, "--warmup", 0, "--model", "tutor/sft"]
    assert main([str(word) for word in words]) == 0
    assert "on the validation rows" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["eval_reward"] <= 1 for row in log if "eval_loss" in row or "eval_reward" in row)
    assert sum("eval_reward" in row for row in log) == 2
    assert len((tmp_path / "run/validation.jsonl").read_text().splitlines()) == 4


def test_the_judge_is_an_option_of_eval(judge_url, tmp_path, monkeypatch, capsys):
    from llmcourse import exam
    from llmcourse.cli import main

    monkeypatch.delenv("LLMCOURSE_JUDGE_URL")
    monkeypatch.setattr(exam, "examinee", lambda *_: lambda messages: "Hello!")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"Greet {i}.", "answer": "Hello, you."}) + "\n" for i in range(3)))
    words = ["eval", "--data", str(data), "--json"]
    assert main([*words, "--judge", judge_url, "--judge-model", "judge"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["score"] == 0.8
    assert not {"LLMCOURSE_JUDGE_URL", "LLMCOURSE_JUDGE_MODEL"} & set(os.environ)
    assert main([*words, "--grade", "judge"]) == 2 and "--judge" in capsys.readouterr().err


def test_a_judge_grades_and_rewards(judge_url):
    from llmcourse.evals import evaluate, summary

    rows = [{"question": f"Greet number {i}.", "rubric": "Friendly and short."} for i in range(4)]
    replies = {row["question"]: reply for row, reply in zip(rows, ["Hello!", "Go away.", "Hello, you!", "What?"])}
    results = evaluate(
        lambda messages: replies[messages[-1]["content"]], rows, grade="judge", workers=4, progress=False
    )
    assert [r["score"] for r in results] == [0.8, 0.0, 0.8, 0.0] and summary(results)[0]["score"] == 0.4
    assert rewards_of(rows, list(replies.values())) == [0.8, 0.0, 0.8, 0.0]
    assert rewards_of(rows, ["silly"] * 4, ["judge"]) == [None] * 4, "no mark: TRL leaves the reply out"
    with pytest.raises(UserError, match="row 1: the judge gave no mark"):
        evaluate(lambda messages: "silly", rows, progress=False)


def test_how_far_a_judge_agrees_with_people(judge_url, tmp_path, capsys):
    "One of four replies gets no mark: that is no agreement."
    said = [("Hello!", True), ("Go away.", False), ("Hello, you!", False), ("silly", True)]
    row = {"question": "Greet.", "rubric": "Friendly."}
    (tmp_path / "rated.jsonl").write_text(
        "".join(json.dumps(row | {"reply": reply, "ann": good}) + "\n" for reply, good in said)
    )
    assert main(["agree", str(tmp_path / "rated.jsonl"), "--grade", "judge", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["who"], found["same"], found["n"]) == ("judge, ann", 2, 4)
