"""Supervised fine-tuning: the mask, the loss, what is refused, runs that repeat, and a model of another shape."""

import json
import math
import warnings

import pytest
import torch

from llmcourse.card import differences, read_card
from llmcourse.core import UserError, read_jsonl, scale as read_scale
from llmcourse.models import load, load_tokenizer, stop_ids
from llmcourse.data import tokenize
from llmcourse.xray import xray
from llmcourse.methods import rerun
from llmcourse.rows import read
from llmcourse.chats import check_labels
from llmcourse.sft import SFT, sft, sft_defaults
from llmcourse.pretraining import has_bf16
from llmcourse.tutor import problems, small_talk, to_chat

ROWS = [{"messages": to_chat(p)["messages"]} for p in problems(4, 0, ("add", "sub", "story1", "story2"))]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tutor/base")


@pytest.fixture
def own(tokenizer, tmp_path):
    "A copy of the tokenizer that a test may change."
    tokenizer.save_pretrained(tmp_path / "own")
    return load_tokenizer(tmp_path / "own")


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory):
    "A Llama of another shape: six heads on three, untied, llama3 rope scaling."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = dict(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters=rope,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "other"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def weights_hash(folder):
    return [v for k, v in read_card(folder).files.items() if k.endswith(".safetensors")]


def taken(rows):
    found = read(rows, "train", "SFT")
    return SFT.take(found, {}), [row.place for row in found]


def losses(folder):
    return [r["loss"] for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r]


# the mask


@pytest.mark.parametrize(
    "messages",
    [ROWS[0]["messages"], ROWS[15]["messages"], *[small_talk(__import__("random").Random(i)) for i in range(6)]],
)
def test_trained_tokens_decode_to_the_replies(tokenizer, messages):
    row = tokenize(tokenizer, messages)
    replies = [m["content"] + tokenizer.eos_token for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == "".join(replies)
    assert all(l in (-100, t) for t, l in zip(row["input_ids"], row["labels"]))
    assert xray(tokenizer, messages).counts["end_trained"] == len(replies)


def test_a_template_without_markers_gives_the_same_mask(tokenizer, own):
    own.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for i in range(8):
        messages = small_talk(__import__("random").Random(i))
        assert tokenize(own, messages) == tokenize(tokenizer, messages)


def test_chatml_trains_its_end_mark_and_not_the_newline_behind(own):
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.chat_template, own.eos_token = CHATML, "<|im_end|>"
    row = tokenize(own, [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}] * 2)
    assert own.decode([t for t in row["labels"] if t != -100]) == "Hello!<|im_end|>" * 2
    assert check_labels(own, [row])["trained"] == sum(l != -100 for l in row["labels"])


def test_assistant_only_loss_off_trains_everything(tokenizer):
    row = tokenize(tokenizer, ROWS[0]["messages"], assistant_only_loss=False)
    assert row["labels"] == row["input_ids"] == tokenize(tokenizer, ROWS[0]["messages"])["input_ids"]


def test_a_template_that_rewrites_earlier_turns_is_refused(own):
    own.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match="changes earlier turns"):
        tokenize(own, ROWS[0]["messages"])


def test_no_template(own):
    own.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tokenize(own, ROWS[0]["messages"])


def test_the_date_does_not_move_the_rows(own):
    own.chat_template = "{{ date_string }}" + CHATML
    assert own.decode(tokenize(own, ROWS[0]["messages"])["input_ids"]).startswith("26 Jul 2024")


def test_xray_shows_text_as_text(tokenizer):
    picture = xray(tokenizer, [{"role": "user", "content": "<script>&"}, {"role": "assistant", "content": "no\nyes"}])
    assert "<script>" not in picture._repr_html_() and "&lt;" in picture._repr_html_() and "↵" in picture._repr_html_()
    assert picture.counts["bos"] == 1 and picture.counts["pad"] == 0 and "trained" in repr(picture)


# the loss


def by_hand(net, batch):
    "Slow and plain: one token at a time."
    with torch.no_grad():
        logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = [
        -logits[i, j].log_softmax(-1)[label].item()
        for i, row in enumerate(batch["labels"].tolist())
        for j, label in enumerate(row[1:])
        if label != -100
    ]
    return math.fsum(found) / len(found)


