"""The doctor and the trainer agree: what `data check` calls an error, `sft` refuses, and the other way round."""

import json

import mutations
import pytest
import whole_way
from hypothesis import given, settings, strategies as st

from llmcourse.chats import encode_chat, look_at_chats, take_chats
from llmcourse.core import UserError
from llmcourse.datacheck import check_data
from llmcourse.faults import turn_faults
from llmcourse.forms import canonical, detect
from llmcourse.models import load_tokenizer
from llmcourse.rows import read

ASK = {"role": "user", "content": "What is the weather in Bern?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def said(content="Sunny.", **more):
    return {"role": "assistant", "content": content, **more}


def calling(arguments, name="weather", **more):
    return said(None, tool_calls=[{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}])


def row(*turns, **columns):
    return {"messages": [ASK, *turns], **columns}


GOOD = {
    "plain": row(said()),
    "text written as value": row(said([{"type": "text", "value": "Sunny."}])),
    "a refusal": row(said(None, refusal="I cannot know that.")),
    "tools as text": row(said(), tools=json.dumps(TOOLS)),
}
BAD = {
    "no answer": (row(said(None)), "turn 1 (assistant) is empty"),
    "blank": (row(said(" \n")), "turn 1 (assistant) is empty"),
    "a part without text": (row(said([{"type": "text"}])), "has no text"),
    "an object": (row(said({"city": "Bern"})), "its content is an object"),
    "calls that are no JSON": (row(said(tool_calls="weather()")), "tool_calls is a text that is not JSON"),
    "tools that are no list": (row(said(), tools=3), "tools is a int, not a list"),
    "broken arguments": (row(calling('{"city":')), "arguments that are not JSON"),
    "arguments encoded twice": (row(calling(json.dumps('{"city": "Bern"}'))), "written as JSON twice"),
    "arguments that are a list": (row(calling("[1]")), "not a JSON object"),
    "no such tool": (row(calling("{}", name="time"), tools=TOOLS), "not among the row's tools"),
    "a missing argument": (row(calling("{}"), tools=TOOLS), "'city' is a required property"),
    "an argument of another type": (row(calling('{"city": 3}'), tools=TOOLS), "is not of type 'string'"),
    "an answer to no call": (
        row(calling('{"city": "Bern"}'), {"role": "tool", "content": "sun", "tool_call_id": "c9"}, said()),
        "answers the call 'c9'",
    ),
    "a call without a name": (row(said(None, tool_calls=[{"id": "c1"}])), "calls a tool without a name"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tutor/base")


def written(data, folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return str(path)


def trained(path, tokenizer):
    "What SFT would be trained to say, of every row."
    rows = take_chats(read(path, "train", "SFT"))
    encoded = [encode_chat(tokenizer, one, f"{path}:{i}") for i, one in enumerate(rows, 1)]
    look_at_chats(tokenizer, encoded, 320)
    return [tokenizer.decode([t for t in r["labels"] if t != -100]) for r in encoded]


@pytest.mark.parametrize("name", GOOD)
def test_good_rows_are_trained(name, tokenizer, tmp_path):
    path = written(GOOD[name], tmp_path)
    assert check_data(path, tokens_per_second=1e4).code < 2
    (text,) = trained(path, tokenizer)
    assert len(text.removesuffix(tokenizer.eos_token)) > 5


@pytest.mark.parametrize("name", BAD)
def test_what_the_doctor_calls_an_error_is_refused(name, tokenizer, tmp_path):
    data, what = BAD[name]
    path = written(data, tmp_path)
    report = check_data(path, tokens_per_second=1e4)
    assert report.code == 2 and what in str(report)
    with pytest.raises(UserError) as e:
        trained(path, tokenizer)
    assert what in str(e.value) and str(e.value).startswith(f"{path}:1") and "\n" not in str(e.value)


def test_legacy_functions_are_read_as_tools():
    call = {"name": "weather", "arguments": '{"city": "Bern"}'}
    old = row(said(None, function_call=call), functions=[TOOLS[0]["function"]])
    new = canonical(old)
    assert new["tools"] == TOOLS and new["messages"][1]["tool_calls"][0]["function"] == call
    assert "functions" not in new and "function_call" not in new["messages"][1]
    assert list(turn_faults(new["messages"], new["tools"])) == []


def test_a_rated_chat_is_not_a_chat_to_learn_from(tmp_path):
    "KTO's rows as whole chats: a bad answer must not be trained."
    bad = row(said("Snow!"), label=False)
    assert detect(bad) == "unpaired"
    assert canonical(bad) == {"prompt": [ASK], "completion": [said("Snow!")], "label": False}
    with pytest.raises(UserError, match="SFT takes one answer a row"):
        take_chats(read([bad], "train", "SFT"))


def test_rows_beyond_the_context_are_refused(tokenizer):
    long = [encode_chat(tokenizer, row(said("so " * 2000)), "rows[0]")]
    with pytest.raises(UserError, match="the model reads 1,024. Give --max-length 1024"):
        look_at_chats(tokenizer, long, 4096, context=1024)


def test_a_schema_is_not_fetched_from_the_network():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"$ref": "http://127.0.0.1:9/x"}}}]
    faults = list(turn_faults([ASK, calling("{}") | {"content": ""}], tools))
    assert [level for level, _ in faults] == ["error"] and "cannot be used" in faults[0][1]


