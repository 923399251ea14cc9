"""Runs that are healthy and runs that are ill, each by a setting of its own, to data/gallery.jsonl.

    python benchmarks/gallery.py chosen         the runs that the limits of `llmcourse explain` were chosen on
    python benchmarks/gallery.py tried          the runs that the first limits were tried on, before some were mended
    python benchmarks/gallery.py unseen         the runs that these are tried on: other seeds, other sizes of each fault
    python benchmarks/gallery.py --small FILE   one small run, to another file: does it run at all?

A row says what was set, what is wrong with it (a name of `explain`), and what was logged. Runs that the file has are
not made again. One thread; a run takes 3 to 25 CPU-seconds.
"""

import json
import math
import random
import re
import sys
import tempfile
import time
from os.path import commonprefix
from pathlib import Path

from llmcourse.checkpoints import grpo_rows
from llmcourse.core import read_jsonl
from llmcourse.lora import lora_config
from llmcourse.questions import reply_text
from llmcourse.recorder import read_flight
from llmcourse.rl import exact_reward, grpo
from llmcourse.sft import sft
from llmcourse.tutor import problems, to_chat

OUTPUT = Path(__file__).parent.parent / "data" / "gallery.jsonl"
RL = dict(
    max_steps=10,
    samples=5,
    probe_groups=0,
    num_generations=4,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=1,
    max_completion_length=16,
    warmup_steps=2,
    learning_rate=2e-4,
)
SFT = dict(num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1, bf16=False)
KEPT = (   # of what TRL logs: what the rules read, and what the picture draws
    *("step", "loss", "eval_loss", "grad_norm", "learning_rate", "reward", "reward_std", "right", "kl", "drift"),
    *("frac_reward_zero_std", "entropy", "clip_ratio/region_mean"),
    *("completions/mean_length", "completions/clipped_ratio"),
)


# --- rewards that are not what somebody meant


def texts(completions) -> list[str]:
    return [reply_text(said) for said in completions]


def marked(completions, **columns):
    "Looks for `#### N`, which the tutor never writes."
    return [float("####" in text) for text in texts(completions)]


def answered(completions, **columns):
    "1 for any reply at all."
    return [float(bool(text)) for text in texts(completions)]


def number(text: str) -> int:
    "The last number of a reply; a large one if there is none."
    found = re.findall(r"\d+", text)
    return int(found[-1][-4:]) if found else 99


def small(completions, **columns):
    "The smaller the answer, the better."
    return [1 / (1 + number(text)) for text in texts(completions)]


def large(completions, **columns):
    "The larger the answer, up to 20, the better."
    return [min(number(text), 20) / 20 for text in texts(completions)]


def long(completions, **columns):
    "The longer, the better."
    return [min(1.0, len(text) / 300) for text in texts(completions)]


def steps_shown(completions, **columns):
    "The more `=` signs, the better."
    return [min(1.0, text.count("=") / 10) for text in texts(completions)]


def noise(completions, **columns):
    "A coin for each reply."
    return [float(random.random() < 0.5) for _ in completions]


def alike(completions, prompts, **columns):
    "How much of a reply do its siblings begin with, too? As if agreement were truth."
    found = texts(completions)
    groups = {}
    for text, prompt in zip(found, map(str, prompts), strict=True):
        groups.setdefault(prompt, []).append(text)

    def common(a: str, b: str) -> float:
        return len(commonprefix([a, b])) / max(1, len(a), len(b))

    return [
        sum(common(text, other) for other in groups[prompt]) / len(groups[prompt])
        for text, prompt in zip(found, map(str, prompts), strict=True)
    ]


# --- rows


def sum_of(rng: random.Random, top: int = 5) -> dict:
    a, b = rng.randint(0, top), rng.randint(0, top)
    return {"question": f"What is {a} plus {b}?", "answer": str(a + b)}


def sums(seed: int, n: int = 120) -> list[dict]:
    rng = random.Random(seed)
    return [sum_of(rng) for _ in range(n)]