def test_loss_and_mask_equal_trl(other, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    net, _ = load(other)
    args = SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(net, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    theirs = [trainer.train_dataset[i] for i in range(len(ROWS))]
    assert [(r["input_ids"], r["labels"]) for r in theirs] == [
        tuple(tokenize(tokenizer, r["messages"]).values()) for r in ROWS
    ]
    batch, plain = trainer.data_collator(theirs), load(other)[0]
    assert abs(trainer.compute_loss(net, dict(batch)).item() - by_hand(plain, batch)) < 1e-5


def test_eight_times_one_is_one_times_eight(other, tmp_path):
    once = sft(ROWS, tmp_path / "a", other, per_device_train_batch_size=8, logging_steps=1, bf16=False)
    parts = sft(
        ROWS,
        tmp_path / "b",
        other,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        logging_steps=1,
        bf16=False,
    )
    assert len(losses(once)) == 2 and losses(once) == pytest.approx(losses(parts), abs=1e-3)


# what is refused before anything is trained


def test_check_labels(tokenizer, capsys):
    good = [tokenize(tokenizer, r["messages"]) for r in ROWS]
    assert check_labels(tokenizer, good, 256) == dict(
        rows=16,
        tokens=sum(len(r["input_ids"]) for r in good),
        trained=sum(l != -100 for r in good for l in r["labels"]),
        too_long=0,
    )
    ends = stop_ids(tokenizer)
    with pytest.raises(UserError, match="nothing would be trained"):
        check_labels(tokenizer, [r | {"labels": [-100] * len(r["labels"])} for r in good])
    with pytest.raises(UserError, match="no end token"):
        check_labels(tokenizer, [r | {"labels": [-100 if l in ends else l for l in r["labels"]]} for r in good])
    with pytest.raises(UserError, match=r"rows\[3\] begins with .* twice \(1 of 16"):
        check_labels(tokenizer, [{k: v[:1] + v for k, v in r.items()} if i == 3 else r for i, r in enumerate(good)])
    assert check_labels(tokenizer, good, 110)["too_long"] == 4
    assert "4 of 16 rows are longer than max_length=110 tokens" in capsys.readouterr().err


def test_the_collator_of_the_museum_is_caught(own):
    from transformers import DataCollatorForLanguageModeling

    own.pad_token = own.eos_token
    batch = DataCollatorForLanguageModeling(own, mlm=False)(
        [{"input_ids": tokenize(own, r["messages"])["input_ids"]} for r in ROWS]
    )
    rows = [{k: batch[k][i].tolist() for k in ("input_ids", "labels")} for i in range(len(ROWS))]
    assert xray(own, rows[0]).counts["end_trained"] == 0
    with pytest.raises(UserError, match="never learn to stop"):
        check_labels(own, rows)
    assert check_labels(own, [tokenize(own, r["messages"]) for r in ROWS])["rows"] == 16


@pytest.mark.parametrize(
    "rows,options,hint",
    [
        ([], {}, "no rows"),
        ([{"messages": []}], {}, r"rows\[0\]"),
        ([ROWS[0], {"messages": ROWS[0]["messages"][:-1]}], {}, r"rows\[1\].*no assistant turn"),
        (["text"], {}, r"rows\[0\]"),
        (ROWS, {"learning_rat": 1}, "did you mean 'learning_rate'"),
        (ROWS, {"zzz": 1}, "SFTConfig has no 'zzz'"),
        (ROWS, {"scale": "t5"}, "did you mean 't4'"),
        (ROWS, {"max_length": 20}, "nothing of it would be trained"),
        (ROWS, {"max_length": 60}, "no end token"),
    ],
    ids=str,
)
def test_bad_input_leaves_nothing(rows, options, hint, other, tmp_path):
    with pytest.raises(UserError, match=hint):
        sft(rows, tmp_path / "run", **{"model": other} | options)
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_of_a_file_are_named_by_line(other, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    with pytest.raises(UserError, match=r"chats.jsonl:2: not JSON"):
        sft(path, tmp_path / "run", other)
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(UserError, match=r"chats.jsonl:2"):
        sft(path, tmp_path / "run", other)
    with pytest.raises(UserError, match="no such file"):
        sft(tmp_path / "nowhere.jsonl", tmp_path / "run", other)
    assert [p.name for p in tmp_path.iterdir()] == ["chats.jsonl"]


def test_a_chat_that_the_template_refuses_is_named(own, other, tmp_path):
    import shutil

    folder = shutil.copytree(other, tmp_path / "strict")
    own.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML.replace("<|im_end|>", "<|eot_id|>")
    )
    own.save_pretrained(folder)
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (ROWS[0]["messages"][1:], ROWS[1]["messages"])))
    with pytest.raises(UserError, match=r"chats.jsonl:2: .*no system role"):
        sft(path, tmp_path / "run", folder)


