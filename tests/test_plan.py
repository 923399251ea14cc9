"""The plan: its bytes are those that PyTorch keeps and that others have measured, its hours those of published speeds,
and what it cannot plan is refused in one line."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llmcourse.cli import main
from llmcourse.configs import LLAMAS
from llmcourse.core import UserError, read_jsonl
from llmcourse.footprint import decoding_speed, serving_bytes, step_bytes, training_memory
from llmcourse.gpus import GPUS, advice, find_card, known_card
from llmcourse.lora import lora_config, lora_parameters
from llmcourse.models import parameter_count
from llmcourse.plan import (
    MFU,
    at_its_peak,
    copied_bytes,
    flops,
    learned,
    precision_of,
    state_bytes,
    training_hours,
)
from llmcourse.planner import (
    JOBS,
    Job,
    amount_of,
    check_job,
    cheapest,
    fits,
    hours_of,
    lengths_of,
    memory_of,
    needed,
    padded_tokens,
    said_hours,
    ways_out,
)
from llmcourse.planreport import as_dict, draw_bytes, plan_job, save_picture
from llmcourse.prices import PRICES, age_of, read_prices
from llmcourse.published import compared, predicted_bytes, summed_up
from llmcourse.saves import HOW, KEEPS, LINEAR, block_keeps, counted_block, kept_by
from llmcourse.shapes import SHAPES, config_of, known_shape, widths

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
TABLE = read_jsonl(DATA / "memory.jsonl")
FOUND = compared(TABLE)
USED = [row for row in FOUND if not row["out"]]
CHATS = str(DATA / "chats.jsonl")
REAL = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")


def tiny(kv: int = 2, **more) -> LlamaConfig:
    "No two widths are equal, so that no formula is right by chance."
    sizes = dict(hidden_size=96, intermediate_size=200, num_attention_heads=8, num_key_value_heads=kv, head_dim=16)
    return LlamaConfig(**dict(vocab_size=500, num_hidden_layers=2) | sizes | more)


# what a step keeps


def kept_of(config: LlamaConfig, how: str, targets=None, exact: bool = False) -> float:
    "Bytes a token that the third block keeps, on real tensors."
    sizes = []
    for blocks in (2, 3):
        net = LlamaForCausalLM(LlamaConfig(**config.to_dict() | dict(num_hidden_layers=blocks)))
        if how != "mixed":
            net = net.bfloat16()
        if targets:
            net = get_peft_model(net, lora_config(r=4, target_modules=targets), autocast_adapter_dtype=exact)
        ids = torch.zeros(1, 64, dtype=torch.long)

        def run(net=net):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "mixed" or exact):
                return net(input_ids=ids, use_cache=False).logits

        sizes.append(kept_by(net.train(), run))
    return (sizes[1] - sizes[0]) / 64


@pytest.mark.parametrize("kv", [2, 8])
def test_a_block_with_all_weights(kv):
    assert kept_of(tiny(kv), "full") == block_keeps(tiny(kv), "full")


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["gate_proj"], ["down_proj", "o_proj"]], ids=str
)
def test_a_block_with_adapters_in_16_bits(targets):
    assert kept_of(tiny(), "lora", targets) == block_keeps(tiny(), targets=targets, exact=False, r=4)


def test_a_block_in_mixed_precision():
    "The copies of the weights in 16 bits are not a token's, and counted with the weights."
    w = widths(tiny())
    copies = 2 * (2 * w.h * w.q + 2 * w.h * w.k + 3 * w.h * w.f) / 64
    assert kept_of(tiny(), "mixed") - copies == block_keeps(tiny(), "mixed")


def test_a_block_with_adapters_in_32_bits():
    copies = 2 * lora_parameters(tiny(), 4) / tiny().num_hidden_layers / 64
    assert kept_of(tiny(), "lora", "all-linear", exact=True) - copies == block_keeps(tiny(), r=4)


@pytest.mark.parametrize("name", REAL)
def test_a_block_of_the_real_ones(name):
    "The real architecture on fake tensors, without its weights: equal to the byte."
    config = config_of(name)
    assert counted_block(config) == block_keeps(config, "full", padded=1024)
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        lora = dict(r=16, target_modules=targets)
        assert counted_block(config, lora=lora) == block_keeps(config, targets=targets, exact=False, r=16, padded=1024)


def test_the_counter_sees_a_difference():
    "A check that cannot fail is none: another width is another count."
    config = config_of("llama-3.2-1b")
    assert counted_block(config | dict(intermediate_size=8193)) != block_keeps(config, "full", padded=1024)


def test_unknown_words_of_saves():
    for wrong in (dict(method="ful"), dict(engine="torchtun"), dict(targets=["q_prj"])):
        with pytest.raises(UserError, match="did you mean"):
            block_keeps(tiny(), **wrong)


# what is always there


def test_state_of_a_real_step():
    "Weights, gradients and averages of a step in float32, by their tensors."
    net = LlamaForCausalLM(tiny())
    optimizer = torch.optim.AdamW(net.parameters())
    ids = torch.zeros(1, 8, dtype=torch.long)
    net(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    n = parameter_count(tiny())
    state = state_bytes(tiny(), "full")
    averages = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.numel() > 1)
    assert state["optimizer"] == averages and state["gradients"] == sum(p.grad.nbytes for p in net.parameters())
    assert state["weights"] == sum(p.nbytes for p in net.parameters()) == 4 * n


@pytest.mark.parametrize("r,targets", [(4, "all-linear"), (16, ["q_proj", "v_proj"])])
def test_what_learns(r, targets):
    net = get_peft_model(LlamaForCausalLM(tiny()), lora_config(r=r, target_modules=targets))
    assert (
        learned(tiny(), "lora", r, targets)
        == net.get_nb_trainable_parameters()[0]
        == lora_parameters(tiny(), r, targets)
    )


def test_what_learns_when_blocks_are_frozen():
    from llmcourse.loading import freeze

    net = LlamaForCausalLM(tiny(num_hidden_layers=3))
    freeze(net, 2)
    assert learned(net.config, "freeze", blocks=2) == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_less_is_less():
    "Each method takes less than the one before, and more rows or tokens never take less."
    config = config_of("llama-3.1-8b")
    totals = [sum(training_memory(config, method).values()) for method in ("full", "freeze", "lora", "qlora8", "qlora")]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 5
    for method in HOW:
        for name, values in dict(batch_size=(1, 2, 8), max_length=(128, 1024, 8192), r=(1, 16, 256)).items():
            sums = [sum(training_memory(config, method, **{name: value}).values()) for value in values]
            assert sums == sorted(sums), (method, name)


def test_parts_add_up_to_the_peak():
    state = dict(weights=10, gradients=6, optimizer=4)
    step = dict(activations=5, block=3, logits=2)
    assert at_its_peak(state, step) == dict(weights=10, optimizer=4, gradients=0, activations=8, logits=0)
    assert sum(at_its_peak(state, step, adding=True).values()) == 10 + 4 + 6 + 5 + 3
    assert sum(at_its_peak(state | dict(gradients=20), step).values()) == 10 + 4 + 20
    without = dict(activations=9, block=0, logits=2)
    assert sum(at_its_peak(state, without).values()) == 10 + 4 + 9 + 2


def test_copies_of_autocast_are_there_at_the_loss():
    "Until the forward pass is over, checkpointing or not (chapter 14 measures it); never beside all gradients."
    n = parameter_count(tiny())
    assert copied_bytes(n, "mixed") == 2 * n and copied_bytes(n, "bfloat16") == 0
    config = config_of("llama-3.1-8b")
    alone = training_memory(config, "full", 1, 256, adding=False)   # the end of the backward pass is the fullest
    assert alone["weights"] == 4 * parameter_count(config)
    assert sum(alone.values()) - 4 * 128256 * 4096 == 16 * parameter_count(config)
    adding = training_memory(config, "full", 4, 2048, adding=True)
    assert adding["weights"] == 6 * parameter_count(config)


def test_chunks_of_logits():
    "In pieces the logits do not grow with the batch."
    config = config_of("llama-3.1-8b")
    assert step_bytes(config, max_length=512)["logits"] == step_bytes(config, max_length=4096)["logits"]
    assert step_bytes(config, max_length=512, chunk=0)["logits"] == 14 * 128256 * 512


# against what others have measured


def test_published_memory():
    total = summed_up(USED)
    assert total["rows"] == 42 and total["median"] <= 0.04 and total["worst"] <= 0.1, total


def test_rows_by_engine():
    "As chapter 14 says: seven are of the trainer that is ours, and the line through the sizes of cards is above us."
    engines = [(row["engine"].split("-")[0], row["method"] == "serve") for row in USED]
    assert [engines.count(x) for x in (("litgpt", False), ("litgpt", True), ("torchtune", False))] == [14, 9, 12]
    ours = [row["error"] for row in USED if row["engine"] == "trl-2024"]
    assert len(ours) == 7 and sum(abs(error) < 0.05 for error in ours) == 6
    line = [row["error"] for row in FOUND if row["out"].startswith("a straight line")]
    assert len(line) == 7 and -0.13 < min(line) and max(line) < -0.02


def test_the_loss_of_early_2024():
    "16 bytes a token and word: logits in float32, a shifted copy, its log-softmax, and the gradient of that."
    head = torch.nn.Linear(64, 4000, bias=False).bfloat16()
    hidden = torch.randn(1, 512, 64, dtype=torch.bfloat16, requires_grad=True)
    tracker = MemTracker()
    with tracker:
        logits = head(hidden)
        logits = logits.float()
        shifted = logits[..., :-1, :].contiguous()
        torch.nn.functional.cross_entropy(shifted.view(-1, 4000), torch.zeros(511, dtype=torch.long)).backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    assert (peak["Total"] - head.weight.nbytes) / (512 * 4000) == pytest.approx(KEEPS["trl-2024"].logits, rel=0.01)


def test_a_wrong_formula_would_be_seen():
    "Without the logits, or with the wrong number of heads, the error is far above ours."
    rows = [row for row in TABLE if not row["out"] and row["method"] != "serve"]
    halved = [row | dict(max_length=row["max_length"] // 2) for row in rows]
    errors = [abs(predicted_bytes(a) / predicted_bytes(b) - 1) for a, b in zip(halved, rows)]
    assert sorted(errors)[len(errors) // 2] > 0.08


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r['model']}-{r['method']}-{r['stated']}")
def test_every_row_has_its_source_and_its_settings(row):
    assert row["source"] and row["model"] in SHAPES and row["unit"] in ("GB", "GiB") and row["stated"] > 0
    if not row["out"]:
        assert row["batch_size"] and row["max_length"] and row["engine"]
        assert row["method"] in ("full", "serve") or row["r"] and row["targets"]


def test_rows_that_are_left_out():
    "Each with a reason; two of them are below the bytes of weights, gradients and averages, as their reason says."
    out = [row for row in TABLE if row["out"]]
    assert len(out) == 22 and all(len(row["out"]) > 30 for row in out)
    low = [row for row in out if row["out"].startswith("below")]
    for row in low:
        assert row["stated"] * 1e9 < 8 * parameter_count(SHAPES[row["model"]])
    assert len(low) == 2
    nf4 = [row for row in FOUND if row["out"].startswith("the versions")]
    assert len(nf4) == 6 and max(abs(row["error"]) for row in nf4) < 0.26  # chapter 14 says so


def test_the_file_is_the_one_of_the_readme():
    assert hashlib.sha256((DATA / "memory.jsonl").read_bytes()).hexdigest() in (DATA / "README.md").read_text()


def test_files_of_llama_cpp():
    "8B in 16 bits is the 14.96 GiB that llama.cpp states."
    assert round(serving_bytes(config_of("llama-3.1-8b"))["weights"] / 2**30, 2) == 14.96


# time


def test_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    net = LlamaForCausalLM(tiny(attn_implementation="eager"))
    ids = torch.zeros(1, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() / 32 == pytest.approx(flops(tiny(), "full", length=64), rel=2e-3)


# (model, method, card, length, tokens a second): LLaMA-Factory's wiki; torchtune's README, packed
SPEEDS = [
    ("llama-2-7b", "lora", "a100-80", 1024, 2392),
    ("llama-2-7b", "lora", "a100-80", 1024, 2954),
    ("llama-2-7b", "lora", "a100-80", 1024, 4007),
    ("llama-3.2-3b", "full", "a100-80", 4096, 7075),
    ("llama-3.1-8b", "lora", "rtx-4090", 2048, 3083),
    ("llama-3.1-8b", "lora", "rtx-6000-ada", 2048, 4699),
    ("llama-3.1-8b", "qlora", "rtx-4090", 2048, 2413),
]


@pytest.mark.parametrize("model,method,card,length,speed", SPEEDS)
def test_published_speeds_are_within_a_factor(model, method, card, length, speed):
    "Plain trainers within two; what is fused, packed or compiled within two and a half, and never slower than planned."
    hours = training_hours(config_of(model), 1e6, GPUS[card].tflops, method, length)
    published = 1e6 / speed / 3600
    assert published / hours < 1.3 and hours / published < 2.5, hours / published


def test_times_of_the_brief():
    assert 100_000 / 8 / 24 / 60 == pytest.approx(8.7, abs=0.05)
    assert 100_000 / 8 / 3 / 60 == pytest.approx(69.4, abs=0.05)
    assert 1e6 / 475 / 60 == pytest.approx(35.1, abs=0.05)
    one = Job(config_of("llama-3.2-1b"), "lora")
    amount = amount_of(one, [500] * 100_000)
    hours = hours_of(one, find_card("rtx-2060s"), amount)
    assert amount.steps == 12_500 and amount.tokens == amount.computed == 50_000_000 and 9 / 2 < hours < 9 * 2


def test_the_rule_of_thumb():
    "Right for 500 tokens, low by two at 2,048 and by four at 8,192, if all logits are made."
    config = config_of("llama-3.1-8b")
    gb = {
        n: (sum(training_memory(config, "qlora", 1, n, chunk=0).values()) * 1.05 + 0.6 * 2**30) / 1e9
        for n in (512, 2048, 8192)
    }
    assert gb[512] / 6 < 1.5 and 1.7 < gb[2048] / 6 < 2.2 and 3.7 < gb[8192] / 6 < 4.7, gb


def test_decoding_is_reading():
    config = config_of("llama-3.1-8b")
    assert decoding_speed(config, 469, tokens=1) == pytest.approx(29.2, abs=0.1)  # llama.cpp, F16
    assert decoding_speed(config, 469, conversations=8, tokens=1) == pytest.approx(8 * 29.2, rel=0.01)
    assert decoding_speed(config, 469, dtype="nf4") > 2 * decoding_speed(config, 469)


def test_padding_is_computed():
    assert padded_tokens([10, 20, 30, 40], 1, 1000) == 100
    assert padded_tokens([10, 20, 30, 40], 4, 1000) == 160
    assert padded_tokens([10, 20, 30, 40], 4, 25) == 100
    assert padded_tokens([], 4, 25) == 0


# jobs


SMALL = Job(config_of("llama-3.2-1b"))


def test_more_cards_take_less_each_and_less_time():
    alone, split = SMALL, replace(SMALL, gpus=4, shard=True)
    assert needed(split) < needed(replace(SMALL, gpus=4)) == needed(alone)
    card = find_card("a100-80")
    each = [hours_of(job, card, amount_of(job, [100] * 999)) for job in (split, alone)]
    assert each[0] == pytest.approx(each[1] / 4)


@pytest.mark.parametrize("task", JOBS)
@pytest.mark.parametrize("method", HOW)
def test_every_task_and_method(task, method):
    memory = memory_of(replace(SMALL, task=task, method=method))
    assert all(size >= 0 for size in memory.values()) and sum(memory.values()) > memory["weights"] > 5e8


def test_tasks_take_what_they_take():
    full = {task: memory_of(replace(SMALL, task=task, method="full")) for task in JOBS}
    whole = 2 * parameter_count(SMALL.config)
    assert full["dpo"]["other models"] == whole and full["ppo"]["other models"] == 2 * whole
    assert "other models" not in full["sft"] | full["grpo"]
    assert full["ppo"]["optimizer"] == 2 * full["sft"]["optimizer"]
    assert full["dpo"]["logits"] == 14 * 128256 * 2 * SMALL.batch_size * SMALL.max_length
    assert "other models" not in memory_of(replace(SMALL, task="dpo"))
    assert full["serve"]["kv cache"] == 2 * 1024 * 2 * 16 * 8 * 64 * 2


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_replies_take_memory(task):
    "What is trained is a prompt and its reply, and what samples them has a cache of a whole step's replies."
    few, many = (memory_of(replace(SMALL, task=task, new_tokens=n)) for n in (1024, 8192))
    assert many["activations"] > 4 * few["activations"] and many["logits"] == 8 * few["logits"]
    same = replace(SMALL, task="sft", max_length=SMALL.max_length + 1024)
    assert few["activations"] == memory_of(same)["activations"]
    sampling = memory_of(replace(SMALL, task="grpo", method="lora", batch_size=1, grad_accum=64, new_tokens=8192))
    assert sampling["kv cache"] == 64 * (1024 + 8192) * 2 * 16 * 8 * 64 * 2
    with pytest.raises(UserError, match="limit is 131,072 tokens; use a smaller --max-length"):
        check_job(replace(SMALL, task=task, max_length=131_000))


def test_a_group_of_replies_for_each_prompt():
    one = replace(SMALL, task="grpo", batch_size=8, grad_accum=8, new_tokens=100)
    eight = amount_of(replace(one, group=8), [50] * 64)
    assert eight.steps == 8 and eight.tokens == 64 * 8 * 100 and eight.computed == 64 * 8 * 150
    assert eight.tokens == 8 * amount_of(one, [50] * 64).tokens
    fixed = amount_of(replace(one, group=8), [50] * 64, max_steps=50)
    assert fixed.steps == 50 and fixed.tokens == 50 * 64 * 100 and fixed.passes == 6.25
    card = find_card("a100")
    assert hours_of(one, card, fixed) == pytest.approx(6.25 * hours_of(one, card, eight))


def test_ways_out_fit():
    big = Job(config_of("llama-3.1-8b"), method="full", max_length=4096)
    for name in ("t4", "rtx-3090", "a100-80"):
        card = find_card(name)
        ways = ways_out(big, card)
        assert not fits(big, card) and ways and all(fits(job, on) for _, job, on in ways)
        assert all(job.batch_size * job.grad_accum == 8 for _, job, _ in ways)


def test_the_words_of_a_way_out_are_the_command_line(tmp_path, capsys):
    "What the plan tells people to type does what it says."
    ask = ["plan", "llama-3.1-8b", "--method", "lora", "--max-length", "2048", "--json"]
    assert main(ask) == 1
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert len(ways) >= 4
    for way in ways:
        typed = [w for w in ask if w not in ("--max-length", "2048")] if "--max-length" in way["change"] else ask
        typed = typed[:2] + typed[4:] if "--method" in way["change"] else typed
        assert main([*typed, *way["change"].split()]) == 0, way
        assert json.loads(capsys.readouterr().out)["needed"] == pytest.approx(way["bytes"])


@pytest.mark.parametrize(
    "wrong,hint",
    [
        (dict(method="lorra"), "did you mean 'lora'"),
        (dict(task="sfd"), "did you mean 'sft'"),
        (dict(batch_size=0), "--batch-size 0"),
        (dict(gpus=0), "--gpus 0"),
        (dict(max_length=10**7), "131,072 tokens"),
    ],
)
def test_jobs_that_make_no_sense(wrong, hint):
    with pytest.raises(UserError, match=hint):
        check_job(replace(SMALL, **wrong))


# rows


def test_lengths_are_those_of_the_tokenizer():
    from llmcourse.chats import encode_chat
    from llmcourse.models import load_tokenizer

    lengths, counted = lengths_of(CHATS, "tutor/base")
    rows = read_jsonl(CHATS)
    assert counted and lengths == [
        len(encode_chat(load_tokenizer("tutor/base"), row, "row")["input_ids"]) for row in rows
    ]
    assert not lengths_of(CHATS, "llama-3.2-1b")[1]


def test_every_task_takes_its_rows():
    assert len(lengths_of(str(DATA / "preferences.jsonl"), "llama-3.2-1b", "dpo")[0]) == 60
    assert len(lengths_of(str(DATA / "gsm8k.jsonl"), "tutor/base", "grpo")[0]) == 64
    with pytest.raises(UserError, match="DPO compares"):
        lengths_of(CHATS, "llama-3.2-1b", "dpo")


# cards and prices


def test_cards():
    assert len(GPUS) >= 20 and all(c.memory > 0 < c.bandwidth and c.tflops > 0 for c in GPUS.values())
    assert find_card("A100-80GB").name == "a100-80" and known_card("TPU v4") is None
    words = [word for card in GPUS.values() for word in [card.name, *card.words.split()]]
    assert len(words) == len(set(words))
    assert not GPUS["t4"].bf16 and not GPUS["v100-16"].fa2 and GPUS["rtx-3070"].bf16


def test_advice_on_4000_cards():
    said = " ".join(advice(find_card("rtx-4090"), 2))
    assert "NCCL_P2P_DISABLE=1" in said and "NCCL_IB_DISABLE=1" in said
    assert not advice(find_card("rtx-4090"), 1) and "NCCL" in " ".join(advice(find_card("rtx-3090"), 2))


def test_every_price_has_a_day_and_a_source():
    assert all(p.as_of and p.source and p.gpu in GPUS for p in PRICES)


PRICE_FILES = [
    ("p.csv", "gpu,usd_per_hour\nt4,cheap\n", "p.csv:2: usd_per_hour is 'cheap'"),
    ("p.csv", "gpu,usd_per_hour\nt4,\n", "no usd_per_hour"),
    ("p.csv", "gpu,usd_per_hour,as_of\nt4,1,yesterday\n", "Give a day"),
    ("p.csv", "gpu,usd_per_hour\nTPU,1\n", "no price of a card"),
    ("p.csv", "card,cost\nt4,1\n", "no column gpu"),
    ("p.jsonl", '{"gpu": "t4", "usd_per_hour": -1}\n', "usd_per_hour is -1"),
    ("p.jsonl", "", "empty"),
    ("p.txt", "t4 1\n", "kind of file"),
]


@pytest.mark.parametrize("name,text,hint", PRICE_FILES, ids=lambda x: str(x)[:20])
def test_bad_prices(name, text, hint, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["plan", "llama-3.2-1b", "--prices", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err.strip()
    assert hint in err and len(err.splitlines()) == 1 and "Traceback" not in err, err


def test_a_catalog_as_it_is(tmp_path):
    file = tmp_path / "vms.csv"
    file.write_text(
        "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice\na,T4,1,0.5,0.2\nb,,,0.1,\nc,H100,8,24,\n"
    )
    assert [(p.gpu, p.gpus, p.usd_per_hour, p.spot) for p in read_prices(file)] == [
        ("t4", 1, 0.5, False),
        ("t4", 1, 0.2, True),
        ("h100", 8, 24.0, False),
    ]


def test_the_cheapest_is_the_cheapest(tmp_path):
    found = cheapest(SMALL, PRICES, [500] * 1000)
    costs = [row["usd"] for row in found]
    assert costs == sorted(costs) and found[0]["usd"] == found[0]["hours"] * found[0]["price"].usd_per_hour
    big = Job(config_of("llama-3.1-70b"), method="full")
    assert cheapest(big, PRICES, [500]) == [] or all(
        fits(r["job"], GPUS[r["price"].gpu]) for r in cheapest(big, PRICES, [500])
    )


def test_old_prices_say_so():
    assert (
        age_of(PRICES[0], "2027-11-21").endswith("365 days old") and age_of(PRICES[0]._replace(as_of="")) == "no date"
    )


# shapes


def test_shapes_by_name():
    assert SHAPES["llama-3.1-8b"] == LLAMAS["Llama 3.1 8B"]
    known = {
        "llama-2-7b": 6.738,
        "llama-2-13b": 13.016,
        "llama-2-70b": 68.977,
        "codellama-34b": 33.744,
        "mistral-7b": 7.242,
        "tinyllama-1.1b": 1.100,
    }
    for name, billions in known.items():
        assert parameter_count(SHAPES[name]) / 1e9 == pytest.approx(billions, abs=0.001)
    assert known_shape("unsloth/Llama-3.2-3B-Instruct-bnb-4bit") == SHAPES["llama-3.2-3b"]
    assert config_of("tutor/sft")["hidden_size"] == 256


@pytest.mark.parametrize(
    "name,hint",
    [
        ("llama-4", "no such model"),
        ("./nowhere", "no such folder"),
        ("owner/unknown-model", "not found here or on the Hub"),
    ],
)
def test_shapes_that_are_not_there(name, hint):
    with pytest.raises(UserError, match=hint):
        config_of(name)


def test_a_hub_that_nobody_reaches_is_knocked_at_once(tmp_path):
    "One line, soon: without the knock the Hub's client tries for half a minute, and says so line by line."
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    env = {name: value for name, value in env.items() if name.lower() != "https_proxy"} | {"PYTHONPATH": str(ROOT)}
    code = "from llmcourse.cli import main; raise SystemExit(main(['plan', 'owner/unknown-model']))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_adapter_has_its_bases_shape(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tutor/base"}')
    assert config_of(tmp_path) == config_of("tutor/base")


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type"):
        config_of(tmp_path)


# the command


def said(capsys, *words) -> tuple[int, str, str]:
    code = main(["plan", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err.strip()


def test_a_plan(capsys):
    code, out, err = said(capsys, "llama-3.2-1b", "--data", CHATS, "--gpu", "t4")
    assert code == 0 and not err
    for words in ("fits", "80 rows, 10 steps", "no price known for the t4: give --prices FILE", "$0.01", "bfloat16"):
        assert words in out, out


def test_a_plan_that_does_not_fit_is_an_answer(capsys):
    code, out, err = said(capsys, "llama-3.1-8b", "--method", "full", "--gpu", "t4")
    assert code == 1 and "does not fit" in out and "what would fit:" in out and "--method qlora" in out and not err


def test_nothing_fits(capsys):
    code, out, _ = said(
        capsys, "llama-3.1-70b", "--method", "qlora", "--gpu", "b200", "--max-length", 131072, "--batch-size", 64
    )
    assert code == 1 and ("what would fit" in out or "Take a smaller model" in out)


def test_a_plan_with_prices(tmp_path, capsys):
    file = tmp_path / "offers.csv"
    file.write_text("gpu,usd_per_hour,provider,as_of\nt4,0.5,Mine,2020-01-01\nl4,0.9,Mine,\n")
    code, out, _ = said(capsys, "tutor/base", "--data", CHATS, "--prices", file, "--gpu", "t4")
    assert code == 0 and "no price known" not in out and "under $0.01" in out
    code, out, _ = said(capsys, "llama-3.2-1b", "--data", CHATS, "--prices", file, "--gpu", "t4", "--epochs", 999)
    assert code == 0 and "no price known" not in out and "days old" in out and "no date" in out


def test_numbers_for_programs(capsys):
    code, out, _ = said(
        capsys, "tutor/base", "--data", CHATS, "--json", "--epochs", 2, "--batch-size", 4, "--grad-accum", 1
    )
    found = json.loads(out)
    assert (
        code == 0 and found["steps"] == 40 and found["rows"] == 80 and found["counted"] and found["method"] == "qlora"
    )
    assert found["needed"] > sum(found["bytes"].values()) and found["hours"] > 0
    assert as_dict(plan_job("tutor/base"))["hours"] == 0


def test_mfu_is_shown_and_set(capsys):
    _, quarter, _ = said(capsys, "tutor/base", "--data", CHATS, "--json")
    _, half, _ = said(capsys, "tutor/base", "--data", CHATS, "--json", "--mfu", 2 * MFU)
    assert json.loads(quarter)["hours"] == pytest.approx(2 * json.loads(half)["hours"])
    _, out, _ = said(capsys, "tutor/base", "--data", CHATS, "--mfu", 0.4)
    assert "at 40% of the card's 65 TFLOPS" in out


def test_serving(capsys):
    code, out, _ = said(
        capsys, "llama-3.1-8b", "--task", "serve", "--method", "lora", "--gpu", "l4", "--max-length", 4096
    )
    assert code == 0 and "kv cache" in out and "at most" in out and "time:" not in out
    assert out.startswith("llama-3.1-8b · serve · weights in bfloat16 · l4\n"), out
    _, out, _ = said(capsys, "llama-3.1-8b", "--task", "serve", "--shard", "--gpu", "l4")
    assert "weights in nf4 · l4\n" in out, "one card is not split"
    full = ["--task", "serve", "--method", "full", "--gpu", "l4", "--max-length", 65536]
    _, out, _ = said(capsys, "llama-3.1-8b", *full)
    assert "v100" not in out and "p100" not in out and "--gpu " in out, "weights in bfloat16 go on cards that have it"


def test_a_plan_takes_what_the_training_takes(capsys):
    "Batch, steps and epochs where nobody said any: those of the scale of the card, as a rehearsal has them."
    splits, gsm8k = DATA / "splits.jsonl", DATA / "gsm8k.jsonl"
    _, out, _ = said(capsys, "llama-3.2-1b", "--method", "lora", "--data", splits, "--gpu", "t4")
    assert "48 rows, 24 steps" in out and "6 in a step (scale t4)" in out, out
    _, out, _ = said(capsys, "llama-3.1-8b", "--method", "lora", "--task", "grpo", "--data", gsm8k, "--gpu", "a100")
    assert "64 rows, 50 steps, at most 3,276,800 tokens of replies" in out and "64 in a step (scale a100)" in out, out
    _, out, _ = said(capsys, "llama-3.2-1b", "--data", gsm8k, "--task", "grpo", "--epochs", 2)
    assert "64 rows, 16 steps" in out, out
    _, out, _ = said(capsys, "llama-3.2-1b", "--data", gsm8k, "--task", "grpo", "--steps", 1, "--gpu", "l40s")
    assert "64 rows, 1 step, " in out and "(scale a100)" in out, out


def test_a_time_that_is_too_short_to_tell(capsys):
    _, out, _ = said(capsys, "llama-3.2-1b", "--method", "lora", "--data", DATA / "splits.jsonl", "--gpu", "t4")
    assert "under a minute, too short to tell" in out and "all 6 offers that can hold it cost under $0.01" in out
    assert "fewer than 2,048 tokens at once" in out and "cheapest" not in out
    _, out, _ = said(capsys, "llama-3.1-8b", "--data", CHATS, "--gpu", "l4", "--epochs", 1000)
    assert "too short" not in out.split("cost:")[0] and "cheapest" in out and "1 thread" not in out
    assert [said_hours(n / 60) for n in (0.4, 1.2, 2.2, 90)] == [
        "under a minute", "about a minute", "about 2 minutes", "about 1.5 hours"]


BAD = [
    (["llama-9b"], "no such model"),
    (["llama-3.2-1b", "--gpu", "t5"], "did you mean 't4'"),
    (["llama-3.2-1b", "--method", "qlorra"], "did you mean 'qlora'"),
    (["llama-3.2-1b", "--task", "srve"], "did you mean 'serve'"),
    (["llama-3.2-1b", "--max-length", "0"], "--max-length 0"),
    (["llama-3.2-1b", "--mfu", "0"], "--mfu"),
    (["llama-3.2-1b", "--mfu", "1.5"], "--mfu"),
    (["llama-3.2-1b", "--epochs", "0"], "--epochs"),
    (["llama-3.2-1b", "--data", "nowhere.jsonl"], "no such file"),
    (["llama-3.2-1b", "--prices", "nowhere.csv"], "no such file"),
    (["llama-3.2-1b", "--data", str(DATA / "preferences.jsonl")], "SFT takes one answer a row"),
    (["llama-3.2-1b", "--data", CHATS, "--task", "dpo"], "DPO compares"),
    (["llama-3.2-1b", "--picture", "bytes.gif"], "a .png or a .svg"),
    ([], "base"),
]


@pytest.mark.parametrize("words,hint", BAD, ids=lambda x: " ".join(x)[-40:] if isinstance(x, list) else "")
def test_bad_input(words, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *words)
    assert code == 2 and not out and hint in err and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert [p for p in tmp_path.rglob("*") if p.name != "home"] == []


@pytest.mark.parametrize("name,mark", [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_picture(name, mark, tmp_path, capsys):
    path = tmp_path / name
    for _ in range(2):  # an earlier picture is replaced
        assert said(capsys, "llama-3.2-1b", "--picture", path)[0] == 0
    assert path.read_bytes().startswith(mark) and path.stat().st_size > 2000
    path.write_text("my notes")
    code, _, err = said(capsys, "llama-3.2-1b", "--picture", path)
    assert code == 2 and "not an earlier result" in err and path.read_text() == "my notes"


def test_a_picture_of_nothing(tmp_path):
    with pytest.raises(UserError, match="at least one plan"):
        draw_bytes({})
    assert save_picture(plan_job("tutor/base"), tmp_path / "p.png").is_file()


def test_the_picture_is_tidy():
    "Every part has its colour in the legend, and the bar ends where the sum is."
    parts = memory_of(replace(SMALL, task="ppo", method="full"))
    fig = draw_bytes({"ppo": parts}, room=80)
    said = [t.get_text() for t in fig.axes[0].texts]
    assert {name for name, size in parts.items() if size} <= set(said)
    assert f"{sum(parts.values()) / 2**30:.1f}" in said and "80 GiB" in said


def test_precision():
    assert precision_of("qlora") == precision_of("qlora8") == "bfloat16" and precision_of("full") == "mixed"
    assert len(LINEAR) == 7
