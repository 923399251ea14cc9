"""A guess comes before the measurement, and the score shows only guesses that did."""
import json
import math
import os

import numpy as np
import pytest
import torch

from llmcourse.check import calibration, measured, predict, progress, remember
from llmcourse.core import CHAPTERS, UserError, home

KINDS = ("rises", "falls")


def said(capsys, call, *words, **options) -> list[str]:
    "The lines that a call prints."
    capsys.readouterr()
    call(*words, **options)
    return capsys.readouterr().out.splitlines()


def test_an_open_guess_is_a_reminder(capsys):
    assert said(capsys, predict, "06.a", ...) == ["◻ 06.a: your guess goes here"]
    assert said(capsys, predict, "06.b", ..., choices=KINDS) == ["◻ 06.b: your guess goes here, one of: rises, falls"]
    assert said(capsys, measured, "06.a", 96) == ["06.a: no guess", "  it is 96"]
    assert said(capsys, measured, "06.b", "falls") == ["06.b: no guess", "  it is falls"]
    assert said(capsys, measured, "06.c", 0.5) == ["06.c: no guess", "  it is 0.5"]
    assert said(capsys, calibration, "06") == ["chapter 06: 0 of 3 questions answered before the measurement"]


@pytest.mark.parametrize("guess,value,verdict", [
    ((60, 80), 96, "you said 60 to 80, it is 96: above your range"),
    ([60, 80], 12, "you said 60 to 80, it is 12: below your range"),
    ((60, 80), 60, "you said 60 to 80, it is 60: inside your range"),
    ((60, 80), 80.0, "you said 60 to 80, it is 80: inside your range"),
    ((5, 5), 5, "you said 5 to 5, it is 5: inside your range"),
    (96, 96, "you said 96, it is 96: exactly right"),
    (90, 96, "you said 90, it is 96: close"),
    (192, 96, "you said 192, it is 96: too high, by a factor of 2"),
    (-2, -4, "you said -2, it is -4: too high, by a factor of 2"),
    (0, 3, "you said 0, it is 3: too low by 3"),
    (3, 0, "you said 3, it is 0: too high by 3"),
    (0, 0.0, "you said 0, it is 0: exactly right"),
    (1, -1, "you said 1, it is -1: too high by 2"),
    (1_000_000, 123456.7, "you said 1,000,000, it is 123,457: too high, by a factor of 8.1"),
    (np.float32(0.5), torch.tensor(0.25), "you said 0.5, it is 0.25: too high, by a factor of 2"),
    ((np.int64(1), torch.tensor(3)), np.array(2), "you said 1 to 3, it is 2: inside your range"),
])
def test_a_measurement_is_compared(capsys, guess, value, verdict):
    said(capsys, predict, "06.a", guess)
    assert said(capsys, measured, "06.a", value) == [f"06.a: {verdict}"]


def test_choices_are_compared_as_text(capsys):
    said(capsys, predict, "06.a", True, choices=(True, False))
    assert said(capsys, measured, "06.a", np.bool_(True)) == ["06.a: you said True, it is True: right"]
    said(capsys, predict, "06.b", 8, choices=(1, 8, 64))
    assert said(capsys, measured, "06.b", 64) == ["06.b: you said 8, it is 64: not what you said"]


@pytest.mark.parametrize("guess", [
    None, "60", "sixty", True, math.nan, math.inf, 10**400, (80, 60), (60,), (1, 2, 3), (60, "80"), (60, ...),
    (1, math.nan), {60, 80}, {}, 1j, np.array([1, 2]), torch.ones(3), [[1, 2], [3, 4]], range(2)], ids=str)
def test_what_is_no_guess_is_refused(guess, capsys):
    with pytest.raises(UserError, match=r"^06\.a: .*Give a number, or a range \(low, high\)"):
        predict("06.a", guess)
    assert not (home() / "predictions.json").exists()


@pytest.mark.parametrize("guess", ["rise", None, 3, (1, 2)])
def test_a_guess_that_is_no_choice_is_refused(guess):
    with pytest.raises(UserError, match=r"guess for 06\.a .*rises, falls"):
        predict("06.a", guess, choices=KINDS)


@pytest.mark.parametrize("id", ["", "06", "6.a", "06.1", "06.A", "06.ab", "06a", None, 6.1, " 06.a", "06.a\n"])
def test_a_wrong_id_is_refused_even_without_a_guess(id):
    for call in (lambda: predict(id, ...), lambda: measured(id, 1)):
        with pytest.raises(UserError, match="chapter, dot, letter"):
            call()


def test_a_chapter_that_does_not_exist():
    for call, words in ((predict, ("66.a", 1)), (measured, ("66.a", 1)), (calibration, ("66",)), (calibration, (6,))):
        with pytest.raises(UserError, match="unknown chapter"):
            call(*words)


