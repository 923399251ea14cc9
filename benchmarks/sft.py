"""Tokens per CPU-second of one epoch of supervised fine-tuning on the tutor, in one run on one machine:
`llmcourse.sft`, TRL with the defaults of `trl sft`, and a bare PyTorch loop with the same batches.
Each in a fresh process, in turn, several rounds; the figure is the median, and ratios are within a round.

    python benchmarks/sft.py [rounds]
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

CONTENDERS = ("ours", "trl", "bare")


def chats():
    from llmcourse.checkpoints import sft_rows
    return sft_rows(42, 150)


def measure(train, tokens: int) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    train()
    print(json.dumps(dict(tokens=tokens, cpu=time.process_time() - cpu, wall=time.perf_counter() - start)))


def contender(name: str) -> None:
    "Load everything, then train under the clock: tokens are those of the rows, without padding."
    import torch
    from llmcourse import runs, sft
    from llmcourse.core import scale, set_seed
    from llmcourse.models import load
    rows, dial = chats(), scale("cpu")
    set_seed(42)
    model, tokenizer = load("tutor/base", dtype="float32")
    encoded = [sft.tokenize(tokenizer, r["messages"]) for r in rows]
    tokens = sum(len(r["input_ids"]) for r in encoded)
    with tempfile.TemporaryDirectory() as folder:
        if name == "ours":
            fit = sft.fit
            def timed(trainer, *words):
                found = []
                measure(lambda: found.append(fit(trainer, *words)), tokens)
                return found[0]
            sft.fit = timed
            with open(os.devnull, "w") as sys.stderr: sft.sft(rows, folder + "/run", seed=42)
        elif name == "trl":
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer
            args = SFTConfig(output_dir=folder, use_cpu=True, report_to="none", num_train_epochs=1, save_strategy="no", disable_tqdm=True, logging_strategy="no")
            measure(SFTTrainer(model, args=args, train_dataset=Dataset.from_list([{"messages": r["messages"]} for r in rows]), processing_class=tokenizer).train, tokens)
        else:
            from transformers.trainer_pt_utils import get_length_grouped_indices
            batch, optimizer, hyper = dial["batch_size"], torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), sft.hyperparameters(dial, model.num_parameters(), False)
            order = get_length_grouped_indices([len(r["input_ids"]) for r in encoded], batch)
            model.set_attn_implementation("eager")
            def step(rows):
                width = max(len(r["input_ids"]) for r in rows)
                fill = lambda key, pad: torch.tensor([list(r[key]) + [pad] * (width - len(r[key])) for r in rows])
                ids, labels = fill("input_ids", tokenizer.pad_token_id), fill("labels", -100)
                with torch.autocast("cpu", torch.bfloat16, enabled=hyper["bf16"]): logits = model(input_ids=ids, attention_mask=(fill("labels", -1) != -1).long()).logits
                torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step(); optimizer.zero_grad()
            model.train()
            measure(lambda: [step([encoded[j] for j in order[i:i + batch]]) for i in range(0, len(order), batch)], tokens)


def main(rounds: int) -> None:
    figures = {name: [] for name in CONTENDERS}
    for i in range(rounds):
        for name in CONTENDERS:
            done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            row = json.loads(done.stdout.strip().splitlines()[-1])
            figures[name].append(row["tokens"] / row["cpu"])
            print(f"round {i + 1} {name:<5} {row['tokens']:,} tokens, {row['cpu']:.1f} CPU-s, {row['wall']:.1f} s: {figures[name][-1]:,.0f} tokens per CPU-s", flush=True)
    ratio = lambda a, b: [x / y for x, y in zip(figures[a], figures[b])]
    for a, b in (("ours", "trl"), ("bare", "ours")):
        print(f"{a} / {b}: median {statistics.median(ratio(a, b)):.2f} ({min(ratio(a, b)):.2f}–{max(ratio(a, b)):.2f}, n={rounds})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]: contender(sys.argv[2])
    else: main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
