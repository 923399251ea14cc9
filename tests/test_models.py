"Chapter 01: counting, loading, rendering and generating, on the tutor and on a second, differently shaped Llama."

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmcourse.card import Run, write_card
from llmcourse.core import UserError, file_hash
from llmcourse.models import (
    BYTES,
    LLAMAS,
    Local,
    encode,
    generate,
    kv_cache_bytes,
    load,
    load_tokenizer,
    parameter_count,
    parameter_parts,
    render,
    stop_ids,
    weight_bytes,
    weights_hash,
)
from llmcourse.pretraining import train_tokenizer

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "01_models.ipynb"
ROPE = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
SHAPE = dict(
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    rope_parameters=ROPE,
)
CHAT = [{"role": "user", "content": "What is 47 plus 38?"}]


def lesson(*names, **known):
    "Run the cells of the notebook that define these names, and give back what they define."
    cells = [
        "".join(c["source"])
        for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    for name in names:
        exec(next(c for c in cells if f"def {name}(" in c), known)
    return known


def new_llama(tokenizer, seed=0, **overrides):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        **SHAPE | overrides,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(n_docs=300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    "A Llama of another shape: grouped heads of odd size, untied, llama3 rope scaling."
    path = tmp_path_factory.mktemp("second") / "model"
    new_llama(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def second(folder):
    return load(folder)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    "A LoRA adapter of the second Llama, with matrices that do something, and a run card."
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("adapter") / "run"
    net = get_peft_model(load(folder)[0], LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    net.save_pretrained(path)
    point(path, folder)
    write_card(Run("sft", model=str(folder), model_hash=file_hash(folder / "model.safetensors")), path)
    return path


def point(adapter, base):
    "Name the base of an adapter."
    place = adapter / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"base_model_name_or_path": str(base)}))


def copied(path, tmp_path, *without):
    to = tmp_path / "copy"
    shutil.copytree(path, to)
    for name in without:
        (to / name).unlink(missing_ok=True)
    return to


# counting


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(tie_word_embeddings=True),
        dict(num_key_value_heads=6),
        dict(num_key_value_heads=1, head_dim=16),
        dict(attention_bias=True),
        dict(mlp_bias=True, attention_bias=True),
        dict(num_hidden_layers=1),
    ],
    ids=str,
)
def test_parameters_by_formula(change):
    config = LlamaConfig(vocab_size=501, **SHAPE | change)
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    assert parameter_count(config) == parameter_count(config.to_dict()) == net.num_parameters()


def test_parameters_without_the_newer_fields():
    old = {k: v for k, v in SHAPE.items() if k not in ("head_dim", "num_key_value_heads", "rope_parameters")} | {
        "vocab_size": 501
    }
    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(**old))
    assert parameter_count(old) == net.num_parameters()


@pytest.mark.parametrize("name, published", zip(LLAMAS, (1_235_814_400, 3_212_749_824, 8_030_261_248, 70_553_706_496)))
def test_parameters_as_published(name, published):
    assert parameter_count(LLAMAS[name]) == sum(parameter_parts(LLAMAS[name]).values()) == published


def test_weight_bytes():
    eight = LLAMAS["Llama 3.1 8B"]
    assert (
        weight_bytes(eight)
        == weight_bytes(eight, "float16")
        == 2 * parameter_count(eight)
        == weight_bytes(eight, "float32") // 2
    )
    assert weight_bytes(eight, "nf4-double") == pytest.approx(5.70e9, rel=2e-3)
    assert weight_bytes(eight, "nf4") == pytest.approx(6.98e9 * 0.5625 + 2.10e9, rel=2e-3)
    sizes = [weight_bytes(eight, d) for d in BYTES]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        weight_bytes(eight, "bfloat6")


def test_weight_bytes_are_the_file(folder):
    config = json.loads((folder / "config.json").read_text())
    assert 0 <= (folder / "model.safetensors").stat().st_size - weight_bytes(config, "float32") < 8192