def hard(seed: int) -> list[dict]:
    "One question in eight is a sum; the others are products, which the tutor does not know."
    rng, rows = random.Random(seed), sums(seed)
    for i, row in enumerate(rows):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if i % 8:
            row |= {"question": f"What is {a} times {b}?", "answer": str(a * b)}
    return rows


def bare(rows: list[dict]) -> list[dict]:
    "Chats in which the answer comes at once, without working."
    asked = [{"role": "user", "content": row["question"]} for row in rows]
    said = [{"role": "assistant", "content": f"Answer: {row['answer']}"} for row in rows]
    return [{"messages": list(turns)} for turns in zip(asked, said, strict=True)]


def chats(seed: int, n: int = 160) -> list[dict]:
    return bare(sums(seed, n))


def lessons(seed: int, n: int = 40) -> list[dict]:
    "Sums and differences of two digits with their working."
    return [to_chat(p) for p in problems(n, seed, ("add", "sub"))]


def pairs(seed: int) -> list[dict]:
    "Sums and differences of two digits."
    return grpo_rows(seed, n=80, tasks=("add", "sub"))


def handful(seed: int) -> list[dict]:
    "Sums that cannot be done at once: all that can be learned is these answers."
    return bare(problems(8, seed, ("add", "sub")))


def other_handful(seed: int) -> list[dict]:
    return bare(problems(12, seed, ("add", "sub"), "test"))


def others(seed: int) -> list[dict]:
    "Rows for validation, of numbers that no training has."
    return [to_chat(p) for p in problems(12, seed, ("add", "sub"), "test")]


# --- the settings: (what is wrong, how it is trained, what differs from a healthy run)

HIGH, LOW, LONG = "learning rate too high", "learning rate too low", "length blow-up"
CONSTANT, SILENT, CUT = "reward is constant", "nothing to learn from", "replies cut off"
HACKED, KL, SURE, HEART = "reward hacked", "KL blow-up", "entropy collapse", "overfitting"

WORKED = dict(start="worked", rows=pairs, max_completion_length=96)

