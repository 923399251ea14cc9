"""PPO and its relatives on the tutor at equal completions, for chapter 09b, to data/ppo.jsonl: one loop, and the
advantage is the only difference.

    python benchmarks/ppo.py [kind or seed ...]      some of them: gae, group, rloo, mean; 42, 43, 44
    python benchmarks/ppo.py --small FILE    one small training of each kind, to another file: does it run at all?

Eight rollouts of 32 completions (4 questions, 8 replies each) from tutor/sft on three-step stories, then 100 held-out
ones, greedy. After PPO, 64 more completions say how noisy each kind's gradient is: the variance of the gradients of
eight parts, eight replies to one question each. GRPO's, which is divided, has no common scale with them. One thread.
"""
import copy
import itertools
import sys
from pathlib import Path

SMALL = sys.argv[1:2] == ["--small"]
SEEDS = (42,) if SMALL else (42, 43, 44)
KINDS = ("gae", "group", "rloo", "mean")
SIZE = dict(steps=1, questions=1, group=2, max_new_tokens=8) if SMALL else dict(steps=8, questions=4, group=8)
PARTS = 2 if SMALL else 8
EXAM, N = 43, 2 if SMALL else 100      # the seed of the held-out problems, and how many
OUTPUT = Path(sys.argv[2]) if SMALL else Path(__file__).parent.parent / "data" / "ppo.jsonl"


def rows(n: int, seed: int, **options) -> list[dict]:
    from llmcourse.tutor import problems, to_chat
    return [{"prompt": to_chat(r, answered=False)["messages"], "answer": r["answer"]}
            for r in problems(n, seed, ["story3"], **options)]


def exam(model, tokenizer) -> list[int]:
    "For each held-out problem: 1 if it is solved."
    from llmcourse.models import Local
    from llmcourse.rl import exact_reward
    asked = rows(N, EXAM, split="test")
    said = Local(model, tokenizer, batch_size=N, max_new_tokens=SIZE.get("max_new_tokens", 160)).batch(
        [r["prompt"] for r in asked])
    return [int(score) for score in exact_reward(said, [r["answer"] for r in asked])]


def gradient(policy, taken: dict, gains, part):
    "The gradient of one part of a rollout, as a vector."
    import torch
    from llmcourse.ppo import ppo_loss
    from llmcourse.rl import token_logps
    some = {name: x[part] for name, x in taken.items()}
    policy.zero_grad()
    ppo_loss(token_logps(policy, some), some["old"], gains[part], some["completion_mask"]).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def noise(policy, critic, tokenizer, seed: int) -> dict[str, float]:
    "The variance of the parts' gradients on the same completions, of those kinds whose mean is the same gradient."
    import torch
    from llmcourse.ppo import credit, gae, rollout
    from llmcourse.rl import exact_reward
    group = SIZE["group"]
    asked = [row for row in rows(PARTS, seed + 100) for _ in range(group)]
    taken = rollout(policy, critic, policy, tokenizer, asked, exact_reward, 0.0, SIZE.get("max_new_tokens", 160))
    paid, values, mask = taken["rewards"], taken["values"], taken["completion_mask"]
    found = {}
    for kind in ("raw", "mean", "rloo", "gae"):   # PPO's as in training, λ = 1, but not whitened
        gains = credit(kind, paid, values, mask, group) if kind != "gae" else gae(paid, values, mask, lam=1.0)
        parts = torch.arange(len(asked)).chunk(PARTS)
        each = torch.stack([gradient(policy.train(), taken, gains, part) for part in parts])
        found[kind] = each.var(0).sum().item()
    return found


def measure(kind: str, seed: int, start, tokenizer) -> dict:
    from llmcourse.core import set_seed
    from llmcourse.ppo import improve, value_model
    from llmcourse.rl import exact_reward
    set_seed(seed)
    policy = copy.deepcopy(start)
    critic = value_model(policy) if kind == "gae" else None
    log = improve(policy, critic, tokenizer, rows(1000, seed + 1), exact_reward, kind=kind, seed=seed, **SIZE)
    seconds = sum(r["cpu_seconds"] for r in log)
    row = dict(kind=kind, seed=seed, completions=SIZE["steps"] * SIZE["questions"] * SIZE["group"], n=N,
               solved=exam(policy, tokenizer), cpu_seconds=round(seconds, 1))
    row |= {name: [round(r[name], 4) for r in log] for name in ("reward", "kl", "clipped", "tokens")}
    if kind == "gae":
        row["explained"] = [round(r["explained"], 3) for r in log]
        row["noise"] = {name: round(x, 5) for name, x in noise(policy, critic, tokenizer, seed).items()}
    return row


def main(kinds: list[str], seeds: list[int]) -> None:
    import torch
    from llmcourse.core import read_jsonl, write_jsonl
    from llmcourse.models import load
    torch.set_num_threads(1)
    start, tokenizer = load("tutor/sft")
    order = [("start", None), *itertools.product(KINDS, SEEDS)]
    for kind, seed in [("start", None), *itertools.product(kinds, seeds)]:
        had = {(r["kind"], r["seed"]): r for r in (read_jsonl(OUTPUT) if OUTPUT.is_file() else [])}
        if kind == "start" and (kind, seed) in had: continue
        if kind == "start": row = dict(kind=kind, seed=seed, n=N, solved=exam(start, tokenizer))
        else: row = measure(kind, seed, start, tokenizer)
        had = {(r["kind"], r["seed"]): r for r in (read_jsonl(OUTPUT) if OUTPUT.is_file() else [])}
        write_jsonl(OUTPUT, [(had | {(kind, seed): row})[key] for key in order if key in had or key == (kind, seed)])
        print(f"{kind} {seed}: {sum(row['solved'])}/{N}, reward {row.get('reward')}, {row.get('cpu_seconds')} s",
              flush=True)


if __name__ == "__main__":
    if "--help" in sys.argv: print(__doc__)
    else:
        words = [] if SMALL else sys.argv[1:]
        main([x for x in words if x in KINDS] or KINDS, [int(x) for x in words if x.isdigit()] or SEEDS)