def test_nothing_but_a_run_is_written_over(other, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for output in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", other, other.parent):
        with pytest.raises(UserError, match="Choose another output"):
            sft(ROWS, output, other)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_interrupted_leaves_the_old_run_and_nothing_half(other, tmp_path, monkeypatch):
    from transformers import Trainer

    run = sft(ROWS, tmp_path / "run", other, max_steps=2)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    step = Trainer.training_step
    calls = []

    def pull_the_plug(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", pull_the_plug)
    with pytest.raises(KeyboardInterrupt):
        sft(ROWS, run, other, max_steps=4)
    assert len(calls) == 2 and {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# runs


def test_a_run_folder_is_whole(other, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = sft(ROWS, tmp_path / "run", other, num_train_epochs=4, learning_rate=1e-2, logging_steps=1)
    out, err = capfd.readouterr()
    assert "SFT" in err and "4/4" in err and not out
    assert not [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("SFT")]
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "train.jsonl",
        "metrics.jsonl",
        "run.yaml",
        "README.md",
    }
    assert read_jsonl(run / "train.jsonl") == ROWS and losses(run)[-1] < losses(run)[0]
    card = read_card(run)
    assert (
        card.method == "sft" and card.seed == 42 and card.hyperparameters["learning_rate"] == 1e-2 and card.seconds > 0
    )
    assert "base_model" in (run / "README.md").read_text()
    net, _ = load(run)
    assert (
        net.config.num_key_value_heads == 3
        and not net.config.tie_word_embeddings
        and net.config.rope_parameters["rope_type"] == "llama3"
    )
    assert not torch.equal(net.lm_head.weight, net.model.embed_tokens.weight)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_same_card_gives_the_same_weights(adapter, other, lora, tmp_path):
    config = dict(lora.to_dict())
    first = sft(
        ROWS,
        tmp_path / "a",
        other,
        peft_config=lora if adapter else None,
        seed=7,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
    )
    again = rerun(first / "run.yaml", tmp_path / "b")
    third = sft(
        ROWS,
        tmp_path / "c",
        other,
        peft_config=lora if adapter else None,
        seed=8,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
    )
    assert weights_hash(first) == weights_hash(again) != weights_hash(third)
    a, b = read_card(first), read_card(again)
    assert differences(a, b) == [] and (a.files, a.before) == (b.files, b.before)
    assert lora.to_dict() == config, "the caller's config was changed"
    if adapter:
        assert a.settings["peft_config"] == dict(
            peft_type="LORA",
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            target_modules="all-linear",
            bias="none",
            use_rslora=False,
            use_dora=False,
        )


def test_rerun_refuses_what_has_changed(other, tmp_path):
    import shutil

    model = shutil.copytree(other, tmp_path / "model")
    run = sft(ROWS, tmp_path / "run", model, max_steps=2)
    (run / "train.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="train.jsonl: changed since the run"):
        rerun(run, tmp_path / "again")
    (run / "train.jsonl").unlink()
    with pytest.raises(UserError, match="are gone"):
        rerun(run, tmp_path / "again")
    sft(ROWS, run, model, max_steps=2)
    shutil.copy(run / "model.safetensors", model)
    with pytest.raises(UserError, match="model: changed since the run"):
        rerun(run, tmp_path / "again")
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace("method: sft", "method: grpo"))
    with pytest.raises(UserError, match="changed since the run"):
        rerun(run, tmp_path / "again")


def test_an_adapter_on_the_tutor_is_small_and_names_its_base(lora, tmp_path):
    run = sft(ROWS, tmp_path / "run", peft_config=lora, max_steps=2)
    assert (
        json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "tutor/base"
        == read_card(run).model
    )
    assert not (run / "model.safetensors").exists() and (run / "adapter_model.safetensors").stat().st_size < 1e6
    net, tokenizer = load(run)
    assert net.num_parameters() == load("tutor/base")[0].num_parameters() and tokenizer.chat_template


def test_a_file_of_rows_and_a_second_round(other, tmp_path):
    "SFT on a model that SFT has made, from a file."
    path = tmp_path / "chats.jsonl"
    path.write_text("\n" + "".join(json.dumps(r | {"note": "x"}) + "\n" for r in ROWS))
    first = sft(path, tmp_path / "a", other, max_steps=2)
    second = sft(str(path), tmp_path / "b", first, max_steps=2)
    assert read_card(second).model_hash == weights_hash(first)[0]
    assert read_jsonl(second / "train.jsonl")[0]["note"] == "x"


def test_pad_that_is_eos_still_trains_the_end(own, other, tmp_path):
    import shutil

    folder = shutil.copytree(other, tmp_path / "model")
    own.pad_token = own.eos_token
    own.save_pretrained(folder)
    run = sft(ROWS, tmp_path / "run", folder, num_train_epochs=30, learning_rate=1e-2, per_device_train_batch_size=4)
    net, tokenizer = load(run)
    row = tokenize(tokenizer, ROWS[0]["messages"])
    with torch.no_grad():
        probs = net(input_ids=torch.tensor([row["input_ids"]])).logits[0, -2].softmax(-1)
    assert probs[tokenizer.eos_token_id] > 0.5


@pytest.mark.parametrize("name,bf16,fp16", [("cpu", has_bf16(), False), ("t4", False, True), ("a100", True, False)])
def test_the_dial_decides_precision_and_size_decides_the_rate(name, bf16, fp16):
    big = sft_defaults(read_scale(name), 8_000_000_000, adapter=True)
    assert (big["bf16"], big["fp16"], big["gradient_checkpointing"]) == (bf16, fp16, name != "cpu")
    assert big["max_length"] == read_scale(name)["max_length"] and big["learning_rate"] == 2e-4
    assert sft_defaults(read_scale(name), 2_000_000, adapter=False)["learning_rate"] == 1e-3


# methods, each one argument away

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
METHODS = {
    "full": {},
    "freeze": dict(freeze_trainable_layers=2),
    "LoRA": dict(adapter={}),
    "rsLoRA": dict(adapter=dict(use_rslora=True)),
    "DoRA": dict(adapter=dict(use_dora=True)),
    "dropout": dict(adapter=dict(lora_dropout=0.1)),
    "NEFTune": dict(adapter={}, neftune_noise_alpha=5),
    "NF4": dict(adapter={}, bits=NF4),
    "NF4, scales in 8 bits": dict(adapter={}, bits=NF4 | dict(bnb_4bit_use_double_quant=True)),
    "int8": dict(adapter={}, bits=dict(load_in_8bit=True)),
    "LoftQ": dict(adapter={}, bits=NF4, loftq=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_its_card_repeats_it(name, tmp_path):
    from transformers import BitsAndBytesConfig
    from llmcourse.lora import lora_config

    options = dict(METHODS[name])
    if "adapter" in options:
        options["peft_config"] = lora_config(r=8, **options.pop("adapter"))
    if "bits" in options:
        options["quantization_config"] = BitsAndBytesConfig(**options.pop("bits"))
    run = sft(ROWS, tmp_path / "run", num_train_epochs=8, per_device_train_batch_size=8, logging_steps=4, **options)
    assert losses(run)[-1] < 0.6 * losses(run)[0]
    again = rerun(run, tmp_path / "again")
    assert weights_hash(run) == weights_hash(again)
    assert read_card(run).hyperparameters == read_card(again).hyperparameters


def test_frozen_blocks_do_not_move(tmp_path):
    run = sft(ROWS, tmp_path / "run", freeze_trainable_layers=1, max_steps=3)
    before, after = load("tutor/base", dtype="float32")[0].state_dict(), load(run)[0].state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k].float())}
    assert moved and all(k.startswith("model.layers.3.") for k in moved)


def test_methods_that_do_not_go_together(tmp_path):
    from transformers import BitsAndBytesConfig

    with pytest.raises(UserError, match="cannot be trained. Give peft_config"):
        sft(ROWS, tmp_path / "run", quantization_config=BitsAndBytesConfig(**NF4))
    with pytest.raises(UserError, match="loftq makes up for rounding to 4 bits"):
        sft(ROWS, tmp_path / "run", loftq=True)
    with pytest.raises(UserError, match="freeze_trainable_layers=9: the model has 4 blocks"):
        sft(ROWS, tmp_path / "run", freeze_trainable_layers=9)
    with pytest.raises(UserError, match="SFTConfig has no 'packin'.*did you mean 'packing'"):
        sft(ROWS, tmp_path / "run", packin=True)
    assert not list(tmp_path.iterdir())


def test_loftq_begins_closer_to_the_whole_model(tmp_path):
    """The same chats, before the first step has moved anything: with LoftQ the rounded model is nearer to the one it
    was rounded from."""
    from peft import get_peft_model
    from transformers import BitsAndBytesConfig
    from llmcourse.lora import lora_config
    from llmcourse.loading import start_from_rounding

    ids = torch.tensor([tokenize(load_tokenizer("tutor/base"), ROWS[0]["messages"])["input_ids"]])
    want = load("tutor/base", dtype="float32")[0](input_ids=ids).logits

    def off(loftq):
        net = get_peft_model(
            load("tutor/base", dtype="float32", quantization_config=BitsAndBytesConfig(**NF4))[0], lora_config(r=32)
        )
        if loftq:
            start_from_rounding(
                net, "tutor/base", "cpu"
            )  # before the first forward pass, at which bitsandbytes may repack the weights
        return (net(input_ids=ids).logits - want).square().mean().item()

    with torch.no_grad():
        assert off(True) < 0.7 * off(False)


def test_rows_of_other_forms_are_read(tmp_path):
    "The same four chats as Alpaca, ShareGPT and prompt/completion train the same weights."
    turns = [(f"What is {i} + 1?", f"Answer: {i + 1}") for i in range(8)]
    forms = {
        "alpaca.json": [{"instruction": q, "input": "", "output": a} for q, a in turns],
        "chats.jsonl": [
            {"messages": [dict(role="user", content=q), dict(role="assistant", content=a)]} for q, a in turns
        ],
        "sharegpt.jsonl": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns
        ],
    }
    hashes = set()
    for name, rows in forms.items():
        (tmp_path / name).write_text(
            json.dumps(rows) if name.endswith("json") else "".join(json.dumps(r) + "\n" for r in rows)
        )
        hashes.add(str(weights_hash(sft(tmp_path / name, tmp_path / "run", max_steps=2))))
    assert len(hashes) == 1
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}) + "\n")
    with pytest.raises(UserError, match="pairs.jsonl:1"):
        sft(tmp_path / "pairs.jsonl", tmp_path / "run")


