"""CPU-seconds of GRPO steps on the tutor, in one run on one machine: our defaults, TRL's (bfloat16 autocast and
gradient checkpointing), and TRL in float32 without checkpointing. Each in a fresh process, in turn, several rounds.

    python benchmarks/grpo.py [rounds] [--small]

Four steps of 64 completions, 256 in all. The completions are sampled, so each contender gets the same prompts and seed.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

SMALL = "--small" in sys.argv
STEPS, GROUP, BATCH = (1, 2, 4) if SMALL else (4, 8, 64)
CONTENDERS = {
    "ours": {},
    "trl": dict(bf16=True, gradient_checkpointing=True),
    "trl float32": dict(bf16=False, gradient_checkpointing=False),
}


def own_defaults() -> dict:
    "Our hyperparameters for this machine, of those that change how fast it is."
    from llmcourse.core import scale
    from llmcourse.rl import GRPO

    ours = GRPO.defaults(scale("cpu"), 2_600_000, False)
    return {name: ours[name] for name in ("bf16", "gradient_checkpointing")}


def contender(name: str) -> None:
    "Build a trainer, then train under the clock."
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from llmcourse.checkpoints import grpo_rows
    from llmcourse.core import set_seed
    from llmcourse.models import load
    from llmcourse.questions import problem_rows
    from llmcourse.rl import exact_reward
    from llmcourse.rows import read

    set_seed(42)
    model, tokenizer = load("tutor/sft", dtype="float32")
    rows = problem_rows(read(grpo_rows(42, n=50), "train"), {"reward_funcs": [exact_reward]})
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            seed=42,
            max_steps=STEPS,
            num_generations=GROUP,
            per_device_train_batch_size=BATCH,
            max_completion_length=160,
            **(CONTENDERS[name] or own_defaults()),
        )
        trainer = GRPOTrainer(model, exact_reward, args, Dataset.from_list(rows), processing_class=tokenizer)
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


def main(rounds: int) -> None:
    seconds = {name: [] for name in CONTENDERS}
    for i in range(rounds):
        for name in CONTENDERS:
            row = measured(name)
            seconds[name].append(row["cpu"])
            took = f"{row['cpu']:.1f} CPU-s, {row['wall']:.1f} s"
            print(f"round {i + 1} {name:<11} {row['completions']} completions, {took}", flush=True)
    for name in list(CONTENDERS)[1:]:
        ratios = [x / y for x, y in zip(seconds[name], seconds["ours"], strict=True)]
        print(
            f"{name} / ours: median {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}, n={rounds})"
        )


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--small"]
    if "--help" in words:
        print(__doc__)
    elif words[:1] == ["--one"]:
        contender(words[1])
    else:
        main(int(words[0]) if words else 2)
