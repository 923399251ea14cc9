"""Chapter 04: intervals, paired tests and the evaluation loop, against enumeration, simulation and planted faults."""

import itertools, math, random, threading, time
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from llmcourse import check
from llmcourse.check import ToDo
from llmcourse.core import UserError
from llmcourse.evals import (
    Completion,
    compare,
    evaluate,
    grade_row,
    judge,
    paired,
    plot_scores,
    score,
    show,
    summary,
    wilson,
)
from llmcourse.exercises.evals import EXERCISES
from llmcourse.tutor import problems, to_chat

settings.register_profile("no deadline", deadline=None)  # a busy machine is not a bug
settings.load_profile("no deadline")
counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.floats(0.5, 0.999))
def test_wilson_is_inside_and_holds_the_share(cn, level):
    c, n = cn
    low, high = wilson(c, n, level)
    assert 0 <= low <= c / n <= high <= 1 and low < high


@given(counts)
def test_wilson_is_symmetric(cn):
    c, n = cn
    low, high = wilson(c, n)
    other_low, other_high = wilson(n - c, n)
    assert math.isclose(low, 1 - other_high, abs_tol=1e-12) and math.isclose(high, 1 - other_low, abs_tol=1e-12)


@given(counts, st.integers(2, 9))
def test_wilson_shrinks_with_n_and_grows_with_level(cn, times):
    c, n = cn
    width = lambda c, n, level=0.95: (lambda lh: lh[1] - lh[0])(wilson(c, n, level))
    assert width(c * times, n * times) < width(c, n) < width(c, n, 0.99)


@given(counts)
def test_wilson_ends_are_the_rates_that_are_just_not_rejected(cn):
    "The definition: at each end, the score test's z is exactly 1.96."
    c, n = cn
    for end in wilson(c, n):
        if 0 < end < 1:
            assert abs(abs(c / n - end) / math.sqrt(end * (1 - end) / n) - 1.959964) < 1e-4


def test_wilson_known_values():
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(20, 20) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    assert wilson(81, 263) == (
        pytest.approx(0.2553, abs=1e-4),
        pytest.approx(0.3662, abs=1e-4),
    )  # Newcombe 1998, table I
    assert wilson(15, 148) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))  # the same


