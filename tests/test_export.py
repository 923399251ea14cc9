"""Export: our GGUF files against llama.cpp's own converter, quantiser and arithmetic."""

import hashlib, json
from pathlib import Path

import numpy as np
import pytest
from llmcourse.core import UserError
from llmcourse.engine import Engine
from llmcourse.converter import DTYPES, permute, rope_factors
from llmcourse.export import KINDS, modelfile, next_logprobs, parity, quantize, to_gguf
from llmcourse.gguf_tokens import CHATS, LLAMA3, QWEN2, TEXTS, check_tokens, pre_tokenizer
from llmcourse.quantizers import plan_types

gguf = pytest.importorskip("gguf")
REFERENCE = Path(__file__).parent / "data" / "gguf_reference.json"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
SHAPES = {  # what differs from a Llama of width 256, 4 heads, 2 for keys and values, tied
    "gqa": dict(num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": dict(
        hidden_size=80,
        intermediate_size=112,
        num_attention_heads=5,
        num_key_value_heads=5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "head_dim": dict(
        hidden_size=192, intermediate_size=320, head_dim=48, tie_word_embeddings=True, rope_parameters=ROPE
    ),
    "linear": dict(
        vocab_size=320, num_hidden_layers=3, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)
    ),
}


def make_tokenizer(
    split=LLAMA3,
    ignore_merges=True,
    bos=True,
    template=TEMPLATE,
    merges=("t h", "th e", "Ġ t", "1 2", "e r", "o u"),
    steps=None,
    normalizer=None,
    **special,
):
    "A byte-level BPE tokenizer with a handful of merges."
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers as pre, processors
    from transformers import PreTrainedTokenizerFast

    pairs = [tuple(m.split()) for m in merges]
    vocab = {t: i for i, t in enumerate(sorted(pre.ByteLevel.alphabet()) + ["".join(p) for p in pairs])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    tok.pre_tokenizer = pre.Sequence(
        steps or [pre.Split(Regex(split), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if normalizer:
        tok.normalizer = normalizer
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIAL)
    tok.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A",
            pair=f"{SPECIAL[0]} $A $B",
            special_tokens=[(SPECIAL[0], tok.token_to_id(SPECIAL[0]))],
        )
    named = dict(bos_token=SPECIAL[0], eos_token="<|eot_id|>", pad_token="<|pad|>") | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, chat_template=template, clean_up_tokenization_spaces=False, **named
    )


def make_model(folder, shape="gqa", dtype="float32", tokenizer=None, save=None, **overrides):
    "A Llama whose weights come from integer arithmetic, so that they are the same on every machine."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    base = dict(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(LlamaConfig(**base | ids | SHAPES[shape] | overrides)).eval()
    with torch.no_grad():
        for k, (name, p) in enumerate(model.named_parameters()):
            n = torch.arange(p.numel(), dtype=torch.int64)
            noise = (((n * 2654435761 + k * 40503) % 2**32 // 2**16).float() / 2**16 - 0.5).reshape(p.shape)
            p.copy_(noise * 0.5 + 1 if "norm" in name else noise * 0.25)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **(save or {}))
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def digest(path):
    "Type, shape and bytes of every tensor, in one hash; and the metadata."
    reader, h = gguf.GGUFReader(path), hashlib.sha256()
    for t in sorted(reader.tensors, key=lambda t: t.name):
        h.update(f"{t.name} {t.tensor_type.name} {t.shape.tolist()}".encode() + t.data.tobytes())
    kv = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    short = {
        k: v if len(str(v)) < 80 else hashlib.sha256(json.dumps(v).encode()).hexdigest()[:16] for k, v in kv.items()
    }
    return {"tensors": h.hexdigest()[:16], "types": sorted({t.tensor_type.name for t in reader.tensors}), "kv": short}


SOURCE = {
    "gqa": "bfloat16",
    "untied": "float32",
    "head_dim": "float32",
    "linear": "float16",
}  # how the test models are stored
SHARDS = {"untied": {"max_shard_size": "100KB"}}  # and which of them in pieces


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


def export_one(shape, room):
    model = make_model(room / shape, shape, SOURCE[shape], save=SHARDS.get(shape))
    return shape, room / shape, model, to_gguf(room / shape, room / f"{shape}-f32.gguf", "f32")


@pytest.fixture(scope="module")
def gqa(room):
    return export_one("gqa", room)


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, room, gqa):
    "(shape, folder, model, float32 GGUF) of one test model."
    return gqa if request.param == "gqa" else export_one(request.param, room)


def test_same_as_llama_cpps_converter_and_quantiser(exported, room):
    """The reference was written by convert_hf_to_gguf.py and llama_model_quantize of the llama.cpp inside xllamacpp
    2026.10.11549."""
    shape, folder, _, f32 = exported
    reference = json.loads(REFERENCE.read_text())[shape]
    for dtype in DTYPES:
        got, want = (
            digest(f32 if dtype == "f32" else to_gguf(folder, room / f"{shape}-{dtype}.gguf", dtype, verify=False)),
            reference[dtype],
        )
        assert got["types"] == want["types"] and got["tensors"] == want["tensors"], dtype
        assert {k: got["kv"].get(k) for k in want["kv"]} == want["kv"], dtype
    for kind in KINDS:
        got, want = digest(quantize(f32, room / f"{shape}-{kind}.gguf", kind)), reference[kind]
        assert got["types"] == want["types"] and got["tensors"] == want["tensors"], kind
        assert {k: got["kv"].get(k) for k in want["kv"]} == want["kv"], kind


def test_llama_cpp_computes_what_transformers_computes(exported):
    shape, folder, model, f32 = exported
    from transformers import AutoTokenizer

    found = parity(
        f32, model, AutoTokenizer.from_pretrained(folder), ["What is 47 plus 38?", "x"] + CHATS[:2], max_new_tokens=12
    )
    assert found["same"] == found["prompts"] == 4 and found["tokens"] > 20
    assert found["gap"] < 1e-4, found


def test_wrong_weights_do_not_pass(exported, room):
    "Planted fault: without the permutation of q and k, the file loads and answers wrongly."
    shape, folder, model, f32 = exported
    from transformers import AutoTokenizer
    import llmcourse.converter as converter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "permute", lambda w, n: w)
        bad = to_gguf(folder, room / f"{shape}-bad.gguf")
    assert parity(bad, model, AutoTokenizer.from_pretrained(folder), ["What is 47 plus 38?"], 8)["gap"] > 1e-3


# --- tokenizers -----------------------------------------------------------------------------------------------


def steps_of(name):
    from tokenizers import pre_tokenizers as pre

    return {
        "gpt-2": [pre.ByteLevel(add_prefix_space=False)],
        "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
    }[name]


LONG = ("a b", "b c", "a bc")  # "abc" is a token that its merges do not lead to


@pytest.mark.parametrize(
    "name, options",
    {
        "llama-bpe": {},
        "qwen2": dict(split=QWEN2, ignore_merges=False, bos=False),
        "gpt-2": dict(steps="gpt-2", ignore_merges=False, bos=False),
        "smollm": dict(steps="smollm", ignore_merges=False, bos=False),
        "smaug-bpe": dict(ignore_merges=False, merges=LONG),
    }.items(),
)
def test_each_pre_tokenizer_reads_as_transformers_does(name, options, tmp_path):
    "`to_gguf` itself compares token ids; here we see that the name is the one we mean, and that llama.cpp accepts it."
    options = dict(options)
    if "steps" in options:
        options["steps"] = steps_of(options["steps"])
    tok = make_tokenizer(**options)
    assert pre_tokenizer(tok) == name
    make_model(tmp_path / "m", tokenizer=tok, num_hidden_layers=1)
    in_a_row = 2  # all added tokens, forwards and backwards
    assert check_tokens(to_gguf(tmp_path / "m", tmp_path / "m.gguf", "q8_0"), tok) == len(TEXTS) + len(
        tok.added_tokens_decoder
    ) + in_a_row + len(CHATS)


def test_ignore_merges_is_noticed_only_where_it_matters():
    assert pre_tokenizer(make_tokenizer(ignore_merges=False)) == "llama-bpe"  # every token is reached by its merges
    assert pre_tokenizer(make_tokenizer(ignore_merges=False, merges=LONG)) == "smaug-bpe"
    with pytest.raises(UserError, match="ignore_merges"):
        pre_tokenizer(make_tokenizer(split=QWEN2, merges=LONG))


def test_tokenizers_that_we_cannot_prove_are_refused(tmp_path):
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers as pre

    byte = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    cases = {
        "pre-tokenizer": dict(split=r"\p{L}+|\s+"),
        "normalises": dict(normalizer=normalizers.NFC()),
        "pre-tokenizer cuts": dict(steps=[pre.ByteLevel(add_prefix_space=True)]),
        "cuts by": dict(steps=[pre.Split(Regex(LLAMA3), "removed"), byte]),
    }
    for message, options in cases.items():
        with pytest.raises(UserError, match=message):
            pre_tokenizer(make_tokenizer(**options))
    tok = make_tokenizer()
    tok.add_tokens([AddedToken("<tail>", rstrip=True)])
    with pytest.raises(UserError, match="spaces beside"):
        pre_tokenizer(tok)
    make_model(tmp_path / "m", tokenizer=make_tokenizer(split=r"\p{L}+|\s+"), num_hidden_layers=1)
    with pytest.raises(UserError, match="pre-tokenizer"):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]  # nothing half-written


