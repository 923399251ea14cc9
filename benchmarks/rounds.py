"""Three rounds of GRPO from `tutor/sft` behind a gate; a calculator by reward; a teacher paid by its student's success.

    python benchmarks/rounds.py rounds,tools,agents 1,2,3 [--small] [rounds.jsonl]

Each measurement is a line of JSON, added to the file when its part is done; chapter 09c draws `data/rounds.jsonl`.
About ten minutes a seed on one idle core. What the file has is not measured again.
"""
import json
import random
import re
import sys
import tempfile
from pathlib import Path

from llmcourse import evals
from llmcourse.calculator import CALCULATOR, TOOL_SYSTEM, shown
from llmcourse.calls import parse_calls
from llmcourse.core import read_jsonl, set_seed
from llmcourse.models import Local, generate, load, render, stop_ids
from llmcourse.rl import exact_reward, grpo
from llmcourse.rounds import rounds, thread_reward
from llmcourse.serve import remote
from llmcourse.shipping import served
from llmcourse.tutor import problems, stories, to_chat

SMALL = "--small" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
FILE = next((word for word in WORDS if word.endswith(".jsonl")), None)
LINES = read_jsonl(FILE) if FILE and Path(FILE).is_file() else []
KEPT = len(LINES)    # of these the file has so many
ONE_STEP = dict(max_steps=1, warmup_steps=0, per_device_train_batch_size=8) if SMALL else {}


def note(**line) -> None:
    "Print a measurement and keep it."
    LINES.append(line)
    print(json.dumps(line), flush=True)


def made(**about) -> bool:
    "Is there such a measurement?"
    return any(about.items() <= line.items() for line in LINES)


def keep() -> None:
    "Write what is new to the file."
    global KEPT
    if FILE:
        with open(FILE, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in LINES[KEPT:])
    KEPT = len(LINES)


def asked(model, rows: list[dict], temperature: float = 0.0) -> list[dict]:
    "Through llmcourse's own server, as the chapter does."
    with served(model, quant="F32", n_parallel=8) as server:
        ask = remote(server.url, max_tokens=240, temperature=temperature)
        return evals.evaluate(ask, rows, "tutor", workers=8, progress=False)


# Rounds


def three_digits(n: int, seed: int) -> list[dict]:
    rng, rows = random.Random(seed), []
    for _ in range(n):
        a, b = sorted((rng.randrange(100, 1000) for _ in "ab"), reverse=True)
        word, value = rng.choice([("plus", a + b), ("minus", a - b)])
        row = {"task": "three digits", "question": f"What is {a} {word} {b}?", "answer": str(value)}
        rows.append(to_chat(row, answered=False))
    return rows


