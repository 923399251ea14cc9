"""A LoRA as a GGUF of its own: the bytes of llama.cpp's script, and the numbers of PEFT's merge."""

import hashlib
import json

import pytest
from llmcourse.cli import main
from llmcourse.converter import to_gguf
from llmcourse.core import UserError
from llmcourse.engine import Engine
from llmcourse.gguf_adapter import lora_to_gguf
from llmcourse.gguf_file import contents, read_gguf
from test_adapted import ALL, ONE_AT_A_TIME, TRAINED, WHOLE, make_adapter
from test_export import make_model, make_tokenizer

# What convert_lora_to_gguf.py writes, of the llama.cpp beside llama-cpp-python 0.3.36: types, shapes and bytes in file
# order, as `tensors` hashes them
REFERENCE = {
    "tied": (
        dict(target_modules=ALL, rank_pattern={"v_proj": 9}, stored="bfloat16"),
        dict(f32="a74bd159de2fea3a", f16="c3fa0a4aec7203bf", bf16="ca64422f648a23ed", q8_0="d71947e3ce3b87ff"),
    ),
    "untied": (
        dict(target_modules=[*ALL, *TRAINED]),
        dict(f32="3c1de7be67b81ca0", f16="b124c3477cd94ac1", bf16="67ee41a394ce5a29", q8_0="b124c3477cd94ac1"),
    ),
    "half": (
        dict(target_modules=["q_proj", "k_proj", "down_proj"], r=3, lora_alpha=16),
        dict(f32="94cd1eeea78c18ec", f16="85f3f8a56ca2bc8c", bf16="7b6cd5571d9b3162", q8_0="b7f7ef54251678f3"),
    ),
}
BESIDE = [("tied", "lora"), ("tied", "rslora"), ("tied", "patterns"), ("tied", "large rank"), ("untied", "both")]
REFUSED = {
    "dora": "DoRA",
    "norms": "whole tensors, such as model.layers.0.input_layernorm.weight",
    "a layer whole": "whole tensors, such as model.layers.0.self_attn.v_proj",
    "embeddings whole": "whole tensors, such as model.embed_tokens.weight",
    "embeddings": "embeddings that double as the output",
    "tokens": "trained tokens",
    "bias": "bias=lora_only",
    "pissa": "init_lora_weights=pissa",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    room = tmp_path_factory.mktemp("bases")
    tokenizer = make_tokenizer()
    make_model(room / "tied", "gqa", "bfloat16", tokenizer, num_hidden_layers=2)
    make_model(room / "untied", "untied", "float32", tokenizer)
    make_model(room / "half", "head_dim", "float16", tokenizer)
    for name in ("tied", "untied"):
        to_gguf(room / name, room / f"{name}.gguf", verify=False)
    return room


def counted(base, folder, stored="float32", **options):
    "An adapter whose numbers come from integer arithmetic, so that they are the same on every machine."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    net = get_peft_model(net, LoraConfig(**dict(r=4, lora_alpha=7, task_type="CAUSAL_LM") | options))
    with torch.no_grad():
        for k, p in enumerate(p for p in net.parameters() if p.requires_grad):
            n = torch.arange(p.numel(), dtype=torch.int64)
            noise = ((n * 2654435761 + k * 40503) % 2**32 // 2**16).float() / 2**16 - 0.5
            p.copy_((noise * 0.2).reshape(p.shape))
    net.to(getattr(torch, stored))
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(folder)
    return folder


def tensors(file):
    "Names, types, shapes and bytes, in file order."
    h = hashlib.sha256()
    for t in read_gguf(file).tensors:
        h.update(f"{t.name} {t.tensor_type.name} {t.shape.tolist()}".encode() + t.data.tobytes())
    return h.hexdigest()[:16]


@pytest.mark.parametrize("base", REFERENCE)
def test_the_tensors_are_those_of_llama_cpps_script(base, bases, tmp_path):
    options, want = REFERENCE[base]
    adapter = counted(bases / base, tmp_path / "adapter", **options)
    assert {kind: tensors(lora_to_gguf(adapter, tmp_path / f"{kind}.gguf", kind)) for kind in want} == want


def test_what_the_file_says_of_itself(tmp_path):
    made = read_gguf(lora_to_gguf("tutor/sft", tmp_path / "sft-lora.gguf"))
    said = {key: contents(made, key) for key in made.fields if not key.startswith("GGUF.")}
    assert list(said)[:4] == ["general.architecture", "general.type", "adapter.type", "general.name"]
    assert said["general.architecture"] == "llama" and said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora" and said["adapter.lora.alpha"] == 32
    assert said["general.base_model.0.name"] == "Base" and "general.size_label" not in said
    assert "tokenizer.ggml.tokens" not in said and len(made.tensors) == 56


@pytest.mark.parametrize("base, kind", BESIDE)
def test_beside_its_base_it_is_the_merged_model(base, kind, bases, tmp_path):
    "rsLoRA and an alpha of a layer's own, too, which llama.cpp's script gets wrong without a word."
    adapter = make_adapter(bases / base, tmp_path / "adapter", **ONE_AT_A_TIME[kind])
    merged = to_gguf(adapter, tmp_path / "merged.gguf", verify=False)
    beside = lora_to_gguf(adapter, tmp_path / "beside.gguf")
    ids = [0, 5, 77, 130, 9, 33]
    with Engine(bases / f"{base}.gguf", adapter=beside) as two, Engine(merged) as one:
        ours, want = two.logprobs(ids, 300), one.logprobs(ids, 300)
        assert two.generate(ids, 16) == one.generate(ids, 16)
    with Engine(bases / f"{base}.gguf") as bare:
        without = bare.logprobs(ids, 300)
    assert max(abs(ours[i] - p) for i, p in want.items()) < 1e-4
    assert max(abs(without[i] - p) for i, p in want.items()) > 0.02


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_format_cannot_hold_is_refused(kind, bases, tmp_path):
    options = ONE_AT_A_TIME.get(kind) or WHOLE[kind][0]
    adapter = make_adapter(bases / "tied", tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=REFUSED[kind]) as error:
        lora_to_gguf(adapter, tmp_path / "out.gguf")
    assert "without --adapter" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_on_an_adapter(bases, tmp_path):
    "The second one's base is the first one, merged."
    from llmcourse.models import load

    one = make_adapter(bases / "tied", tmp_path / "one", target_modules=ALL)
    make_tokenizer().save_pretrained(one)
    two = make_adapter(one, tmp_path / "two", load=load(one)[0], target_modules=["q_proj", "up_proj"])
    base, merged = (to_gguf(which, tmp_path / f"{which.name}.gguf", verify=False) for which in (one, two))
    with Engine(base, adapter=lora_to_gguf(two, tmp_path / "beside.gguf")) as beside, Engine(merged) as whole:
        ours, want = (engine.logprobs([0, 7, 99, 31], 300) for engine in (beside, whole))
    assert max(abs(ours[i] - p) for i, p in want.items()) < 1e-4


def test_the_command_writes_base_adapter_and_modelfile(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--model", "tutor/sft", "--adapter", "--quant", "f16", "--output", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "base-F16.gguf", "sft-lora.gguf"]
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[1:3] == ["FROM ./base-F16.gguf", "ADAPTER ./sft-lora.gguf"]
    plain = to_gguf("tutor/base", tmp_path / "base.gguf", "f16", verify=False)
    assert plain.read_bytes() == (out / "base-F16.gguf").read_bytes()   # the two share tokenizer and template


def test_the_base_speaks_with_the_adapters_template(bases, tmp_path):
    "A base has seen no chats; the adapter was trained with a template of its own."
    from llmcourse.shipping import export_beside

    adapter = make_adapter(bases / "half", tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("trim", "upper")
    tokenizer.save_pretrained(adapter)
    made = export_beside(adapter, tmp_path / "out", "f32")
    assert contents(read_gguf(made[0]), "tokenizer.chat_template") == tokenizer.chat_template
    assert len(made) == 2   # Go has no `upper` for a Modelfile


@pytest.mark.parametrize("model, why", [("tutor/base", "no adapter"), ("tutor/none", "unknown checkpoint")])
def test_a_whole_model_has_nothing_to_put_beside(model, why, tmp_path, capsys):
    assert main(["export", "--model", model, "--adapter", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert why in said and "\n" not in said and not (tmp_path / "out").exists()


def test_nan_in_an_adapter_is_named(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=["up_proj"])
    numbers = load_file(adapter / "adapter_model.safetensors")
    numbers[min(numbers)][0, 0] = float("nan")
    save_file(numbers, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight.lora_a holds NaN"):
        lora_to_gguf(adapter, tmp_path / "out.gguf")


def test_alpha_of_zero_would_be_read_as_none(bases, tmp_path):
    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=["up_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    with pytest.raises(UserError, match="lora_alpha=0"):
        lora_to_gguf(adapter, tmp_path / "out.gguf")