def test_added_tokens_that_overlap_are_compared(tmp_path):
    "llama.cpp looks for the longest added token first, tokenizers for the leftmost."
    from tokenizers import AddedToken

    tok = make_tokenizer()
    tok.add_tokens([AddedToken("<ab", normalized=False), AddedToken("b<c>", normalized=False)])
    make_model(tmp_path / "m", tokenizer=tok, num_hidden_layers=1)
    with pytest.raises(UserError, match="reads '<ab<c>'"):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")


def test_all_added_tokens_are_compared(tmp_path):
    "Also the last of very many."
    from llmcourse.gguf_tokens import special_texts

    tok = make_tokenizer()
    tok.add_special_tokens({"additional_special_tokens": [f"<|extra_{i}|>" for i in range(300)]})
    texts = special_texts(tok)
    assert all(any(f"a{t.content}b" in text for text in texts) for t in tok.added_tokens_decoder.values())


@pytest.mark.parametrize("wrong", ["default", "gpt-2", "qwen2"])
def test_wrong_pre_tokenizer_is_caught(wrong, tmp_path, monkeypatch):
    "Planted fault: llama.cpp loads the file without a word, and reads digits and spaces differently."
    import llmcourse.converter as converter

    make_model(tmp_path / "m", tokenizer=make_tokenizer(merges=("1 2", "Ġ 1", "Ġ (")), num_hidden_layers=1)
    monkeypatch.setattr(converter, "pre_tokenizer", lambda tokenizer: wrong)
    with pytest.raises(UserError, match="they part at token"):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_template_without_the_bos_that_the_tokenizer_adds_is_caught(tmp_path):
    "Trained without BOS, served with BOS: llama.cpp puts it in front of every conversation."
    tok = make_tokenizer(template=TEMPLATE.replace("{{ bos_token }}", ""))
    make_model(tmp_path / "m", tokenizer=tok, num_hidden_layers=1)
    with pytest.raises(UserError, match="both add BOS"):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")