def test_cache_bytes_are_the_cache(second):
    net, tokenizer = second
    ids = tokenizer(["one two three", "four five six"], return_tensors="pt", padding=True)["input_ids"]
    with torch.no_grad():
        cache = net(input_ids=ids).past_key_values
    assert sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) == kv_cache_bytes(
        net.config, ids.numel(), "float32"
    )
    assert kv_cache_bytes(LLAMAS["Llama 3.1 8B"], 1) == 131_072
    with pytest.raises(UserError, match="dtype of a cache"):
        kv_cache_bytes(net.config, 1, "nf4")


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "no vocab_size"),
        (LLAMAS["Llama 3.1 8B"] | {"hidden_size": None}, "no hidden_size"),
        (LLAMAS["Llama 3.1 8B"] | {"model_type": "mixtral"}, "unknown model_type for this formula: 'mixtral'"),
    ],
    ids=("empty", "half", "mixtral"),
)
def test_a_config_that_is_no_llama(config, words):
    with pytest.raises(UserError, match=words):
        parameter_count(config)


# the lesson's own code


def test_the_forward_pass_of_the_lesson_on_another_shape(second):
    import math

    net, tokenizer = second
    ids = tokenizer(
        "Ben has 12 keys. He finds 30 more. How many keys does Ben have now? And a longer text, beyond the 64 "
        "first positions: "
        "apples, books, coins, cups, eggs, flowers, marbles, oranges"
    )["input_ids"]
    assert len(ids) > 64
    lesson(
        "rms_norm",
        "attention",
        "forward",
        torch=torch,
        math=math,
        silu=torch.nn.functional.silu,
        model=net,
        ids=ids,
        rows=None,
        seed=1,
    )  # the last one asserts that they agree