@pytest.mark.parametrize("purpose", whole_way.WAYS)
def test_every_mutated_row_is_used_refused_or_of_another_split(purpose, tmp_path):
    "300 mutated rows the whole way: no traceback, and doctor, training and exam agree about each of them."
    path = mutations.write(tmp_path / "rows.jsonl", 300, seed=1)
    found = whole_way.one_way(path, tmp_path, purpose)
    assert found["rows"] == 300 and min(found["used"], found["refused"]) > 60


def test_a_file_with_bad_rows_is_refused_in_one_line(tmp_path):
    path = mutations.write(tmp_path / "rows.jsonl", 100, seed=2)
    said = whole_way.refused_in_one_line(path, tmp_path)
    assert "of 100 rows cannot be used" in said and "--skip-bad" in said and not (tmp_path / "no").exists()


def test_the_x_ray_draws_mutated_rows_or_refuses_them_in_one_line(tmp_path):
    found = whole_way.x_rayed(mutations.write(tmp_path / "rows.jsonl", 300, seed=4))
    assert found["drawn"] > 60


def test_mutations_are_the_same_every_time():
    assert repr(list(mutations.mutated(50, 3))) == repr(list(mutations.mutated(50, 3)))


LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
ANY = st.recursive(
    LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=6
)
KEYS = ("role", "content", "tool_calls", "function_call", "refusal", "weight", "tool_call_id", "name")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1), st.sampled_from(KEYS), ANY, st.sampled_from(("tools", "functions", "label", "split")), ANY)
def test_mutated_rows_end_in_one_line(turn, key, value, column, other):
    "Whatever a turn or a column holds, reading and checking end in rows or in one line that names the place."
    turns = [dict(ASK), said()]
    turns[turn][key] = value
    try:
        take_chats(read([{"messages": turns, column: other}], "train", "SFT"))
    except UserError as e:
        assert str(e).startswith("rows") and "\n" not in str(e)


@pytest.mark.parametrize(
    "scored,what",
    [
        (lambda n: [1.0] * (n - 1), "scores for"),
        (lambda n: [float("nan")] * n, "gave nan to the reply"),
        (lambda n: [float("inf")] * n, "gave inf"),
        (lambda n: ["good"] * n, "gave 'good'"),
        (lambda n: 1.0, "returned a float"),
        (lambda n: __import__("torch").ones(n), "returned a Tensor"),
        (lambda n: 1 / 0, "failed (ZeroDivisionError"),
    ],
)
def test_a_reward_that_misbehaves_is_named_before_training(scored, what, tmp_path):
    from llmcourse.rl import grpo

    def mine(completions, **columns):
        return scored(len(completions))

    rows = [{"question": f"What is {a} plus {a}?", "answer": str(2 * a)} for a in range(10, 18)]
    tiny = dict(num_generations=2, per_device_train_batch_size=4, max_steps=1, warmup_steps=0, probe_groups=2)
    with pytest.raises(UserError, match="the reward mine") as e:
        grpo(rows, tmp_path / "run", reward_funcs=mine, max_completion_length=4, **tiny)
    assert what in str(e.value) and not (tmp_path / "run").exists()


