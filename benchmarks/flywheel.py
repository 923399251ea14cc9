"""Rounds of the flywheel from `tutor/sft` with simulated users: honest ones, and with three of ten hostile.

    python benchmarks/flywheel.py honest,hostile,methods 1,2,3 [--small] [flywheel.jsonl]

Each round is a line of JSON, added to the file as it is made; chapter 12 draws `data/flywheel.jsonl`. About two
minutes for three honest rounds on one busy core. What was measured already is not measured again.
"""
import json
import sys
import tempfile
from pathlib import Path

from llmcourse.core import read_jsonl
from llmcourse.turning import turns

SMALL = "--small" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
FILE = next((word for word in WORDS if word.endswith(".jsonl")), None)
N = 4 if SMALL else 60
PARTS = {  # part → rounds and settings of `turns`
    "honest": [(3, {})],
    "hostile": [(1, {"users": {"hostile": 0.3}, "clean": True}), (1, {"users": {"hostile": 0.3}, "clean": False})],
    "methods": [(1, {"method": "dpo"}), (1, {"method": "kto"})],
}
LINES = []


def note(line: dict) -> None:
    "Print a round and keep it."
    LINES.append(line)
    print(json.dumps(line), flush=True)
    if FILE:
        with open(FILE, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


def main() -> None:
    parts, seeds = (WORDS[0] if WORDS else "honest").split(","), (WORDS[1] if len(WORDS) > 1 else "1").split(",")
    there = read_jsonl(FILE) if FILE and Path(FILE).is_file() else []
    for part in parts:
        for seed in map(int, seeds):
            for rounds, how in PARTS[part]:
                said = {"part": part, "seed": seed, "method": how.get("method", "sft"), "clean": how.get("clean", True)}
                if any({k: line[k] for k in said} == said for line in there):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    def tell(line, said=said):
                        note(said | line)

                    turns(folder, 1 if SMALL else rounds, n=N, seed=seed, told=tell, **how)
    print(f"done: {len(LINES)} measurements")


if __name__ == "__main__":
    main()
