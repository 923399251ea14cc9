"""Rows as they should not be: the rows of `data/` in every form, each changed in one to three places, by a seed.

    python tests/whole_way.py 10000 0     10,000 of them the whole way, and what became of them

`tests/test_contract.py` takes a slice.
"""
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path

from llmcourse.files import lines

DATA = Path(__file__).parent.parent / "data"
FILES = ("alpaca.json", "chats.jsonl", "completions.jsonl", "dolly.jsonl", "gsm8k.jsonl", "preferences.jsonl",
         "sharegpt.jsonl", "splits.jsonl", "thumbs.jsonl", "tools.jsonl", "topics.csv")
ASK, SAY = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "2+2: 4.\nAnswer: 4"}
CALL = {"name": "calculate", "arguments": '{"a": 2, "op": "+", "b": 2}'}
OTHERS = [   # forms of which `data/` has no file
    {"input": {"messages": [ASK], "tools": []}, "preferred_output": [SAY],
     "non_preferred_output": [SAY | {"content": "5"}]},
    {"instruction": "What is 2+2?", "completions": [{"response": "4", "overall_score": 5.0},
                                                    {"response": "5", "overall_score": 1.0}]},
    {"input": [ASK], "ideal": ["4", "four"]}, {"text": "Two and two are four."}, {"prompt": "What is 2+2?"},
    {"text": "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"},
    {"task": "add", "question": "What is 2+2?", "working": "2+2=4", "answer": 4}, {"question": "2+2?", "answer": "4"},
    {"messages": [ASK, {"role": "assistant", "content": None, "function_call": CALL},
                  {"role": "function", "name": "calculate", "content": "4"}, SAY],
     "functions": [{"name": "calculate", "parameters": {"type": "object"}}]},
    {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},
    {"messages": [ASK, SAY], "label": True}, {"chosen": [ASK, SAY], "rejected": [ASK, SAY | {"content": "5"}]},
    {"system": "Be brief.", "prompt": "2+2?", "history": [["1+1?", "2"]], "response": "4"},
    {"id": "simple_0", "question": [[ASK]], "ground_truth": [{"math.add": {"a": [2], "b": [2.0, 2], "to": ["", 0]}}],
     "function": [{"name": "math.add", "parameters": {"type": "dict", "required": ["a", "b"], "properties": {
         "a": {"type": "float"}, "b": {"type": "float"}, "to": {"type": "any"}}}}]}]


def deep(levels: int) -> list:
    "A list in a list in a list …"
    out = []
    for _ in range(levels): out = [out]
    return out


ODD = [None, True, False, 0, -1, 10**400, 2.5, float("nan"), float("inf"), "", " \n", "x", "\ud800", "\x00\x1b[31m",
       "1", "<|eot_id|>", "[", "{}", '[{"role": "user"}]', "so " * 900, "Ж" * 40, [], {}, [[]], [{}], [None], ["a", 1],
       {"a": 1}, {"role": "user"}, {"type": "text"}, [{"type": "text"}], [{"type": "image_url"}], deep(60),
       [{"function": None}], [{"function": {"name": "calculate", "arguments": "{"}}], [{"function": {"name": 3}}],
       {"$ref": "#"}, [{"type": "function", "function": {"name": "calculate", "parameters": {"type": 3}}}]]
NAMES = ("role", "content", "from", "value", "tool_calls", "tools", "functions", "function_call", "weight", "label",
         "split", "answer", "ideal", "prompt", "messages", "system", "history", "name", "tool_call_id", "refusal",
         "images")


def spots(value, path=()) -> Iterator[tuple]:
    "Where something is in a row: the path to every value."
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield *path, key
        yield from spots(inner, (*path, key))


def mutate(row: dict, rng: random.Random) -> dict:
    "The row with one change, somewhere."
    *path, key = rng.choice(list(spots(row)) or [("text",)])
    holder = row
    for step in path: holder = holder[step]
    kind = rng.randrange(8)
    if kind <= 2: holder[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == 3: del holder[key]
    elif kind == 4 and isinstance(holder, dict): holder[rng.choice(NAMES)] = holder.pop(key)
    elif kind == 4: holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif kind == 5: holder[key] = rng.choice([json.dumps, lambda x: [x], lambda x: {"value": x}])(holder[key])
    elif kind == 6 and isinstance(holder, dict): holder[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
    elif kind == 6: rng.shuffle(holder)
    return row


def originals() -> list[dict]:
    "Sound rows in every form, as their files write them."
    sound = [row for name in FILES for _, row in lines(DATA / name) if isinstance(row, dict)] + OTHERS * 5
    for i, row in enumerate(sound):
        if row.pop("split", "train") != "train": row["split"] = "test"
        for m in row.get("messages", ())[:-1] if "split" in row else (): m["content"] += f" ({i})"   # no leak
    return sound


def mutated(n: int, seed: int = 0) -> Iterator[dict]:
    "So many mutated rows; the same seed gives the same ones. Each eighth is left as it was."
    rng, sound = random.Random(seed), originals()
    for _ in range(n):
        row = copy.deepcopy(rng.choice(sound))
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3))):
            if row: row = mutate(row, rng)
        yield row


def write(path: Path, n: int, seed: int = 0) -> Path:
    "The mutated rows as a file, one a line."
    path.write_text("".join(json.dumps(row) + "\n" for row in mutated(n, seed)), encoding="utf-8")
    return path
