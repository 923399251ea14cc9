"""Does a model that `llmcourse export --program` laid out answer in that program as it does in transformers? The real
programs, each in an environment of its own, are asked the same questions, greedily:

    python -m venv g4 && g4/bin/pip install gpt4all            # 242 MB with its environment, Linux, a CPU does
    python -m venv mlx && mlx/bin/pip install 'mlx[cpu]' mlx-lm   # 355 MB
    python benchmarks/layouts.py gpt4all --python g4/bin/python [-n 60] [--only Q8_0] layouts.jsonl
    python benchmarks/layouts.py mlx --python mlx/bin/python layouts.jsonl   # adds to the file

Without --python, our own llama.cpp answers. Of GPT4All: every GGUF type; a second question in the same chat, with and
without {1} in the template; its defaults. Of MLX: replies, and the largest difference of a log-probability behind any
token of prompt and reply; a merged model, an adapter, 8 and 4 bits by mlx-lm; and the tutor with other rotary angles,
as transformers saves it and as we write it. LM Studio has no package to install: tests check its layout and template.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

AGAIN = "What is 12 + 9?"
ROPES = {
    "theta 500,000": dict(rope_type="default", rope_theta=500_000.0),
    "linear": dict(rope_type="linear", rope_theta=10_000.0, factor=2.0),
    "llama3": dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64),
}


def in_gpt4all(job: dict):
    "What GPT4All answers, one line a chat. Runs in its own environment."
    import gpt4all
    model = gpt4all.GPT4All(job["file"], model_path=job["folder"], allow_download=False, device="cpu", n_threads=1,
                            n_ctx=512)
    for system, question in job["asked"]:
        with model.chat_session(job["system_prompt"] + system, job["prompt_template"]):
            yield [model.generate(text, max_tokens=64, **job["options"]) for text in (question, AGAIN)]


def in_mlx(job: dict):
    "Greedy replies of mlx-lm, and the largest gap to transformers' log-probabilities. Runs in its own environment."
    import mlx.core as mx
    import numpy as np
    from mlx_lm import generate, load
    from mlx_lm.sample_utils import make_sampler
    model, tokenizer = load(job["folder"])
    for ids, full, file in job["asked"]:
        reply = generate(model, tokenizer, ids, max_tokens=64, sampler=make_sampler(temp=0.0))
        logits = model(mx.array([full]))[0].astype(mx.float32)
        theirs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        yield [reply, float(np.abs(theirs - np.load(file)).max())]


def plain_environment() -> dict:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def child(python: str, name: str, job: dict) -> list:
    "Run one of the two functions above under another Python."
    done = subprocess.run([python, __file__, "--child", name], input=json.dumps(job), env=plain_environment(),
                          capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def asked(n: int, seed: int = 1) -> list:
    "Sums and stories, as conversations."
    from llmcourse.tutor import problems, to_chat
    return [to_chat(p, answered=False)["messages"] for p in problems(n, seed, ("add", "sub", "story1"), "test")]


def answers(net, tokenizer, chats: list, questions: tuple = (None, AGAIN)) -> tuple[list, list]:
    "transformers' replies to each and to a second question, and (ids, ids with the reply, log-probabilities)."
    from llmcourse.export import greedy
    from llmcourse.models import encode
    replies, cases = [], []
    for chat in chats:
        pair = []
        for question in questions:
            if question:
                chat = [*chat, {"role": "assistant", "content": pair[0]}, {"role": "user", "content": question}]
            ids = encode(tokenizer, chat)
            full, logprobs = greedy(net, tokenizer, ids, 64)
            pair.append(tokenizer.decode(full[len(ids):], skip_special_tokens=True))
            if not question: cases.append((ids, full, logprobs.numpy()))
        replies.append(pair)
    return replies, cases


def ours(gguf: Path, chats: list) -> list:
    "What our own llama.cpp answers."
    from llmcourse.engine import Engine
    with Engine(gguf) as engine:
        first = [engine(chat) for chat in chats]
        turns = [[*chat, {"role": "assistant", "content": reply}, {"role": "user", "content": AGAIN}]
                 for chat, reply in zip(chats, first)]
        return [[reply, engine(turn)] for reply, turn in zip(first, turns)]


def same(replies: list, expected: list) -> dict:
    "How many first and second replies are transformers' own, and how many are those of `expected`."
    return {"n": len(expected)} | {f"same_{i + 1}": sum(a[i] == b[i] for a, b in zip(replies, expected))
                                   for i in range(len(expected[0]))}


def gpt4all_rows(python: str | None, room: Path, chats: list, wanted):
    "One row a GGUF type, and for one of them what happens with other settings."
    import torch
    from llmcourse.export import KINDS
    from llmcourse.layouts import gpt4all_folder
    from llmcourse.modelfile import chat_pieces
    from llmcourse.models import load
    from llmcourse.shipping import PLAIN
    net, tokenizer = load("tutor/sft", dtype=torch.float32)
    pieces, expected = chat_pieces(tokenizer), []
    greedily = dict(temp=0, repeat_penalty=1.0)
    alpaca = "### Instruction:\n{0}\n\n### Response:\n"
    texts = [("".join(pieces["system"] + m["content"] + pieces["system_end"] for m in chat[:-1]), chat[-1]["content"])
             for chat in chats]
    for kind in ["Q8_0", *(kind for kind in (*PLAIN, *KINDS) if kind != "Q8_0")]:
        tried = {kind: {}} if kind != "Q8_0" else {
            kind: {}, f"{kind}, without {{1}}": {"prompt_template": pieces["user"] + "{0}" + pieces["user_end"]
                                                 + pieces["answer"]},
            f"{kind}, repeat_penalty 1.18, its default": {"options": greedily | {"repeat_penalty": 1.18}},
            f"{kind}, without a template": {"prompt_template": alpaca}}
        tried = {what: other for what, other in tried.items() if wanted(what)}
        if not tried: continue
        expected = expected or answers(net, tokenizer, chats)[0]
        gguf, words = gpt4all_folder("tutor/sft", room / "gpt4all", kind)
        if kind in tried: yield {"program": "llama.cpp", "what": kind} | same(ours(gguf, chats), expected)
        for what, other in tried.items() if python else ():
            job = dict(file=gguf.name, folder=str(gguf.parent), asked=texts, options=greedily)
            found = child(python, "gpt4all", job | json.loads(words.read_text()) | other)
            yield {"program": f"gpt4all {version(python, 'gpt4all')}", "what": what} | same(found, expected)


def mlx_folders(room: Path, python: str | None, wanted):
    "(what, a model that transformers loads, the folder to ask)."
    import torch
    from llmcourse.layouts import mlx_folder
    from llmcourse.merging import merge
    from transformers import AutoModelForCausalLM, AutoTokenizer
    def made(model, name, *more): return mlx_folder(model, room / name, *more)[0].parent
    merged = merge("tutor/sft", room / "merged", dtype="float32")
    if wanted("an adapter, F32"): yield "an adapter, F32", "tutor/sft", made("tutor/sft", "adapter")
    if wanted("an adapter, BF16"): yield "an adapter, BF16", "tutor/sft", made("tutor/sft", "half", "BF16")
    if wanted("a merged model"): yield "a merged model", merged, made(merged, "whole")
    for bits in (bits for bits in (8, 4) if python and wanted(f"{bits} bits by mlx-lm")):
        whole, target = made("tutor/sft", f"for {bits}"), room / f"{bits}-bit"
        subprocess.run([python, "-m", "mlx_lm", "convert", "--hf-path", whole, "-q", "--q-bits", str(bits),
                        "--mlx-path", target], check=True, capture_output=True, env=plain_environment())
        yield f"{bits} bits by mlx-lm", "tutor/sft", target
    for name, rope in ((name, rope) for name, rope in ROPES.items() if wanted(f"rope {name}, ")):
        plain = room / f"plain {name}"
        net = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, rope_parameters=rope)
        net.save_pretrained(plain)
        AutoTokenizer.from_pretrained(merged).save_pretrained(plain)
        yield f"rope {name}, as transformers saves it", plain, plain
        yield f"rope {name}, as we write it", plain, made(plain, f"ours {name}")


def mlx_rows(python: str | None, room: Path, chats: list, wanted):
    "One row a folder."
    import numpy as np
    import torch
    from llmcourse.models import load
    known = {}
    for what, model, folder in mlx_folders(room, python, wanted):
        if model not in known: known[model] = answers(*load(model, dtype=torch.float32), chats, (None,))
        replies, cases = known[model]
        files = [str(room / f"{i}.npy") for i in range(len(cases))]
        for file, (*_, logprobs) in zip(files, cases): np.save(file, logprobs)
        if not python: continue
        job = dict(folder=str(folder), asked=[(ids, full, file) for file, (ids, full, _) in zip(files, cases)])
        found = child(python, "mlx", job)
        yield {"program": f"mlx-lm {version(python, 'mlx-lm')}, mlx {version(python, 'mlx')}", "what": what} | \
            same(found, replies) | {"gap": max(gap for _, gap in found)}


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("program", choices=["gpt4all", "mlx"])
    words.add_argument("output", type=Path)
    words.add_argument("--python")
    words.add_argument("--only", default="", help="a regular expression: rows whose name begins so")
    words.add_argument("-n", type=int, default=60, help="conversations")
    options = words.parse_args()
    chats = asked(options.n // 3)
    def wanted(what): return bool(re.match(options.only, what))
    rows = {"gpt4all": gpt4all_rows, "mlx": mlx_rows}[options.program]
    with tempfile.TemporaryDirectory() as room, options.output.open("a") as out:
        for row in rows(options.python, Path(room), chats, wanted):
            print(json.dumps(row), flush=True)
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        ask = {"gpt4all": in_gpt4all, "mlx": in_mlx}[sys.argv[2]]
        for answer in ask(json.load(sys.stdin)): print(json.dumps(answer))
    else: main()