def test_a_call_is_compared_with_calls(tmp_path):
    "An empty reply would equal the empty text beside a call."
    from llmcourse.evals import evaluate
    from llmcourse.exam import exam_report, exam_rows

    rows = exam_rows(written(row(calling('{"city": "Bern"}'), tools=TOOLS), tmp_path), "tutor/base")
    offered = []

    def replies(text):
        def generate(messages, tools):
            offered.append(tools)
            return text

        return generate

    for text, right in (
        ("", False),
        ("sun", False),
        ('{"name": "weather", "parameters": {"city": "Bern"}}', True),
        ('{"name": "weather", "parameters": {"city": "Basel"}}', False),
        ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}</tool_call>', True),
        ("[weather(city='Bern'), weather(city='Basel')]", False),
    ):
        results = evaluate(replies(text), rows, progress=False)
        assert [r["right"] for r in results] == [right], text
    assert offered == [TOOLS] * 6
    report = {r["task"]: (r["correct"], r["n"]) for r in exam_report(results)}
    assert report == {"all": (0, 1), "calls: names": (0, 1), "calls: arguments": (1, 1)}


CHATS = [row(said(f"{n} degrees.")) | {"messages": [{"role": "user", "content": f"How warm is it in town {n}?"},
                                                    said(f"{n} degrees.")]} for n in range(10)]


def test_ten_rows_train_at_the_defaults_with_validation_and_a_system_prompt(tmp_path, capsys):
    from llmcourse.card import read_card
    from llmcourse.cli import main
    from llmcourse.core import read_jsonl

    rows, held = tmp_path / "ten.jsonl", tmp_path / "held.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in CHATS))
    held.write_text("".join(json.dumps(row(said())) + "\n" for _ in range(2)))
    words = ["sft", "--data", str(rows), "--output", str(tmp_path / "run"), "--validation", str(held)]
    assert main([*words, "--system", "Be brief."]) == 0
    said_ = capsys.readouterr().err
    assert "few rows: 3 epochs" in said_ and said_.count("on the validation rows") == 5
    kept = read_jsonl(tmp_path / "run/train.jsonl")
    assert len(kept) == 10 and kept[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len([r for r in read_jsonl(tmp_path / "run/metrics.jsonl") if "eval_loss" in r]) == 5
    assert read_card(tmp_path / "run").hyperparameters["per_device_train_batch_size"] == 1
    held.write_text(json.dumps(CHATS[3]) + "\n")
    assert main([*words[:-2], "--validation", str(held)]) == 2 and "a leak" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,hint",
    [
        (["--r", "100000"], "no matrix of the model has a rank above"),
        (["--seed", "-1"], "--seed -1: has to be a number from 0 up"),
        (["--learning-rate", "0"], "has to be more than 0"),
        (["--learning-rate", "inf"], "from 0 up"),
        (["--output", "rows.jsonl/run"], "Choose another"),
    ],
)
def test_bounds_are_checked(words, hint, tmp_path, monkeypatch, capsys):
    from llmcourse.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CHATS))
    assert main(["sft", "--data", "rows.jsonl", *words]) == 2
    assert hint in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_question_with_one_word_changed_is_named_whatever_its_answer(tmp_path):
    ask = lambda word, answer, side: {"prompt": f"How does a {word} stay upright while it is moving?",
                                      "completion": answer, "split": side}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (ask("bicycle", "It steers.", "train"), ask("scooter", "No.", "test")))))
    found = check_data(path, tokens_per_second=1).found
    assert ("warning", "line 2") in [(level, place) for level, place, what in found if "one word differs" in what]
    sums = [{"prompt": f"How much is {n} plus 30 to you?", "completion": "x", "split": s}
            for n, s in ((2, "train"), (3, "test"))]
    path.write_text("\n".join(map(json.dumps, sums)))
    assert not [what for _, _, what in check_data(path, tokens_per_second=1).found if "one word differs" in what]


def test_one_object_in_a_json_file_is_one_row_and_damage_is_named(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(row(said())))
    assert len(read(tmp_path / "one.json")) == 1
    (tmp_path / "big.jsonl").write_text('{"prompt": ' + "9" * 5000 + "}\n")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"\0" * 50 + b"PAR1")
    for name in ("big.jsonl", "deep.json", "bad.parquet"):
        with pytest.raises(UserError, match=f"{name}:1: not "):
            read(tmp_path / name)