def test_unsloth_needs_a_gpu_and_says_so(tmp_path):
    with pytest.raises(UserError, match='engine "unsloth" needs a GPU'):
        sft(ROWS, tmp_path / "run", engine="unsloth")
    with pytest.raises(UserError, match="unknown engine 'unslot': did you mean 'unsloth'"):
        sft(ROWS, tmp_path / "run", engine="unslot")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name,value",
    [("learning_rate", -1), ("num_train_epochs", 0), ("num_train_epochs", -1), ("save_steps", -3), ("max_length", 0)],
)
def test_a_number_that_has_to_be_positive(name, value, tmp_path):
    with pytest.raises(UserError, match=rf"{name}={value} \(.*\): has to be more than 0"):
        sft(ROWS, tmp_path / "run", **{name: value})
    assert not list(tmp_path.iterdir())


def test_rows_of_two_forms_in_either_order_train_the_same_and_are_told(tmp_path, capsys):
    odd = {"instruction": "What is 3 + 4?", "input": "", "output": "Answer: 7"}
    for name, rows in (("a", [*ROWS[:7], odd]), ("b", [odd, *ROWS[:7]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        sft(tmp_path / f"{name}.jsonl", tmp_path / name, max_steps=2)
    said = capsys.readouterr().err
    for first in ("a.jsonl:8", "b.jsonl:1"):
        assert f"messages 7, alpaca 1 (first {tmp_path / first})" in said


def test_rows_of_another_split_are_left_out(capsys):
    rows = [row | {"split": s} for row, s in zip(ROWS, ("train", "test", "train"))]
    kept, places = taken(rows)
    assert (
        len(kept) == 2
        and places == ["rows[0]", "rows[2]"]
        and "1 rows of the split test are left out" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="none is left"):
        taken([ROWS[0] | {"split": "test"}])
    with pytest.raises(UserError, match=r"rows\[0\].*the better answer"):
        taken([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def test_a_call_of_a_tool_can_be_trained(own):
    "OpenAI's rows have no content where the assistant calls a tool, and its arguments as JSON in a text."
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sun", "tool_call_id": "1"},
            {"role": "assistant", "content": "Sun."},
        ]
    }
    (kept,), _ = taken([row])
    own.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ "
        "c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor "
        "%}"
    )
    assert '{"city": "Bern"}' in own.decode(tokenize(own, kept["messages"], assistant_only_loss=False)["input_ids"])
    from jinja2 import TemplateError

    own.chat_template = CHATML
    with pytest.raises(TemplateError, match="does not print the call of 'weather' in turn 1"):
        tokenize(own, kept["messages"])
