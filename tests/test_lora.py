"""Chapter 07: counting against PEFT, merging against the adapter itself, on Llamas of other shapes; and every base
that merge must refuse."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llmcourse.card import Run, read_card, write_card
from llmcourse.core import UserError, read_jsonl, set_seed
from llmcourse.evals import wilson
from llmcourse.lora import linear_shapes, lora_config, lora_parameters, merge
from llmcourse.models import load, weights_hash
from llmcourse.sft import sft
from llmcourse.pretraining import train_tokenizer
from llmcourse.tutor import problems, to_chat

PLAIN = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
ODD = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    tie_word_embeddings=False,
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
)
IDS = torch.arange(40).view(2, 20) * 7 % 512


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(n_docs=300)


def make(folder, tokenizer, seed=0, dtype=torch.float32, **shape):
    "A Llama with random weights, saved with its tokenizer."
    set_seed(seed)
    ends = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    net = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1, **ends, **shape)
    )
    net.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapt(base, folder, card=True, **config):
    "An adapter that does something: B is random too."
    set_seed(1)
    net = get_peft_model(load(base)[0], lora_config(**config))
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(folder)
    if card:
        write_card(Run("sft", model=str(base), model_hash=weights_hash(base)), folder)
    return folder


def logits(net):
    with torch.no_grad():
        return net(IDS).logits


@pytest.fixture
def plain(tmp_path, tokenizer):
    return make(tmp_path / "base", tokenizer, **PLAIN)


# --- the configuration


def test_config_is_pefts_own():
    config = lora_config(r=8, lora_alpha=32, target_modules=["q_proj"], lora_dropout=0.1, use_rslora=True)
    assert isinstance(config, LoraConfig)
    assert (
        config.r,
        config.lora_alpha,
        config.target_modules,
        config.lora_dropout,
        config.use_rslora,
        config.task_type,
    ) == (8, 32, {"q_proj"}, 0.1, True, "CAUSAL_LM")
    assert (lora_config().r, lora_config().lora_alpha, lora_config().target_modules) == (16, 32, "all-linear")


@pytest.mark.parametrize("r", [0, -1, 2.5, "8"])
def test_config_refuses_a_rank(r):
    with pytest.raises(UserError, match="rank is a whole number"):
        lora_config(r=r)


def test_config_suggests_a_name():
    with pytest.raises(UserError, match="did you mean 'lora_dropout'"):
        lora_config(lora_droput=0.1)
    with pytest.raises(UserError, match="spelled as in peft.LoraConfig"):
        lora_config(zzz=1)


# --- counting


@pytest.mark.parametrize(
    "shape",
    [PLAIN, ODD, ODD | dict(head_dim=None, num_key_value_heads=6, tie_word_embeddings=True)],
    ids=["tied", "untied", "all heads"],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]], ids=str)
def test_count_is_pefts_count(shape, targets):
    for r in (1, 7):
        with torch.device("meta"):
            net = get_peft_model(
                LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)), lora_config(r=r, target_modules=targets)
            )
        assert net.get_nb_trainable_parameters()[0] == lora_parameters(net.config, r, targets)


def test_count_of_the_models_people_use():
    big = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    mid = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    one = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    )
    assert [lora_parameters(c) for c in (one, mid, big)] == [11_272_192, 41_943_040, 207_093_760]
    assert lora_parameters(mid, r=8, target_modules=["q_proj", "v_proj"]) == 3_407_872


def test_count_refuses_a_layer_that_is_not_there():
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        lora_parameters(LlamaConfig(), target_modules=["q_prj"])
    assert linear_shapes(LlamaConfig(**ODD))["o_proj"] == (96, 48)


# --- LoRA written out, against PEFT


@pytest.mark.parametrize("shape", [PLAIN, ODD], ids=["tied", "untied"])
@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
def test_peft_is_the_formula(shape, rs, tmp_path, tokenizer):
    "Logits of the adapter = logits of a base whose matrices were changed by hand; at the start, of the base itself."
    base = make(tmp_path / "base", tokenizer, **shape)
    assert torch.equal(logits(get_peft_model(load(base)[0], lora_config())), logits(load(base)[0]))
    net, _ = load(adapt(base, tmp_path / "a", r=4, lora_alpha=12, use_rslora=rs), merge=False)
    by_hand, _ = load(base)
    for name, layer in net.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            w = by_hand.get_submodule(name.removeprefix("base_model.model.")).weight
            w.data += 12 / (math.sqrt(4) if rs else 4) * B.data @ A.data
    assert (logits(net) - logits(load(base)[0])).abs().max() > 0.1
    torch.testing.assert_close(logits(net), logits(by_hand), atol=2e-4, rtol=1e-4)


# --- merging


@pytest.mark.parametrize("shape", [PLAIN, ODD], ids=["tied", "untied"])
def test_merged_equals_adapter(shape, tmp_path, tokenizer):
    base = make(tmp_path / "base", tokenizer, **shape)
    adapter = adapt(base, tmp_path / "a", r=4, lora_alpha=12, use_rslora=True)
    out = merge(adapter, tmp_path / "merged")
    net, _ = load(out)
    torch.testing.assert_close(logits(net), logits(load(adapter, merge=False)[0]), atol=2e-4, rtol=1e-4)
    assert net.config.to_dict() == load(base)[0].config.to_dict() | {"_name_or_path": net.config._name_or_path}
    assert load(out)[1].get_vocab() == tokenizer.get_vocab() and load(out)[1].chat_template == tokenizer.chat_template
    card = read_card(out)
    assert (card.method, card.model_hash, card.hyperparameters["dtype"]) == ("merge", weights_hash(base), "float32")
    assert not list(tmp_path.glob(".*")) and not list(out.glob("adapter*"))


def test_merge_keeps_the_precision_of_the_base(tmp_path, tokenizer):
    base = make(tmp_path / "base", tokenizer, dtype=torch.bfloat16, **PLAIN)
    adapter = adapt(base, tmp_path / "a")
    out = merge(adapter, tmp_path / "m")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "model.safetensors").stat().st_size < 1.1 * (base / "model.safetensors").stat().st_size
    wide = merge(adapter, tmp_path / "w", dtype="float32")
    exact = logits(load(adapter, merge=False)[0])
    assert (logits(load(wide)[0]) - exact).abs().max() < 2e-4 < (logits(load(out)[0]) - exact).abs().max() < 0.5
    with pytest.raises(UserError, match="unknown dtype 'bf16'"):
        merge(adapter, tmp_path / "x", dtype="bf16")
    assert not (tmp_path / "x").exists()


def test_merge_of_an_adapter_on_an_adapter(plain, tmp_path):
    first = adapt(plain, tmp_path / "a")
    second = adapt(first, tmp_path / "b", r=2)
    out = merge(second, tmp_path / "m")
    torch.testing.assert_close(logits(load(out)[0]), logits(load(second, merge=False)[0]), atol=2e-4, rtol=1e-4)


def test_merge_after_sft(plain, tmp_path):
    rows = [to_chat(p) for p in problems(8, 0, ("add",))]
    run = sft(
        rows,
        tmp_path / "run",
        model=plain,
        peft_config=lora_config(r=2),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    out = merge(run, tmp_path / "m")
    torch.testing.assert_close(logits(load(out)[0]), logits(load(run, merge=False)[0]), atol=2e-4, rtol=1e-4)
    assert (logits(load(out)[0]) - logits(load(plain)[0])).abs().max() > 1e-4
    merge(run, out)  # again, over the first


def test_base_that_moved(plain, tmp_path):
    adapter = adapt(plain, tmp_path / "a")
    here = merge(adapter, tmp_path / "m1")
    plain.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no such folder"):
        merge(adapter, tmp_path / "m2")
    there = merge(adapter, tmp_path / "m2", base=tmp_path / "elsewhere")
    assert weights_hash(here) == weights_hash(there)


# --- what merge refuses; and nothing is written


def refuses(tmp_path, match, *args, **kwargs):
    with pytest.raises(UserError, match=match):
        merge(args[0], tmp_path / "refused", *args[1:], **kwargs)
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob(".refused*"))


def test_refuses_a_foreign_base_of_the_same_shape(plain, tmp_path, tokenizer):
    adapter, other = adapt(plain, tmp_path / "a"), make(tmp_path / "other", tokenizer, seed=9, **PLAIN)
    refuses(tmp_path, "was trained on weights", adapter, base=other)
    make(plain, tokenizer, seed=9, **PLAIN)  # the base itself was retrained
    refuses(tmp_path, "was trained on weights", adapter)


def test_refuses_to_merge_twice(plain, tmp_path):
    adapter = adapt(plain, tmp_path / "a")
    merged = merge(adapter, tmp_path / "m")
    refuses(tmp_path, "was trained on weights", adapter, base=merged)
    refuses(tmp_path, "no adapter there", merged)


def test_refuses_another_shape_without_a_card(plain, tmp_path, tokenizer):
    adapter, other = adapt(plain, tmp_path / "a", card=False), make(tmp_path / "other", tokenizer, **ODD)
    refuses(tmp_path, "does not fit", adapter, base=other)


def test_refuses_a_packed_base_by_its_config(plain, tmp_path):
    adapter = adapt(plain, tmp_path / "a")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    refuses(tmp_path, "few bits .bitsandbytes.*dequantize=True", adapter)


def test_refuses_what_is_no_adapter(plain, tmp_path):
    refuses(tmp_path, "no adapter there", plain)
    refuses(tmp_path, "no such folder", tmp_path / "nowhere")
    adapter = adapt(plain, tmp_path / "a")
    (adapter / "adapter_model.safetensors").rename(tmp_path / "kept")
    refuses(tmp_path, "no adapter_model.safetensors", adapter)
    (tmp_path / "kept").rename(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    refuses(tmp_path, "names no base", adapter)
    (adapter / "adapter_config.json").write_text("{")
    refuses(tmp_path, r"adapter_config.json: not JSON", adapter)


def test_refuses_to_write_over_a_model_or_a_stranger(plain, tmp_path):
    adapter = adapt(plain, tmp_path / "a")
    before = weights_hash(plain), weights_hash(adapter)
    for output in (plain, adapter, tmp_path):
        with pytest.raises(UserError, match="Choose another output"):
            merge(adapter, output)
    assert (weights_hash(plain), weights_hash(adapter)) == before


def test_interrupted_leaves_the_old_run(plain, tmp_path, monkeypatch):
    adapter = adapt(plain, tmp_path / "a")
    out = merge(adapter, tmp_path / "m")
    old = weights_hash(out)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcourse.merging.write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, out)
    assert weights_hash(out) == old and not list(tmp_path.glob(".m*"))


# --- four bits


def test_qlora_merges_into_the_unpacked_base(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    plain = make(
        tmp_path / "base", tokenizer, **PLAIN | dict(intermediate_size=128)
    )  # rows of 64: what bitsandbytes needs on a CPU
    from transformers import BitsAndBytesConfig

    net, tokenizer = load(
        plain,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    packed = tmp_path / "packed"
    net.save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    adapter = adapt(packed, tmp_path / "a")
    refuses(tmp_path, "dequantize=True", adapter)
    refuses(tmp_path, "was trained on weights", adapter, base=plain)
    out = merge(adapter, tmp_path / "m", dtype="float32", dequantize=True)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    off = lambda a, b: float((logits(load(a)[0]) - logits(b)).abs().mean())
    packed_adapter = load(adapter, merge=False)[0]
    assert (
        off(out, packed_adapter) < 0.02 < 0.1 < off(plain, packed_adapter)
    )  # bitsandbytes computes in bfloat16 on some CPUs


# --- the sweep that the chapter reads

DATA = Path(__file__).parent.parent / "data"
SWEEP = read_jsonl(DATA / "sweep.jsonl")


def test_sweep_is_the_file_that_its_readme_names():
    assert f"`{hashlib.sha256((DATA / 'sweep.jsonl').read_bytes()).hexdigest()}`" in (DATA / "README.md").read_text(
        encoding="utf-8"
    )


def test_sweep_holds_every_setting_once_a_seed():
    pytest.importorskip("bitsandbytes")
    spec = importlib.util.spec_from_file_location("sweep", DATA.parent / "benchmarks" / "sweep.py")
    spec.loader.exec_module(sweep := importlib.util.module_from_spec(spec))
    names = lambda rows: sorted(map(str, rows))
    assert names((g, n, seed) for g, n, *_ in sweep.settings() for seed in sweep.SEEDS) == names(
        (r["group"], r["setting"], r["seed"]) for r in SWEEP
    )


@pytest.mark.parametrize("row", SWEEP, ids=lambda r: f"{r['group']}-{r['setting']}-{r['seed']}")
def test_sweep_rows_agree_with_themselves(row):
    assert (row["low"], row["high"]) == tuple(round(x, 4) for x in wilson(row["correct"], row["n"])) and row[
        "correct"
    ] <= row["format"] <= row["n"]
    assert 0 <= row["bytes_measured"] - row["bytes_predicted"] < 1000  # the optimizer's step counters
    if "rank" == row["group"]:
        assert row["trainable"] == lora_parameters(load("tutor/base")[0].config, row["setting"])