def test_base_model_without_chat_template(tmp_path):
    make_model(tmp_path / "m", tokenizer=make_tokenizer(template=None, bos=False), num_hidden_layers=1)
    fields = gguf.GGUFReader(to_gguf(tmp_path / "m", tmp_path / "m.gguf", "q8_0")).fields
    assert "tokenizer.chat_template" not in fields and fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_token_types(gqa):
    types = gguf.GGUFReader(gqa[3]).fields["tokenizer.ggml.token_type"].contents()
    tok = make_tokenizer()
    kinds = {t.content: gguf.TokenType(types[i]).name for i, t in tok.added_tokens_decoder.items()}
    assert kinds == dict.fromkeys(SPECIAL, "CONTROL") | {"<tool>": "USER_DEFINED"}
    assert set(types[:256]) == {gguf.TokenType.NORMAL} and set(types[len(tok) :]) <= {gguf.TokenType.UNUSED}


# --- what cannot be exported ----------------------------------------------------------------------------------


def test_models_that_we_cannot_export_are_refused(tmp_path):
    def edit(name, **changes):
        make_model(tmp_path / name, num_hidden_layers=1)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / name

    cases = {
        "MistralForCausalLM": dict(architectures=["MistralForCausalLM"]),
        "rope scaling": dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
        "gelu": dict(hidden_act="gelu"),
        "has shape": dict(intermediate_size=128),
        "is missing": dict(num_hidden_layers=2),
        "not part of": dict(num_hidden_layers=0),
    }
    for i, (message, changes) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            to_gguf(edit(f"m{i}", **changes), tmp_path / "out.gguf")
    with pytest.raises(UserError, match="did you mean 'f16'"):
        to_gguf(tmp_path / "m0", tmp_path / "out.gguf", "fp16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json"):
        to_gguf(tmp_path / "empty", tmp_path / "out.gguf")
    (tmp_path / "m3" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        to_gguf(tmp_path / "m3", tmp_path / "out.gguf")
    edit("heads", num_attention_heads=7)
    with pytest.raises(UserError, match="heads: no config.json that .* not a multiple"):
        to_gguf(tmp_path / "heads", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_broken_weights_are_named(tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=1)
    file, index = tmp_path / "m/model.safetensors", tmp_path / "m/model.safetensors.index.json"
    whole = file.read_bytes()
    for broken in (b"", b"xx", whole[:100], whole[:-100]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
            to_gguf(tmp_path / "m", tmp_path / "out.gguf")
    file.unlink()
    (tmp_path / "m/model-1.safetensors").write_bytes(whole)
    ints, outside = '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../m/model-1.safetensors"}}'
    broken = ("{", "[]", "{}", '{"weights": {}}', '{"weight_map": {}}', '{"weight_map": ["a"]}', ints, outside)
    for text in broken:
        index.write_text(text)
        with pytest.raises(UserError, match="no index of weights"):
            to_gguf(tmp_path / "m", tmp_path / "out.gguf")
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(UserError, match="model-2.safetensors is missing"):
        to_gguf(tmp_path / "m", tmp_path / "out.gguf")
    with pytest.raises(UserError, match="Hub .no network."), pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
        to_gguf("nobody/nothing", tmp_path / "out.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_the_weights_that_transformers_loads_are_exported(tmp_path):
    "An older file beside model.safetensors, or an index left behind, changes nothing."
    import shutil

    from transformers import AutoModelForCausalLM

    make_model(tmp_path / "m", num_hidden_layers=1)
    want = to_gguf(tmp_path / "m", tmp_path / "want.gguf", verify=False).read_bytes()
    new, old = tmp_path / "m/model.safetensors", tmp_path / "m/model_old.safetensors"
    with_norm(shutil.copy(new, old), 5.0)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model_old.safetensors"}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    assert to_gguf(tmp_path / "m", tmp_path / "got.gguf", verify=False).read_bytes() == want
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"  # which is long gone
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    assert to_gguf(tmp_path / "m", tmp_path / "got.gguf", verify=False).read_bytes() == want
    shutil.copy(tmp_path / "m/model.safetensors", tmp_path / "m/model-00001-of-00001.safetensors")
    new.unlink()
    index["weight_map"] = dict.fromkeys(tensor_index_of(old), "model_old.safetensors")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    norm = AutoModelForCausalLM.from_pretrained(tmp_path / "m").model.norm.weight
    tensors = gguf.GGUFReader(to_gguf(tmp_path / "m", tmp_path / "got.gguf", verify=False)).tensors
    assert (next(t.data for t in tensors if t.name == "output_norm.weight") == norm.tolist()).all() and norm[0] == 5
    (tmp_path / "m/model.safetensors.index.json").unlink()  # transformers loads nothing without one of the two
    with pytest.raises(UserError, match="no model.safetensors"):
        to_gguf(tmp_path / "m", tmp_path / "got.gguf")


def tensor_index_of(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return list(f.keys())


def with_norm(file, value, name="model.norm.weight", at=...):
    "Change numbers in a safetensors file."
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[name][at] = value
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "kind, value, why",
    [(kind, v, why) for kind in (*DTYPES, "Q4_K_M") for v, why in ((np.nan, "NaN"), (-np.inf, "an infinity"))]
    + [("f16", 1e5, "F16 ends at"), ("q8_0", -1e7, "Q8_0 ends at"), ("Q4_0", 1e6, "Q4_0 ends at")],
)
def test_numbers_that_are_none_or_do_not_fit_are_refused(kind, value, why, tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=1)
    with_norm(tmp_path / "m/model.safetensors", value, UP, (3, 4))
    with pytest.raises(UserError, match=f"model.safetensors: {UP} holds .*{why}"):
        to_gguf(tmp_path / "m", tmp_path / "out.gguf", kind, verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_numbers_that_fit_pass(tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=1)
    with_norm(tmp_path / "m/model.safetensors", 65504.0, UP, (3, 4))
    for kind in (*DTYPES, "Q4_0", "Q4_K_M"):
        reader = gguf.GGUFReader(to_gguf(tmp_path / "m", tmp_path / "out.gguf", kind, verify=False))
        data = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
        assert np.isfinite(gguf.quants.dequantize(data.data, data.tensor_type)).all(), kind


def test_nan_in_a_gguf_is_not_quantised(gqa, tmp_path):
    reader = gguf.GGUFReader(gqa[3])
    norm = next(t for t in reader.tensors if t.name == "output_norm.weight")
    raw = bytearray(gqa[3].read_bytes())
    raw[norm.data_offset : norm.data_offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(raw)
    with pytest.raises(UserError, match="nan.gguf: output_norm.weight holds NaN"):
        quantize(tmp_path / "nan.gguf", tmp_path / "q.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["nan.gguf"]


@pytest.mark.parametrize("edit", ["shorter", "shifted", "alias", "other type", "negative", "nothing"])
def test_a_header_that_contradicts_itself_is_refused(edit, tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=1)
    file = tmp_path / "m/model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    low, high = header[UP]["data_offsets"]
    header[UP] |= {
        "shorter": {"data_offsets": [low, high - 4]},
        "shifted": {"data_offsets": [low + 4, high + 4]},
        "alias": {"data_offsets": header[UP.replace("up", "gate")]["data_offsets"]},
        "other type": {"dtype": "BF16"},
        "negative": {"shape": [-1, 256]},
        "nothing": {"shape": []},
    }[edit]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        to_gguf(tmp_path / "m", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "text, why",
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n", "a pointer of Git LFS"),
        ("<!DOCTYPE html>\n<html><body>Please log in</body></html>", "a web page"),
        ("", "empty"),
    ],
)
def test_what_lies_in_the_place_of_weights_is_named(text, why, tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=1)
    (tmp_path / "m/model.safetensors").write_text(text)
    with pytest.raises(UserError, match=why):
        to_gguf(tmp_path / "m", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "broken",
    {
        "text for a number": dict(factor="8"),
        "no ramp": dict(low_freq_factor=1.0, high_freq_factor=1.0),
        "a key is missing": dict(factor=None),
    }.items(),
    ids=str,
)
def test_rope_that_cannot_be_computed_is_refused(broken, tmp_path):
    make_model(tmp_path / "m", "head_dim", num_hidden_layers=1)
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {k: v for k, v in (ROPE | broken[1]).items() if v is not None}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="m: .*rope"):
        to_gguf(tmp_path / "m", tmp_path / "out.gguf", verify=False)


@pytest.mark.parametrize("text", ["license: [", "tags: 5\nlicense: {a: b}\nbase_model: 7\ndatasets: {}", "- a"])
def test_a_broken_model_card_does_not_stop_an_export(text, tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=1)
    (tmp_path / "m/README.md").write_text(f"---\n{text}\n---\n# A model\n")
    assert to_gguf(tmp_path / "m", tmp_path / "out.gguf", verify=False).is_file()


def test_a_disk_that_fills_while_writing(gqa, tmp_path, monkeypatch):
    "The system's own error comes through, so that the command line can say it; nothing is left."
    import errno

    import llmcourse.gguf_file as gguf_file

    def full(file, arrays, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_file, "_append", full)
    with pytest.raises(OSError) as e:
        to_gguf(gqa[1], tmp_path / "out.gguf", verify=False)
    assert e.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    from llmcourse.gguf_file import write_gguf

    monkeypatch.undo()
    with open("/dev/full", "wb", buffering=0) as device, pytest.raises(OSError) as e:
        gguf_file._append(Device(device), [np.zeros(2**20, np.float32)], 2**22)
    assert e.value.errno == errno.ENOSPC and write_gguf


class Device:
    "A file on a full disk, which still knows where it is."

    def __init__(self, device):
        self.device, self.at = device, 0

    def tell(self):
        return self.at

    def write(self, data):
        self.at += len(memoryview(data).cast("B")) if len(data) else 0
        return self.device.write(data) if len(data) else 0


def test_another_architecture_is_not_quantised(tmp_path):
    from llmcourse.gguf_file import write_gguf

    w = np.zeros((32, 32), np.float32)
    write_gguf(tmp_path / "other.gguf", lambda writer: None, {"w.weight": ("F32", w.shape)}, [w])
    with pytest.raises(UserError, match="other.gguf: no llama.block_count"):
        quantize(tmp_path / "other.gguf", tmp_path / "q.gguf")


def test_no_room_on_the_disk(gqa, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match="MB free"):
        to_gguf(gqa[1], tmp_path / "out.gguf")
    with pytest.raises(UserError, match="MB free"):
        quantize(gqa[3], tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_merged_first(room, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    net = get_peft_model(make_model(base, "gqa", num_hidden_layers=2), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.linspace(-0.05, 0.05, p.numel()).reshape(p.shape))
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(tmp_path / "adapter")
    f32 = to_gguf(tmp_path / "adapter", tmp_path / "merged.gguf")
    found = parity(f32, net.merge_and_unload(), AutoTokenizer.from_pretrained(base), ["What is 47 plus 38?"], 8)
    assert found["same"] == 1 and found["gap"] < 1e-4


# --- quantising -----------------------------------------------------------------------------------------------


def test_at_once_is_the_same_as_in_two_steps(exported, tmp_path):
    shape, folder, _, f32 = exported
    for kind in KINDS:
        one = to_gguf(folder, tmp_path / "one.gguf", kind, verify=False, threads=2)
        assert one.read_bytes() == quantize(f32, tmp_path / "two.gguf", kind).read_bytes(), kind


def test_slabs_make_the_same_file(gqa, tmp_path, monkeypatch):
    import llmcourse.tensors as tensors

    whole = to_gguf(gqa[1], tmp_path / "whole.gguf", "bf16", verify=False).read_bytes()
    monkeypatch.setattr(tensors, "SLAB", 3000)  # 11 rows, or one head where a head must stay together
    assert to_gguf(gqa[1], tmp_path / "slabs.gguf", "bf16", verify=False).read_bytes() == whole


def test_a_large_tensor_needs_no_large_memory(tmp_path):
    "640 MB of embeddings in float32, in a process of its own: at most a tenth of them more than for a small model."
    import subprocess
    import sys

    import torch
    from safetensors.torch import save_file

    make_model(tmp_path / "small", num_hidden_layers=1, tie_word_embeddings=True)
    make_model(tmp_path / "large", num_hidden_layers=1, tie_word_embeddings=True)
    config = tmp_path / "large/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 625_000}))
    tensors = {n: torch.zeros(s) for n, s in llama_shapes(tmp_path / "large").items()}
    save_file(tensors, tmp_path / "large/model.safetensors", metadata={"format": "pt"})
    del tensors
    code = (
        "import sys, resource; from llmcourse.converter import to_gguf; "
        "from pathlib import Path; import llmcourse.converter as c; c.add_tokenizer = lambda *_: None; "
        "to_gguf(sys.argv[1], sys.argv[2], 'Q8_0', verify=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)"
    )
    peak = {}
    for name in ("small", "large"):
        words = [sys.executable, "-c", code, tmp_path / name, tmp_path / f"{name}.gguf"]
        peak[name] = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert peak["large"] - peak["small"] < 100, peak


def llama_shapes(folder):
    from llmcourse.tensors import expected_tensors

    return expected_tensors(json.loads((folder / "config.json").read_text()))


def test_long_lists_are_read_as_the_library_reads_them(gqa):
    from llmcourse.gguf_file import read_gguf

    ours, theirs = read_gguf(gqa[3]), gguf.GGUFReader(gqa[3])
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert ours.fields[key].contents() == field.contents() and ours.fields[key].types == field.types, key
    assert all((a.data == b.data).all() and a.name == b.name for a, b in zip(ours.tensors, theirs.tensors, strict=True))


def test_a_gguf_cut_anywhere_is_refused(gqa, tmp_path):
    from llmcourse.gguf_file import read_gguf

    whole = gqa[3].read_bytes()
    for size in (4, 10, 30, 300, 5000, 6001, 9003, 20_000, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole GGUF"):
            read_gguf(tmp_path / "cut.gguf")


def test_sizes_are_known_beforehand(gqa, tmp_path):
    for kind in ("Q8_0", "Q4_K_M", "Q2_K"):
        plan = plan_types(gqa[3], kind)
        path = quantize(gqa[3], tmp_path / "q.gguf", kind, threads=2)
        tensors = gguf.GGUFReader(path).tensors
        assert {t.name: (t.tensor_type.name, t.n_bytes) for t in tensors} == {
            n: (k, size) for n, (k, _, size) in plan.items()
        }
        assert path.stat().st_size - sum(size for *_, size in plan.values()) < 60_000  # header, vocabulary, padding


def test_quantised_files_run_and_stay_close(gqa, tmp_path):
    shape, _, _, f32 = gqa
    with Engine(f32) as engine:
        ids = engine.tokenize("What is 47 plus 38? Ones: 7 + 8 = 15, carry the one.")
    contexts = [ids[:n] for n in range(2, len(ids), 3)]
    p = next_logprobs(f32, contexts)
    assert p.shape[0] == len(contexts) and np.allclose(np.exp(p).sum(1), 1, atol=1e-4)
    kl = {}
    for kind in ("Q8_0", "Q4_K_M", "Q2_K"):
        q = next_logprobs(quantize(f32, tmp_path / f"{kind}.gguf", kind), contexts)
        kl[kind] = float((np.exp(p) * (p - q)).sum(1).mean())
    assert 0 <= kl["Q8_0"] < kl["Q4_K_M"] < kl["Q2_K"]


def test_only_float_files_are_quantised(gqa, tmp_path):
    q8 = quantize(gqa[3], tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(UserError, match="Q8_0 already"):
        quantize(q8, tmp_path / "q4.gguf")
    with pytest.raises(UserError, match="did you mean 'Q4_K_M'"):
        quantize(gqa[3], tmp_path / "q4.gguf", "Q4_KM")
    with pytest.raises(UserError, match="no such file"):
        quantize(tmp_path / "none.gguf", tmp_path / "q4.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match="not a whole GGUF"):
        quantize(tmp_path / "bad.gguf", tmp_path / "q4.gguf")
    assert not (tmp_path / "q4.gguf").exists()


def test_a_library_that_does_something_else_is_refused(monkeypatch):
    import llmcourse.quantizers as quantizers

    monkeypatch.setattr(quantizers, "quantize_rows", lambda rows, kind, lib: np.zeros(1, np.uint8))
    quantizers.ggml.cache_clear()
    with pytest.raises(UserError, match="xllamacpp=="):
        quantizers.ggml()

    class Bare:
        pass

    monkeypatch.setattr(quantizers.ctypes, "CDLL", lambda path: Bare())
    with pytest.raises(UserError, match="no ggml_quantize_chunk"):
        quantizers.ggml()
    quantizers.ggml.cache_clear()


@pytest.mark.parametrize(
    "broken, why",
    [
        (lambda b: b"", "failed to read magic"),
        (lambda b: b"GGUF and no more, nothing that loads", "version"),
        (lambda b: b[:5000], "failed to read key-value pairs"),
        (lambda b: b[:2_000_000], "corrupted or incomplete"),
        (lambda b: b.replace(b"llama", b"zebra"), "unknown model architecture: 'zebra'"),
    ],
    ids=["empty", "no header", "half a header", "half a file", "another architecture"],
)
def test_engine_says_why_a_file_does_not_load(gqa, tmp_path, broken, why):
    (tmp_path / "bad.gguf").write_bytes(broken(gqa[3].read_bytes()))
    engine = Engine(tmp_path / "bad.gguf")
    with pytest.raises(UserError, match=f"bad.gguf: llama.cpp cannot load it: .*{why}") as e, engine:
        pass
    assert "\n" not in str(e.value) and not engine.child.alive and not engine.child.folder.exists()


@pytest.mark.parametrize("cut", [0, 3, 4, 8, 24, 40, 100, 1000, 5000, 20_000, 100_000, 1_000_000, -1, -5000])
def test_the_reason_is_never_a_line_about_the_build(gqa, tmp_path, cut):
    (tmp_path / "bad.gguf").write_bytes(gqa[3].read_bytes()[:cut])
    with pytest.raises(UserError, match="cannot load it: ") as e, Engine(tmp_path / "bad.gguf"):
        pass
    assert "unknown" not in str(e.value) and "build" not in str(e.value) and len(str(e.value).split(": ")[-1]) > 10


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    net = get_peft_model(make_model(base, "gqa", num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_not_whole_is_not_called_a_stranger(adapter, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for broken in (b"", whole[:50], whole[:-20], b"version https://git-lfs.github.com/spec/v1"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="adapter_model.safetensors: not a whole safetensors file"):
            to_gguf(adapter, tmp_path / "out.gguf")
    file.unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors. Save"):
        to_gguf(adapter, tmp_path / "out.gguf")
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="only a pickled .bin"):
        to_gguf(adapter, tmp_path / "out.gguf")
    file.write_bytes(whole)
    grown = load_file(file) | {"base_model.model.model.embed_tokens.weight": torch.zeros(300, 256)}
    save_file(grown, file)
    with pytest.raises(UserError, match=r"300 token embeddings, .* has 269.*resize_token_embeddings\(300\)"):
        to_gguf(adapter, tmp_path / "out.gguf")


@pytest.mark.parametrize("text", ["[]", "3", '"base"', "{", '{"base_model_name_or_path": 3}', "{}"])
def test_an_adapter_config_that_is_none(text, adapter, tmp_path):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json: "):
        to_gguf(adapter, tmp_path / "out.gguf")


def test_the_name_of_an_adapter_is_in_the_file(adapter, tmp_path):
    "And not that of a folder in /tmp; so two exports are equal."
    one = to_gguf(adapter, tmp_path / "one.gguf", verify=False)
    assert one.read_bytes() == to_gguf(adapter, tmp_path / "two.gguf", verify=False).read_bytes()
    assert gguf.GGUFReader(one).fields["general.name"].contents() == "adapter"


# --- from the command line --------------------------------------------------------------------------------------

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
COUNTING = TEMPLATE.replace("'<|eot_id|>'", "('' if loop.index == 3 else '<|eot_id|>')")


def test_a_template_that_ollama_cannot_say_is_exported_and_served(tmp_path, capsys):
    from llmcourse.cli import main
    from llmcourse.shipping import served

    make_model(tmp_path / "m", tokenizer=make_tokenizer(template=COUNTING), num_hidden_layers=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/Modelfile").write_text("# ollama create NAME -f Modelfile\nFROM ./an-earlier-one.gguf\n")
    words = ["export", "--model", str(tmp_path / "m"), "--output", str(tmp_path / "out"), "--despite-parity"]
    assert main(words) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m-Q8_0.gguf"]
    said = capsys.readouterr()
    assert "no Modelfile for Ollama" in said.err and "more than put constant text" in said.err
    assert "llmcourse serve --model" in said.err and "m-Q8_0.gguf" in said.out
    for model in (tmp_path / "m", tmp_path / "out"):
        with served(model) as server:
            reply = server.client().chat.completions.create(
                model=server.name, messages=CHATS[0], max_tokens=3, temperature=0
            )
        assert reply.usage.completion_tokens == 3


@pytest.mark.parametrize(
    "template, said", [(None, "has no chat template"), (NO_SYSTEM, "takes no system prompt")], ids=["none", "no system"]
)
def test_what_ollama_will_lack_is_said_in_the_modelfile(template, said, gqa, tmp_path):
    tok = make_tokenizer(template=template)
    text = modelfile(gqa[3], tok, tmp_path / "Modelfile").read_text()
    assert said in text and text.startswith("# ollama create") and "\nFROM " in text and "PARAMETER stop" in text
    assert ('TEMPLATE """{{ .Prompt }}"""' in text) == (template is None)


@pytest.mark.parametrize("quant", ["q4_k_m", "Q4_k_M", "Q4_K_M"])
def test_types_in_any_case(quant, tmp_path):
    from llmcourse.shipping import export_folder

    files = export_folder("tutor/sft", tmp_path, quant)
    assert [p.name for p in files] == ["sft-Q4_K_M.gguf", "Modelfile"]
    with pytest.raises(UserError, match="did you mean 'Q4_K_M'"):
        export_folder("tutor/sft", tmp_path, "q4_k_mm")


def test_the_quantised_file_of_the_command_is_that_of_the_quantiser(exported, tmp_path):
    from llmcourse.shipping import export_folder

    shape, folder, _, f32 = exported
    for kind in ("Q8_0", "Q6_K"):
        made = export_folder(folder, tmp_path, kind)[0]
        assert made.read_bytes() == quantize(f32, tmp_path / "two.gguf", kind).read_bytes()


# --- small parts ----------------------------------------------------------------------------------------------


def test_permute_pairs_the_halves_of_each_head():
    assert permute(np.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert permute(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_factors_stretch_only_long_waves():
    factors = rope_factors(dict(head_dim=64, rope_parameters=ROPE))
    assert factors[0] == 1 and factors[-1] == 8 and (np.diff(factors) >= 0).all() and len(factors) == 32
    assert rope_factors(dict(head_dim=64, rope_parameters=dict(rope_type="default", rope_theta=1e4))) is None


# --- Modelfile ------------------------------------------------------------------------------------------------


def go(template, messages):
    """The little of Go's text/template that our Modelfiles use. (Go 1.27's own engine gave the same texts when this
    was written.)"""
    import re

    parts = re.split(r"\{\{ (.*?) \}\}", template)  # text, action, text, action, …
    system = any(m["role"] == "system" for m in messages)

    def block(i, dot):
        "Run from part i to the end of the block; give the text and where it ended."
        out = parts[i]
        while i + 1 < len(parts):
            action, i = parts[i + 1], i + 2
            if action == "end" or action.startswith("else if"):
                return out, i - 1
            if action == ".Content":
                out += dot["content"]
            elif action == "range .Messages":
                for m in messages:
                    text, at = block(i, m)
                    out += text
                i = at + 1
            elif action.startswith("if"):
                done = False
                while True:
                    yes = (
                        not system
                        if action == "if not .System"
                        else re.search(r'eq .Role "(\w+)"', action)[1] == (dot or {}).get("role")
                    )
                    text, at = block(i, dot)
                    if yes and not done:
                        out, done = out + text, True
                    action, i = parts[at], at + 1
                    if action == "end":
                        break
            out += parts[i]
        return out, i

    return block(0, None)[0]


CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe "
    "nice.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string|default('1 Jan 2024') "
    "+ '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content']|trim }}{% set messages = messages[1:] %}{% "
    "endif %}{{ '<|eot_id|>' }}" + TEMPLATE.replace("{{ bos_token }}", "")
)


@pytest.mark.parametrize(
    "template, bos",
    [(TEMPLATE, True), (CHATML, False), (DATED, True), (NO_SYSTEM, True)],
    ids=["llama3", "chatml with a default system", "llama3.1 with a date", "no system prompt"],
)
def test_modelfile_says_what_the_chat_template_says(template, bos, gqa, tmp_path):
    tok = make_tokenizer(template=template, bos=bos)
    text = modelfile(gqa[3], tok, tmp_path / "Modelfile").read_text()
    body = text.split('"""')[1]
    for chat in [c for c in CHATS if template != NO_SYSTEM or c[0]["role"] != "system"]:
        want = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        assert go(body, chat) == want.removeprefix(tok.bos_token if bos else "")


def test_modelfile_has_all_it_needs(gqa, tmp_path):
    tok = make_tokenizer()
    lines = modelfile(gqa[3], tok, tmp_path / "Modelfile", num_ctx=256).read_text().splitlines()
    stops = {line.split('"')[1] for line in lines if line.startswith("PARAMETER stop")}
    assert stops == {"<|eot_id|>", "<|end_of_text|>"} and "PARAMETER num_ctx 256" in lines
    source = next(line for line in lines if line.startswith("FROM ")).removeprefix("FROM ")
    assert (tmp_path / source).resolve() == Path(gqa[3]).resolve()
    assert "<|begin_of_text|>" not in "".join(lines)  # the engine adds it
    with pytest.raises(UserError, match="made for 512"):
        modelfile(gqa[3], tok, tmp_path / "Modelfile", num_ctx=1000)


@pytest.mark.parametrize(
    "template, message",
    [
        (
            TEMPLATE.replace("'<|eot_id|>'", "('' if loop.index == 3 else '<|eot_id|>')"),
            "more than",
        ),  # counts the turns
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", "refuses a user"),
        (TEMPLATE.replace("\n\n", " {{ ", 1), "cannot"),
        (TEMPLATE.replace("\n\n", "\u200b", 1), "cannot"),
    ],
)
def test_templates_that_a_modelfile_cannot_say_are_refused(template, message, gqa, tmp_path):
    with pytest.raises(UserError, match=message):
        modelfile(gqa[3], make_tokenizer(template=template), tmp_path / "Modelfile")
    assert not list(tmp_path.iterdir())
