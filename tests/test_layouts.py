"""`llmcourse export --program`: folders for LM Studio, GPT4All and MLX. The programs: benchmarks/layouts.py."""

import json
from pathlib import Path

import pytest
from test_export import ROPE, SHAPES, TEMPLATE, make_model, make_tokenizer, steps_of

from llmcourse import layouts
from llmcourse.cli import main
from llmcourse.core import UserError
from llmcourse.gguf_file import contents, read_gguf
from llmcourse.gguf_tokens import chat_text, unmarked
from llmcourse.layouts import (
    check_gpt4all,
    gpt4all_folder,
    gpt4all_session,
    export_for,
    lmstudio_folder,
    mlx_config,
    mlx_folder,
    published_as,
)
from llmcourse.models import load, load_tokenizer

CHAT = [
    {"role": "user", "content": "one {0} %2"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_publisher_and_model(tmp_path, monkeypatch):
    "A name on the Hub keeps its two parts; a folder of one's own has a publisher, too."
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    assert published_as("tutor/sft") == ("tutor", "sft")
    assert published_as("meta-llama/Llama-3.2-1B") == ("meta-llama", "Llama-3.2-1B")
    for place in ("runs/mine", "runs/mine/", tmp_path / "runs/mine"):
        assert published_as(place) == ("me", "mine")


def test_lm_studio_finds_publisher_model_file(tmp_path):
    [gguf] = lmstudio_folder("tutor/sft", tmp_path / "models")
    assert files(tmp_path) == ["models/tutor/sft/sft-Q8_0.gguf"]
    assert lmstudio_folder("tutor/sft", tmp_path / "models") == [gguf]   # an earlier export is replaced


@pytest.mark.parametrize(
    "mark",
    [
        "{% generation %}A{% endgeneration %}",
        "{%- generation -%} A {%- endgeneration %}",
        "x {%generation%}\nA{%endgeneration-%}\n y",
    ],
)
def test_marks_for_training_leave_no_trace(mark):
    "Old versions of JavaScript's Jinja refuse them, or leave out what is between them."
    from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

    text = f"{{% for m in [1, 2] %}} B {mark} C\n{{% endfor %}}"
    assert "{%" in text and "generation %}" not in unmarked(text) and "{%generation" not in unmarked(text)
    assert compiled(unmarked(text)).render() == compiled(text).render()


def test_every_gguf_has_a_template_without_marks(tmp_path):
    tokenizer = load_tokenizer("tutor/sft")
    assert "{% generation %}" in tokenizer.chat_template
    [gguf] = lmstudio_folder("tutor/sft", tmp_path)
    written = contents(read_gguf(gguf), "tokenizer.chat_template")
    assert "{% generation %}" not in written and "{% endgeneration %}" not in written
    marked = chat_text(tokenizer, CHAT, True)
    tokenizer.chat_template = written
    assert chat_text(tokenizer, CHAT, True) == marked


def said_by_gpt4all(session, chat):
    "What GPT4All's Python package (2.8.2) makes of a conversation that ends with a question."
    turn = session["prompt_template"].format("%1", "%2")
    text = session["system_prompt"]
    for asked, answer in zip(chat[::2], [*chat[1::2], None]):
        before, after = turn.split("%2")
        text += before.replace("%1", asked["content"])
        if answer:
            text += answer["content"] + after
    return text


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        TEMPLATE.replace("<|eot_id|>'", "<|eot_id|>}{'"),   # braces, which str.format would read
        "{{ bos_token }}{% if messages[0].role != 'system' %}{{ 'Be kind.<|eot_id|>' }}{% endif %}"
        + TEMPLATE.removeprefix("{{ bos_token }}"),
    ],
    ids=["llama 3", "braces", "a default system prompt"],
)
def test_the_words_for_gpt4all_make_the_prompt_of_the_template(template):
    tokenizer = make_tokenizer(template=template)
    said = said_by_gpt4all(gpt4all_session(tokenizer), CHAT)
    assert tokenizer.bos_token + said == chat_text(tokenizer, CHAT, True)


