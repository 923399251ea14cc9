"""One file, one meaning: all who take rows get the same rows, in the same splits, with the same places."""

import contextlib
import csv
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse import datacheck, exam
from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.forms import _implicit as common_prompt, from_messages
from llmcourse.methods import METHODS, method
from llmcourse.models import load_tokenizer
from llmcourse.rows import SIDES, prompt, read, walk
from llmcourse.synthesis import synthesize
from llmcourse.training import train
from llmcourse.xray import xray_file

TRAINED, EXAMINED = ("train", None), ("test", "validation", None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tutor/base")


# ---- files


def chat(question: str, answer: str, split: str | None) -> dict:
    "A row of one question."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | ({"split": split} if split else {})


def write_lines(path: Path, rows: list[dict], blank: list[int]) -> list[int]:
    "JSONL with blank lines before some rows; the line of each row."
    text, lines = "", []
    for row, n in zip(rows, blank, strict=True):
        text += "\n" * n + json.dumps(row) + "\n"
        lines.append(text.count("\n"))
    path.write_text(text)
    return lines


def write_array(path: Path, rows: list[dict]) -> list[int]:
    "One JSON array; a row's line is its number."
    path.write_text(json.dumps(rows, indent=1))
    return [*range(1, len(rows) + 1)]


def write_table(path: Path, rows: list[dict]) -> list[int]:
    "CSV with the turns as JSON in a cell; no cell has a newline, so a row is a line."
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["messages", "split"])
        table.writerows([json.dumps(row["messages"]), row.get("split", "")] for row in rows)
    return [*range(2, len(rows) + 2)]


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
splits = st.none() | st.sampled_from(sorted(SIDES))
forms = st.sampled_from(["messages", "sharegpt", "alpaca", "dolly", "prompt-completion"])
files = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["jsonl", "json", "csv"]),
        "rows": st.lists(st.tuples(text, text, splits, forms, st.integers(0, 2)), min_size=1, max_size=6),
    }
)


