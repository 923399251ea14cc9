"""The graders against answers as models and people write them: who is right is written beside each, by hand."""

import json
import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.core import UserError
from llmcourse.evals import evaluate, grade_row
from llmcourse.forms import canonical, detect
from llmcourse.graders import GRADERS, grade_judge, grader_for, guess, mark_of
from llmcourse.rows import read
from llmcourse.tutor import problem, to_chat

# (reply, reference, is it right?)
NUMBERS = [
    # dressed up, and right
    ("18", "18", True),
    ("18.", "18", True),
    ("18.0", "18", True),
    ("Answer: 18.", "18", True),
    ("Answer: 18.00", "18", True),
    ("answer: 18", "18", True),
    ("**Answer:** 18", "18", True),
    ("**Answer: 18**", "18", True),
    ("Answer: **18**", "18", True),
    ("The answer is 18.", "18", True),
    ("The final answer is: 18", "18", True),
    ("So the answer would be 18 apples.", "18", True),
    ("Final Answer: 18", "18", True),
    ("Answer:\n18", "18", True),
    ("#### 18", "18", True),
    ("48/2 = 24, 24 - 6 = 18\n#### 18", "18", True),
    (r"\boxed{18}", "18", True),
    (r"Thus $\boxed{18}$.", "18", True),
    (r"$\boxed{18\text{ dollars}}$", "18", True),
    (r"\[\boxed{\$18}\]", "18", True),
    ("$18", "18", True),
    ("$18.00", "18", True),
    ("18 dollars", "$18", True),
    ("She earns $18 every day.", "18", True),
    ("US$18", "18", True),
    ("18 USD", "$18", True),
    ("€18", "18", True),
    ("18 €", "€18", True),
    ("£1,250.50", "1250.5", True),
    ("1,000", "1000", True),
    ("1,000,000", "1000000", True),
    ("1 000 000", "1000000", True),
    ("1\u202f000", "1000", True),
    ("1\u00a0250,50 €", "1250.5", True),
    ("1.234,56 €", "1234.56", True),
    ("1.000.000", "1000000", True),
    ("1'000", "1000", True),
    ("1_000", "1000", True),
    ("12,34,567", "1234567", True),
    ("1{,}000", "1000", True),
    ("0,5", "0.5", True),
    ("3,14", "3.14", True),
    (".5", "0.5", True),
    ("50%", "50", True),
    ("50 %", "50%", True),
    ("50 percent", "50%", True),
    (r"50\%", "50%", True),
    ("0.5", "50%", True),
    ("50%", "0.5", True),
    ("3/4", "0.75", True),
    ("0.75", "3/4", True),
    (r"$\frac{3}{4}$", "3/4", True),
    (r"\boxed{\dfrac{3}{4}}", "0.75", True),
    ("6/8", "3/4", True),
    ("1 1/2", "1.5", True),
    ("1½ cups", "1.5", True),
    ("0.33", "1/3", True),
    ("1/3", "0.333", True),
    ("-4", "-4", True),
    ("−4", "-4", True),
    ("The temperature is -4 °C.", "-4", True),
    ("-$5", "-5", True),
    ("$-5", "-5", True),
    ("negative 4", "-4", True),
    (r"$-\frac{3}{4}$", "-0.75", True),
    (r"1\frac{1}{2}", "1.5", True),
    ("-½", "-0.5", True),
    ("<think>Is the answer 17?</think>It is 18.", "18", True),
    ("<think>48/2</think><answer>18</answer>", "18", True),
    ("The answer should be 18.", "18", True),
    ("1.5e3", "1500", True),
    ("1.5×10^3", "1500", True),
    (r"1.5 \times 10^{3}", "1500", True),
    ("1.5 x 10³", "1500", True),
    ("10^6", "1000000", True),
    ("2.5e-3", "0.0025", True),
    ("1.5 million", "1500000", True),
    ("$2 thousand", "2000", True),
    ("$18k", "18000", True),
    ("5 km", "5", True),
    ("5km", "5 km", True),
    ("5 kilometers", "5 km", True),
    ("3 hours", "3 h", True),
    ("18 apples", "18", True),
    ("18 m²", "18", True),
    ("20 - 2 = 18", "18", True),
    ("Answer: 20 - 2 = 18", "18", True),
    ("She has 18 left (20 - 2 = 18)", "18", True),
    ("The answer is x = 18", "18", True),
    ("Answer: 18 (that is, 9 twice, 9 + 9)", "18", True),
    ("The answer is 18 per day for 7 days.", "18", True),
    ("First I thought 17.\nAnswer: 17\nNo.\nAnswer: 18", "18", True),
    ("18", 18, True),
    ("18", 18.0, True),
    ("2", ["1", "2"], True),
    ("18", "48 - 30 = <<48-30=18>>18\n#### 18", True),
    ("1080", "so 1,080\n#### 1,080", True),
    ("Answer: 18\n\nQuestion: Tom has 4 apples and eats 1. How many?\nAnswer: 3", "18", True),
    ("The answer is 18.\nQ: And 2 + 1?\nA: The answer is 3.", "18", True),
    ("Answer: 17\nNo.\nAnswer: 18\n\n**Question 2:** 1+2?\nAnswer: 3", "18", True),
    ("Question: 9 + 9?\nAnswer: 18", "18", True),
    ("half", "0.5", True),
    ("Answer: half", "0.5", True),
    ("The answer is one half.", "1/2", True),
    ("Answer: a half", "0.5", True),
    ("2.5M", "2500000", True),
    ("Answer: 2.5M", "2.5 million", True),
    ("$2.5M", "2500000", True),
    ("3B people", "3000000000", True),
    ("2.5m", "2.5", True),
    ("150%", "150", True),
    ("1000%", "10", True),
    ("She had 48, and gives away half of it: 24", "24", True),
    ("She has 18, which is half as many", "18", True),
    ("It is 18, down by half", "18", True),
    ("1000 dollars after 5 days", "5", True),
    ("Answer: 18\n\nQuestion: 1+2?\nAnswer: 3", "3", False),
    ("Answer: half of them", "0.5", False),
    ("2.5m", "2500000", False),
    ("18-20", "18", False),
    ("It takes 18–20 days", "18", False),
    ("18-20", "20", False),
    ("1000%", "1000", False),
    ("Answer: 1000%", "1000", False),
    # near misses
    ("_18_", "18", True),
    ("Ans: 18", "18", True),
    ("1 234,5", "1234.5", True),
    ("\\frac12", "0.5", True),
    ("Answer: 18, 19", "18", False),
    ("100 °F", "100 °C", False),
    ("19", "18", False),
    ("<think>So the answer is 18", "18", False),
    ("<think>The answer is 18.</think>17", "18", False),
    ("", "18", False),
    ("I do not know.", "18", False),
    ("180", "18", False),
    ("1.8", "18", False),
    ("118", "18", False),
    ("-18", "18", False),
    ("18", "-18", False),
    ("Answer: 17\n18 was wrong.", "18", False),
    ("18 or 19? The answer is 19.", "18", False),
    ("Answer: 18 or 19", "18", False),
    ("Answer: 18-20", "18", False),
    ("between 18 and 20", "18", False),
    ("The answer is not 18", "18", False),
    ("Answer: nobody knows, since 18 is too many to say", "17", False),
    ("18 - 1 = 17", "18", False),
    ("#### 17", "18", False),
    ("The answer is 18.\n#### 17", "18", False),
    (r"18 is wrong: \boxed{17}", "18", False),
    ("$1,000", "100", False),
    ("1,000", "1", False),
    ("1.234", "1234", False),
    ("1,234", "1.234", False),
    ("10,00", "1000", False),
    ("€18", "$18", False),
    ("18 cents", "$18", False),
    ("5 miles", "5 km", False),
    ("5 hours", "5 minutes", False),
    ("5%", "50%", False),
    ("0.5%", "50%", False),
    ("500%", "0.5", False),
    ("3/4", "4/3", False),
    ("0.66", "2/3", False),
    ("0.3", "1/3", False),
    ("0.13", "1/8", False),
    ("1 1/2", "0.5", False),
    ("1.5e3", "1.5", False),
    ("1.5e-3", "1500", False),
    ("1.5 billion", "1500000", False),
    ("18…", "18", False),
    ("Answer: 1…", "1", False),
    ("2018-01-18", "18", False),
    ("at 3:18", "18", False),
    ("on the 18th", "18", False),
    ("GPT18", "18", False),
    ("version 1.2.18", "18", False),
    ("17, 18, 19", "18", False),
    ("1,2,18", "18", False),
    ("10^18", "18", False),
    ("17 m^18", "18", False),
    ("eighteen-ish, say 20", "18", False),
]
TEXTS = ["iron", "4", "Paris", "carbon"]
CHOICES = [  # (reply, the letter that is right, is it right?)
    ("C", "C", True),
    ("c", "C", True),
    ("C.", "C", True),
    ("(C)", "C", True),
    ("[C]", "C", True),
    ("**C**", "C", True),
    ("C) Paris", "C", True),
    ("C. Paris", "C", True),
    ("C: Paris", "C", True),
    ("C - Paris", "C", True),
    ("Paris", "C", True),
    ("paris.", "C", True),
    ("Answer: C", "C", True),
    ("Answer: (C) Paris", "C", True),
    ("answer: c", "C", True),
    ("The answer is C.", "C", True),
    ("The answer is (C).", "C", True),
    ("The correct answer is C: Paris.", "C", True),
    ("The answer is Paris.", "C", True),
    ("**Answer:** C", "C", True),
    (r"\boxed{C}", "C", True),
    (r"$\boxed{\text{C}}$", "C", True),
    ("#### C", "C", True),
    ("Option C is correct.", "C", True),
    ("The correct option is C.", "C", True),
    ("The best choice is (C)", "C", True),
    ("I would choose C.", "C", True),
    ("I'll go with C", "C", True),
    ("It's C.", "C", True),
    ("C is the right answer, because iron is a metal.", "C", True),
    ("A is wrong. B is a number. So C is correct.", "C", True),
    ("Let's see. A is a metal, D is an element.\n\nC", "C", True),
    ("C because Paris is a city", "C", True),
    ("C\n\nExplanation: A is a metal.", "C", True),
    ("Option (C)", "C", True),
    ("The answer is A, because iron is a metal", "A", True),
    ("4", "B", True),
    ("Answer: 4", "B", True),
    ("Answer: Carbon", "D", True),
    ("<think>A? B?</think>\n<answer>C</answer>", "C", True),
    ("I think C", "C", True),
    ("<think>C</think>The answer is B.", "C", False),
    ("I think C is wrong", "C", False),
    ("Solution: C", "C", True),
    ("Therefore, C.", "C", True),
    ("I'd say C", "C", True),
    ("It is Paris.", "C", True),
    ("Answer: D. No, C", "C", False),
    ("The answer cannot be C", "C", False),
    ("Either A or C", "C", False),
    ("B", "C", False),
    ("", "C", False),
    ("E", "C", False),
    ("Answer: Carbon", "C", False),
    ("A city", "A", False),
    ("Answer: A city of light", "A", False),
    ("B or C", "C", False),
    ("Answer: B, C", "C", False),
    ("A, B, C and D", "A", False),
    ("The answer is not C", "C", False),
    ("C is wrong, the answer is B", "C", False),
    ("C is not correct", "C", False),
    ("Because of it", "B", False),
    ("Certainly!", "C", False),
    ("C++", "C", False),
    ("I cannot choose between C and D", "C", False),
    ("Answer: B\nC is wrong", "C", False),
    ("Vitamin C", "C", False),
    ("The answer is B. (C) is wrong.", "C", False),
    ("Don't know", "D", False),
    ("None of the above", "C", False),
    # reasons, and a text beside its letter
    ("I think it's B because A is wrong", "B", True),
    ("I choose B because it is 3+1.", "B", True),
    ("I'd pick B as it fits", "B", True),
    ("It must be B since 3+1=4", "B", True),
    ("Correct: B", "B", True),
    ("B (4)", "B", True),
    ("Answer: 4 (B)", "B", True),
    ("Answer: B (4)", "B", True),
    ("I go for B", "B", True),
    ("The capital is Paris", "C", True),
    ("Paris is the capital of France.", "C", True),
    ("The result is 4.", "B", True),
    ("I don’t think it’s A. I go for C", "C", True),
    ("A: Paris", "A", False),
    ("A: Paris", "C", False),
    ("Answer: A (Paris)", "A", False),
    ("It is not B", "B", False),
    ("A or B", "B", False),
    ("Between A and B, A", "B", False),
    ("I don't think it's B because 3 is more", "B", False),
    ("I do not choose B because it is 4", "B", False),
    ("I would not go for B", "B", False),
    ("Correct: B, C", "B", False),
    ("Correct: B or C", "B", False),
    ("Not correct: B", "B", False),
    ("Incorrect: B", "B", False),
    ("I choose B as well as C", "B", False),
    ("The capital is not Paris", "C", False),
    ("The capital isn't Paris", "C", False),
    ("It could be Paris", "C", False),
    ("Is the capital Paris?", "C", False),
    ("Paris or carbon would do", "C", False),
    ("The capital is Paris, carbon an element", "C", False),
    ("Paris is wrong", "C", False),
    ("A spider has 4 pairs of legs", "B", False),
    ("The result is 4.5", "B", False),
    ("The result is -4", "B", False),
    ("Parisian bread", "C", False),
    ("If it's B because of the sum, then I am a fish", "B", False),
]
EXACT = [
    ("Paris", "Paris", True),
    (" paris. ", "Paris", True),
    ('"Paris"', "Paris", True),
    ("It is a city.\nAnswer: Paris", "Paris", True),
    ("**Answer:** Paris", "Paris", True),
    ("Lutetia", ["Paris", "Lutetia"], True),
    ("New  York", "new york", True),
    ("<think>Lyon?</think><answer>Paris</answer>", "Paris", True),
    ("It isn’t", "It isn't", True),
    ("It isn't", "It isn’t", True),
    ("**Paris**", "Paris", True),
    ("*Paris*.", "Paris", True),
    ("**Paris.**", "Paris", True),
    ("`Paris`", "Paris", True),
    ("Answer: **Paris**", "Paris", True),
    ("A*", "A", False),
    ("**Paris** or **Rome**", "Paris", False),
    ("Paris, I think", "Paris", False),
    ("Not Paris", "Paris", False),
    ("Pari", "Paris", False),
    ("Parish", "Paris", False),
    ("", "Paris", False),
    ("Answer: London\nParis", "Paris", False),
    ("C", "C++", False),
    ("7", "007", False),
]
CONTAINS = [
    ("It is Paris, of course.", "Paris", True),
    ("PARIS", "Paris", True),
    ("Perhaps Lutetia?", ["Paris", "Lutetia"], True),
    ("I love New York!", "new york", True),
    ("5 apples", "5", True),
    ("There are 5.", "5", True),
    ("<think>Paris?</think>Lyon", "Paris", False),
    ("comparisons", "Paris", False),
    ("Parisian", "Paris", False),
    ("15 apples", "5", False),
    ("5.3 apples", "5", False),
    ("1,005", "5", False),
    ("", "Paris", False),
]
REGEX = [
    ("due 2024-05-01", r"\d{4}-\d\d-\d\d", True),
    ("YES", r"(?i)^yes$", True),
    ("a\nb", r"(?m)^b$", True),
    ("due in May", r"\d{4}-\d\d-\d\d", False),
    ("yes, but", r"(?i)^yes$", False),
    ("", r".", False),
]
ORDER = '{"who": "Ana", "what": "apples", "n": 3, "paid": true}'
JSON = [  # (reply, reference, the share that is right)
    (ORDER, ORDER, 1),
    ('{"n": 3, "paid": true, "what": "apples", "who": "Ana"}', ORDER, 1),
    (f"```json\n{ORDER}\n```", ORDER, 1),
    (f"Here it is:\n```\n{ORDER}\n```\nAnything else?", ORDER, 1),
    (f"Sure! {ORDER} That is all.", ORDER, 1),
    ('{"who": "ana", "what": "Apples", "n": 3.0, "paid": true}', ORDER, 1),
    ('{"who": "Ana", "what": "apples", "n": 4, "paid": true}', ORDER, 0.75),
    ('{"who": "Ana", "what": "apples"}', ORDER, 0.5),
    ('{"who": "Ana", "what": "apples", "n": "3", "paid": 1}', ORDER, 0.5),
    ('{"who": "Ana", "what": "apples", "n": 3, "paid": true, "tip": 1}', ORDER, 0.8),
    ('{"Who": "Ana"}', ORDER, 0),
    ("three apples for Ana", ORDER, 0),
    ("", ORDER, 0),
    ("{}", ORDER, 0),
    ('{"who": "Ana",', ORDER, 0),
    ("[1, 2, 3]", "[1, 2, 3]", 1),
    ("[1, 2]", "[1, 2, 3]", 2 / 3),
    ("[3, 2, 1]", "[1, 2, 3]", 1 / 3),
    ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5),
    ("null", '{"a": 1}', 0),
]
TABLES = {"number": NUMBERS, "exact": EXACT, "contains": CONTAINS, "regex": REGEX}
CASES = [(name, *case) for name, cases in TABLES.items() for case in cases]