@pytest.mark.parametrize("bad", [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(bad):
    with pytest.raises(UserError, match="right out of"):
        wilson(*bad)
    with pytest.raises(UserError, match="level"):
        wilson(1, 2, level=95)


def test_score_keys():
    assert list(score(3, 4)) == ["n", "correct", "accuracy", "low", "high"] and score(3, 4)["accuracy"] == 0.75


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (0, 6), (1, 5), (3, 3), (2, 9), (7, 4)])
def test_paired_equals_enumeration(only_a, only_b):
    "All 2^m ways in which m disagreements could have fallen, each equally likely."
    a = [True] * only_a + [False] * only_b + [True] * 5
    b = [False] * only_a + [True] * only_b + [True] * 5
    m, gap = only_a + only_b, abs(only_a - only_b)
    as_uneven = sum(abs(2 * sum(coins) - m) >= gap for coins in itertools.product((0, 1), repeat=m))
    assert paired(a, b) == {"only_a": only_a, "only_b": only_b, "p": pytest.approx(as_uneven / 2**m)}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_paired_is_symmetric_and_a_probability(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    one, two = paired(a, b), paired(b, a)
    assert 0 < one["p"] <= 1 and one["p"] == two["p"] and one["only_a"] == two["only_b"]
    assert paired(a, a)["p"] == 1


@pytest.mark.parametrize("m", [1, 2, 7, 20, 43])
def test_paired_equals_the_sum_over_the_binomial(m):
    """Too many falls to enumerate: count the ways of each number of heads with `math.comb`, exactly, and keep the
    splits that are no likelier."""
    ways = [math.comb(m, k) for k in range(m + 1)]
    for heads in range(m + 1):
        exact = Fraction(sum(w for w in ways if w <= ways[heads]), 2**m)
        a, b = [True] * heads + [False] * (m - heads), [False] * heads + [True] * (m - heads)
        assert paired(a, b)["p"] == pytest.approx(float(exact), rel=1e-12)


def test_paired_keeps_its_level():
    "Two equally good models are called different in at most 5 % of 2000 trials (exact tests are on the safe side)."
    rng, alarms = random.Random(0), 0
    for _ in range(2000):
        a, b = ([rng.random() < 0.7 for _ in range(60)] for _ in "ab")
        alarms += paired(a, b)["p"] < 0.05
    assert 0.01 < alarms / 2000 < 0.05


def test_paired_refuses_unequal_lists():
    with pytest.raises(UserError, match="2 answers of A, 1 of B"):
        paired([True, False], [True])


def test_paired_on_many_rows_is_quick_and_finite():
    start = time.process_time()
    assert paired([True] * 2000 + [False] * 1800, [False] * 2000 + [True] * 1800)["p"] == pytest.approx(
        0.0012, abs=2e-4
    )
    assert paired([True] * 3000, [False] * 3000)["p"] < 1e-300
    assert time.process_time() - start < 5


# --- grading ---------------------------------------------------------------------------------------------------------

TUTOR = {"task": "add", "question": "What is 47 plus 38?", "working": "…", "answer": "85"}


@pytest.mark.parametrize(
    "reply, right",
    [
        ("47+38: ones 7+8=15, carry 1, tens 4+3+1=8, so 85.\nAnswer: 85", True),
        ("Answer: 85", True),
        ("so 85.", False),
        ("Answer: 85\nAnswer: 86", False),
        ("Answer: 185", False),
        ("85", False),
        ("", False),
        ("Answer: 85 or so", False),
    ],
)
def test_tutor_rows_count_only_in_the_format(reply, right):
    assert grade_row(TUTOR, reply) is right and grade_row(to_chat(TUTOR), reply) is right


def own(reference):
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": reference}]}


@pytest.mark.parametrize(
    "row, reply, right",
    [
        (own("Paris"), "paris.", True),
        (own("Paris"), "Paris, I think", False),
        (own("Paris"), "", False),
        (own("so 85.\nAnswer: 85"), "I see: Answer 85\nAnswer: 85", True),
        (own("Answer: 85"), "85", True),
        ({"input": [{"role": "user", "content": "Q"}], "ideal": ["Paris", "Lutetia"]}, " LUTETIA\n", True),
        ({"question": "Q", "answer": 42}, "42", True),
        ({"question": "Q", "answer": "-4"}, "4", False),
        (own("50 %"), "50", True),
        (own("50 %"), "5", False),
        (own("C++"), "C", False),
        (own("C++"), '"C++".', True),
        ({"question": "Q", "answer": "New  York"}, "new york", True),
        ({"question": "Q", "answer": "ﬁne"}, "fine", True),
    ],
)
def test_own_rows(row, reply, right):
    assert grade_row(row, reply) is right


def test_row_without_reference():
    with pytest.raises(UserError, match="no reference"):
        grade_row({"messages": [{"role": "user", "content": "Q"}]}, "x")
    with pytest.raises(UserError, match="no reference"):
        grade_row(own(""), "")


# --- the loop --------------------------------------------------------------------------------------------------------

ROWS = problems(4, seed=1, tasks=("add", "story1"), split="test")


def solver(messages):
    "Knows the answers; thinks longer about early rows, so that threads finish out of order."
    i = next(i for i, r in enumerate(ROWS) if r["question"] == messages[-1]["content"])
    time.sleep(0.002 * (len(ROWS) - i))
    return f"so\nAnswer: {ROWS[i]['answer']}"


@pytest.mark.parametrize("workers", [1, 4])
def test_evaluate_keeps_order(workers):
    results = evaluate(solver, ROWS, workers=workers, progress=False)
    assert [r["question"] for r in results] == [r["question"] for r in ROWS] and all(
        r["right"] and r["format"] for r in results
    )
    assert list(results[0]) == ["task", "question", "answer", "reply", "format", "right"]


def test_threads_run_side_by_side():
    seen = set()
    gate = threading.Barrier(4, timeout=60)

    def waits(messages):
        gate.wait()
        seen.add(threading.get_ident())
        return "Answer: 1"

    evaluate(waits, ROWS, workers=4, progress=False)
    assert len(seen) == 4


def test_problems_and_chats_give_the_same_questions():
    chats = []

    def spy(messages):
        chats.append(messages)
        return ""

    for rows in (ROWS, [to_chat(r) for r in ROWS], [to_chat(r, answered=False) for r in ROWS]):
        evaluate(spy, rows, progress=False)
    n = len(ROWS)
    assert chats[:n] == chats[n : 2 * n] == chats[2 * n :] and all(c[-1]["role"] == "user" for c in chats)


class Batched:
    def __init__(self, fail=None, short=False):
        self.fail, self.short, self.sizes = fail, short, []

    def __call__(self, messages):
        if messages[-1]["content"] == self.fail:
            raise RuntimeError("prompt of 4000 tokens")
        return "Answer: 1"

    def batch(self, chats):
        self.sizes.append(len(chats))
        return [self(c) for c in chats][self.short :]


def test_batches_are_used_and_bounded():
    model = Batched()
    rows = problems(50, seed=3, tasks=("add", "sub", "story1"))
    assert len(evaluate(model, rows, progress=False)) == 150 and model.sizes == [64, 64, 22]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_generate_that_raises_names_the_row(workers):
    def broken(messages):
        if messages[-1]["content"] == ROWS[2]["question"]:
            raise ConnectionError("server gone")
        return "x"

    with pytest.raises(UserError, match=r"row 3: no reply \(ConnectionError: server gone\)") as e:
        evaluate(broken, ROWS, workers=workers, progress=False)
    assert ROWS[2]["question"][:40] in str(e.value) and "\n" not in str(e.value)


def test_a_batch_that_raises_names_the_row():
    with pytest.raises(UserError, match="row 6: no reply .*4000 tokens"):
        evaluate(Batched(fail=ROWS[5]["question"]), ROWS, progress=False)
    with pytest.raises(UserError, match="row 1 to row 8: 7 replies to 8 questions"):
        evaluate(Batched(short=True), ROWS, progress=False)


def test_a_row_that_knows_its_place():
    rows = [row | {"place": f"test.jsonl:{i}"} for i, row in enumerate(ROWS, 3)]
    fails = lambda m: None if m[-1]["content"] == ROWS[1]["question"] else "x"
    with pytest.raises(UserError, match="^test.jsonl:4: the reply is a NoneType"):
        evaluate(fails, rows, progress=False)
    with pytest.raises(UserError, match="^test.jsonl:8: no reply .*4000 tokens"):
        evaluate(Batched(fail=ROWS[5]["question"]), rows, progress=False)
    with pytest.raises(UserError, match="^test.jsonl:3 to test.jsonl:10: 7 replies"):
        evaluate(Batched(short=True), rows, progress=False)
    with pytest.raises(UserError, match="^own.jsonl:9: no reference"):
        evaluate(solver, [{"question": "Q", "place": "own.jsonl:9"}], progress=False)
    with pytest.raises(UserError, match="^own.jsonl:9: turn 0"):
        evaluate(solver, [{"messages": [{"role": "user"}], "place": "own.jsonl:9"}], progress=False)
    assert list(evaluate(solver, rows, progress=False)[0]) == ["task", "question", "answer", "reply", "format", "right"]


def test_a_grader_that_raises_names_the_row():
    grade = lambda row, reply: int(reply) == 1
    with pytest.raises(UserError, match=r"^row 2: cannot be graded \(ValueError: .*The reply was 'two'"):
        evaluate(lambda m: "1" if m[-1]["content"] == ROWS[0]["question"] else "two", ROWS, grade=grade, progress=False)


def test_an_error_stops_the_threads():
    asked = []

    def broken(messages):
        asked.append(1)
        time.sleep(0.01)
        raise RuntimeError("no")

    with pytest.raises(UserError, match="row 1"):
        evaluate(broken, problems(100, tasks=("add",)), workers=2, progress=False)
    assert len(asked) < 20


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{"messages": []}], "row 1"),
        ([TUTOR, {"messages": [{"role": "user"}]}], "row 2: turn 0"),
        ([TUTOR, {"messages": [{"role": "user", "content": "Q"}]}], "row 2: no reference"),
        ([{"messages": [{"role": "assistant", "content": "A"}]}], "row 1: nothing before"),
        ([{"text": "Q"}], "row 1"),
    ],
)
def test_rows_that_cannot_be_asked(rows, message):
    with pytest.raises(UserError, match=message):
        evaluate(lambda m: "x", rows, progress=False)


