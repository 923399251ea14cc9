"""One training for every setting that chapter 07 talks about, all scored on the same problems, to data/sweep.jsonl.

    python benchmarks/sweep.py [group ...]      some of the settings, by the first word of each below
    python benchmarks/sweep.py --small FILE     one small training, to another file: does it run at all?

Three seeds each: a seed draws the chats, the adapter's start and the order; the exam is the same for all. A row says
what was set, the score with its interval, what was trained, bytes predicted and measured, and seconds. One training on
each core at a time, one thread each.
"""
import contextlib
import logging
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from llmcourse import evals
from llmcourse.checkpoints import sft_rows
from llmcourse.card import read_card
from llmcourse.core import read_jsonl, write_jsonl
from llmcourse.lora import lora_config
from llmcourse.models import Local, load, weight_bytes
from llmcourse.sft import sft
from llmcourse.tutor import problems

SMALL = sys.argv[1:2] == ["--small"]
SEEDS = (42,) if SMALL else (42, 43, 44)
EXAM = 43                      # the seed of the held-out problems
CHATS = 4 if SMALL else 150    # of each of four kinds
N = 2 if SMALL else 100        # held-out problems of each kind
KINDS = ("add", "sub", "story1", "story2")
OUTPUT = Path(sys.argv[2]) if SMALL else Path(__file__).parent.parent / "data" / "sweep.jsonl"


def bits(**more):
    from transformers import BitsAndBytesConfig
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    return BitsAndBytesConfig(**more if more.get("load_in_8bit") else nf4 | more)


def lora(**fields) -> dict:
    return dict(peft_config=lora_config(**fields))


PROJECTIONS = {"q, v": ["q_proj", "v_proj"], "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
               "feed-forward": ["gate_proj", "up_proj", "down_proj"], "all linear": "all-linear"}


def methods():
    "(name, options of `sft`, bytes of a weight of the linear layers)"
    yield "full", {}, 4
    yield "freeze: last block", dict(freeze_trainable_layers=1), 4
    yield "LoRA", lora(), 4
    yield "rsLoRA", lora(use_rslora=True), 4
    yield "DoRA", lora(use_dora=True), 4
    yield "LoRA + NEFTune", lora() | dict(neftune_noise_alpha=5), 4
    yield "QLoRA, NF4", lora() | dict(quantization_config=bits()), 0.5 + 4 / 64
    twice = dict(quantization_config=bits(bnb_4bit_use_double_quant=True))
    yield "QLoRA, NF4 twice", lora() | twice, 0.5 + 1 / 64 + 4 / 64 / 256
    yield "QLoRA, NF4 + LoftQ", lora() | dict(quantization_config=bits(), loftq=True), 0.5 + 4 / 64
    yield "LoRA on int8", lora() | dict(quantization_config=bits(load_in_8bit=True)), 1


def settings():
    "(group, name, options of `sft`, bytes of a weight of the linear layers)"
    yield from (("method", *method) for method in methods())
    yield from (("rank", r, lora(r=r, lora_alpha=2 * r), 4) for r in (1, 2, 4, 8, 16, 32, 64))
    yield from (("rank64", x, lora(r=64, lora_alpha=128) | dict(learning_rate=x), 4) for x in (5e-4, 1e-3, 2e-3))
    yield from (("alpha", a, lora(lora_alpha=a), 4) for a in (2, 8, 32, 128, 512))
    yield from (("dropout", d, lora(lora_dropout=d), 4) for d in (0.0, 0.1, 0.3, 0.6))
    yield from (("targets", name, lora(target_modules=modules), 4) for name, modules in PROJECTIONS.items())
    yield from (("rate", x, lora() | dict(learning_rate=x), 4) for x in (1e-4, 4e-4, 1e-3, 4e-3, 1e-2, 4e-2))
    yield from (("accumulation", a, lora() | dict(gradient_accumulation_steps=a), 4) for a in (1, 2, 4, 8))
    yield from (("warmup", w, lora() | dict(warmup_steps=w, learning_rate=1e-2), 4) for w in (0, 0.05, 0.1, 0.3, 0.6))
    schedules = ("constant", "linear", "cosine", "constant_with_warmup")
    yield from (("schedule", s, lora() | dict(lr_scheduler_type=s), 4) for s in schedules)