def test_the_four_bits_of_the_lesson_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    from statistics import NormalDist

    own = lesson("nf4_levels", torch=torch, NormalDist=NormalDist)
    w = torch.randn(128, 256, generator=torch.manual_seed(0))
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    levels = own["nf4_levels"]()
    codes, absmax = own["quantise"](w, levels)
    torch.testing.assert_close(levels, state.code.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(absmax.flatten(), state.absmax.float())
    torch.testing.assert_close(
        own["restore"](codes, absmax, levels, w.shape), functional.dequantize_4bit(packed, state), atol=1e-5, rtol=0
    )
    assert packed.nbytes + state.absmax.nbytes == BYTES["nf4"] * w.numel()


# tokenizer and template


def test_render_is_what_the_ids_say(second):
    _, tokenizer = second
    text = render(tokenizer, CHAT)
    assert (
        text == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 47 plus "
        "38?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.decode(encode(tokenizer, CHAT)) == text
    assert not render(tokenizer, CHAT, add_generation_prompt=False).endswith("assistant<|end_header_id|>\n\n")


def test_exactly_one_bos(second):
    _, tokenizer = second
    for prompt in (CHAT, "What is 47 plus 38?", ""):
        assert encode(tokenizer, prompt).count(tokenizer.bos_token_id) == 1
    assert (
        tokenizer(render(tokenizer, CHAT))["input_ids"].count(tokenizer.bos_token_id) == 2
    )  # the bug that `encode` is for


def test_a_template_that_is_missing_or_refuses(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render(tokenizer, CHAT)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate.*Roles: user"):
        render(tokenizer, CHAT)
    bare = copied(folder, tmp_path, "chat_template.jinja")
    net, tokenizer = load(bare)
    with pytest.raises(UserError, match=f"{bare}.*no chat template"):
        Local(net, tokenizer)(CHAT)
    assert isinstance(generate(net, tokenizer, ["a plain text works"], 2)[0], str)


@pytest.mark.parametrize("remove, expected", [(("pad_token",), "<|finetune_right_pad_id|>")])
def test_pad_is_not_the_end_if_there_is_another(folder, tmp_path, remove, expected):
    path = copied(folder, tmp_path)
    place = path / "tokenizer_config.json"
    place.write_text(json.dumps({k: v for k, v in json.loads(place.read_text()).items() if k not in remove}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == expected and tokenizer.pad_token_id not in stop_ids(tokenizer)


def test_stop_ids(second):
    _, tokenizer = second
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == sorted(
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], key=tokenizer.convert_tokens_to_ids
    )


# loading


def test_the_shipped_base_works():
    net, tokenizer = load()
    assert generate(net, tokenizer, ["What is 47 plus 38?\nWorking:"], stop="\n")[0].strip().endswith("so 85.")
    assert parameter_count(net.config) == net.num_parameters() and not net.training


def test_load_the_second_shape(second, folder):
    net, tokenizer = second
    assert net.dtype == torch.float32 and not net.training and net.config.rope_parameters["rope_type"] == "llama3"
    assert net.lm_head.weight.data_ptr() != net.get_input_embeddings().weight.data_ptr()
    assert load(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert weights_hash(folder) == file_hash(folder / "model.safetensors")


def test_folder_without_tokenizer(folder, tmp_path):
    path = copied(folder, tmp_path, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    with pytest.raises(UserError, match=f"{path}: a model without a tokenizer. Save one"):
        load(path)


def test_tokenizer_config_alone_is_not_a_tokenizer(folder, tmp_path):
    with pytest.raises(UserError, match="without a tokenizer"):
        load(copied(folder, tmp_path, "tokenizer.json"))


def test_folder_without_model(folder, tmp_path):
    for i, gone in enumerate((("model.safetensors",), ("config.json",))):
        path = copied(folder, tmp_path / str(i), *gone)
        with pytest.raises(UserError, match=f"{path}: no readable model in there"):
            load(path)


def test_broken_files(folder, tmp_path):
    path = copied(folder, tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        load(path)
    (path / "model.safetensors").write_bytes(whole)
    (path / "config.json").write_text("{oops")
    with pytest.raises(UserError, match="no readable"):
        load(path)
    (path / "tokenizer.json").write_text("{oops")
    with pytest.raises(UserError, match="no readable tokenizer in there"):
        load_tokenizer(path)


def test_layers_that_are_not_in_the_file(folder, tmp_path):
    path = copied(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match="18 tensors of its config.json are not in its weights, e.g. model.layers.3"):
        load(path)
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(UserError, match="no readable model in there"):
        load(path)


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="unknown checkpoint 'tutor/bas': did you mean 'tutor/base'"):
        load("tutor/bas")
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown scale 'cpuu': did you mean 'cpu'"):
        load(scale="cpuu")
    with pytest.raises(UserError, match="no such folder here, and the Hub was not reached"):
        load("nobody-here/nothing-there")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_scale_whose_device_is_missing(folder):
    with pytest.raises(UserError, match="scale 't4' wants the device 'cuda'"):
        load(folder, "t4")


# adapters


def test_adapter_merged_is_adapter_unmerged(adapter, folder):
    ids = torch.tensor([load_tokenizer(folder)("What is 47 plus 38?")["input_ids"]])
    with torch.no_grad():
        base, merged, apart = (
            net(input_ids=ids).logits for net in (load(folder)[0], load(adapter)[0], load(adapter, merge=False)[0])
        )
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)
    assert (merged - base).abs().max() > 1e-2


def test_adapter_has_its_own_tokenizer_if_it_has_one(adapter, folder, tmp_path):
    assert load(adapter)[1].chat_template == load_tokenizer(folder).chat_template
    path, tokenizer = copied(adapter, tmp_path), load_tokenizer(folder)
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(path)
    assert load(path)[1].chat_template == "another"


def test_adapter_of_another_base_of_the_same_shape(adapter, folder, tokenizer, tmp_path):
    other, path = tmp_path / "other", copied(adapter, tmp_path)
    new_llama(tokenizer, seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    point(path, other)
    with pytest.raises(UserError, match="was trained on weights .*Give it the base that it was trained on"):
        load(path)
    (path / "run.yaml").unlink()  # without a card nobody can tell
    load(path)


def test_adapter_whose_base_was_trained_on(adapter, folder, tmp_path):
    base, path = copied(folder, tmp_path / "base"), copied(adapter, tmp_path)
    point(path, base)
    load(path)
    net = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        net.model.norm.weight[0] += 1e-3
    net.save_pretrained(base)
    with pytest.raises(UserError, match="was trained on weights"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [dict(hidden_size=64, num_attention_heads=4, head_dim=16), dict(num_hidden_layers=2), dict(num_hidden_layers=4)],
    ids=("narrower", "fewer layers", "more layers"),
)
def test_adapter_of_another_shape_without_a_card(adapter, tokenizer, tmp_path, change):
    other, path = tmp_path / "other", copied(adapter, tmp_path, "run.yaml")
    new_llama(tokenizer, **change).save_pretrained(other)
    tokenizer.save_pretrained(other)
    point(path, other)
    with pytest.raises(UserError, match="this adapter does not fit"):
        load(path)


def test_broken_adapters(adapter, folder, tmp_path):
    path = copied(adapter, tmp_path, "adapter_model.safetensors")
    with pytest.raises(UserError, match="no adapter_model.safetensors. Save the adapter again"):
        load(path)
    point(path, "")
    with pytest.raises(UserError, match="names no base"):
        load(path)
    (path / "adapter_config.json").write_text("{oops")
    with pytest.raises(UserError, match="not JSON"):
        load(path)


def test_no_merging_into_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    get_peft_model(load()[0], LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        tmp_path
    )
    point(tmp_path, "tutor/base")
    four = dict(
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    with pytest.raises(UserError, match="merging into a quantised base"):
        load(tmp_path, **four)
    net, tokenizer = load(tmp_path, merge=False, **four)
    assert "85" in generate(net, tokenizer, ["What is 47 plus 38?\nWorking:"], stop="\n")[0]


# generating

PROMPTS = [
    "What is 47 plus 38?",
    "A",
    CHAT,
    "Ben has 12 keys. He finds 30 more. How many keys does Ben have now?",
    [*CHAT, {"role": "assistant", "content": "85"}, *CHAT],
]


def test_a_batch_is_its_prompts_one_by_one(second):
    net, tokenizer = second
    alone = [generate(net, tokenizer, [p], 12)[0] for p in PROMPTS]
    assert generate(net, tokenizer, PROMPTS, 12) == alone == generate(net, tokenizer, PROMPTS, 12, batch_size=2)
    assert len(set(alone)) > 2
    assert Local(net, tokenizer, max_new_tokens=12)(CHAT) == alone[2]


def test_generate_is_greedy_by_hand(second):
    import math

    net, tokenizer = second
    own = lesson(
        "rms_norm",
        "attention",
        "forward",
        torch=torch,
        math=math,
        silu=torch.nn.functional.silu,
        model=net,
        ids=[1, 2, 3],
        rows=None,
        seed=1,
    )
    ids = encode(tokenizer, PROMPTS[0])
    start, ends = len(ids), stop_ids(tokenizer)
    while len(ids) < start + 12 and ids[-1] not in ends:
        ids.append(own["forward"](net, ids)[-1].argmax().item())
    assert generate(net, tokenizer, [PROMPTS[0]], 12)[0].rstrip("…") == tokenizer.decode(
        [i for i in ids[start:] if i not in ends], skip_special_tokens=True
    )


def test_the_models_own_sampling_settings_do_not_count(second):
    net, tokenizer = second
    plain, kept = generate(net, tokenizer, PROMPTS[:2], 12), net.generation_config
    try:
        net.generation_config = type(kept)(repetition_penalty=5.0, do_sample=True, temperature=0.6, top_p=0.5, top_k=3)
        assert generate(net, tokenizer, PROMPTS[:2], 12) == plain
    finally:
        net.generation_config = kept


def test_sampling_follows_the_seed_and_the_temperature(second):
    net, tokenizer = second

    def draw(seed, temperature):
        torch.manual_seed(seed)
        return generate(net, tokenizer, ["A"] * 4, 10, temperature=temperature)

    assert draw(1, 1.0) == draw(1, 1.0) != draw(2, 1.0)
    assert len(set(draw(1, 1.0))) > 1 and set(draw(1, 1e-4)) == set(generate(net, tokenizer, ["A"], 10))


def test_stop_text_and_the_mark_of_a_cut_reply():
    net, tokenizer = load()
    whole, cut, stopped = (
        generate(net, tokenizer, ["What is 47 plus 38?\nWorking:"], **o)[0]
        for o in (dict(), dict(max_new_tokens=5), dict(stop=", carry"))
    )
    assert not whole.endswith("…") and cut.endswith("…") and whole.startswith(cut[:-1])
    assert stopped == whole.split(", carry")[0]


def test_no_room(second):
    net, tokenizer = second
    with pytest.raises(
        UserError, match=r"prompts\[1\]: \d+ tokens, and the model has room for 1 to 246 beside 10 new ones. Shorten it"
    ):
        generate(net, tokenizer, ["short", "long " * 300], 10)
    with pytest.raises(UserError, match="room for 1 to 0 beside 400"):
        generate(net, tokenizer, ["short"], 400)
    bare = load_tokenizer(net.name_or_path)
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match=r"prompts\[0\]: 0 tokens"):
        generate(net, bare, [""], 5)
    assert generate(net, tokenizer, [], 5) == []
