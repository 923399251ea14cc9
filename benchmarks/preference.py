"""What chapter 08 compares, each in a training of its own, to data/preference.jsonl; the tutor, on a CPU.

    python benchmarks/preference.py [NAME ...]        some of ARMS below, or "replies" for data/replies.jsonl
    python benchmarks/preference.py --small FILE      one small training, to another file: does it run at all?

A row: what was trained with which seed, CPU-seconds of training (with the replies that it sampled for itself), and how
many of the same held-out requests were answered as they should be: 200 for a hint and 100 off topic; 20 problems of
each of five kinds; the share of wrong or unwanted hints among those. One thread; about a minute a row.
"""
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmcourse import evals
from llmcourse.core import read_jsonl, set_seed, write_jsonl
from llmcourse.manners import DECLINE, hint_requests, is_decline, is_hint, manner_pairs, off_topic
from llmcourse.models import Local, load
from llmcourse.preference import prefer
from llmcourse.questions import reply_text
from llmcourse.rl import grpo
from llmcourse.sft import sft
from llmcourse.tutor import is_right, problems, to_chat

SMALL = sys.argv[1:2] == ["--small"]
DATA = Path(__file__).parent.parent / "data"
OUTPUT = Path(sys.argv[2]) if SMALL else DATA / "preference.jsonl"
SEEDS = (1,) if SMALL else (1, 2, 3)
PAIRS = 2 if SMALL else 80       # hint requests of each of four kinds; the others in proportion
EXAM = 2026                      # the seed of everything held out
HINTS, OTHERS = hint_requests(1 if SMALL else 50, EXAM, "test"), off_topic(2 if SMALL else 100, EXAM, "test")
TEST = problems(1 if SMALL else 20, EXAM, split="test")
FAST = dict(max_steps=1, warmup_steps=0) if SMALL else {}


def chats(pairs: list[dict]) -> list[dict]:
    return [{"messages": row["prompt"] + row["chosen"]} for row in pairs]


def thumbs(pairs: list[dict]) -> list[dict]:
    "One reply of each pair, good and bad in turn."
    return [{"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": not i % 2}
            for i, row in enumerate(pairs)]