def asked(answer, **more) -> dict:
    return {"question": "Which one?", "answer": answer, **more}


def test_there_are_enough_of_them():
    assert len(CASES) + len(CHOICES) + len(JSON) >= 150
    hard = [right for *_, right in CASES + CHOICES if not right]
    assert len(hard) >= 75, "negatives"


@pytest.mark.parametrize("name,reply,wanted,right", CASES)
def test_right_and_wrong(name, reply, wanted, right):
    assert GRADERS[name](asked(wanted), reply) is right


@pytest.mark.parametrize("reply,letter,right", CHOICES)
def test_choices(reply, letter, right):
    row = asked("ABCD".index(letter), choices=TEXTS)
    assert GRADERS["choice"](row, reply) is right and GRADERS["choice"](canonical(row), reply) is right


@pytest.mark.parametrize("reply,wanted,share", JSON)
def test_json_by_field(reply, wanted, share):
    assert GRADERS["json"](asked(wanted), reply) == pytest.approx(share)
    assert GRADERS["json"]({"messages": [], "answer": json.loads(wanted)}, reply) == pytest.approx(share)


# ---- schemas, judges, and what they cannot do

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "reply,share",
    [
        ('{"name": "Ana", "age": 3}', 1),
        ('```json\n{"name": "Ana", "age": 3}\n```', 1),
        ('{"name": "Ana", "age": -1}', 0.5),
        ('{"name": "Ana"}', 0.5),
        ('{"name": "Ana", "age": 3, "job": "x"}', 2 / 3),
        ('{"name": 1, "age": "x"}', 0),
        ("[]", 0),
        ("Ana is 3", 0),
    ],
)
def test_json_by_schema(reply, share):
    openai = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for row in ({"schema": PERSON}, {"schema": json.dumps(PERSON)}, {"response_format": openai}):
        assert GRADERS["json"]({"question": "Who?"} | row, reply) == pytest.approx(share)
        assert guess({"question": "Who?"} | row)[0] == "json"


