"""A file of rows the whole way: read, doctor, check, encode, collate, one step of training, exam; every row is counted.

    python tests/whole_way.py 10000 0     so many of `mutations.py`, by a seed: what became of them
"""
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import mutations

from llmcourse.core import UserError
from llmcourse.datacheck import check_data
from llmcourse.evals import evaluate
from llmcourse.exam import exam_rows, examinee, fitting
from llmcourse.models import load_tokenizer
from llmcourse.rl import grpo
from llmcourse.rows import TAKE, Row, walk
from llmcourse.sft import sft
from llmcourse.xray import xray_file

QUICK = dict(skip_bad=True, max_steps=1, warmup_steps=0, save_strategy="no", per_device_train_batch_size=4)
SHORT = dict(probe_groups=0, num_generations=2, max_completion_length=160, gradient_accumulation_steps=1)


class Echo:
    "A model of ours that says what it was asked."
    def __init__(self, local): self.model, self.tokenizer, self.options = local.model, local.tokenizer, local.options
    def __call__(self, messages, tools=None): return messages[-1]["content"] or "nothing"


def train_sft(path: Path, folder: Path) -> list[str]:
    run = sft(path, folder / "sft", **QUICK)
    return (run / "train.jsonl").read_text().splitlines()


def train_grpo(path: Path, folder: Path) -> list[str]:
    run = grpo(path, folder / "grpo", "tutor/base", **QUICK, **SHORT)   # by the reward that the doctor assumes
    return (run / "train.jsonl").read_text().splitlines()


def examine(path: Path, folder: Path) -> list:
    echo = Echo(examinee("tutor/base", None))
    rows = fitting(echo, exam_rows(str(path), None, skip_bad=True), skip_bad=True)
    return evaluate(echo, rows, progress=False)


WAYS = {"sft": (train_sft, "train"), "grpo": (train_grpo, "train"), "eval": (examine, "exam")}


def wrong_lines(path: Path, purpose: str) -> tuple[int, set[int]]:
    "Rows, and the lines that the doctor calls wrong; one line a kind, and the numbers add up."
    report = check_data(path, tokens_per_second=1, purpose=purpose, limit=10**6, epochs=1)
    lines = {int(place.split()[-1]) for level, place, what in report.found if level == "error" and "a leak" not in what}
    told = json.loads(json.dumps(report.as_dict()))
    assert len(lines) == told["refused"] and told["rows"] == told["usable"] + told["refused"]
    return report.rows, lines


def one_way(path: Path, folder: Path, purpose: str) -> dict:
    "What became of the rows. Raises `AssertionError` where doctor and command disagree, or a row is lost."
    command, side = WAYS[purpose]
    rows, wrong = wrong_lines(path, purpose)
    split = {row.number: row.split for row in walk(path) if isinstance(row, Row)}
    others = sum(name not in TAKE[side] for name in split.values())
    refused = sum(split.get(line) in TAKE[side] for line in wrong)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said): used = len(command(path, folder))
    assert rows == used + refused + others, (purpose, rows, used, refused, others, said.getvalue())
    accounts = [line for line in said.getvalue().splitlines() if " rows read, " in line]
    assert accounts[0].partition(": ")[2].startswith(f"{rows:,} rows read") or str(path) in accounts[0], accounts
    taken = re.search(" rows read, ([\\d,]+) taken", accounts[0])
    fit = re.findall("these (.*) rows (.*) fit", said.getvalue())
    assert [taken[1]] * len(fit) == [before for before, _ in fit], (taken[1], fit)
    assert f"{used:,}" == (fit[-1][1] if fit else taken[1]), (used, accounts, fit)
    return dict(rows=rows, used=used, refused=refused, of_other_splits=others)


def refused_in_one_line(path: Path, folder: Path) -> str:
    "Without `skip_bad` the file is refused, with a line that says how many rows and what kinds."
    try: sft(path, folder / "no", **QUICK | dict(skip_bad=False))
    except UserError as e:
        assert "\n" not in str(e) and "rows cannot be used" in str(e) and str(e).startswith(str(path))
        return str(e)
    raise AssertionError("bad rows were trained")


def x_rayed(path: Path) -> dict:
    "Each row under the x-ray, alone: drawn, or refused in one line that begins with its place."
    drawn, tokenizer = 0, load_tokenizer("tutor/base")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        try: drawn += len(xray_file([row], tokenizer)[0])
        except UserError as e: assert str(e).startswith("rows[0]: ") and "\n" not in str(e), e
    return dict(rows=len(rows), drawn=drawn)


def main(n: int, seed: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = mutations.write(Path(folder) / "rows.jsonl", n, seed)
        print("xray", x_rayed(file))
        for purpose in WAYS: print(purpose, json.dumps(one_way(file, Path(folder), purpose)), flush=True)
        print(refused_in_one_line(file, Path(folder)))


if __name__ == "__main__": main(*map(int, sys.argv[1:] or ["10000"]))