@contextlib.contextmanager
def written(file: dict):
    "The path of a file, and (place, split, messages) of each of its rows."
    rows = [chat(f"{i}: {q}", f"so {a}", split) for i, (q, a, split, _, _) in enumerate(file["rows"])]
    shaped = [from_messages(row, form) for row, (*_, form, _) in zip(rows, file["rows"], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{file['kind']}"
        if file["kind"] == "jsonl":
            lines = write_lines(path, shaped, [n for *_, n in file["rows"]])
        elif file["kind"] == "json":
            lines = write_array(path, shaped)
        else:
            lines = write_table(path, rows)
        yield (
            path,
            [
                (f"{path}:{line}", SIDES.get(row.get("split")), row["messages"])
                for line, row in zip(lines, rows, strict=True)
            ],
        )


# ---- readers: each gives (place, split, messages) of what it takes


class Stop(Exception):
    "Enough: the rows are read."


def trained_on(name: str, path: Path) -> list[tuple]:
    "What a method would train on."
    taken = []

    def take(rows, ours):
        taken[:] = [(row.place, row.split, row.data["messages"]) for row in rows]   # one by one first, then all
        return rows

    with contextlib.suppress(Stop), mock.patch("llmcourse.training.load_to_train", side_effect=Stop):
        train(replace(method(name), take=take), path, path.parent / "run")
    return taken


def examined_on(path: Path) -> list[tuple]:
    "What `llmcourse eval` would ask."
    taken = []

    def evaluate(generate, rows, *words, **options):
        taken.extend((row["place"], SIDES.get(row.get("split")), row["messages"]) for row in rows)
        raise Stop

    with mock.patch.object(exam, "evaluate", evaluate), contextlib.suppress(Stop):
        code = main(["eval", "--url", "http://127.0.0.1:9/v1", "--model", "none", "--data", str(path)])
        raise UserError(f"code {code}")
    return taken


def looked_at(path: Path, tokenizer) -> list[tuple]:
    "What the doctor passes on to its search for copies."
    taken = []

    class Seen(datacheck.Seen):
        def faults(self, place, row, side):
            taken.append((f"{path}:{place}", None if side == "all" else side, row["messages"]))
            return super().faults(place, row, side)

    with mock.patch.object(datacheck, "Seen", Seen):
        report = datacheck.check_data(path, tokenizer=tokenizer, tokens_per_second=1)
    assert report.rows == len(taken) and report.sides == Counter(split or "all" for _, split, _ in taken)
    return taken


# ---- the property


@settings(max_examples=40, deadline=None)
@given(file=files)
def test_every_reader_takes_the_same_rows(file, tokenizer):
    with written(file) as (path, rows):
        assert [(row.place, row.split, row.data["messages"]) for row in walk(path)] == rows
        for name in METHODS:
            expect(rows, TRAINED, lambda name=name: trained_on(name, path))
        expect(rows, EXAMINED, lambda: examined_on(path))
        assert looked_at(path, tokenizer) == rows
        drawn = xray_file(path, tokenizer, rows=len(rows))[0]
        assert [f"{path}:{line}" for line, _ in drawn] == [place for place, _, _ in rows]
        for (_, picture), (_, _, messages) in zip(drawn, rows, strict=True):
            assert "".join(p for p, t in zip(picture.pieces, picture.trained, strict=True) if t)
            assert picture.counts["end_trained"] == sum(m["role"] == "assistant" for m in messages)
        assert asked_for(path) == [(place, messages[:-1]) for place, _, messages in rows]


def expect(rows: list[tuple], sides: tuple, reader) -> None:
    "The reader takes the rows of these sides; if there are none, it says so in one line."
    wanted = [row for row in rows if row[1] in sides]
    if wanted:
        assert reader() == wanted
        return
    with pytest.raises(UserError) as said:
        reader()
    assert "\n" not in str(said.value)


def asked_for(path: Path) -> list[tuple]:
    "(place, chat) of what a generator is asked when a file gives the seeds."
    chats = []
    seeds = [{"messages": prompt(row), "id": row.place} for row in read(path)]
    kept, _ = synthesize(lambda asked: chats.append(asked) or "4", seeds, lambda row, reply: True, samples=1)
    return [(row["provenance"]["seed"], asked) for row, asked in zip(kept, chats, strict=True)]


# ---- a planted leak

LEAK = [chat("2+2?", "Answer: 4", "train"), chat("3+3?", "Answer: 6", "test"), chat("  2+2? ", "4", "test")]


def as_taken(row: dict, command: str) -> dict:
    "A chat as a command takes it: whole, with a second reply beside it, or with a thumb."
    if command in ("sft", "grpo", "rloo", "eval"):
        return row
    prompt, said = row["messages"][:-1], row["messages"][-1:]
    if command == "kto":
        return dict(prompt=prompt, completion=said, label="3+3" in prompt[-1]["content"], split=row["split"])
    return dict(prompt=prompt, chosen=said, rejected=[said[0] | {"content": "?"}], split=row["split"])


@pytest.mark.parametrize("command", [*METHODS, "eval"])
def test_a_planted_leak_is_refused_with_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), [as_taken(row, command) for row in LEAK], [0, 0, 0])
    assert main([command, "--data", "rows.jsonl"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        "llmcourse: rows.jsonl:3: its split is test, and the same question is in train (rows.jsonl:1): "
        "a leak. Remove one of the two, or give both the same split"
    ]
    assert [*tmp_path.iterdir()] == [tmp_path / "rows.jsonl"]


def test_the_doctor_names_a_planted_leak_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), LEAK, [0, 0, 0])
    assert main(["data", "check", "rows.jsonl", "--tokens-per-second", "1000"]) == 2
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert len(found) == 1
    assert found[0].startswith("✗ line 3: the question is in train too, line 1: a leak between the splits → take one")


TURN = st.builds(
    lambda i, text: {"role": ("user", "assistant")[i], "content": text}, st.integers(0, 1), st.sampled_from("abc")
)


@settings(deadline=None)  # the first case loads TRL
@given(st.lists(TURN, max_size=3), st.lists(TURN, min_size=1, max_size=3), st.lists(TURN, min_size=1, max_size=3))
def test_the_common_beginning_is_what_trl_takes_for_the_prompt(prompt, chosen, rejected):
    from trl import extract_prompt

    a, b = prompt + chosen, prompt + rejected
    if [m["role"] for m in a + b] == ["assistant"] * 2:
        return  # two texts, which we do not cut inside a word
    theirs = extract_prompt({"chosen": a, "rejected": b})
    assert common_prompt(a, b) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