def test_schema_and_fields_together():
    row = asked('{"name": "Ana", "age": 3}', schema=PERSON)
    assert GRADERS["json"](row, '{"name": "Ana", "age": 3}') == 1
    assert GRADERS["json"](row, '{"name": "Eva", "age": 3}') == 0.5, "valid, and half of it wrong"
    assert GRADERS["json"](row, '{"name": "Ana", "age": 3, "x": 1}') == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "name,row,message",
    [
        ("number", asked("Paris"), "no number in the reference 'Paris'"),
        ("number", {"question": "Q"}, "no reference"),
        ("choice", asked("Paris"), "no choice in the reference"),
        ("choice", asked(7, choices=TEXTS), "is none of the 4 choices"),
        ("regex", asked("("), "no regular expression"),
        ("json", asked("Paris"), "no JSON in the reference"),
        ("json", {"question": "Q", "schema": {"type": "objekt"}}, "not a JSON schema"),
        ("contains", asked(" "), "an empty text"),
        ("exact", asked(" "), "an empty reference"),
        ("judge", {"question": "Q"}, "no reference"),
        ("judge", asked("Paris"), "LLMCOURSE_JUDGE_URL"),
    ],
)
def test_a_row_that_cannot_be_graded_is_named_before_anything_is_asked(name, row, message, monkeypatch):
    monkeypatch.delenv("LLMCOURSE_JUDGE_URL", raising=False)
    with pytest.raises(UserError, match=f"^own.jsonl:2: .*{re.escape(message)}") as e:
        grader_for([("own.jsonl:2", row)], name)
    assert "\n" not in str(e.value)