def test_gpt4all_has_a_file_and_its_words(tmp_path):
    gguf, words = gpt4all_folder("tutor/sft", tmp_path / "all", "Q4_0")
    assert files(tmp_path / "all") == ["sft-Q4_0.gguf", "sft-Q4_0.json"]
    assert json.loads(words.read_text()) == gpt4all_session(load_tokenizer("tutor/sft"))
    assert gpt4all_folder("tutor/sft", tmp_path / "all", "Q4_0") == [gguf, words]


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(steps=steps_of("smollm"), ignore_merges=False, bos=False), "unknown pre-tokenizer type: 'smollm'"),
        (dict(template=None), "no chat template"),
        (dict(eos_token="<|end_of_text|>"), "GPT4All stops at '<|end_of_text|>' only"),
    ],
    ids=["smollm", "no template", "another end"],
)
def test_what_gpt4all_cannot_have_leaves_nothing(options, why, tmp_path):
    make_model(tmp_path / "model", tokenizer=make_tokenizer(**options))
    with pytest.raises(UserError, match=why):
        export_for("gpt4all", tmp_path / "model", tmp_path / "new/all")
    assert not (tmp_path / "new").exists()
    check_gpt4all(make_tokenizer())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mlx_folder_is_the_same_model(shape, tmp_path):
    "transformers reads it bit for bit as the original, rotary angles included."
    import torch

    net = make_model(tmp_path / shape, shape)
    mlx_folder(tmp_path / shape, tmp_path / "mlx")
    again, _ = load(tmp_path / "mlx", dtype=torch.float32)
    ids = torch.arange(200)[None] % 250
    with torch.inference_mode():
        assert torch.equal(net(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    "rope, scaled", [(ROPE, True), (dict(rope_type="default", rope_theta=7.0), False), (None, False)]
)
def test_mlx_finds_the_rotary_angles_under_its_own_names(rope, scaled):
    "mlx-lm's Llama reads rope_theta and rope_scaling, and nothing else."
    out = mlx_config({"rope_parameters": rope, "tie_word_embeddings": False}, "float16", [1, 2])
    assert out["rope_theta"] == (rope or {"rope_theta": 10000.0})["rope_theta"]
    assert out["rope_scaling"] == (rope if scaled else None)
    assert "rope_parameters" not in out and out["tie_word_embeddings"] is False and out["eos_token_id"] == [1, 2]


def test_an_adapter_is_merged_for_mlx(tmp_path):
    import torch

    made = mlx_folder("tutor/sft", tmp_path / "mlx", "bf16")
    net, tokenizer = load("tutor/sft", dtype=torch.float32)
    again, same = load(tmp_path / "mlx", dtype=torch.float32)
    for a, b in zip(net.parameters(), again.parameters()):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-6)
    assert chat_text(same, CHAT, True) == chat_text(tokenizer, CHAT, True)
    assert "generation %}" not in (tmp_path / "mlx/chat_template.jinja").read_text()
    assert json.loads((tmp_path / "mlx/config.json").read_text())["dtype"] == "bfloat16"
    assert mlx_folder("tutor/sft", tmp_path / "mlx", "F16") == made   # replaces its own


def test_a_large_model_is_written_in_several_files(tmp_path, monkeypatch):
    import torch

    net = make_model(tmp_path / "model", "untied")
    monkeypatch.setattr(layouts, "SHARD", "200KB")
    made = mlx_folder(tmp_path / "model", tmp_path / "mlx")
    assert len([p for p in made if p.suffix == ".safetensors"]) > 2
    again, _ = load(tmp_path / "mlx", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_nan_is_not_written_for_mlx(tmp_path):
    net = make_model(tmp_path / "model")
    net.model.norm.weight.data[3] = float("nan")
    net.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model.norm.weight"):
        export_for("mlx", tmp_path / "model", tmp_path / "a/b/mlx")
    assert not (tmp_path / "a").exists()


def test_what_was_there_before_stays(tmp_path):
    (tmp_path / "kept/empty").mkdir(parents=True)
    with pytest.raises(UserError):
        export_for("lmstudio", tmp_path / "nowhere", tmp_path / "kept/new")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["kept", "kept/empty"]


@pytest.mark.parametrize(
    "words, why",
    [
        (["--program", "lmstuido"], "did you mean 'lmstudio'"),
        (["--program", "gpt4all", "--adapter"], "gpt4all takes one whole model"),
        (["--program", "lmstudio", "--ollama", "tutor"], "--ollama: lmstudio has a folder of its own"),
        (["--program", "mlx", "--quant", "Q4_K_M"], "an MLX folder holds F32, F16, BF16"),
        (["--program", "gpt4all", "--quant", "Q9"], "Q9"),
        (["--program", "mlx", "--output", "taken"], "taken: a folder is already there"),
        (["--program", "lmstudio", "--output", "file"], "file"),
        (["--program", "gpt4all", "--output", "words"], "sft-Q8_0.json: a file is already there"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("words").mkdir()
    for file in ("taken/notes.txt", "file", "words/sft-Q8_0.json"):
        Path(file).write_text("mine")
    before = files(tmp_path)
    assert main(["export", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert why in said and "\n" not in said
    assert files(tmp_path) == before and not Path("runs").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert not main(["export", "--program", "lmstudio", "--quant", "Q4_0"])
    assert "runs/lmstudio/tutor/sft/sft-Q4_0.gguf" in capsys.readouterr().out
    assert files(tmp_path) == ["runs/lmstudio/tutor/sft/sft-Q4_0.gguf"]
