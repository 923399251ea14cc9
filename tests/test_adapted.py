"""Adapters, merged tensor by tensor while they are converted, against PEFT's merge of the whole model."""

import json
import os
import signal
import subprocess
import sys

import pytest
from llmcourse import converter
from llmcourse.converter import to_gguf
from llmcourse.core import UserError
from test_export import make_model, make_tokenizer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINED = ["embed_tokens", "lm_head"]
ONE_AT_A_TIME = {
    "lora": dict(target_modules=ALL),
    "rank 1": dict(r=1, target_modules=ALL),
    "large rank": dict(r=100, target_modules=ALL),
    "rslora": dict(r=8, use_rslora=True, target_modules=ALL),
    "patterns": dict(
        target_modules=ALL, rank_pattern={"v_proj": 9, "layers.1.mlp.up_proj": 3}, alpha_pattern={"layers.0.*": 40}
    ),
    "fan in": dict(fan_in_fan_out=True, target_modules=["q_proj", "down_proj"]),
    "one layer": dict(target_modules=ALL, layers_to_transform=[1]),
    "dora": dict(use_dora=True, target_modules=ALL),
    "dora and rslora": dict(use_dora=True, use_rslora=True, r=8, target_modules=["v_proj", "up_proj"]),
    "norms": dict(target_modules=ALL, modules_to_save=["norm", "input_layernorm"]),
    "a layer whole": dict(target_modules=["q_proj"], modules_to_save=["v_proj"]),
    "embeddings whole": dict(target_modules=ALL, modules_to_save=["embed_tokens"]),
    "head whole": dict(target_modules=ALL, modules_to_save=["lm_head"]),
    "both whole": dict(target_modules=ALL, modules_to_save=TRAINED),
    "embeddings": dict(target_modules=[*ALL, "embed_tokens"]),
    "head": dict(target_modules=[*ALL, "lm_head"]),
    "both": dict(target_modules=[*ALL, *TRAINED]),
    "embeddings, head whole": dict(target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    "tokens": dict(target_modules=ALL, trainable_token_indices=[3, 200, 7]),
}
WHOLE = {
    "bias": (dict(target_modules=["q_proj"], bias="lora_only"), "bias=lora_only"),
    "pissa": (dict(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights=pissa"),
    "dora of embeddings": (dict(target_modules=["embed_tokens"], use_dora=True), "DoRA of the embeddings"),
    "dora and dora": (dict(target_modules=TRAINED, use_dora=True), "DoRA of the embeddings"),
    "tied on purpose": (dict(target_modules=["q_proj"], ensure_weight_tying=True), "ensure_weight_tying=True"),
}


def make_adapter(base, folder, dtype=None, load=None, **options):
    "An adapter of random numbers, saved as PEFT saves it."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    net = load or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    net = get_peft_model(net, LoraConfig(**dict(r=4, lora_alpha=7, task_type="CAUSAL_LM") | options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    if dtype:
        net.to(getattr(torch, dtype))
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(folder)
    return folder


def by_peft(adapter, output, kind="f32"):
    "The file that comes of PEFT's merge of the whole model, in float32."
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((adapter / "adapter_config.json").read_text())
    net = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    net = PeftModel.from_pretrained(net, adapter).merge_and_unload()
    merged = output.parent / "merged" / adapter.name
    net.save_pretrained(merged)
    AutoTokenizer.from_pretrained(config["base_model_name_or_path"]).save_pretrained(merged)
    return named(to_gguf(merged, output, kind, verify=False))


def named(made):
    "A file's bytes, with the name that an adapter's has: gguf writes a folder's in capitals."
    return made.read_bytes().replace(b"Adapter", b"adapter", 1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Tied in bfloat16, with nine layers of grouped heads; untied in float32, with biases and odd widths, in pieces."
    room = tmp_path_factory.mktemp("bases")
    tokenizer = make_tokenizer()
    make_model(room / "tied", "gqa", "bfloat16", tokenizer, num_hidden_layers=2)
    make_model(room / "untied", "untied", "float32", tokenizer, save={"max_shard_size": "100KB"})
    make_model(room / "half", "head_dim", "float16", tokenizer)
    return room


@pytest.fixture
def one_at_a_time(monkeypatch):
    "Whoever loads a whole model fails."
    monkeypatch.setattr(converter, "load", None)


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("options", ONE_AT_A_TIME.values(), ids=list(ONE_AT_A_TIME))
def test_the_file_is_that_of_pefts_merge(options, base, bases, tmp_path, one_at_a_time):
    adapter = make_adapter(bases / base, tmp_path / "adapter", **options)
    for kind in ("f32", "Q8_0"):
        made = to_gguf(adapter, tmp_path / "made.gguf", kind, verify=False).read_bytes()
        assert made == by_peft(adapter, tmp_path / "want.gguf", kind)
    assert made != to_gguf(bases / base, tmp_path / "base.gguf", "Q8_0", verify=False).read_bytes()


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["tied", "half"])
def test_sixteen_bits_are_merged_in_float32(base, stored, bases, tmp_path, one_at_a_time):
    "Whatever the base and the adapter are stored in: the sum is never rounded to 16 bits."
    options = ONE_AT_A_TIME["embeddings, head whole"] if stored == "float16" else ONE_AT_A_TIME["dora"]
    adapter = make_adapter(bases / base, tmp_path / "adapter", stored, **options)
    made = to_gguf(adapter, tmp_path / "made.gguf", verify=False).read_bytes()
    assert made == by_peft(adapter, tmp_path / "want.gguf")


def test_slabs_and_threads_change_nothing(bases, tmp_path, monkeypatch, one_at_a_time):
    import llmcourse.tensors as tensors

    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=[*ALL, "embed_tokens"])
    want = by_peft(adapter, tmp_path / "want.gguf", "Q4_K_M")
    monkeypatch.setattr(tensors, "SLAB", 3000)
    assert to_gguf(adapter, tmp_path / "made.gguf", "Q4_K_M", verify=False, threads=2).read_bytes() == want


def test_an_adapter_on_an_adapter(bases, tmp_path, one_at_a_time):
    from llmcourse.models import load

    one = make_adapter(bases / "tied", tmp_path / "one", target_modules=ALL, modules_to_save=["embed_tokens"])
    make_tokenizer().save_pretrained(one)
    two = make_adapter(one, tmp_path / "adapter", load=load(one)[0], target_modules=[*ALL, "lm_head"])
    made = to_gguf(two, tmp_path / "made.gguf", verify=False).read_bytes()
    load(two)[0].save_pretrained(tmp_path / "merged/adapter")
    make_tokenizer().save_pretrained(tmp_path / "merged/adapter")
    assert made == named(to_gguf(tmp_path / "merged/adapter", tmp_path / "want.gguf", verify=False))


@pytest.mark.parametrize("options, why", WHOLE.values(), ids=list(WHOLE))
def test_what_only_peft_can_merge_is_said(options, why, bases, tmp_path, capsys):
    adapter = make_adapter(bases / "untied", tmp_path / "adapter", **options)
    made = to_gguf(adapter, tmp_path / "made.gguf", verify=False).read_bytes()
    assert f"adapter: {why}: PEFT merges it, the whole model at once" in capsys.readouterr().err
    assert made == by_peft(adapter, tmp_path / "want.gguf")


def test_trained_tokens_under_a_lora_of_a_tied_head_are_refused(bases, tmp_path):
    "PEFT leaves its own layer in the model, which cannot be saved."
    adapter = make_adapter(
        bases / "tied", tmp_path / "adapter", target_modules=["lm_head"], trainable_token_indices=[0, 9, 268]
    )
    with pytest.raises(UserError, match="lm_head.* has one change inside another"):
        to_gguf(adapter, tmp_path / "made.gguf", verify=False)


def test_a_base_that_is_not_as_its_config_says_is_left_to_peft(bases, tmp_path, capsys):
    "A tied model with a head in its file: transformers decides what that means."
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(bases / "tied", tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tmp_path / "base/model.safetensors")
    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=ALL)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    made = to_gguf(adapter, tmp_path / "made.gguf", verify=False).read_bytes()
    assert "a base with other tensors than its config's" in capsys.readouterr().err
    assert made == by_peft(adapter, tmp_path / "want.gguf")


def test_an_adapter_for_another_model_is_refused(bases, tmp_path, one_at_a_time):
    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=ALL)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, why in (("half", "does not fit"), ("none", "no such folder")):
        config["base_model_name_or_path"] = str(bases / base)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=why):
            to_gguf(adapter, tmp_path / "out.gguf", verify=False)
    assert not (tmp_path / "out.gguf").exists()


def test_nan_in_an_adapter_is_named(bases, tmp_path, one_at_a_time):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=["up_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: model.layers.0.mlp.up_proj.weight holds NaN"):
        to_gguf(adapter, tmp_path / "out.gguf", verify=False)


APART = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"  # a parent's peak would count for its child
PEAK = (
    "import sys, resource; import llmcourse.converter as c; c.add_tokenizer = lambda *_: None; "
    "c.to_gguf(sys.argv[1], sys.argv[2], 'Q8_0', verify=False); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)"
)


@pytest.mark.parametrize(
    "targets, tensors", [(["q_proj", "down_proj"], 0), (["q_proj", "embed_tokens"], 1)], ids=["layers", "embeddings"]
)
def test_a_large_model_is_not_held_in_memory(targets, tensors, tmp_path):
    "307 MB of embeddings in float32, untouched: nearly none of it. With a LoRA of their own: one tensor's change."
    import torch
    from safetensors.torch import save_file
    from llmcourse.tensors import expected_tensors

    peak, mb = {}, {}
    for name, vocabulary in (("small", 1000), ("large", 300_000)):
        base, adapter = tmp_path / f"{name}-base", tmp_path / name
        make_model(base, num_hidden_layers=1, tie_word_embeddings=True)
        config = json.loads((base / "config.json").read_text()) | {"vocab_size": vocabulary}
        (base / "config.json").write_text(json.dumps(config))
        shapes = expected_tensors(config)
        save_file({n: torch.zeros(s) for n, s in shapes.items()}, base / "model.safetensors", {"format": "pt"})
        make_adapter(base, adapter, target_modules=targets)
        words = [sys.executable, "-c", APART, sys.executable, "-c", PEAK, adapter, tmp_path / f"{name}.gguf"]
        peak[name] = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        mb[name] = vocabulary * 256 * 4 / 1e6
    assert peak["large"] - peak["small"] < tensors * mb["large"] + 160, peak


def test_killed_in_the_middle_of_a_merge(bases, tmp_path):
    "What is left is swept by the next export."
    adapter = make_adapter(bases / "tied", tmp_path / "adapter", target_modules=ALL)
    code = (
        "import os, signal, sys, llmcourse.adapted as a\n"
        "from llmcourse.cli import main\n"
        "kept, seen = a.change, []\n"
        "def change(*words):\n"
        "    seen.append(words)\n"
        "    if len(seen) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return kept(*words)\n"
        "if sys.argv[1] == 'die': a.change = change\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    (tmp_path / "tmp").mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    words = ["export", "--model", str(adapter), "--output", str(tmp_path / "out"), "--despite-parity"]
    dead = subprocess.run([sys.executable, "-c", code, "die", *words], env=env, capture_output=True, timeout=120)
    assert dead.returncode == -signal.SIGKILL
    half = [*(tmp_path / "out").glob(".adapter*/*.gguf")]
    assert len(half) == 1 and half[0].stat().st_size > 1000
    assert not list((tmp_path / "tmp").rglob("*.safetensors")) and list((tmp_path / "tmp").iterdir())
    assert subprocess.run([sys.executable, "-c", code, "live", *words], env=env).returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "adapter-Q8_0.gguf"]
    assert not list((tmp_path / "tmp").glob("llmcourse-*"))