def test_unknown_grader():
    with pytest.raises(UserError, match="unknown grader 'numbr': did you mean 'number'"):
        grader_for([("rows[0]", asked("1"))], "numbr")


def test_judge():
    seen = []

    def judge(messages):
        seen.append(messages[0]["content"])
        return "It is fine.\nScore: 7/10"

    row = {"question": "Say hello.", "rubric": "It is friendly."}
    assert grade_judge(row, "Hi!", judge) == 0.7 and "It is friendly." in seen[0] and "Hi!" in seen[0]
    assert "Say hello." in seen[0] and guess(row)[0] == "judge"
    assert grade_judge(row, "Hi!", lambda messages: "I like it") is None
    assert [mark_of(text) for text in ("Score: 10", "Score: **3**", "Score: 11", "Score: 7.5", "Score: -1", "")] == [
        10, 3, None, None, None, None
    ]  # fmt: skip


# ---- guesses


@pytest.mark.parametrize(
    "row,name",
    [
        (asked("18"), "number"),
        (asked(18), "number"),
        (asked("so it is 18\n#### 18"), "number"),
        (asked("$1,200.50"), "number"),
        ({"input": [{"role": "user", "content": "Q"}], "ideal": ["18", "eighteen"]}, "exact"),
        ({"input": [{"role": "user", "content": "Q"}], "ideal": ["18", "18.0"]}, "number"),
        (asked("18 or 19"), "exact"),
        (asked("18 people came to the party."), "exact"),
        (asked("007"), "exact"),
        (asked("2024-05-01"), "exact"),
        (asked("Paris"), "exact"),
        (asked("C"), "exact"),
        ({"question": "Which?\nA. iron\nB. oak\nC. Paris", "answer": "C"}, "choice"),
        (asked(2, choices=TEXTS), "choice"),
        (asked("C", options=TEXTS), "choice"),
        ({"question": "Which?", "A": "iron", "B": "oak", "answer": "B"}, "choice"),
        ({"question": "Which?", "choices": {"text": TEXTS, "label": [*"ABCD"]}, "answerKey": "C"}, "choice"),
        (asked('{"a": 1}'), "json"),
        (asked("[1, 2]"), "json"),
        (asked("[sic]"), "exact"),
        (asked("SELECT 1", schema="CREATE TABLE t (a int[])"), "exact"),
        (asked("x", regex="x+"), "regex"),
        (asked("x", contains=["x", "y"]), "contains"),
        (asked("x", rubric="It is short."), "judge"),
        (problem("add", random.Random(1)), "tutor"),
        (to_chat(problem("story2", random.Random(1))), "tutor"),
    ],
)
def test_guess(row, name):
    assert guess(row)[0] == name
    assert guess(canonical(row))[0] == name, "as `rows.read` gives it"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=5,
)
COLUMNS = (
    "answer",
    "ideal",
    "choices",
    "options",
    "answerKey",
    "schema",
    "response_format",
    "regex",
    "contains",
    "rubric",
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), ANY, max_size=4), st.text(max_size=20))
def test_any_row_is_graded_or_refused_in_one_line(columns, reply):
    from unittest import mock

    with mock.patch.dict("os.environ", {"LLMCOURSE_JUDGE_URL": ""}):
        try:
            ((place, row),) = [(row.place, row.data) for row in read([{"question": "Q?", **columns}])]
            name, _ = grader_for([(place, row)])
            assert 0 <= GRADERS[name](row, reply) <= 1
        except UserError as e:
            assert str(e).startswith("rows[0]") and "\n" not in str(e)


