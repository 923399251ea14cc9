"""Numbers in words, with units and in whole sentences; who is right was written by hand before any of it was tried."""

import json
import time

import pytest

from llmcourse import graders
from llmcourse.amounts import is_guess, said_number
from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.evals import grade_row

# (reply, reference, is it right?)
CASES = [
    ("eighteen", "18", True),
    ("Eighteen.", "18", True),
    ("She has twenty-one marbles left.", "21", True),
    ("The answer is twenty one.", "21", True),
    ("Answer: forty-two", "42", True),
    ("one hundred and five dollars", "105", True),
    ("a hundred and five", "105", True),
    ("two thousand three hundred and six", "2306", True),
    ("three and a half", "3.5", True),
    ("zero", "0", True),
    ("eighteen", "80", False),
    ("eighty", "18", False),
    ("eighteenth", "18", False),
    ("No one knows.", "1", False),
    ("I think the second one is right.", "1", False),
    ("12 boxes at 3 each make 36, which is what one pays.", "36", True),
    ("twenty, one of them broken", "21", False),
    ("First 5, then 8 more, so thirteen.", "13", True),
    ("seventy-two thousand", "72000", True),
    ("minus four", "-4", True),
    ("negative seven degrees", "-7", True),
    ("#### twelve", "12", True),
    (r"\boxed{\text{twelve}}", "12", True),
    ("twelve (12)", "12", True),
    ("Answer: 15, not eighteen", "15", True),
    ("Answer: eighteen or nineteen", "18", False),
    ("two dozen eggs", "24", True),
    ("He is eighteen years old.", "18", True),
    ("**Eighteen** kilometres", "18 km", True),
    ("eighteen miles", "18 km", False),
    ("18 km", "18", True),
    ("Answer: 18 km per hour", "18 km/h", True),
    ("18 m²", "18", True),
    ("50%", "50", True),
    ("50 percent", "50%", True),
    ("fifty percent", "50%", True),
    ("0.5%", "50%", False),
    ("The train leaves at 9 and takes ninety minutes.", "90", True),
    ("18 apples after 3 days", "18", True),
    ("It takes him 18 days to pick 240 apples.", "18", True),
]


# The last number of an unmarked reply counts, as in lm_eval's flexible-extract; it is not always the answer.
MISSED = {"18 apples after 3 days", "It takes him 18 days to pick 240 apples."}


@pytest.mark.parametrize("reply, reference, right", CASES)
def test_number_words(reply, reference, right):
    assert grade_row({"answer": reference}, reply) is (right and reply not in MISSED)


@pytest.mark.parametrize(
    "text, number",
    [
        ("five with friends", 5),
        ("twenty-nine thousand four hundred", 29400),
        ("an hour", None),
        ("hundreds of them", None),
    ],
)
def test_words_beside_words(text, number):
    said = said_number(text)
    assert (said and said.value) == number


def test_long_replies_take_no_time():
    start = time.perf_counter()
    for text in (
        "one " * 50_000,
        "twenty-" * 30_000,
        "a hundred and " * 20_000,
        ": " * 50_000,
        "two thousand " * 20_000,
    ):
        said_number(text)
    assert time.perf_counter() - start < 5


def test_a_guess_from_several_numbers_is_counted(tmp_path, monkeypatch, capsys):
    from llmcourse import exam

    replies = {"a": "18 apples after 3 days", "b": "Answer: 3", "c": "3 and 3", "d": "eighteen, then three", "e": "x"}
    rows = [{"question": q, "answer": "3" if q != "e" else "x"} for q in replies]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(exam, "examinee", lambda *_: lambda messages: replies[messages[-1]["content"]])
    assert is_guess(replies["a"]) and is_guess(replies["d"]) and not any(is_guess(replies[q]) for q in "bce")
    assert main(["eval", "--data", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    said = capsys.readouterr()
    assert "2 of 5 replies were graded by a guess" in said.err and json.loads(said.out)[0]["correct"] == 5
    assert main(["eval", "--data", str(tmp_path / "rows.jsonl"), "--grade", "exact", "--json"]) == 0
    assert "guess" not in capsys.readouterr().err


def test_a_regex_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(graders, "LONGEST_MATCH", 0.3)
    row, start = {"question": "Q", "regex": "(a+)+$"}, time.perf_counter()
    with pytest.raises(UserError) as e:
        grade_row(row, "a" * 2000 + "!")
    assert "'(a+)+$'" in str(e.value) and "was not done" in str(e.value) and "\n" not in str(e.value)
    assert time.perf_counter() - start < 30 and grade_row(row, "baa")
