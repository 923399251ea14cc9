"""Completions per CPU-second of GRPO on the tutor, in one run on one machine: ours, TRL's trainer with its defaults
(bfloat16 autocast and gradient checkpointing), and TRL's trainer with our settings (float32, no checkpointing). Each in
a fresh process, in turn, several rounds. With `--curve`, the rewards step by step, ours and TRL's with our settings.

    python benchmarks/grpo.py [rounds] [--small]
    python benchmarks/grpo.py --curve 7 123 2024

Four steps of 64 completions, 256 in all; a curve has twenty steps. Prompts and seeds are the same for each contender.

On one thread of a busy machine, CPU-seconds of three pairs: ours 7.7, 8.3 and 8.0, TRL in float32 17.9, 18.9 and 19.0,
that is 2.33 times the completions (95 %: 2.21 to 2.44, n=3); TRL's defaults 20.6 and 21.3, that is 2.5 and 2.7 times.
Ours and TRL in float32 log the same rewards: their means are 0.7656, the losses -0.01629.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from math import exp, log

SMALL = "--small" in sys.argv
STEPS, GROUP, BATCH, CURVE = (1, 2, 4, 2) if SMALL else (4, 8, 64, 20)
CONTENDERS = ("ours", "trl", "trl float32")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}   # of Student's distribution, by rounds


def own_settings() -> dict:
    "Our hyperparameters for this machine, of those that change how fast it is."
    from llmcourse.core import scale
    from llmcourse.rl import GRPO

    ours = GRPO.defaults(scale("cpu"), 2_600_000, False)
    return {name: ours[name] for name in ("bf16", "gradient_checkpointing")}


def trainer_of(name: str, steps: int, seed: int, folder: str, **options):
    "A trainer, ready to go."
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from llmcourse.checkpoints import grpo_rows
    from llmcourse.core import set_seed
    from llmcourse.models import load
    from llmcourse.questions import problem_rows
    from llmcourse.rl import exact_reward
    from llmcourse.rows import read
    from llmcourse.scoring import without_waste

    set_seed(seed)
    model, tokenizer = load("tutor/sft", dtype="float32")
    rows = problem_rows(read(grpo_rows(seed, n=50), "train"), {"reward_funcs": [exact_reward]})
    args = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=seed,
        max_steps=steps,
        num_generations=GROUP,
        per_device_train_batch_size=BATCH,
        max_completion_length=160,
        **({} if name == "trl" else own_settings()),
        **options,
    )
    assert args.bf16 == args.gradient_checkpointing == (name == "trl"), "TRL's defaults are others by now"
    trainer = without_waste(GRPOTrainer) if name == "ours" else GRPOTrainer
    return trainer(model, exact_reward, args, Dataset.from_list(rows), processing_class=tokenizer)


def contender(name: str) -> None:
    "Build a trainer, then train under the clock."
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(name, STEPS, 42, folder)
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps(dict(completions=STEPS * BATCH, cpu=cpu, wall=wall)))


def measured(name: str) -> dict:
    "The last line that a contender prints in a process of its own."
    small = ["--small"] if SMALL else []
    done = subprocess.run([sys.executable, __file__, "--one", name, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def interval(ratios: list[float]) -> str:
    "The geometric mean, with its 95 % interval."
    logs = [log(x) for x in ratios]
    middle, n = statistics.fmean(logs), len(logs)
    if n not in T95: return f"{exp(middle):.2f} (n={n})"
    half = T95[n] * statistics.stdev(logs) / n**0.5
    return f"{exp(middle):.2f} (95 %: {exp(middle - half):.2f}–{exp(middle + half):.2f}, n={n})"


def speed(rounds: int) -> None:
    seconds = {name: [] for name in CONTENDERS}
    for i in range(rounds):
        for name in CONTENDERS:
            row = measured(name)
            seconds[name].append(row["cpu"])
            took = f"{row['cpu']:.1f} CPU-s, {row['wall']:.1f} s, {row['completions'] / row['cpu']:.1f} per CPU-s"
            print(f"round {i + 1} {name:<11} {row['completions']} completions, {took}", flush=True)
    for name in CONTENDERS[1:]:
        ratios = [x / y for x, y in zip(seconds[name], seconds["ours"], strict=True)]
        print(f"{name} / ours: {interval(ratios)}")


def curve(seeds: list[int]) -> None:
    "Mean reward of all steps and of the last five, and their differences."
    from llmcourse.rl import GRPO

    rate = GRPO.defaults({"device": "cpu", "dtype": "float32", "max_new_tokens": 160}, 2_600_000)["learning_rate"]
    apart = []
    for seed in seeds:
        means = {}
        for name in ("ours", "trl float32"):
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(name, CURVE, seed, folder, learning_rate=rate, logging_steps=1)
                trainer.train()
            rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
            means[name] = statistics.fmean(rewards), statistics.fmean(rewards[-5:])
            print(f"seed {seed} {name:<11} {' '.join(f'{x:.2f}' for x in rewards)}", flush=True)
        apart.append([x - y for x, y in zip(means["ours"], means["trl float32"])])
        print(f"seed {seed} ours - trl float32: {apart[-1][0]:+.3f} over all steps, {apart[-1][1]:+.3f} in the last 5")
    middle = [statistics.fmean(column) for column in zip(*apart, strict=True)]
    print(f"mean of {len(seeds)} seeds: {middle[0]:+.3f} over all steps, {middle[1]:+.3f} in the last 5")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--small"]
    if "--help" in words:
        print(__doc__)
    elif words[:1] == ["--one"]:
        contender(words[1])
    elif words[:1] == ["--curve"]:
        curve([int(word) for word in words[1:]] or [7, 123, 2024])
    else:
        speed(int(words[0]) if words else 3)