# ---- published forms


@pytest.mark.parametrize(
    "row",
    [
        asked(2, choices=TEXTS, subject="geography"),
        asked("C", choices=TEXTS),
        asked("Paris", choices=TEXTS),
        {"question": "Which one?", "options": TEXTS, "answer": "C", "answer_index": 2, "category": "law"},
        {"question": "Which one?", "choices": {"text": TEXTS, "label": [*"1234"]}, "answerKey": "3", "id": "x"},
        {"question": "Which one?", **dict(zip("ABCD", TEXTS)), "answer": "C"},
    ],
)
def test_multiple_choice_as_published(row):
    assert detect(row) == "choice"
    data = canonical(row)
    assert data["messages"] == [
        {"role": "user", "content": "Which one?\nA. iron\nB. 4\nC. Paris\nD. carbon\nAnswer:"},
        {"role": "assistant", "content": "C"},
    ]
    assert {"subject", "category", "id"} & set(row) <= set(data), "other columns are kept"
    assert grade_row(row, "C") and grade_row(data, "(C) Paris") and not grade_row(data, "D")
    assert evaluate(lambda m: m[-1]["content"][-17:-16], [row], progress=False)[0]["question"].endswith("Answer:")


@pytest.mark.parametrize(
    "row,message",
    [
        (asked(4, choices=TEXTS), "none of the 4 choices"),
        (asked(-1, choices=TEXTS), "none of the 4 choices"),
        (asked("Rome", choices=TEXTS), "none of the 4 choices"),
        (asked("3", choices=["3", "4", "5", "6"]), "may be two of the choices"),
        (asked(0, choices=["one"]), "1 choices"),
    ],
)
def test_a_choice_that_is_none_is_refused(row, message):
    with pytest.raises(UserError, match=f"^a.jsonl:3: .*{message}"):
        canonical(row, "a.jsonl:3")