@pytest.mark.parametrize("choices", ["rises", ("rises",), ("rises", "rises"), ["a", "b", "a"]], ids=str)
def test_wrong_choices_are_refused_even_without_a_guess(choices):
    with pytest.raises(UserError, match="two or more different ones"):
        predict("06.a", ..., choices=choices)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True, [1, 2], np.ones(2), torch.ones(2), {}, object()],
                         ids=lambda x: type(x).__name__)
def test_a_measurement_is_one_number(value):
    predict("06.a", 3)
    with pytest.raises(UserError, match="06.a: measured"):
        measured("06.a", value)


def test_a_measurement_is_of_the_kind_that_was_asked():
    predict("06.a", 3)
    with pytest.raises(UserError, match="Give predict its choices"):
        measured("06.a", "falls")
    predict("06.b", ..., choices=KINDS)
    with pytest.raises(UserError, match="unknown outcome of 06.b 'stays'"):
        measured("06.b", "stays")


def test_a_guess_may_change_until_the_measurement(capsys):
    predict("06.a", (1, 2))
    predict("06.a", (60, 80))
    measured("06.a", 70)
    assert "ranges: 1 of 1 held" in "\n".join(said(capsys, calibration, "06"))


def test_a_guess_after_the_measurement_is_taken_but_not_scored(capsys):
    predict("06.a", (1, 2))
    measured("06.a", 70)
    assert "seen the answer already" in said(capsys, predict, "06.a", (60, 80))[-1]
    assert said(capsys, measured, "06.a", 70)[-1].endswith("inside your range")
    assert "  ranges: 0 of 1 held; 80 % sure means 4 in 5" in said(capsys, calibration, "06")
    assert len(said(capsys, predict, "06.a", (1, 2))) == 1      # the first one again: that was honest


def test_who_ran_the_notebook_first_knows_the_answer(capsys):
    predict("06.a", ...)
    measured("06.a", 70)
    assert "seen the answer already" in said(capsys, predict, "06.a", (60, 80))[-1]
    assert said(capsys, calibration, "06")[0].startswith("chapter 06: 0 of 1 questions")


def test_running_a_chapter_again_changes_nothing(capsys):
    def chapter():
        predict("06.a", 40)
        predict("06.b", "rises", choices=KINDS)
        measured("06.a", 96)
        measured("06.b", "rises")
        calibration("06")
    chapter()
    first = capsys.readouterr().out
    chapter()
    assert capsys.readouterr().out == first


def test_a_question_that_changes_starts_again(capsys):
    predict("06.a", 40)
    measured("06.a", 96)
    assert said(capsys, predict, "06.a", "falls", choices=KINDS) == ["✎ 06.a: you say falls"]
    assert said(capsys, measured, "06.a", "rises") == ["06.a: you said falls, it is rises: not what you said"]


def test_the_score_has_six_lines_at_most(capsys):
    for k, letter in enumerate("abcdefgh"):
        predict(f"06.{letter}", (0, 10 * k))
        measured(f"06.{letter}", 35)
    predict("06.i", 0)
    measured("06.i", 5)
    predict("06.j", "rises", choices=KINDS)
    measured("06.j", "falls")
    predict("04.a", (0, 1))
    measured("04.a", 0.5)
    lines = said(capsys, calibration, "06")
    assert lines == ["chapter 06: 10 of 10 questions answered before the measurement",
                     "  ranges: 4 of 8 held; 80 % sure means 4 in 5", "  choices: 0 of 1 right",
                     "  numbers: off by a factor of inf (median of 1)",
                     "  all chapters: 5 of 9 ranges held, your ranges are too narrow"]
    assert len(lines) <= 6


def test_every_chapter_has_a_score_before_it_is_begun(capsys):
    for chapter in CHAPTERS:
        score = f"chapter {chapter}: 0 of 0 questions answered before the measurement"
        assert said(capsys, calibration, chapter) == [score]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"06.a": 3}', "\xff"], ids=repr)
def test_a_broken_file_is_named(text):
    home().mkdir()
    (home() / "predictions.json").write_bytes(text.encode("latin-1"))
    for call in (lambda: predict("06.a", 1), lambda: measured("06.a", 1), lambda: calibration("06")):
        with pytest.raises(UserError, match="predictions.json: not JSON that we wrote. Delete it to start again"):
            call()
    assert (home() / "predictions.json").read_bytes() == text.encode("latin-1")


def test_notes_are_written_aside(monkeypatch):
    predict("06.a", 1)
    before = (home() / "predictions.json").read_text()
    def full(*words): raise OSError("No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        predict("06.b", 2)
    assert (home() / "predictions.json").read_text() == before
    assert [p.name for p in home().iterdir()] == ["predictions.json"]
    json.loads(before)


def test_progress_and_predictions_do_not_mix():
    remember("06.1")
    predict("06.a", 1)
    assert list(progress()) == ["06.1"]