def test_a_reply_that_is_not_text():
    with pytest.raises(UserError, match="row 1: the reply is a NoneType"):
        evaluate(lambda m: None, ROWS, progress=False)


def test_own_grader_needs_no_reference():
    results = evaluate(lambda m: "short", [{"question": "Q"}], grade=lambda row, reply: len(reply) < 10, progress=False)
    assert results[0]["right"] and results[0]["answer"] is None and results[0]["task"] == "all"


def test_completion_fills_the_prompt():
    class Echo:
        def batch(self, prompts):
            return [p.upper() for p in prompts]

    g = Completion(Echo(), "{question} {braces}\nWorking:")
    assert g([{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]) == "2+2? {BRACES}\nWORKING:"


# --- tables ----------------------------------------------------------------------------------------------------------


def results(*rights, task="add"):
    return [{"task": task, "question": f"{task}{i}", "right": bool(r), "format": True} for i, r in enumerate(rights)]


def test_summary():
    rows = summary(results(1, 0, 1, 1) + results(0, 0, task="sub"), overall=True)
    assert [(r["task"], r["n"], r["correct"]) for r in rows] == [("add", 4, 3), ("sub", 2, 0), ("all", 6, 3)]
    assert summary(results(0, 0), key="format")[0]["correct"] == 2


def test_compare():
    c = compare(results(1, 0, 0, 0, 0, 0, 0), results(0, 1, 1, 1, 1, 1, 0))
    assert (
        (c["n"], c["only_before"], c["only_after"]) == (7, 1, 5)
        and c["gain"] == pytest.approx(4 / 7)
        and c["p"] == pytest.approx(14 / 64)
    )
    with pytest.raises(UserError, match="row 2: the two evaluations asked different"):
        compare(results(1, 1), [results(1)[0], results(1)[0]])
    with pytest.raises(UserError, match="2 answers of A"):
        compare(results(1, 1), results(1))
    with pytest.raises(UserError, match="no results"):
        compare([], [])


def test_the_interval_of_a_gain_holds_the_truth():
    "True rates 0.5 and 0.7, joint by one common difficulty: 95 % of the intervals should hold 0.2."
    rng, held, trials = random.Random(1), 0, 1500
    for _ in range(trials):
        u = [rng.random() for _ in range(80)]
        a, b = [x < 0.5 for x in u], [(x + 0.35 * rng.random()) % 1 < 0.7 for x in u]
        c = compare(results(*a), results(*b))
        held += c["low"] <= 0.2 <= c["high"]
    assert 0.93 < held / trials < 0.975


def test_show_and_plot():
    import matplotlib

    matplotlib.use("Agg")
    rows = summary(results(1, 0, 1, 1))
    assert show(rows).to_dict("records") == [
        {"task": "add", "n": 4, "correct": 3, "accuracy": "75 %", "95 % interval": "30–95 %"}
    ]
    assert len(plot_scores({"A": rows, "B": rows}).containers) == 2 and len(plot_scores(rows).containers) == 1


# --- exercises and the judge -----------------------------------------------------------------------------------------


def exercise_cases():
    return [(ex, why) for ex in EXERCISES for why in ex.wrong]


@pytest.mark.parametrize("ex, why", exercise_cases(), ids=lambda x: x if isinstance(x, str) else x.id)
def test_exercises_reject_what_they_list(ex, why):
    assert len(ex.wrong) >= 2
    with pytest.raises(ToDo):
        check.grade(ex, lambda *args: ...)
    with pytest.raises(AssertionError) as e:
        check.grade(ex, ex.wrong[why])
    assert not isinstance(e.value, ToDo) and "raised" not in str(e.value) and len(str(e.value)) > 20


@pytest.mark.parametrize(
    "reply, mark",
    [
        ("Score: 7", 7),
        ("I think\nScore: 10 of 10", 10),
        ("Score: 11", None),
        ("Score: 7.5", None),
        ("seven", None),
        ("", None),
    ],
)
def test_judge_reads_a_mark_or_none(reply, mark):
    asked = []

    def model(messages):
        asked.append(messages[-1]["content"])
        return reply

    assert judge(model, "What is 2+2?", "4") == mark and "2+2" in asked[0] and "\n4\n" in asked[0]