# ---- properties


def written(n: Fraction, rng: random.Random) -> str:
    "A whole number as somebody may write it."
    marks = rng.choice([",", " ", "\u202f", "'", "_", ""]) if abs(n) >= 1000 else ""
    digits = f"{abs(n):,}".replace(",", marks)
    text = ("-" if n < 0 else "") + rng.choice(["", "$", "€"]) + digits + rng.choice(["", ".0", ".00"])
    return rng.choice(
        ["{}", "Answer: {}.", "The answer is {}", "#### {}", r"\boxed{{{}}}", "so **{}**", "it is {}"]
    ).format(text)


@settings(max_examples=500, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.integers(0, 10**6))
def test_every_way_to_write_a_number_is_read_back(n, other, seed):
    text = written(n, random.Random(seed))
    assert GRADERS["number"](asked(str(n)), text) is True, text
    assert GRADERS["number"](asked(str(other)), text) is (n == other), text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200), st.sampled_from([asked("18"), asked("C", choices=TEXTS), asked("Paris"), asked(ORDER)]))
def test_any_reply_is_graded(reply, row):
    for name in ("exact", "contains", guess(row)[0], "mixed"):
        assert 0 <= GRADERS[name](row, reply) <= 1


@pytest.mark.parametrize(
    "part",
    [
        "1",
        "1,",
        "1 ",
        "-",
        "$",
        "\\frac{",
        "1,000",
        "[",
        '{"a":',
        "Answer: ",
        "A ",
        "(A",
        "1/",
        "1e",
        "**",
        "```\n",
        "1-",
    ],
)
def test_long_replies_take_no_time(part):
    reply, start = part * (40_000 // len(part)), time.process_time()
    for row in (asked("18"), asked(2, choices=TEXTS), asked("Paris"), asked(ORDER)):
        GRADERS["mixed"](row, reply)
    assert time.process_time() - start < 5


def test_numbers_beyond_reason():
    for text in ("9" * 5000, "1e999999999", "10^99999999", "1/0", "0^-1"):
        assert GRADERS["number"](asked("18"), text) is False


def test_agrees_with_an_independent_reader():
    "math-verify (Hugging Face) reads LaTeX and plain numbers; no unit, no spaced thousands, no near miss by range."
    verify = pytest.importorskip("math_verify")
    both = [(r, w, right) for r, w, right in NUMBERS if isinstance(w, str) and "<<" not in w]
    theirs = [verify.verify(verify.parse(w), verify.parse(r)) for r, w, _ in both]
    agree = sum(a == right for a, (*_, right) in zip(theirs, both))
    assert agree / len(both) > 0.6


def test_calls_are_not_graded_where_none_is_wanted():
    "A reply without a call would be right for each row."
    with pytest.raises(UserError, match="a.jsonl:1: no call of a tool in the reference 'D'"):
        grader_for([("a.jsonl:1", {"question": "Which?", "answer": "D"})], "tool")


def test_a_number_of_several_is_a_guess_and_one_behind_a_mark_is_none():
    from llmcourse.amounts import is_guess

    assert is_guess("1000 dollars after 5 days")
    assert not is_guess("Answer: 18\n\nQuestion: 1+2?\nAnswer: 3")


# ---- several references


def as_read(row: dict) -> dict:
    return next(iter(read([row]))).data


@pytest.mark.parametrize("name", ["regex", "contains", "exact"])
@pytest.mark.parametrize("reply,right", [("refund", True), ("zz", True), ("hello", False), ("f", False), ("", False)])
def test_any_text_of_a_list_is_right(name, reply, right):
    columns = [{"answer": ["zz", "refund"]}, {"ideal": ["zz", "refund"], "input": "Q?"}]
    if name != "exact":
        columns.append({name: ["zz", "refund"]})
    for more in columns:
        row = as_read(({} if "input" in more else {"question": "Q?"}) | more)
        assert GRADERS[name](row, reply) is right, more


@pytest.mark.parametrize("column,given", [("regex", {"a": 1}), ("regex", 5), ("regex", ["a", 5]), ("regex", ["a", ""]),
                                          ("contains", ["a", {"b": 1}]), ("contains", [None])])  # fmt: skip
def test_what_is_no_text_is_refused_with_its_row(column, given):
    row = asked("x", **{column: given})
    with pytest.raises(UserError, match=f"^own.jsonl:2: {column} .*is no text. Give a text, or a list of texts"):
        grader_for([("own.jsonl:2", row)])


def test_a_bad_pattern_is_named_behind_one_that_fits():
    with pytest.raises(UserError, match=r"^own.jsonl:2: '\('.*no regular expression"):
        grader_for([("own.jsonl:2", asked("x", regex=[".*", "("]))])


# ---- what is said before the first question


def exam(rows):
    from llmcourse.exam import examinable, exam_grader

    found = read(rows, "exam", "", examinable)
    return exam_grader([row.data | {"place": row.place} for row in found], None, "own.jsonl")


@pytest.mark.parametrize(
    "answers,said",
    [(["You can send it back within thirty days."], True), (["Yes."], False), (["In Bern, of course.", "Yes"], False),
     (["18"], False)],
)  # fmt: skip
def test_full_sentences_are_seldom_word_for_word_the_same(answers, said, capsys):
    exam([asked(answer) for answer in answers])
    text = "Full sentences are seldom word for word the same: --grade judge or contains"
    assert (text in "".join(capsys.readouterr())) is said


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]


