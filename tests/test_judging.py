"""How far raters agree, beyond chance and with an interval; two answers compared in both orders; and the command."""

import json
import random

import pytest

from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.judging import agreement, agreement_table, duel, preferred, read_ratings, verdicts, win_rate

YES, NO = True, False


# ---- agreement


def test_kappa_of_cohens_own_kind_of_table():
    "20 and 15 of 50 the same, 5 and 10 not: the example that textbooks and Wikipedia work out, 0.4."
    first = [YES] * 25 + [NO] * 25
    second = [YES] * 20 + [NO] * 5 + [YES] * 10 + [NO] * 15
    found = agreement(first, second)
    assert found["same"] == 35 and found["accuracy"] == 0.7 and found["chance"] == 0.5
    assert found["kappa"] == pytest.approx(0.4)
    assert found["kappa_low"] < 0.4 < found["kappa_high"] and found["low"] < 0.7 < found["high"]


def test_kappa_of_three_names():
    "4 of 6 the same, a third by chance: (4/6 - 1/3) / (1 - 1/3)."
    first = ["a", "b", "c", "a", "b", "c"]
    assert agreement(first, ["a", "b", "c", "a", "c", "b"])["kappa"] == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_who_always_says_yes_has_a_kappa_of_0(share):
    labels = [YES] * round(share * 40) + [NO] * round((1 - share) * 40)
    found = agreement(labels, [YES] * 40)
    assert found["accuracy"] == share and found["kappa"] == pytest.approx(0)


def test_full_agreement_is_not_certainty():
    labels = [YES, NO] * 10
    found = agreement(labels, labels)
    assert found["kappa"] == found["kappa_high"] == 1 and 0.6 < found["kappa_low"] < 0.7
    assert agreement([YES] * 9, [YES] * 9)["kappa"] is None, "nothing was told apart"


def test_no_mark_is_no_agreement():
    assert agreement([YES, NO, NO], [YES, None, NO])["same"] == 2


@pytest.mark.parametrize(
    "labels,given,words",
    [([], [], "no labels"), ([YES], [], "1 labels, 0 verdicts"), ([YES, None], [YES, YES], "label 2 is missing")],
)
def test_labels_that_cannot_be_compared(labels, given, words):
    with pytest.raises(UserError, match=words):
        agreement(labels, given)


def test_the_interval_holds_the_true_kappa_as_often_as_it_says():
    "Raters who say the same in 85 % of the cases, half of them yes: kappa is 0.7. 20, 40 and 100 replies at a time."
    rng = random.Random(3)
    for n in (20, 40, 100):
        hits = 0
        for _ in range(500):
            labels = [rng.random() < 0.5 for _ in range(n)]
            found = agreement(labels, [x != (rng.random() < 0.15) for x in labels])
            hits += found["kappa_low"] <= 0.7 <= found["kappa_high"]
        assert 0.92 <= hits / 500 <= 0.98, (n, hits)


# ---- ratings and verdicts


def rated(**more) -> dict:
    return {
        "question": "When?",
        "answer": "In 3 days.",
        "reply": "It takes 3 days.",
        "ann": True,
        "ben": "false",
    } | more


def test_raters_are_the_columns_of_true_and_false():
    rows, raters = read_ratings([rated(), rated(ann="True", ben=False, liked=3)])
    assert raters == ["ann", "ben"] and [r["ann"] for r in rows] == [True, True] and rows[0]["ben"] is False
    rows, raters = read_ratings([rated(ann="yes", ben=0)], ["ben", "ann"])
    assert raters == ["ben", "ann"] and rows[0]["ann"] is True and rows[0]["ben"] is False


@pytest.mark.parametrize(
    "rows,raters,words",
    [
        ([{"reply": "x", "ann": "fine"}], None, r"rows\[0\]: no column of true and false"),
        ([rated(), {"ann": True, "ben": True}], None, r'rows\[1\]: no "reply"'),
        ([rated(ann="fine")], ["ann"], r"rows\[0\]: ann says 'fine'"),
        ([rated()], ["eve"], r"rows\[0\]: eve says None"),
    ],
)
def test_ratings_that_cannot_be_read(rows, raters, words):
    with pytest.raises(UserError, match=words):
        read_ratings(rows, raters)


def test_verdicts_of_a_grader_and_of_a_function():
    rows, _ = read_ratings([rated(contains="3 days"), rated(contains="3 days", reply="Soon.")])
    assert verdicts(rows, "contains") == [True, False]
    marks = iter([0.7, None])
    assert verdicts(rows, lambda row, reply: next(marks)) == [True, None]
    assert verdicts(rows, lambda row, reply: 0.7, cut=0.8) == [False, False]
    with pytest.raises(UserError, match="cut 7"):
        verdicts(rows, "contains", 7)
    with pytest.raises(UserError, match=r"rows\[0\]: no number"):
        verdicts(read_ratings([rated(answer="soon")])[0], "number")


def test_the_table_has_people_first_and_then_where_they_agree():
    rows, raters = read_ratings([rated(contains="3 days", ben=True), rated(contains="3 days", reply="Soon.")])
    table = agreement_table(rows, raters, {"contains": verdicts(rows, "contains")})
    assert [(r["who"], r["same"], r["n"]) for r in table] == [
        ("ann, ben", 1, 2),
        ("contains, ann", 1, 2),
        ("contains, ben", 2, 2),
        ("contains, where people agree", 1, 1),
    ]


