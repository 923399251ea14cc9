"""GRPO from `tutor/sft` on several seeds: three-step stories before and after, greedy and sampled, by a paired test.

    python benchmarks/seeds.py 7 123 [--small]

Each seed draws the training questions and seeds the sampling. Three to five minutes a seed.
"""
import sys
import tempfile

from llmcourse import evals, tutor
from llmcourse.checkpoints import GRPO_RECIPE, grpo_rows
from llmcourse.core import set_seed
from llmcourse.models import Local, load
from llmcourse.rl import grpo

SMALL = "--small" in sys.argv     # does it run at all?
TEST = tutor.problems(6 if SMALL else 300, 20261, ("story3",), split="test")
SETTINGS = GRPO_RECIPE | ({"max_steps": 1, "warmup_steps": 0} if SMALL else {})


def answers(model, temperature: float) -> list[dict]:
    set_seed(5)
    generate = Local(*load(model), max_new_tokens=160, batch_size=100, temperature=temperature)
    return evals.evaluate(generate, TEST, progress=False)


def main(seeds: list[int]) -> None:
    before = {t: answers("tutor/sft", t) for t in (0.0, 1.0)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            run = grpo(grpo_rows(seed), f"{folder}/{seed}", model="tutor/sft", seed=seed, **SETTINGS)
            for t in before:
                after = answers(run, t)
                found = evals.compare(before[t], after)
                right = [sum(row["right"] for row in rows) for rows in (before[t], after)]
                print(f"seed {seed}, T={t:.0f}: {right[0]} → {right[1]} of {len(TEST)}, "
                      f"gain {found['low']:.0%} to {found['high']:.0%}, p={found['p']:.0e}", flush=True)


if __name__ == "__main__":
    if "--help" in sys.argv: print(__doc__)
    else: main([int(word) for word in sys.argv[1:] if word != "--small"] or [7, 123])
