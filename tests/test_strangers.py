"""Files that a stranger brings: what they hold is used, refused or said, each in one line."""
import json

import pytest

from llmcourse.amounts import said_number
from llmcourse.byfield import valid_share
from llmcourse.core import UserError
from llmcourse.datacheck import check_data
from llmcourse.files import lines
from llmcourse.graders import grade_number
from llmcourse.letters import chosen
from llmcourse.rows import read
from llmcourse.sft import sft

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
