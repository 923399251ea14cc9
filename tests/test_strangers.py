"""Files that a stranger brings: what they hold is used, refused or said, each in one line."""
import json
import re
import shlex
from pathlib import Path

import pytest
from rules import MODULES

from llmcourse.amounts import said_number
from llmcourse.byfield import valid_share
from llmcourse.chats import encode_chat
from llmcourse.cli import COMMANDS, command, main
from llmcourse.core import UserError
from llmcourse.converter import to_gguf
from llmcourse.datacheck import check_data, context_of
from llmcourse.exam import exam_rows
from llmcourse.files import lines
from llmcourse.graders import grade_number
from llmcourse.labels import TODAY
from llmcourse.letters import chosen
from llmcourse.models import load, load_tokenizer
from llmcourse.options import parser
from llmcourse.rl import grpo
from llmcourse.rows import read
from llmcourse.sft import sft
from llmcourse.shipping import served

DATA = Path(__file__).parent.parent / "data"
ASK = {"role": "user", "content": "Ana has 3 apples."}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}, "required": ["name"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
ONE_STEP = dict(max_steps=1, warmup_steps=0, save_strategy="no", per_device_train_batch_size=2)


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def asked(content, form=FORMAT, **more):
    return {"messages": [ASK, said(content)], "response_format": form, **more}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- OpenAI's requests ---

GOOD = {
    "as asked": asked('{"name": "Ana", "n": 3}'),
    "as text": asked('{"name": "Ana"}', json.dumps(FORMAT)),
    "any object": asked("{}", {"type": "json_object"}),
    "plain text": asked("Ana: 3", {"type": "text"}),
    "a refusal": {"messages": [ASK, said(None, refusal="I cannot.")], "response_format": FORMAT},
    "a call": {"response_format": FORMAT, "messages": [ASK, said(None, tool_calls=[
        {"id": "c", "type": "function", "function": {"name": "count", "arguments": "{}"}}])]},
}
BAD = {
    "another type": (asked('{"name": "Ana", "n": "3"}'), "'3' is not of type 'integer'"),
    "a field is missing": (asked('{"n": 3}'), "'name' is a required property"),
    "words around it": (asked('Here: {"name": "Ana"}'), "asks for JSON, and the answer is none"),
    "no JSON": (asked("Ana: 3", {"type": "json_object"}), "asks for JSON, and the answer is none"),
    "a schema from elsewhere": (asked("{}", {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}),
                                "points to 'http://x/y'"),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_answer_as_its_request_wants_it_is_trained(name, tmp_path, capsys):
    path = written(tmp_path / "rows.jsonl", [GOOD[name] | {"temperature": 0.2}] * 2)
    report = check_data(path, "tutor/tools", tokens_per_second=1)
    assert report.code == 1 and report.refused == 0
    assert "no chat template prints response_format, temperature: not trained" in str(report)
    if name != "as asked": return
    sft(path, tmp_path / "run", **ONE_STEP)
    assert f"not trained in 2 of 2 rows, since no chat template prints it: response_format, temperature ({path}:1)" \
        in capsys.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_breaks_its_own_request_is_refused(name, tmp_path):
    row, what = BAD[name]
    path = written(tmp_path / "rows.jsonl", [row])
    report = check_data(path, "tutor/base", tokens_per_second=1)
    assert report.code == 2 and report.refused == 1 and what in str(report)
    with pytest.raises(UserError) as e: sft(path, tmp_path / "run", **ONE_STEP)
    assert what in str(e.value) and str(e.value).startswith(f"{path}:1: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("schema", [{"$ref": "http://127.0.0.1:9/x"}, {"$ref": "#/nowhere"}, {"$ref": "#"}])
def test_a_schema_that_leads_nowhere_is_named_and_nothing_is_fetched(schema):
    with pytest.raises(UserError, match="a JSON schema that"): valid_share({"a": 1}, schema)


# --- multiple choice ---

MMLU = """Find the degree of the extension Q(sqrt(2)).,0,4,2,6,C
"What is the capital of France, the country?",Rome,Paris,Bern,Oslo,B
Statement 1 | Every group is a ring.,"True, True","False, False","True, False","False, True",B
"""


def test_the_first_row_of_mmlu_as_published_is_a_row(tmp_path, capsys):
    path = tmp_path / "abstract_algebra_test.csv"
    path.write_text(MMLU)
    found = read(path, "exam")
    assert [row.data["messages"][-1]["content"] for row in found] == ["C", "B", "B"]
    assert "What is the capital of France, the country?\nA. Rome\nB. Paris" in found[1].data["messages"][0]["content"]
    read(path, "exam")
    said = capsys.readouterr().err
    assert said == f"{path.name}: no header line; its columns are read as question, A, B, C, D, answer, " \
        "as in MMLU's files\n"
    assert check_data(path, "tutor/base", purpose="eval").rows == 3


@pytest.mark.parametrize("head, body", [
    ("question,A,B,C,D,answer", "2+2?,3,4,5,6,B"), ("Question,A,B,C,D,E", "x,1,2,3,4,5"),
    ("prompt,completion,source,C", "2+2?,4,web,1"), ("id,question,A,B,C,D", "1,2+2?,3,4,5,6")])
def test_a_header_is_a_header(head, body, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"{head}\n{body}\n")
    assert [row for _, row in lines(path)] == [dict(zip(head.split(","), body.split(",")))]


CITIES = ["Rome", "Paris", "Bern", "New York"]


@pytest.mark.parametrize("reply, letter", [
    ("A: London", None), ("**B.** London", None), ("Answer: A: London", None), ("B: Rome", None),
    ("A. San Marino", None),
    ("A: Rome", "A"), ("D. New York City", "D"), ("D: York", "D"), ("B. Correct", "B"), ("B. Because it is", "B"),
    ("C) This one", "C"), ("C", "C"), ("B: it is the seat of the government", "B")])
def test_a_letter_beside_a_text_of_no_choice_chooses_nothing(reply, letter):
    assert chosen(reply, CITIES) == letter


@pytest.mark.parametrize("reply, letter", [
    ("A: 7", None), ("A: 3", "A"), ("A: 4", None), ("B: 4.", "B"), ("Answer: C: 9", None)])
def test_a_letter_beside_a_number_of_no_choice_chooses_nothing(reply, letter):
    assert chosen(reply, ["3", "4", "5", "6"]) == letter


def test_a_range_is_no_number():
    for text in ("18 to 20", "It is 18 to 20.", "$18 to $20", "18 or 20", "18–20", "Answer: 18 to 20"):
        assert said_number(text) is None, text
    for text in ("It rose from 18 to 20.", "18 to 19: no, 20", "18 is close to 20", "18 apples, 2 more: 20"):
        assert said_number(text).value == 20, text
    assert not grade_number({"question": "?", "answer": "20"}, "It takes 18 to 20 minutes.")


# --- BFCL ---

QUESTION = {"id": "simple_0", "question": [[{"role": "user", "content": "2 + 2?"}]],
            "function": [{"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}}}]}
ANSWER = {"id": "simple_0", "ground_truth": [{"add": {"a": [2]}}]}


def test_each_half_of_bfcl_names_the_other(tmp_path):
    questions = written(tmp_path / "BFCL_v3_simple.json", [QUESTION])
    (tmp_path / "possible_answer").mkdir()
    answers = tmp_path / "possible_answer/BFCL_v3_simple.json"
    beside = "no right calls to 'simple_0'. BFCL keeps them in a file of their own: put possible_answer/BFCL_v3_simple"
    with pytest.raises(UserError, match=beside): exam_rows(str(questions), None)
    with pytest.raises(UserError, match=beside): sft(questions, tmp_path / "run", **ONE_STEP)
    assert "put possible_answer/BFCL_v3_simple.json beside" in str(check_data(questions, "tutor/tools", purpose="eval"))
    written(answers, [ANSWER])
    with pytest.raises(UserError, match="These are BFCL's answers: give the file of its questions"):
        exam_rows(str(answers), None)
    assert len(exam_rows(str(questions), None)) == 1


# --- a judge ---


def test_a_judge_that_is_not_there_is_noticed_before_the_first_reply(tmp_path, monkeypatch, capsys):
    from llmcourse import exam
    asked = []
    monkeypatch.setattr(exam, "evaluate", lambda *args, **more: asked.append(args))
    path = written(tmp_path / "rows.jsonl", [{"prompt": "Hello?", "rubric": "It is friendly."}])
    judge = ["--judge", "http://127.0.0.1:9/v1"]
    for words in (judge, [*judge, "--judge-model", "anyone"]):
        assert main(["eval", "--data", str(path), "--model", "tutor/base", *words]) == 2
        assert "http://127.0.0.1:9/v1: nothing answers there" in capsys.readouterr().err
    assert not asked


# --- rows that are left out ---


def test_the_lines_about_rows_that_are_left_out_add_up(tmp_path, capsys):
    "7 rows = 3 used + 1 of another split + 2 that cannot be read + 1 that does not fit."
    chat = {"messages": [ASK, said("3")]}
    held = {"messages": [ASK | {"content": "Ben has 5 pears."}, said("5")], "split": "test"}
    rows = [chat, chat, chat, held, {"messages": 3}, {"messages": [ASK]},
            {"messages": [ASK | {"content": "so " * 3000}, said("3")]}]
    path = written(tmp_path / "rows.jsonl", rows)
    run = sft(path, tmp_path / "run", skip_bad=True, **ONE_STEP)
    read_line, fit_line = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert read_line.startswith("SFT: 7 rows read, 4 taken; 1 rows of the split test are left out; 2 rows cannot")
    assert fit_line.startswith("SFT: of these 4 rows 3 fit the model; 1 do not and are left out, too: ")
    assert len((run / "train.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError) as e: sft(path, tmp_path / "run", **ONE_STEP)
    assert f"llmcourse data check {path} --purpose sft --limit 2 lists all of them" in str(e.value)


def listed(error: str, capsys) -> int:
    "How many errors the command names that an error says lists them all."
    command = re.search(r"; llmcourse (data check .*) lists all of them", error)[1]
    assert main([*shlex.split(command), "--json", "--tokens-per-second", "1"]) == 2, command
    return json.loads(capsys.readouterr().out)["refused"]


@pytest.mark.parametrize("command, row", [
    ("sft", {"messages": [ASK | {"content": "so " * 3000}, said("3")]}), ("sft", {"messages": [ASK]}),
    ("grpo", {"prompt": "so " * 3000, "answer": "3"}), ("grpo", {"messages": [said("3")]}),
    ("eval", {"prompt": "so " * 3000, "answer": "3"}), ("eval", {"prompt": "Hello?"}),
    ("grpo --max-length 960", {"prompt": "so " * 90, "answer": "3"})])
def test_the_command_that_lists_all_lists_all(command, row, tmp_path, capsys):
    good = {"sft": {"messages": [ASK, said("3")]}}.get(command, {"prompt": "2+2?", "answer": "4"})
    path = written(tmp_path / "my rows.jsonl", [good, row, row])
    output = ["--output", str(tmp_path / "run")] if command != "eval" else []
    assert main([*command.split(), "--data", str(path), *output]) == 2
    error = capsys.readouterr().err
    assert "2 of 3 rows cannot be used" in error and listed(error, capsys) == 2


# --- hints name options that there are ---

ELSEWHERE = {
    "--version", "--query-gpu", "--format", "--reinstall", "--torch-backend", "--help", "--hf-path", "--mlx-path"}


def options_of(name: str) -> set[str]:
    return {word for action in parser(command(name), name)._actions for word in action.option_strings}


def test_every_option_in_a_text_is_one_of_a_command():
    every = set().union(*map(options_of, COMMANDS))
    for path in (path for path in MODULES if path.stem != "launchers"):    # whose words go to other programs
        for text in re.findall(r"(?<![\w-])(?<!var\()--[a-z][a-z-]*(?![\w:-])", path.read_text(encoding="utf-8")):
            assert text.rstrip("-") in every | ELSEWHERE, (path.name, text)


NO_SUCH_NAMES = ("max_completion_length", "per_device_train", "gradient_acc", "num_train_epochs", "max_steps")


@pytest.mark.parametrize("words", [
    "grpo --data gsm8k.jsonl --batch-size 4 --steps 1", "rloo --data gsm8k.jsonl --batch-size 12 --steps 1",
    "grpo --data gsm8k.jsonl --batch-size 4000", "grpo --data gsm8k.jsonl --max-length 2000",
    "grpo --data gsm8k.jsonl --max-length 0", "grpo --data gsm8k.jsonl --reward judge --steps 1",
    "sft --data chats.jsonl --steps 0", "sft --data chats.jsonl --epochs 0", "sft --data chats.jsonl --batch-size 0",
    "sft --data chats.jsonl --grad-accum 0", "sft --data chats.jsonl --max-length 4", "sft --data chats.jsonl --r 9999",
    "sft --data sick.jsonl", "grpo --data sick.jsonl", "eval --data sick.jsonl", "sft --full --qlora",
    "eval --data gsm8k.jsonl --grade judge", "agree ratings.jsonl --grade judge", "plan tutor/base --data sick.jsonl",
    "plan tutor/base --max-length 9999", "data check sick.jsonl --tokens-per-second 1", "sft --seed 5000000000",
    "rehearse sft --data chats.jsonl --max-length 30", "xray sick.jsonl"])
def test_a_hint_names_options_of_the_command_that_says_it(words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LLMCOURSE_JUDGE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    words = [str(DATA / word) if word.endswith("jsonl") else word for word in words.split()]
    code = main(words)
    said = "".join(capsys.readouterr())
    assert code in (1, 2) or words[0] == "plan", said
    for sentence in re.split(r"[;.] ", said):
        other = re.search(rf"llmcourse ({'|'.join(COMMANDS)})\b", sentence)
        name = other[1] if other else "sft" if words[:2] == ["rehearse", "sft"] else words[0]
        known = options_of(name) | {"--help"}
        if name == "data": known |= {"--skip-bad", "--purpose"}   # it advises on the training to come
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", sentence):
            assert option in known, (option, name, sentence)
    for name in NO_SUCH_NAMES:
        for found in re.findall(rf"{name}\w*(?:=\S+)?(.{{0,3}})", said): assert found.startswith(" (-"), said


# --- one JSON object around the rows ---


def test_every_list_in_an_object_is_read_or_the_file_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    chat = {"messages": [ASK, said("3")]}
    other = {"messages": [ASK | {"content": "Ben has 5 pears."}, said("5")]}
    path.write_text(json.dumps({"train": [chat], "validation": [other]}))
    assert [row.split for row in read(path)] == ["train", "validation"]
    path.write_text(json.dumps({"version": "1.1", "columns": ["messages"], "data": [chat, other]}))
    assert len(read(path)) == 2
    path.write_text(json.dumps({"easy": [chat], "hard": [other]}))
    with pytest.raises(UserError, match="several lists of rows: easy, hard. Keep one of them in a file"): read(path)


def test_the_doctor_knows_what_the_base_of_an_adapter_can_read():
    assert context_of("tutor/sft") == context_of("tutor/base") == 1024


# --- tools, templates, texts ---


def test_a_tool_that_is_defined_twice_is_named(tmp_path):
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    other = {"type": "function", "function": {"name": "add", "description": "another"}}
    rows = [asked("hi", None, tools=[add, add]), asked("yes", None, tools=[add, other])]
    path = written(tmp_path / "rows.jsonl", rows)
    report = check_data(path, "tutor/tools", tokens_per_second=1, limit=3)
    found = {(level, place): what for level, place, what in report.found if "second time" in what}
    again = "tools[1] defines 'add' a second time"
    assert found == {("warning", "line 1"): f"{again}, in the same words",
                     ("error", "line 2"): f"{again}, with another description or other parameters"}
    with pytest.raises(UserError, match="rows.jsonl:2: tools.1. defines 'add' a second time"):
        sft(path, tmp_path / "run", "tutor/tools", **ONE_STEP)


def test_different_texts_of_one_kind_are_all_shown_up_to_the_limit(tmp_path):
    add = {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}}}
    given = ['{"a": "x"}', '{"a": "x"}', "{}", '{"a": 1, "b": "y"}', '{"a": 1, "b": null}']
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": text}} for text in given]
    rows = [{"tools": [add], "messages": [ASK | {"content": f"Add {i}."}, said(None, tool_calls=[call])]}
            for i, call in enumerate(calls)]
    path = written(tmp_path / "rows.jsonl", rows)
    shown = str(check_data(path, "tutor/tools", tokens_per_second=1, limit=3)).splitlines()
    at = next(i for i, line in enumerate(shown) if "do not fit" in line)
    assert shown[at].startswith("✗ line 1: turn 1 calls 'add' with arguments that do not fit: 'x' is not of type")
    assert "5 rows of this kind, also 2, 3, …" in shown[at]
    assert shown[at + 1] == "  line 3: turn 1 calls 'add' with arguments that do not fit: 'a' is a required property"
    assert shown[at + 2] == "  line 4: turn 1 calls 'add' with arguments that do not fit: 'y' is not of type 'integer'"
    assert not shown[at + 3].startswith("  line"), "three texts and no more"
    kinds = check_data(path, "tutor/tools", tokens_per_second=1, limit=9).as_dict()["findings"]
    assert len(next(kind for kind in kinds if "do not fit" in kind["first"])["examples"]) == 4


@pytest.fixture(scope="module")
def undated(tmp_path_factory):
    "The tutor with a template that prints today's date."
    folder = tmp_path_factory.mktemp("undated") / "model"
    net, tokenizer = load("tutor/base")
    today = "{{ strftime_now('%d %b %Y') }}\n"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token }}" + today, 1)
    if today not in tokenizer.chat_template: tokenizer.chat_template = today + tokenizer.chat_template
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_template_that_prints_today_is_said_by_doctor_training_and_export(undated, tmp_path, capsys):
    path = written(tmp_path / "rows.jsonl", [{"messages": [ASK, said("3")]}] * 2)
    report = check_data(path, str(undated))
    assert TODAY in str(report).splitlines() and report.as_dict()["notes"] == [TODAY]
    assert TODAY not in str(check_data(path, "tutor/base", tokens_per_second=1))
    sft(path, tmp_path / "run", undated, **ONE_STEP)
    assert TODAY in capsys.readouterr().err.splitlines()
    to_gguf(undated, tmp_path / "model.gguf", verify=False)
    assert TODAY in capsys.readouterr().err.splitlines()


def test_a_model_without_a_template_is_said_at_export_and_when_it_is_served(tmp_path, capsys):
    folder, gguf = tmp_path / "model", tmp_path / "model.gguf"
    net, tokenizer = load("tutor/base")
    tokenizer.chat_template = None
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    to_gguf(folder, gguf, verify=False)
    line = f"{folder}: no chat template, so llama.cpp puts ChatML around the turns of a chat, which the model may never"
    assert capsys.readouterr().err.startswith(line)
    with served(gguf): assert f"{gguf}: no chat template, so llama.cpp puts ChatML" in capsys.readouterr().err
    other = to_gguf("tutor/base", tmp_path / "base.gguf", verify=False)
    with served(other): assert "no chat template" not in capsys.readouterr().err


def test_grpo_says_where_rows_with_tools_belong(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"prompt": "2+2?", "answer": "4", "tools": [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]}])
    with pytest.raises(UserError) as e: grpo(path, tmp_path / "run")
    assert str(e.value).startswith(f"{path}:1: has tools, and TRL would ask the model without them. ")
    assert "llmcourse sft" in str(e.value) and "\n" not in str(e.value)


# --- names that lead nowhere ---


@pytest.mark.parametrize("words", [
    "chat --port 0", "serve --port 0", "eval", "export", "sft --data chats.jsonl", "xray chats.jsonl"])
def test_a_folder_that_is_not_there_yet_is_not_looked_for_on_the_hub(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(DATA / word) if word.endswith("jsonl") else word for word in words.split()]
    assert main([*words, "--model", "runs/gguf"]) == 2
    said = capsys.readouterr().err
    assert "runs/gguf: no such folder. " in said and "Hub was" not in said and said.count("\n") == 1
    if words[0] in ("chat", "serve"): assert "`llmcourse export --output runs/gguf`" in said


def test_the_scores_say_what_their_words_mean(capsys):
    assert main(["scores", "--n", "0"]) == 2
    assert "--n 0: give at least 1" in capsys.readouterr().err
    assert main(["scores", "--n", "2", "--seed", "1", "--checkpoints", "base"]) == 0
    told = capsys.readouterr().out
    for words in ("tutor/base goes on with a text", "at once: ", "sampled: ", "chat format: "): assert words in told
    assert main(["scores", "--n", "2", "--seed", "1", "--checkpoints", "base", "--json"]) == 0
    json.loads(capsys.readouterr().out)


# --- columns of other programs, which would be passed over in silence ---


def one(row, tmp_path):
    return read(written(tmp_path / "rows.jsonl", [row]))[0]


def test_a_system_prompt_beside_the_turns_is_read(tmp_path):
    chat = [ASK, said("3")]
    system = {"role": "system", "content": "Be brief."}
    assert one({"system": "Be brief.", "messages": chat}, tmp_path).data == {"messages": [system, *chat]}
    assert one({"system_prompt": "Be brief.", "messages": chat}, tmp_path).data == {"messages": [system, *chat]}
    assert one({"system": "No.", "messages": [system, *chat]}, tmp_path).data["messages"] == [system, *chat]
    orca = {"system_prompt": "Be brief.", "question": ASK["content"], "response": "3"}
    assert one(orca, tmp_path).data == {"messages": [system, *chat]}


def test_a_turn_that_is_not_to_be_trained_is_not(tmp_path):
    turns = [ASK, said("BAD", train=False), {"role": "user", "content": "And Ben?"}, said("GOOD", train=True)]
    found = one({"messages": turns}, tmp_path)
    tokenizer = load_tokenizer("tutor/base")
    labels = encode_chat(tokenizer, found.data, "row")["labels"]
    trained = tokenizer.decode([token for token in labels if token != -100])
    assert "GOOD" in trained and "BAD" not in trained


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No!"}], "label": False},
    {"messages": [ASK, said("No!")], "kto_tag": False}])
def test_an_answer_that_is_rated_bad_is_not_a_chat(row, tmp_path):
    found = one(row, tmp_path)
    assert found.form == "unpaired" and found.data["label"] is False
    assert found.data["completion"][0]["content"] == "No!"
    with pytest.raises(UserError, match="a row of the form unpaired"): sft([row], tmp_path / "run", **ONE_STEP)


def test_calls_and_tools_of_llama_factory_are_calls_and_tools(tmp_path):
    found = one({"conversations": [
        {"from": "human", "value": "Weather in Bern?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}],
        "tools": '[{"name": "weather", "parameters": {"type": "object"}}]'}, tmp_path).data
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    assert found["messages"][1] == said("", tool_calls=[{"type": "function", "function": call}])
    assert found["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("names", [("question", "answer"), ("prompt", "completion"), ("prompt", "response")])
def test_the_text_that_a_question_is_about_is_asked_with_it(names, tmp_path):
    ask, reply = names
    found = one({ask: "Who has 3?", "context": "Ana has 3 apples.", reply: "Ana"}, tmp_path).data["messages"]
    assert found == [{"role": "user", "content": "Who has 3?\n\nAna has 3 apples."}, said("Ana")]


def test_one_turn_of_a_tree_is_no_text_to_learn(tmp_path):
    with pytest.raises(UserError, match="no form that we know"):
        one({"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi"}, tmp_path)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_that_a_template_leaves_out_are_said(name, tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"messages": [ASK, said("3", **{name: "Three of them."})]}])
    left = "the model's chat template leaves out the thoughts of turn 1 (assistant)"
    assert left in str(check_data(path, "tutor/base", tokens_per_second=1))


def test_parts_of_a_content_are_named(tmp_path):
    parts = [{"type": "output_text", "text": "3"}]
    assert one({"input": [ASK], "output": [said(parts)]}, tmp_path).data["messages"] == [ASK, said("3")]
    with pytest.raises(UserError, match="its content is text, tool_use, not text"):
        one({"messages": [ASK, said([{"type": "text", "text": "x"}, {"type": "tool_use"}])]}, tmp_path)