def rewarded(seed: int) -> list[dict]:
    "The prompts of the pairs, with what a verifier needs."
    kinds = {"hint": hint_requests(PAIRS, seed), "other": off_topic(min(120, 2 * PAIRS), seed)}
    kept = problems(max(1, 2 * PAIRS // 3), seed, ("add", "sub", "story1", "story2"))
    rows = [row | {"kind": kind, "messages": row["prompt"]} for kind, some in kinds.items() for row in some]
    rows += [row | {"kind": "plain", "messages": to_chat(row, answered=False)["messages"]} for row in kept]
    blank = dict(question="none", working="none", answer="none")
    return [{k: (blank | row)[k] for k in ("messages", "kind", "question", "working", "answer")} for row in rows]


def manners_reward(completions, kind, question, working, answer, **columns):
    "1.0 for a hint to whoever wants one, a refusal off topic, and the right answer to a plain question."
    def worth(said, kind, row):
        if kind == "plain": return is_right(said, row["answer"])
        return is_decline(said) if kind == "other" else is_hint(said, row)
    rows = [dict(question=q, working=w, answer=a) for q, w, a in zip(question, working, answer)]
    return [float(worth(reply_text(c), k, row)) for c, k, row in zip(completions, kind, rows)]


def best_of(seed: int, n: int = 4) -> list[dict]:
    "Chats of the first good reply of n that the tutor samples itself."
    rows = rewarded(seed)[:: 8 if SMALL else 1]
    set_seed(seed)
    asked = [row for row in rows for _ in range(n)]
    local = Local(*load("tutor/sft"), max_new_tokens=120, batch_size=256, temperature=1.0)
    said = local.batch([row["messages"] for row in asked])
    worth = manners_reward(said, *[[row[k] for row in asked] for k in ("kind", "question", "working", "answer")])
    good = {}
    for i, (reply, w) in enumerate(zip(said, worth)):
        if w: good.setdefault(i // n, reply)
    return [{"messages": rows[i]["messages"] + [{"role": "assistant", "content": text}]} for i, text in good.items()]


def preferred(**options):
    def run(seed, place):
        rows = manner_pairs(seed, PAIRS)
        return prefer(thumbs(rows) if options.get("method") == "kto" else rows, place, seed=seed, **options | FAST)
    return run


def examples(rows):
    def run(seed, place): return sft(rows(seed), place, "tutor/sft", seed=seed, learning_rate=5e-4, bf16=False, **FAST)
    return run


def reinforced(seed, place):
    how = dict(max_steps=1, per_device_train_batch_size=8) if SMALL else dict(max_steps=8)
    return grpo(rewarded(seed), place, "tutor/sft", seed=seed, reward_funcs=manners_reward, probe_groups=0,
                max_completion_length=120, warmup_steps=0, **how)


ARMS = {   # name → (seeds, training)
    "dpo": (SEEDS, preferred()),
    "sft on chosen": (SEEDS[:1], examples(lambda seed: chats(manner_pairs(seed, PAIRS)))),
    "sft on the best of 4": (SEEDS[:1], examples(best_of)),
    "grpo": (SEEDS[:1], reinforced),
    "kto": (SEEDS[:1], preferred(method="kto")),
    "beta 0.02": (SEEDS[:1], preferred(beta=0.02)),
    "beta 0.5": (SEEDS[:1], preferred(beta=0.5)),
    "sigmoid alone": (SEEDS[:1], preferred(loss_type=["sigmoid"])),
    "ipo": (SEEDS[:1], preferred(method="ipo")),
    "orpo": (SEEDS[:1], preferred(method="orpo")),
    "simpo": (SEEDS[:1], preferred(method="simpo")),
    "cpo": (SEEDS[:1], preferred(method="cpo")),
}


def marks(name: str, seed: int, model, seconds: float) -> dict:
    "A row of the file."
    local = Local(*load(model), max_new_tokens=120, batch_size=300)
    said = local.batch([row["prompt"] for row in HINTS + OTHERS])
    hints = [is_hint(reply, row) for reply, row in zip(said, HINTS)]
    refusals = [is_decline(reply) for reply in said[len(HINTS):]]
    plain = evals.evaluate(local, TEST, progress=False)
    kinds = {r["task"]: r["correct"] for r in evals.summary(plain)}
    format = sum(r["format"] for r in plain)
    spread = sum(is_hint(r["reply"], row) or DECLINE in r["reply"] for r, row in zip(plain, TEST))
    return dict(what=name, seed=seed, cpu_seconds=round(seconds, 1), hints=hints, refusals=refusals, kinds=kinds,
                right=[r["right"] for r in plain], format=format, unwanted=spread,
                said=[said[0], said[len(HINTS)]])


def replies() -> None:
    "60 stories of three steps that nothing was trained on, with 16 sampled replies each."
    rows = problems(60, 8, ["story3"], split="test")
    set_seed(8)
    local = Local(*load("tutor/sft"), max_new_tokens=140, batch_size=320, temperature=1.0)
    said = local.batch([to_chat(row, answered=False)["messages"] for row in rows for _ in range(16)])
    write_jsonl(DATA / "replies.jsonl", [{"question": row["question"], "answer": row["answer"],
                                          "replies": said[16 * i:16 * i + 16]} for i, row in enumerate(rows)])


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    rows = [] if SMALL else [r for r in read_jsonl(OUTPUT) if r["what"] not in names] if OUTPUT.exists() else []
    if "start" in names: rows.append(marks("start", 0, "tutor/sft", 0.0))
    for name in (n for n in names if n in ARMS):
        seeds, training = ARMS[name]
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                begun = time.process_time()
                run = training(seed, f"{folder}/run")
                rows.append(marks(name, seed, run, time.process_time() - begun))
            if not SMALL: write_jsonl(OUTPUT, rows)
            last = rows[-1]
            print(f"{name}, seed {seed}: {sum(last['hints'])} of {len(HINTS)} hints, {sum(last['refusals'])} of "
                  f"{len(OTHERS)} refusals, {sum(last['right'])} of {len(TEST)} right, {last['unwanted']} unwanted, "
                  f"{last['cpu_seconds']:.0f} CPU-s", flush=True)
    write_jsonl(OUTPUT, rows)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    with contextlib.suppress(KeyboardInterrupt):
        if "--help" in sys.argv: print(__doc__)
        elif words == ["replies"]: replies()
        else: main(["dpo"] if SMALL else words or ["start", *ARMS])
