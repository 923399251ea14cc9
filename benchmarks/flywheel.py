"""Rounds of the flywheel from `tutor/sft` with simulated users: honest ones, and with three of ten hostile.

    python benchmarks/flywheel.py honest,first,hostile,methods,forgetful 1,2,3 [--small] [flywheel.jsonl]

Each round is a line of JSON, added to the file as it is made; chapter 12 draws `data/flywheel.jsonl`. About two
minutes for three honest rounds on one busy core. What was measured already is not measured again.
"""
import json
import shutil
import sys
import tempfile
from pathlib import Path

from llmcourse.core import read_jsonl
from llmcourse.following import Following
from llmcourse.turning import begin, exam_of, heard, replay_of, turn, turn_rounds

SMALL = "--small" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
FILE = next((word for word in WORDS if word.endswith(".jsonl")), None)
N = 4 if SMALL else 60
HOSTILE = {"hostile": 0.3}
LINES = []


def note(line: dict) -> None:
    "Print a round and keep it."
    LINES.append(line)
    print(json.dumps(line), flush=True)
    if FILE:
        with open(FILE, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


def wheel(folder: Path, seed: int, rounds: int = 1, **how) -> list[dict]:
    "Rounds from `tutor/sft`, with honest users unless told otherwise."
    before = str(Path(__file__).parent.parent / "data/splits.jsonl") if SMALL else None
    return turn_rounds(folder, 1 if SMALL else rounds, n=N, seed=seed, before=before, **how)


def attacked(folder: Path, seed: int, clean: bool) -> dict:
    "One round with hostile users, after an honest one."
    exam = exam_of(None, "tutor/sft", N, seed)
    with Following(folder, n_parallel=8) as server:
        said = heard(server, N, seed, 2, **HOSTILE)
    replay = replay_of(None, "tutor/sft", seed)
    return turn(folder, 2, lambda: said, exam, "tutor/sft", "sft", "Q8_0", seed, replay, clean)


def forgetful(folder: Path, seed: int) -> dict:
    "The first honest round of a seed, without the chats that the model was trained on before."
    exam = exam_of(None, "tutor/sft", N, seed)
    begin(folder, "tutor/sft", exam, "Q8_0")
    with Following(folder, n_parallel=8) as server:
        said = heard(server, N, seed, 1)
    return turn(folder, 1, lambda: said, exam, "tutor/sft", "sft", "Q8_0", seed, replay=[])


def measure(part: str, seed: int, room: Path) -> None:
    "All rounds of one part."
    if part == "honest":
        for line in wheel(room / "honest", seed, rounds=3):
            note({"part": part, "seed": seed} | line)
    if part == "first":
        for name in ("cleaned", "as it came"):
            line = wheel(room / name, seed, clean=name == "cleaned", users=HOSTILE)[0]
            note({"part": part, "seed": seed, "rows": name} | line)
    if part == "hostile":
        wheel(room / "cleaned", seed)
        shutil.copytree(room / "cleaned", room / "as it came")
        for name in ("cleaned", "as it came"):
            note({"part": part, "seed": seed, "rows": name} | attacked(room / name, seed, name == "cleaned"))
    if part == "methods":
        for method in ("dpo", "kto"):
            note({"part": part, "seed": seed, "method": method} | wheel(room / method, seed, method=method)[0])
    if part == "forgetful":
        note({"part": part, "seed": seed} | forgetful(room / part, seed))


def main() -> None:
    parts, seeds = (WORDS[0] if WORDS else "honest").split(","), (WORDS[1] if len(WORDS) > 1 else "1").split(",")
    there = {(line["part"], line["seed"]) for line in read_jsonl(FILE)} if FILE and Path(FILE).is_file() else set()
    for part in parts:
        for seed in map(int, seeds):
            if (part, seed) in there:
                continue
            with tempfile.TemporaryDirectory() as room:
                measure(part, seed, Path(room))
    print(f"done: {len(LINES)} measurements")


if __name__ == "__main__":
    main()