@pytest.mark.parametrize(
    "name,arguments,wrong",
    [("weather", {"city": 5}, "arguments that do not fit"), ("weather", {}, "arguments that do not fit"),
     ("wether", {"city": "Bern"}, "not among the row's tools"), ("weather", {"city": "Bern"}, "")],
)  # fmt: skip
@pytest.mark.parametrize("column", ["answer", "messages"])
def test_a_wanted_call_that_its_tools_do_not_take_is_no_exam_row(name, arguments, wrong, column):
    turns = [{"role": "user", "content": "How warm is it?"}]
    row = {"messages": turns, "tools": WEATHER}
    if column == "answer":
        row["answer"] = {"name": name, "arguments": arguments}
    else:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        row["messages"] = [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}]
    if not wrong:
        assert exam([row]) == "tool" or column == "answer"
        return
    with pytest.raises(UserError, match=rf"^rows\[0\]: .*{wrong}.*\. Correct the row$"):
        exam([row])


def test_a_reference_that_breaks_its_own_schema_is_no_exam_row():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    exam([asked('{"name": "Ana", "age": 3}', response_format=form)])
    with pytest.raises(UserError, match=r"^rows\[0\]: .*breaks the row's own schema. Correct the row"):
        exam([asked('{"name": "Ana", "age": "three"}', response_format=form)])
    with pytest.raises(UserError, match=r"^rows\[0\]: no JSON in the reference 'Ana, 3'. Correct the row"):
        exam([asked("Ana, 3", response_format=form)])