CHOSEN = [
    ("fine", "grpo", dict(learning_rate=1e-4)),
    ("fine", "grpo", dict()),
    ("fine", "grpo", dict(beta=0.04)),
    ("fine", "rloo", dict()),
    ("fine", "sft", dict()),
    ("fine", "sft", dict(learning_rate=4e-3, r=16, validation=others)),
    (SILENT, "grpo", dict(start="strong")),
    (SILENT, "grpo", dict(rows=hard)),
    (CONSTANT, "grpo", dict(reward_funcs=marked)),
    (HACKED, "grpo", dict(reward_funcs=small, learning_rate=5e-4)),
    (HACKED, "grpo", dict(reward_funcs=large, learning_rate=5e-4)),
    (LONG, "grpo", dict(reward_funcs=long, **WORKED, learning_rate=5e-4)),
    (CUT, "grpo", dict(max_completion_length=3)),
    (CUT, "grpo", dict(**WORKED | dict(max_completion_length=24))),
    (LOW, "grpo", dict(learning_rate=1e-7)),
    (HIGH, "grpo", dict(learning_rate=5e-3)),
    (KL, "grpo", dict(reward_funcs=noise, learning_rate=8e-4, max_steps=6)),   # seen before its entropy collapses
    (SURE, "grpo", dict(reward_funcs=noise, learning_rate=8e-4, max_steps=12)),
    (SURE, "grpo", dict(reward_funcs=noise, learning_rate=2e-3)),
    (SURE, "grpo", dict(reward_funcs=alike, rows=hard, learning_rate=5e-4)),
    (LOW, "sft", dict(learning_rate=1e-6)),
    (HIGH, "sft", dict(learning_rate=0.05)),
    (HEART, "sft", dict(rows=handful, validation=other_handful, num_train_epochs=16)),
]
TRIED = [
    ("fine", "grpo", dict(learning_rate=1.5e-4)),
    ("fine", "grpo", dict(beta=0.02, num_generations=8)),
    ("fine", "grpo", dict(loss_type="dr_grpo", max_steps=14)),
    ("fine", "rloo", dict(learning_rate=1e-4, max_steps=12)),
    ("fine", "sft", dict(learning_rate=5e-4)),
    ("fine", "sft", dict(learning_rate=2e-3, r=8, validation=others)),
    (SILENT, "grpo", dict(start="strong", max_steps=8)),
    (SILENT, "rloo", dict(rows=hard, num_generations=8)),
    (CONSTANT, "grpo", dict(reward_funcs=answered)),
    (CONSTANT, "rloo", dict(reward_funcs=marked, max_steps=6)),
    (HACKED, "grpo", dict(reward_funcs=small, learning_rate=4e-4, max_steps=14)),
    (HACKED, "rloo", dict(reward_funcs=large, learning_rate=5e-4)),
    (LONG, "grpo", dict(reward_funcs=steps_shown, **WORKED, learning_rate=5e-4)),
    (CUT, "grpo", dict(max_completion_length=4)),
    (CUT, "rloo", dict(**WORKED | dict(max_completion_length=34), max_steps=6)),
    (LOW, "grpo", dict(learning_rate=5e-7)),
    (LOW, "rloo", dict(learning_rate=1e-8)),
    (HIGH, "grpo", dict(learning_rate=1e-2)),
    (HIGH, "rloo", dict(learning_rate=4e-3)),
    (KL, "rloo", dict(reward_funcs=noise, learning_rate=7e-4, max_steps=7)),
    (SURE, "rloo", dict(reward_funcs=noise, learning_rate=8e-4, max_steps=14)),
    (SURE, "rloo", dict(reward_funcs=noise, learning_rate=3e-3)),
    (SURE, "grpo", dict(reward_funcs=alike, rows=hard, learning_rate=4e-4, max_steps=14)),
    (LOW, "sft", dict(learning_rate=3e-6)),
    (HIGH, "sft", dict(learning_rate=0.02)),
    (HEART, "sft", dict(rows=handful, validation=other_handful, num_train_epochs=12, learning_rate=2e-3)),
]
UNSEEN = [   # sizes of the faults that neither of the two has
    ("fine", "grpo", dict(learning_rate=1.2e-4)),
    ("fine", "grpo", dict(max_steps=16)),
    ("fine", "grpo", dict(beta=0.01, max_steps=8)),
    ("fine", "grpo", dict(loss_type="bnpo", num_generations=8)),
    ("fine", "grpo", dict(loss_type="dr_grpo", learning_rate=2.5e-4, max_steps=12)),
    ("fine", "rloo", dict(learning_rate=1.5e-4, max_steps=14)),
    ("fine", "rloo", dict(num_generations=8)),
    ("fine", "sft", dict(learning_rate=7e-4)),
    ("fine", "sft", dict(num_train_epochs=3)),
    ("fine", "sft", dict(learning_rate=3e-3, r=8, validation=others)),
    (SILENT, "rloo", dict(start="strong", max_steps=12)),
    (SILENT, "grpo", dict(rows=hard, num_generations=8, max_steps=12)),
    (CONSTANT, "grpo", dict(reward_funcs=marked, learning_rate=4e-4)),
    (CONSTANT, "rloo", dict(reward_funcs=answered, max_steps=8)),
    (HACKED, "grpo", dict(reward_funcs=large, learning_rate=6e-4)),
    (HACKED, "rloo", dict(reward_funcs=small, learning_rate=4.5e-4, max_steps=12)),
    (LONG, "rloo", dict(reward_funcs=steps_shown, **WORKED, learning_rate=6e-4)),
    (CUT, "rloo", dict(max_completion_length=3, max_steps=8)),
    (CUT, "grpo", dict(**WORKED | dict(max_completion_length=30), max_steps=8)),
    (LOW, "grpo", dict(learning_rate=8e-7)),
    (LOW, "rloo", dict(learning_rate=2e-7, max_steps=12)),
    (HIGH, "grpo", dict(learning_rate=7e-3)),
    (HIGH, "rloo", dict(learning_rate=6e-3, max_steps=8)),
    (KL, "grpo", dict(reward_funcs=noise, learning_rate=9e-4, max_steps=6)),
    (SURE, "grpo", dict(reward_funcs=noise, learning_rate=1e-3, max_steps=13)),
    (SURE, "rloo", dict(reward_funcs=noise, learning_rate=2.5e-3)),
    (SURE, "rloo", dict(reward_funcs=alike, rows=hard, learning_rate=6e-4, max_steps=12)),
    (LOW, "sft", dict(learning_rate=2e-6)),
    (HIGH, "sft", dict(learning_rate=0.03)),
    (HEART, "sft", dict(rows=handful, validation=other_handful, num_train_epochs=14, learning_rate=1.5e-3)),
]
SETS = {"chosen": (CHOSEN, (1,)), "tried": (TRIED, (11, 12)), "unseen": (UNSEEN, (21, 22))}