def meter(sizes: dict):
    "A callback that weighs weights, gradients and optimizer state at the end of training."
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
            sizes["gradient"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

        def on_train_end(self, args, state, control, model=None, optimizer=None, **kw):
            states = [getattr(p, "quant_state", None) for p in model.parameters()]
            scales = [state for state in states if state is not None]   # NF4: one for 64 weights
            rounding = sum(q.absmax.nbytes + (q.state2.absmax.nbytes if q.nested else 0) for q in scales)
            sizes["weights"] = sum(p.nbytes for p in model.parameters()) + rounding
            held = [v for state in optimizer.state.values() for v in state.values() if hasattr(v, "nbytes")]
            sizes["optimizer"] = sum(v.nbytes for v in held)
            sizes["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Meter()


def predicted(config, trainable: int, each: float, adapter: bool) -> int:
    """Bytes of weights (the linear layers in `each` bytes, the rest in 4), and for what is trained: the adapter itself
    (4), gradients (4), AdamW's two moments (8); on a rounded base TRL keeps an adapter in bfloat16, half of that."""
    whole = weight_bytes(config, "float32")
    width = config.hidden_size
    keys = width * config.num_key_value_heads // config.num_attention_heads
    linear = config.num_hidden_layers * width * (2 * width + 2 * keys + 3 * config.intermediate_size)
    return round(whole - (4 - each) * linear + (16 if adapter else 12) * trainable / (1 if each == 4 else 2))


def train(seed: int, folder: str, options: dict) -> tuple[Path, dict]:
    "The run folder, and what weights, gradients and optimizer weighed."
    sizes = {}
    run = sft(sft_rows(seed, CHATS), Path(folder) / "run", seed=seed, callbacks=[meter(sizes)], logging_steps=1,
              **options)
    return run, sizes


def exam(run: Path, options: dict) -> tuple[list[dict], object]:
    "Graded answers to the held-out problems, and the config of the model that gave them."
    as_trained = {key: options[key] for key in ("quantization_config",) if key in options}
    model, tokenizer = load(run, **as_trained, **(dict(merge=False, dtype="float32") if as_trained else {}))
    generate = Local(model, tokenizer, max_new_tokens=160, batch_size=100)
    return evals.evaluate(generate, problems(N, EXAM, KINDS, split="test"), progress=False), model.config


def measure(seed: int, group: str, name, options: dict, each: float) -> dict:
    import torch
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with (tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing,
          contextlib.redirect_stderr(nothing)):
        run, sizes = train(seed, folder, options)
        results, config = exam(run, options)
        losses = [round(r["loss"], 3) for r in read_jsonl(run / "metrics.jsonl") if "loss" in r]
        disk = sum(p.stat().st_size for p in run.glob("*.safetensors"))
        seconds = read_card(run).seconds
    score = evals.score(sum(r["right"] for r in results), len(results))
    trainable = sizes["trainable"]
    return dict(group=group, setting=name, seed=seed, **{k: round(v, 4) for k, v in score.items()},
                format=sum(r["format"] for r in results), trainable=trainable,
                bytes_predicted=predicted(config, trainable, each, "peft_config" in options),
                bytes_measured=sizes["weights"] + sizes["gradient"] + sizes["optimizer"],
                bytes_on_disk=disk, seconds=seconds, chats=len(sft_rows(seed, CHATS)), losses=losses)


def tell(row: dict) -> str:
    return (f"{row['group']:<13} {row['setting']!s:<22} {row['seed']}  {row['correct']}/{row['n']} "
            f"({row['low']:.0%}–{row['high']:.0%})  {row['trainable']:>9,} trained  "
            f"{row['bytes_predicted'] / 1e6:.2f} MB predicted, {row['bytes_measured'] / 1e6:.2f} measured  "
            f"{row['seconds']} s")


def place(row: dict) -> tuple:
    return row["group"], row["setting"], row["seed"]


def main(groups: list[str]) -> None:
    chosen = list(settings())[2:3] if SMALL else list(settings())
    order = [(setting[0], setting[1], seed) for setting in chosen for seed in SEEDS]
    jobs = [(seed, *setting) for setting in chosen for seed in SEEDS if not groups or setting[0] in groups]
    rows = {place(r): r for r in (read_jsonl(OUTPUT) if OUTPUT.is_file() else []) if place(r) in order}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for i, done in enumerate(as_completed([pool.submit(measure, *job) for job in jobs]), 1):
            rows[place(done.result())] = done.result()
            write_jsonl(OUTPUT, [rows[key] for key in order if key in rows])
            print(f"{i}/{len(jobs)}  {tell(done.result())}", flush=True)


if __name__ == "__main__":
    if "--help" in sys.argv: print(__doc__)
    else: main([] if SMALL else sys.argv[1:])
