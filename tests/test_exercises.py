"""A check can fail: it says "to do" to the empty stub and rejects each listed wrong answer."""
import pytest

from llmcourse.check import ToDo, check, exercises, grade, progress
from llmcourse.core import CHAPTERS

ALL = [e for number in CHAPTERS for e in exercises(number)]


def test_every_chapter_has_exercises():
    assert {e.id.split(".")[0] for e in ALL} == set(CHAPTERS)
    assert len({e.id for e in ALL}) == len(ALL)


@pytest.mark.parametrize("ex", ALL, ids=lambda e: e.id)
def test_empty_stub_is_to_do(ex, capsys):
    some = next(iter(ex.wrong.values()))
    stub = (lambda *args, **kwargs: ...) if callable(some) else ...
    with pytest.raises(ToDo):
        grade(ex, stub)
    check(ex.id, stub)
    assert "to do" in capsys.readouterr().out
    assert ex.id not in progress()


@pytest.mark.parametrize("ex,why", [(e, why) for e in ALL for why in e.wrong], ids=lambda x: getattr(x, "id", x))
def test_wrong_answer_is_rejected(ex, why):
    with pytest.raises(AssertionError) as caught:
        grade(ex, ex.wrong[why])
    assert not isinstance(caught.value, ToDo)
    assert str(caught.value), f"{ex.id} says nothing to: {why}"


@pytest.mark.parametrize("ex", ALL, ids=lambda e: e.id)
def test_two_wrong_answers_are_listed(ex):
    assert len(ex.wrong) >= 2 and ex.hint and ex.title
