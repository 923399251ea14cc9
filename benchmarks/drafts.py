"""When does a draft pay? CPU time a token in llama.cpp, with and without, in turn, for the tutor in bodies of any size.

    python benchmarks/drafts.py [drafts.jsonl] [--small]

A body `times` 8 is the tutor with MLPs eight times as wide, filled up with zeros: it says the same, token for token,
and takes the time of the larger model. So the share of guesses that are kept stays, and only the costs change.
"""
import json
import random
import re
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving import cpu

from llmcourse.core import write_jsonl
from llmcourse.export import to_gguf
from llmcourse.serve import serve
from llmcourse.tutor import problems, to_chat

TOKENS = 33     # of each reply that count; the replies to these problems are longer
CHATS = [to_chat(p, answered=False)["messages"] for p in problems(4, 5, ("story1",), "test")]
DRAFT, Q4 = "tutor/draft", "Q4_K_M"


def widened(times: int, folder: Path) -> Path:
    "tutor/sft as a GGUF, its MLPs `times` as wide: what is new is zero."
    import torch

    from llmcourse.models import load

    net, tokenizer = load("tutor/sft")
    for layer in net.model.layers:
        for name, side in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            part = getattr(layer.mlp, name)
            more = list(part.weight.shape)
            more[side] *= times - 1
            part.weight = torch.nn.Parameter(torch.cat([part.weight.data, torch.zeros(more)], side))
    net.config.intermediate_size *= times
    for part in (net, tokenizer):
        part.save_pretrained(folder / f"times{times}")
    return to_gguf(folder / f"times{times}", folder / f"times{times}.gguf", "f32")


def replies(server, tokens: int, at_once: int) -> tuple[float, int, list]:
    "CPU milliseconds, passes and what llama.cpp says, for all questions."
    ask = dict(temperature=0, max_tokens=tokens, cache_prompt=False)

    def one(chat):
        return json.loads(server.get("/v1/chat/completions", ask | {"messages": chat}))

    passes = lambda: int(re.search(r"^llamacpp:n_decode_total (\d+)", server.get("/metrics"), re.M)[1])
    start, before = passes(), cpu(server.process.pid)
    with ThreadPoolExecutor(at_once) as pool: said = list(pool.map(one, CHATS))
    return 1000 * (cpu(server.process.pid) - before), passes() - start, said


def measure(server, at_once: int = 1) -> dict:
    "One measurement: CPU milliseconds a token and a pass, less reading the question; guesses made and kept; replies."
    first, some, _ = replies(server, 1, at_once)
    whole, all_, said = replies(server, TOKENS, at_once)
    times = [s["timings"] for s in said]
    made, kept = (sum(t.get(key, 0) for t in times) for key in ("draft_n", "draft_n_accepted"))
    tokens = sum(t["predicted_n"] - 1 for t in times)
    texts = [s["choices"][0]["message"]["content"] for s in said]
    spent = whole - first
    return {"ms": spent / tokens, "pass_ms": spent / max(1, all_ - some), "tokens": tokens, "made": made, "kept": kept,
            "said": texts}


def body(times: int, rounds: int, folder: Path) -> list[dict]:
    "Everything about one size: without a draft, with each, four questions at once, and the draft alone, in turn."
    target = widened(times, folder)
    drafts = {DRAFT: to_gguf(DRAFT, folder / "draft.gguf", "f32"), Q4: to_gguf("tutor/sft", folder / "tight.gguf", Q4)}
    wanted = {"alone": (target, 1, {}), "four at once": (target, 4, {})}
    wanted |= {who: (target, 1, {"draft": str(file)}) for who, file in drafts.items()}
    wanted |= {f"{who} alone": (file, 1, {}) for who, file in drafts.items()}
    orders, rows, texts, rng = {}, [], None, random.Random(times)
    try:
        for who, (file, places, more) in wanted.items():
            orders[who] = serve(file, n_parallel=places, n_threads=1, **more)
        for i in range(rounds + 1):     # the first warms up
            for who in rng.sample(list(orders), len(orders)):
                found = measure(orders[who], 4 if who == "four at once" else 1)
                said = found.pop("said")
                if who in (DRAFT, Q4) and texts: assert said == texts, f"{who} changed a reply"
                if who == "alone": texts = said
                place = {"times": times, "MB": round(target.stat().st_size / 1e6, 1), "who": who, "round": i}
                rows.append(place | found)
    finally:
        for server in orders.values(): server.stop()
    return [row for row in rows if row["round"]]


def ratios(rows: list[dict], above: str, below: str, key: str = "ms", below_key: str = "ms") -> tuple:
    "The ratio of two medians, and its bootstrapped interval."
    pick = lambda who, key: [row[key] for row in rows if row["who"] == who]
    a, b = pick(above, key), pick(below, below_key)
    rng, middle = random.Random(0), statistics.median
    draws = sorted(middle(rng.choices(a, k=len(a))) / middle(rng.choices(b, k=len(b))) for _ in range(1000))
    return middle(a) / middle(b), draws[25], draws[974]


def loose(row: dict) -> bool:
    "Did the four questions start so far apart that fewer than three and a half tokens shared a pass?"
    return row["pass_ms"] < 3.5 * row["ms"]


def summary(rows: list[dict]) -> list[dict]:
    "A line for each body and draft: c, r, tokens a pass, the gain that the formula promises, and the one measured."
    lines = []
    for times in dict.fromkeys(row["times"] for row in rows):
        here = [row for row in rows if row["times"] == times]
        four = [row for row in here if row["who"] == "four at once"]
        close = [row for row in four if not loose(row)] or four     # a busy machine may have none
        check = ratios([row for row in here if row not in four] + close, "four at once", "alone", "pass_ms")
        for who in (DRAFT, Q4):
            sums = {key: sum(row[key] for row in here if row["who"] == who) for key in ("made", "kept", "tokens")}
            passes, cost = sums["tokens"] - sums["kept"], ratios(here, f"{who} alone", "alone")
            promised = sums["tokens"] / (sums["made"] * cost[0] + passes * check[0])
            lines.append({"times": times, "MB": here[0]["MB"], "draft": who} | sums | {
                "passes": passes, "c": cost, "r": check, "promised": promised, "measured": ratios(here, "alone", who)})
    return lines


def table(rows: list[dict]) -> list[str]:
    "The lines of the table in chapter 02."
    span = lambda x: f"{x[0]:.2f} ({x[1]:.2f}–{x[2]:.2f})"
    return [f"| × {x['times']} | {x['MB']:.1f} | {x['draft']} | {x['kept'] / x['made']:.1%} of {x['made']:,} "
            f"| {x['tokens'] / x['passes']:.2f} | {x['c'][0]:.3f} | {span(x['r'])} | {x['promised']:.2f} "
            f"| {span(x['measured'])} |" for x in summary(rows)]


def main(words: list[str]) -> None:
    small = "--small" in words
    path = next((Path(word) for word in words if not word.startswith("-")), Path("drafts.jsonl"))
    rows = []
    for times in (1,) if small else (1, 8):
        with tempfile.TemporaryDirectory() as place:
            rows += body(times, 1 if small else 8, Path(place))
        write_jsonl(path, rows)
    print(*table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