STARTS = {   # name → the rows that it has seen, how often
    "weak": (lambda: chats(1), 8),   # right a third of the time
    "strong": (lambda: chats(1), 20),   # right, and sure
    "worked": (lambda: lessons(1, 48), 1),   # two digits, with working: right half of the time, and rambling
}


def start(name: str, folder: Path) -> Path:
    "A tutor that has seen a few sums."
    rows, epochs = STARTS[name]
    return sft(rows(), folder / name, seed=1, learning_rate=1e-3, **SFT | dict(num_train_epochs=epochs))


def trained(how: str, seed: int, folder: Path, starts: Path, options: dict) -> Path:
    "One run of the gallery, in `folder`."
    options = dict(options)
    name = options.pop("start", "weak")
    model = starts / name if name in STARTS else name
    rows = options.pop("rows", lessons if how == "sft" else sums)(seed)
    if "validation" in options:
        options["validation"] = options["validation"](seed)
    if r := options.pop("r", 0):
        options["peft_config"] = lora_config(r=r, lora_alpha=2 * r)
    if how == "sft":
        return sft(rows, folder, seed=seed, **SFT | options)
    return grpo(rows, folder, method=how, seed=seed, **{"model": model, "reward_funcs": exact_reward} | RL | options)


def short_number(value):
    "Four digits are enough for a picture."
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return float(f"{value:.4g}")


def said(options: dict) -> dict:
    "Settings as a row holds them: functions by their names."
    return {name: getattr(value, "__name__", value) for name, value in options.items()}


def row(fault: str, which: str, how: str, seed: int, options: dict, folder: Path, seconds: float) -> dict:
    "What a run leaves in the gallery."
    run = read_flight(folder)
    log = [{name: short_number(line[name]) for name in KEPT if line.get(name) is not None} for line in run.rows]
    looks = [look | {"samples": look["samples"][:2]} for look in run.samples[:: max(1, len(run.samples) // 2)]]
    return dict(
        fault=fault, set=which, method=how, seed=seed, settings=said(options), seconds=round(seconds, 1),
        rows=[line for line in log if len(line) > 1], samples=looks,
    )


def main(which: str, output: Path, settings: list, seeds: tuple) -> None:
    "Make what is missing, a line at a time."
    made = read_jsonl(output) if output.is_file() and output.stat().st_size else []
    names = ("fault", "set", "method", "seed", "settings")
    there = [json.dumps([one[name] for name in names]) for one in made]
    with tempfile.TemporaryDirectory() as place, output.open("a", encoding="utf-8") as lines:
        wanted = {options.get("start", "weak") for _, how, options in settings if how != "sft"}
        for name in sorted(wanted & set(STARTS)):
            start(name, Path(place))
        for seed in seeds:
            for fault, how, options in settings:
                if json.dumps([fault, which, how, seed, said(options)]) in there:
                    continue
                before = time.process_time()
                folder = trained(how, seed, Path(place) / "run", Path(place), options)
                found = row(fault, which, how, seed, options, folder, time.process_time() - before)
                print(json.dumps(found, ensure_ascii=False), file=lines, flush=True)
                print(f"{which} {fault}: {how}, seed {seed}, {found['seconds']} CPU-s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--small"]:
        main("chosen", Path(sys.argv[2]), [("fine", "grpo", dict(start="tutor/sft", max_steps=4, samples=2))], (1,))
    else:
        main(sys.argv[1], OUTPUT, *SETS[sys.argv[1]])