# ---- two answers


def likes(word):
    "A judge that prefers the answer with a word in it, wherever it stands."

    def judge(messages):
        one = messages[0]["content"].partition("Answer A:\n")[2].partition("\n\nAnswer B:\n")[0]
        return f"**Better: {'A' if word in one else 'B'}**"

    return judge


def test_the_judge_sees_question_both_answers_and_rubric():
    seen = []
    preferred(lambda m: seen.append(m[0]["content"]) or "Better: tie", "When?", "now", "later", "It is exact.")
    assert all(text in seen[0] for text in ("When?", "Answer A:\nnow", "Answer B:\nlater", "It is exact."))


@pytest.mark.parametrize(
    "said,found",
    [("Better: A", "A"), ("better: **b**.", "B"), ("Better: tie", "tie"), ("Better: Answer", None), ("A", None)],
)
def test_what_a_judge_may_say(said, found):
    assert preferred(lambda messages: said, "?", "x", "y") == found


def test_a_judge_that_changes_its_mind_has_said_nothing():
    assert duel(likes("3"), "When?", "soon", "in 3 days") == {"verdict": "b", "steady": True}
    assert duel(likes("3"), "When?", "in 3 days", "soon") == {"verdict": "a", "steady": True}
    assert duel(lambda m: "Better: A", "When?", "x", "y") == {"verdict": "", "steady": False}
    assert duel(lambda m: "no idea", "When?", "x", "y") == {"verdict": "", "steady": False}
    assert duel(lambda m: "Better: tie", "When?", "x", "y") == {"verdict": "tie", "steady": True}


def duels(a: int, b: int, ties: int) -> list[dict]:
    return [{"verdict": v, "steady": True} for v in ["a"] * a + ["b"] * b + ["tie"] * ties]


def test_win_rate_counts_a_tie_as_half():
    found = win_rate(duels(2, 6, 2))
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (10, 6, 2, 2)
    assert found["win_rate"] == pytest.approx(0.7) and found["low"] < 0.7 < found["high"]
    assert found["p"] == pytest.approx(2 * (1 + 8 + 28) / 2**8), "the sign test: 6 to 2"
    assert win_rate(duels(0, 40, 0))["low"] > 0.9 and win_rate(duels(0, 40, 0))["high"] == 1
    with pytest.raises(UserError, match="no duels"):
        win_rate([])


def test_a_pair_on_which_the_judge_changed_its_mind_is_a_coin():
    "Half a win, as a tie is, but with a coin's uncertainty: 20 of them are not 20 ties."
    changed = [{"verdict": "", "steady": False}] * 20
    coins, ties = win_rate(changed), win_rate(duels(0, 0, 20))
    assert (coins["unsteady"], coins["ties"], coins["wins"], coins["win_rate"], coins["p"]) == (20, 0, 0, 0.5, 1)
    assert coins["high"] - coins["low"] > 0.4 > 0.2 > ties["high"] - ties["low"]
    odd = win_rate(changed[:3] + duels(0, 1, 0))
    assert odd["n"] == 4 and odd["win_rate"] == 0.625


def test_the_interval_of_a_win_rate_holds_the_true_one():
    rng, hits = random.Random(4), 0
    for _ in range(500):
        drawn = rng.choices(["a", "b", "tie"], [0.2, 0.5, 0.3], k=50)  # the true rate is 0.65
        found = win_rate([{"verdict": v, "steady": True} for v in drawn])
        hits += found["low"] <= 0.65 <= found["high"]
    assert 0.92 <= hits / 500 <= 0.98, hits


# ---- the command


def test_the_command_prints_a_table_and_writes_verdicts(tmp_path, capsys):
    path = tmp_path / "ratings.jsonl"
    rows = [rated(regex="3 days"), rated(regex="3 days", reply="Soon.", ann=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["agree", str(path), "--grade", "regex", "--output", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "ann, ben" in said and "regex, ann" in said and "kappa" in said
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in written] == [True, False] and written[0]["regex"] == "3 days"
    assert main(["agree", str(path), "--grade", "regex", "--raters", "ann", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["same"] == 2 and row["kappa"] == 1


@pytest.mark.parametrize(
    "text,words,expected",
    [
        ("{}\n", [], "no column of true and false"),
        ('{"reply": "x", "ann": true}\n', [], "nobody to agree with"),
        ('{"reply": "x", "ann": true}\n', ["--grade", "number"], "no reference"),
        ('{"reply": "x", "ann": true}\n', ["--grade", "numer"], "did you mean"),
        ('{"question": "?", "answer": "y", "reply": "x", "ann": true}\n', ["--grade", "judge"], "LLMCOURSE_JUDGE_URL"),
        ("", [], "empty"),
    ],
)
def test_bad_ratings_give_one_line(tmp_path, capsys, monkeypatch, text, words, expected):
    monkeypatch.delenv("LLMCOURSE_JUDGE_URL", raising=False)
    path = tmp_path / "ratings.jsonl"
    path.write_text(text)
    assert main(["agree", str(path), *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.strip().splitlines()) == 1 and "Traceback" not in said