def sealed_rows() -> list[dict]:
    n = 4 if SMALL else 50
    plain = [to_chat(row, answered=False) for row in problems(n // 2, 20263, ["add", "story2"], split="test")]
    return plain + [row for k in (3, 4, 5) for row in stories(n, k, 20263, "test")] + three_digits(n // 2, 20263)


def measure_sealed(path, **about) -> None:
    for row in evals.summary(asked(path, sealed_rows())):
        note(part="sealed", **about, kind=row["task"], right=row["correct"], n=row["n"])


def rounds_of(seed: int, folder: str) -> None:
    each, n = (8, 4) if SMALL else (24, 30)
    def pool(i): return stories(each, 3, seed + 100 * i) + stories(each, 4, seed + 100 * i)
    frozen = problems(n, 20262, ["add", "story2"], split="test")
    frozen += [row for k in (3, 4) for row in stories(n, k, 20262, "test")]
    steps = ONE_STEP or dict(max_steps=8, per_device_train_batch_size=32, warmup_steps=1, learning_rate=4e-4)
    history = rounds("tutor/sft", pool, frozen, f"{folder}/rounds{seed}", asked, 1 if SMALL else 3, seed,
                     reward=thread_reward, max_completion_length=200, **steps)
    for i, verdict in enumerate(history, 1):
        log = [r for r in read_jsonl(Path(verdict["run"]) / "metrics.jsonl") if "reward" in r]
        silent = sum(r["frac_reward_zero_std"] for r in log) / len(log)
        note(part="round", seed=seed, round=i, silent=round(silent, 3),
             **{k: verdict[k] for k in ("tried", "kept", "passed", "why", "before", "after", "low", "high")})
        measure_sealed(verdict["run"], model=f"round {i}", seed=seed, round=i)


# Tools


def calculate(start: int, change: str) -> str:
    """
    Change a whole number.

    Args:
        start: the number
        change: +38 adds to it, -38 takes from it
    """
    return shown(start, change)


def lie(start: int, change: str) -> str:
    found = shown(start, change)
    value = int(re.search(r"(-?\d+)\.$", found)[1])
    return found.replace(f"so {value}.", f"so {value + 1}.")


def tool_sums(n: int, digits: int, seed: int) -> list[dict]:
    rows = three_digits(n, seed) if digits == 3 else problems(n // 2, seed, ["add", "sub"], split="train")
    asks = [row["messages"][-1]["content"] if digits == 3 else row["question"] for row in rows]
    system = {"role": "system", "content": TOOL_SYSTEM}
    return [{"prompt": [system, {"role": "user", "content": ask}], "answer": row["answer"]}
            for ask, row in zip(asks, rows)]


def with_tool(loaded, rows: list[dict], tool) -> tuple[int, int]:
    "Right answers and calls, with a tool or without one."
    chats = [list(row["prompt"]) for row in rows]
    ask = Local(*loaded, max_new_tokens=110, batch_size=64)
    calls = 0
    for _ in range(4):
        going = [chat for chat in chats if chat[-1]["role"] != "assistant"]
        if not going: break
        said = ask.batch(going, [[CALCULATOR]] * len(going) if tool else None)
        for chat, reply in zip(going, said):
            made = parse_calls(reply) if tool else []
            if not made:
                chat.append({"role": "assistant", "content": reply})
                continue
            calls += 1
            try: result = tool(**made[0]["arguments"] or {})
            except Exception as e: result = f"error: {e}"
            function = {"name": made[0]["name"], "arguments": json.dumps(made[0]["arguments"])}
            sent = [{"type": "function", "function": function}]
            chat.append({"role": "assistant", "content": "", "tool_calls": sent})
            chat.append({"role": "tool", "content": result})
    return int(sum(exact_reward([[chat[-1]] for chat in chats], [row["answer"] for row in rows]))), calls


def measure_tools(loaded, **about) -> None:
    for digits in (2, 3):
        rows = tool_sums(4 if SMALL else 100, digits, 20264)
        for name, tool in {"with": calculate, "without": None, "lying": lie}.items():
            right, calls = with_tool(loaded, rows, tool)
            note(part="tools", **about, digits=digits, tool=name, right=right, n=len(rows), calls=calls)


def tools_of(seed: int, folder: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import llama3_template

    set_seed(seed)
    net, tokenizer = load("tutor/tools")
    if not made(part="tools", seed=0): measure_tools((net, tokenizer), model="before", seed=0)
    tokenizer.response_template = llama3_template
    net.generation_config.eos_token_id = stop_ids(tokenizer)
    size = 8 if SMALL else 64
    args = GRPOConfig(output_dir=folder, per_device_train_batch_size=size, num_generations=8, max_completion_length=120,
                      report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
                      max_steps=1 if SMALL else 12, learning_rate=4e-4, warmup_steps=1, beta=0.0, seed=seed,
                      lr_scheduler_type="constant_with_warmup", disable_tqdm=True, max_tool_calling_iterations=3,
                      logging_steps=1)
    trainer = GRPOTrainer(net, exact_reward, args, Dataset.from_list(tool_sums(400, 2, seed)),
                          processing_class=tokenizer, tools=[calculate])
    trainer.train()
    curve = [round(r["reward"], 3) for r in trainer.state.log_history if "reward" in r]
    note(part="tool curve", seed=seed, reward=curve)
    measure_tools((net.eval(), tokenizer), model="after", seed=seed)


# Two agents


def first_step(text: str) -> str: return (re.match(r"[^:]*:", text) or [""])[0]


def student_of(model, tokenizer):
    "(prompts, plans, answers) → was the student right, going on from each plan?"
    def right(prompts, plans, answers):
        starts = [render(tokenizer, prompt) + plan for prompt, plan in zip(prompts, plans)]
        said = [plan + rest for plan, rest in zip(plans, generate(model, tokenizer, starts, 150))]
        return exact_reward(said, answers)
    return right


def agents_of(seed: int, folder: str) -> None:
    student = student_of(*load("tutor/sft"))
    test = problems(4 if SMALL else 100, 20265, ["story3"], split="test")
    prompts, answers = [to_chat(row, answered=False)["messages"] for row in test], [row["answer"] for row in test]

    def score(name, plans):
        true = sum(plan == first_step(row["working"]) for plan, row in zip(plans, test))
        note(part="agents", seed=seed, plan=name, right=int(sum(student(prompts, plans, answers))), n=len(test),
             true_plans=true)

    def plans_of(model): return [first_step(text) for text in generate(*load(model), prompts, 8)]

    def student_reward(completions, prompts, answer, **columns):
        return student(prompts, [first_step(c[-1]["content"]) for c in completions], answer)

    if not made(part="agents"):
        score("no plan", [""] * len(test))
        score("untrained teacher", plans_of("tutor/sft"))
        score("right first step", [first_step(row["working"]) for row in test])
    steps = ONE_STEP or dict(max_steps=8, warmup_steps=1, learning_rate=4e-4)
    run = grpo(problems(400, seed, ["story3"]), f"{folder}/teacher{seed}", "tutor/sft", student_reward, seed=seed,
               probe_groups=0, max_completion_length=8, **steps)
    plans = plans_of(run)
    score("trained teacher", plans)
    score("shuffled plans", plans[1:] + plans[:1])


PARTS = {   # name → (what makes it, its last measurement)
    "rounds": (rounds_of, dict(part="sealed", round=1 if SMALL else 3)),
    "tools": (tools_of, dict(part="tools", digits=3, tool="lying")),
    "agents": (agents_of, dict(part="agents", plan="shuffled plans")),
}
SEEDS = [int(word) for word in re.findall(r"\d+", next((w for w in WORDS if re.fullmatch(r"[\d,]+", w)), "1,2,3"))]


def main() -> None:
    parts = next((w for w in WORDS if w.split(",")[0] in PARTS), ",".join(PARTS)).split(",")
    before = len(LINES)
    with tempfile.TemporaryDirectory() as folder:
        if "rounds" in parts and not made(part="sealed", seed=0):
            for name in ("sft",) if SMALL else ("base", "sft", "grpo", "rl"):
                about = {"round": 0} if name == "sft" else {}
                measure_sealed(f"tutor/{name}", model="round 0" if name == "sft" else f"tutor/{name}", seed=0, **about)
        for seed in SEEDS:
            for make, last in (PARTS[part] for part in parts):
                if not made(seed=seed, **last): make(seed, folder)
                keep()
    print(f"done: {len(LINES) - before} measurements")


if __name__ == "__main__":
    if "--help" in sys.argv: print(__doc__)
    else: main()
