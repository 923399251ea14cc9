"""Runs that are healthy and runs that are ill, each by a setting of its own, to data/gallery.jsonl.

    python benchmarks/gallery.py chosen         the runs that the limits of `llmcourse explain` were chosen on
    python benchmarks/gallery.py unseen         the runs that they are tried on: other seeds, other sizes of each fault
    python benchmarks/gallery.py --small FILE   one small run, to another file: does it run at all?

A row says what was set, what is wrong with it (a name of `explain`), and what was logged. Runs that the file has are
not made again. One thread; a run takes 3 to 25 CPU-seconds.
"""

import json
import math
import random
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
SUMS = ("add", "sub")
RL = dict(
    max_steps=8,
    samples=4,
    probe_groups=0,
    num_generations=4,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=1,
    max_completion_length=64,
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


def short(completions, **columns):
    "The shorter, the better."
    return [1 / (1 + len(text) / 50) for text in texts(completions)]


def few_digits(completions, **columns):
    "The fewer digits, the better."
    return [1 / (1 + sum(c.isdigit() for c in text) / 10) for text in texts(completions)]


def long(completions, **columns):
    "The longer, the better."
    return [min(1.0, len(text) / 300) for text in texts(completions)]


def steps_shown(completions, **columns):
    "The more `=` signs, the better."
    return [text.count("=") / 10 for text in texts(completions)]


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


def sums(seed: int) -> list[dict]:
    return grpo_rows(seed, n=80, tasks=SUMS)


def easy(seed: int) -> list[dict]:
    return grpo_rows(seed, n=100, tasks=("add",))


def chats(seed: int) -> list[dict]:
    return [to_chat(p) for p in problems(40, seed, SUMS)]


def hard(seed: int) -> list[dict]:
    "One question in eight is a sum; the others are products, which the tutor does not know."
    rng = random.Random(seed)
    rows = sums(seed)[:96]
    for i, row in enumerate(rows):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if i % 8:
            row["messages"][-1]["content"] = f"What is {a} times {b}?"
            row["answer"] = str(a * b)
    return rows


def few(seed: int) -> list[dict]:
    "Eight questions, again and again."
    return sums(seed)[:8] * 12


def handful(seed: int) -> list[dict]:
    return chats(seed)[:12]


def other_chats(seed: int) -> list[dict]:
    "Rows that no training of the same seed has."
    return [to_chat(p) for p in problems(10, seed + 1000, SUMS)]


# --- the settings: (what is wrong, how it is trained, what differs from a healthy run)

HIGH, LOW, LONG = "learning rate too high", "learning rate too low", "length blow-up"
CONSTANT, SILENT, CUT = "reward is constant", "nothing to learn from", "replies cut off"
HACKED, KL, SURE, HEART = "reward hacked", "KL blow-up", "entropy collapse", "overfitting"

CHOSEN = [
    ("fine", "grpo", dict(learning_rate=1e-4)),
    ("fine", "grpo", dict()),
    ("fine", "grpo", dict(beta=0.04)),
    ("fine", "rloo", dict()),
    ("fine", "sft", dict()),
    ("fine", "sft", dict(learning_rate=4e-3, r=16, validation=other_chats)),
    (SILENT, "grpo", dict(model="tutor/rl", rows=easy)),
    (SILENT, "grpo", dict(rows=hard)),
    (CONSTANT, "grpo", dict(reward_funcs=marked, max_steps=6)),
    (HACKED, "grpo", dict(reward_funcs=short, learning_rate=1e-3, max_steps=10)),
    (HACKED, "grpo", dict(reward_funcs=few_digits, learning_rate=1e-3, max_steps=10)),
    (LONG, "grpo", dict(reward_funcs=long, learning_rate=5e-4, max_completion_length=96)),
    (CUT, "grpo", dict(max_completion_length=24, max_steps=6)),
    (CUT, "grpo", dict(max_completion_length=35, max_steps=6)),
    (LOW, "grpo", dict(learning_rate=1e-7)),
    (HIGH, "grpo", dict(learning_rate=5e-3)),
    (KL, "grpo", dict(reward_funcs=noise, learning_rate=2e-3)),
    (SURE, "grpo", dict(reward_funcs=alike, rows=hard, learning_rate=8e-4)),
    (LOW, "sft", dict(learning_rate=1e-6)),
    (HIGH, "sft", dict(learning_rate=0.05)),
    (HEART, "sft", dict(rows=handful, validation=other_chats, num_train_epochs=16)),
]
UNSEEN = [
    ("fine", "grpo", dict(learning_rate=1.5e-4)),
    ("fine", "grpo", dict(beta=0.02, num_generations=8)),
    ("fine", "grpo", dict(loss_type="dr_grpo", learning_rate=3e-4)),
    ("fine", "rloo", dict(learning_rate=1e-4)),
    ("fine", "sft", dict(learning_rate=5e-4)),
    ("fine", "sft", dict(learning_rate=2e-3, r=8, validation=other_chats)),
    ("fine", "sft", dict(learning_rate=1e-3, num_train_epochs=3, validation=other_chats)),
    (SILENT, "grpo", dict(model="tutor/rl", rows=easy, max_steps=6)),
    (SILENT, "rloo", dict(rows=hard, num_generations=8)),
    (CONSTANT, "grpo", dict(reward_funcs=answered, max_steps=6)),
    (LONG, "grpo", dict(reward_funcs=steps_shown, learning_rate=5e-4, max_completion_length=96)),
    (CUT, "grpo", dict(max_completion_length=20, max_steps=6)),
    (CUT, "rloo", dict(max_completion_length=34, max_steps=6)),
    (LOW, "grpo", dict(learning_rate=5e-7)),
    (HIGH, "grpo", dict(learning_rate=1e-2)),
    (LOW, "sft", dict(learning_rate=3e-6)),
    (HIGH, "sft", dict(learning_rate=0.02)),
    (HEART, "sft", dict(rows=handful, validation=other_chats, num_train_epochs=12, learning_rate=2e-3)),
    (HACKED, "grpo", dict(reward_funcs=short, learning_rate=8e-4, max_steps=12)),
    (HACKED, "rloo", dict(reward_funcs=few_digits, learning_rate=1e-3, max_steps=10)),
    (KL, "rloo", dict(reward_funcs=noise, learning_rate=2e-3)),
    (SURE, "grpo", dict(reward_funcs=alike, rows=hard, learning_rate=6e-4)),
]
SETS = {"chosen": (CHOSEN, (1,)), "unseen": (UNSEEN, (11, 12))}


def start(folder: Path) -> Path:
    "A tutor that has seen few sums: right about half the time, and not yet sure how to say it."
    rows = [to_chat(p) for p in problems(48, 1, SUMS)]
    return sft(rows, folder, seed=1, num_train_epochs=1, bf16=False, per_device_train_batch_size=8, learning_rate=1e-3)


def trained(how: str, seed: int, folder: Path, weak: Path, options: dict) -> Path:
    "One run of the gallery, in `folder`."
    options = dict(options)
    rows = options.pop("rows", chats if how == "sft" else sums)(seed)
    if "validation" in options:
        options["validation"] = options["validation"](seed)
    if r := options.pop("r", 0):
        options["peft_config"] = lora_config(r=r, lora_alpha=2 * r)
    if how == "sft":
        return sft(rows, folder, seed=seed, **SFT | options)
    return grpo(rows, folder, method=how, seed=seed, **{"model": weak, "reward_funcs": exact_reward} | RL | options)


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
    made = read_jsonl(output) if output.is_file() else []
    names = ("fault", "set", "method", "seed", "settings")
    there = [json.dumps([one[name] for name in names]) for one in made]
    with tempfile.TemporaryDirectory() as place, output.open("a", encoding="utf-8") as lines:
        weak = start(Path(place) / "start")
        for seed in seeds:
            for fault, how, options in settings:
                if json.dumps([fault, which, how, seed, said(options)]) in there:
                    continue
                before = time.process_time()
                folder = trained(how, seed, Path(place) / "run", weak, options)
                found = row(fault, which, how, seed, options, folder, time.process_time() - before)
                print(json.dumps(found, ensure_ascii=False), file=lines, flush=True)
                print(f"{which} {fault}: {how}, seed {seed}, {found['seconds']} CPU-s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--small"]:
        main("chosen", Path(sys.argv[2]), [("fine", "grpo", dict(max_steps=4, samples=2))], (1,))
    else:
        main(sys.argv[1], OUTPUT, *SETS[sys.argv[1]])
