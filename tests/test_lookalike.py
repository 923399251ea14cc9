"""A look-alike has the architecture of its original, random weights, and fits on a laptop."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmcourse.core import UserError, file_hash
from llmcourse.lookalike import PUBLIC, original_config, lookalike, public_name, real_weights, shrunk
from llmcourse.lora import lora_config
from llmcourse.models import Local, load, load_tokenizer
from llmcourse.templates import dress

FAMILIES = {
    "llama": dict(num_attention_heads=32, num_key_value_heads=8, attention_bias=True, mlp_bias=True),
    "qwen2": dict(
        num_attention_heads=14, num_key_value_heads=2, hidden_size=896, intermediate_size=4864, tie_word_embeddings=True
    ),
    "qwen3": dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=1024, head_dim=128),
    "mistral": dict(sliding_window=4096),
    "gemma2": dict(),
    "gemma3_text": dict(),
    "mixtral": dict(),
    "phi3": dict(),
    "gpt2": dict(),
}
KEPT = (
    "tie_word_embeddings", "rope_parameters", "max_position_embeddings", "attention_bias", "mlp_bias", "sliding_window",
    "hidden_act", "rms_norm_eps", "final_logit_softcapping", "num_experts_per_tok",
)  # fmt: skip
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


def original(family: str):
    return transformers.AutoConfig.for_model(family, **FAMILIES[family])


def ratio(config) -> float:
    return config.num_attention_heads / (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_architecture_smaller(family, tmp_path):
    "Of nine families: what decides how it fits together is kept; it loads, generates, and one step moves its weights."
    config = original(family)
    place = lookalike(config, tmp_path / "small")
    small = AutoConfig.from_pretrained(place)
    assert type(small) is type(config) and small.model_type == family
    assert ratio(small) == ratio(config) and small.num_attention_heads <= config.num_attention_heads
    for name in KEPT:
        assert getattr(small, name, None) == getattr(config, name, None), name
    kinds = getattr(config, "layer_types", None)
    assert not kinds or set(small.layer_types) == set(kinds) and len(small.layer_types) == small.num_hidden_layers
    net, tokenizer = load(place)
    assert net.num_parameters() < 2.5e6 and small.vocab_size == len(tokenizer)
    tied = net.get_input_embeddings().weight is net.get_output_embeddings().weight
    assert tied == config.tie_word_embeddings
    assert Local(net, tokenizer, max_new_tokens=4)(CHAT) is not None
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    ids = torch.tensor([tokenizer("What is 2 plus 2?")["input_ids"]])
    net.train()(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    assert any("embed" in n or "wte" in n for n in moved) and len(moved) > len(before) / 2


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_shapes(name):
    "Counted by transformers on a device without memory, they are as large as what is published."
    billions = {"llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213, "llama-3.1-8b": 8.030, "llama-3.1-70b": 70.554}
    weights, size = real_weights(original_config(name))
    assert round(weights / 1e9, 3) == billions[name] and size == 2 * weights
    small = shrunk(original_config(name), load_tokenizer("tutor/base"))
    assert (
        small.rope_parameters == original_config(name).rope_parameters
        and small.rope_parameters["rope_type"] == "llama3"
    )
    assert small.tie_word_embeddings == ("3.2" in name) and small.max_position_embeddings == 131072
    assert small.num_attention_heads * small.head_dim == small.hidden_size


def test_a_seed_decides_the_weights_and_nothing_else_is_drawn(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    a, b, c = (lookalike("llama-3.2-1b", tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(torch.rand(1), expected)
    hashes = [file_hash(p / "model.safetensors") for p in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert "seed 1" in (c / "README.md").read_text()
    assert load_file(a / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_as_many_files_as_the_original(tmp_path):
    "Counted in a folder; else by its size."
    one, four = (lookalike(name, tmp_path / name) for name in ("llama-3.2-1b", "llama-3.1-8b"))
    assert (one / "model.safetensors").is_file() and not (one / "model.safetensors.index.json").exists()
    index = json.loads((four / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4 == len(list(four.glob("*.safetensors")))
    again = lookalike(four, tmp_path / "again")
    assert len(list(again.glob("*.safetensors"))) == 4
    assert AutoModelForCausalLM.from_pretrained(four).num_parameters() == load(again)[0].num_parameters()


def test_vocabulary_and_template_are_the_tokenizers(tmp_path):
    other = dress(load_tokenizer("tutor/base"), "ChatML")
    other.save_pretrained(tmp_path / "words")
    place = lookalike("llama-3.2-1b", tmp_path / "small", tokenizer=tmp_path / "words", multiple=64)
    tokenizer = load_tokenizer(place)
    assert tokenizer.chat_template == other.chat_template and tokenizer.eos_token == "<|im_end|>"
    config = AutoConfig.from_pretrained(place)
    assert config.vocab_size % 64 == 0 and 0 <= config.vocab_size - len(tokenizer) < 64
    assert config.eos_token_id == tokenizer.eos_token_id


def test_an_adapter_finds_its_layers(tmp_path):
    from peft import get_peft_model

    net, _ = load(lookalike("llama-3.2-3b", tmp_path / "small"))
    names = [n for n, p in get_peft_model(net, lora_config(r=4)).named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2


def test_names_of_the_public_shapes(tmp_path, monkeypatch):
    for name in ("meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B-Instruct", "llama-3.2-1b"):
        assert public_name(name) == "llama-3.2-1b"
        assert original_config(name).hidden_size == 2048
    for name in ("me/llama-3.2-1b-poems", "me/other", "tutor/base"):
        assert public_name(name) is None
    with pytest.raises(UserError, match="the Hub was not reached"):
        original_config("me/other")
    with pytest.raises(UserError, match="no such folder"):
        original_config(tmp_path / "nothing")
    assert original_config("tutor/sft").hidden_size == 256, "an adapter's base"


def test_only_an_earlier_look_alike_is_replaced(tmp_path):
    lookalike("llama-3.2-1b", tmp_path / "small")
    lookalike("llama-3.2-1b", tmp_path / "small", seed=3)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="already there"):
        lookalike("llama-3.2-1b", mine)
    assert [p.name for p in mine.iterdir()] == ["README.md"]
