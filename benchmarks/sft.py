"""Tokens per CPU-second of one epoch of supervised fine-tuning on the tutor, in one run on one machine:
`llmcourse.sft`, TRL with the defaults of `trl sft`, and a bare PyTorch loop with the same rows.
Each in a fresh process, in turn, several rounds; the figure is the median, and ratios are within a round.

    python benchmarks/sft.py [rounds] [--small]
"""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

CONTENDERS = ("ours", "trl", "bare")
CHATS = 4 if "--small" in sys.argv else 150     # of each of four kinds


def chats() -> list[dict]:
    from llmcourse.checkpoints import sft_rows
    return sft_rows(42, CHATS)


def clock():
    "A callback that times what a trainer does between the start of training and its end."
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *words, **options):
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_train_end(self, *words, **options):
            self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
    return Clock()


def ours(rows, model, tokenizer, folder, timer):
    "The run with everything around it; the clock sees the training alone."
    from llmcourse.sft import sft
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        sft(rows, f"{folder}/run", seed=42, callbacks=[timer])


def trl(rows, model, tokenizer, folder, timer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    args = SFTConfig(output_dir=folder, use_cpu=True, report_to="none", num_train_epochs=1, save_strategy="no",
                     disable_tqdm=True, logging_strategy="no")
    data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[timer]).train()


def bare(rows, model, tokenizer, folder, timer):
    "Forward, backward, clip, step, in bfloat16 where the processor has it; batches of rows of nearly one length."
    import torch
    from llmcourse.core import scale
    from transformers.trainer_pt_utils import get_length_grouped_indices
    ids = [torch.tensor(tokenizer.apply_chat_template(r["messages"], return_dict=True)["input_ids"]) for r in rows]
    size = scale("cpu")["batch_size"]
    order = get_length_grouped_indices([len(x) for x in ids], size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model.set_attn_implementation("eager")
    model.train()
    timer.on_train_begin()
    for start in range(0, len(order), size):
        batch = order[start:start + size]
        text = torch.nn.utils.rnn.pad_sequence([ids[i] for i in batch], True, tokenizer.pad_token_id)
        seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[i]) for i in batch], True)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model(input_ids=text, attention_mask=seen).logits
        targets = text.masked_fill(seen == 0, -100)
        torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    timer.on_train_end()


def contender(name: str) -> None:
    "Load everything, then train under the clock: tokens are those of the rows, without padding."
    from llmcourse.core import set_seed
    from llmcourse.models import load
    rows, timer = chats(), clock()
    set_seed(42)
    model, tokenizer = load("tutor/base", dtype="float32")
    texts = [tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        {"ours": ours, "trl": trl, "bare": bare}[name](rows, model, tokenizer, folder, timer)
    print(json.dumps(dict(tokens=sum(map(len, texts)), cpu=timer.cpu, wall=timer.wall)))


def measured(name: str) -> dict:
    "The last line that a contender prints in a process of its own."
    small = ["--small"] if "--small" in sys.argv else []
    done = subprocess.run([sys.executable, __file__, "--one", name, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(rounds: int) -> None:
    figures = {name: [] for name in CONTENDERS}
    for i in range(rounds):
        for name in CONTENDERS:
            row = measured(name)
            figures[name].append(row["tokens"] / row["cpu"])
            print(f"round {i + 1} {name:<5} {row['tokens']:,} tokens, {row['cpu']:.1f} CPU-s, {row['wall']:.1f} s: "
                  f"{figures[name][-1]:,.0f} tokens per CPU-s", flush=True)
    for a, b in (("ours", "trl"), ("bare", "ours")):
        ratios = [x / y for x, y in zip(figures[a], figures[b], strict=True)]
        print(f"{a} / {b}: median {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}, n={rounds})")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--small"]
    if "--help" in words:
        print(__doc__)
    elif words[:1] == ["--one"]:
        contender(words[1])
    else:
        main(int(words[0]) if words else 5)
