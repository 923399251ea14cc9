"""Every command works on a reader's own model folder and JSONL: here a Llama of another shape, made on the spot."""

import json

import pytest

from llmcourse.cli import main
from llmcourse.card import read_card
from llmcourse.evals import evaluate
from llmcourse.models import Local, load
from llmcourse.core import set_seed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A Llama with other head counts, its own head size, untied embeddings and llama3 rope scaling; and ten chats."
    from transformers import LlamaConfig, LlamaForCausalLM
    from llmcourse.models import load_tokenizer

    place, tokenizer = tmp_path_factory.mktemp("other"), load_tokenizer("tutor/base")
    set_seed(3)
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
        "rope_theta": 500000.0,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"Colour {i}?"}, {"role": "assistant", "content": "Blue."}]}
        for i in range(10)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


@pytest.fixture(scope="module")
def tuned(place):
    words = [
        "sft",
        "--model",
        place / "model",
        "--data",
        place / "chats.jsonl",
        "--output",
        place / "sft",
        "--full",
        "--epochs",
        "60",
        "--learning-rate",
        "3e-3",
    ]
    assert main([str(w) for w in words]) == 0
    return place / "sft"


def test_sft_then_eval(tuned, place, capsys):
    """It has learnt its rows by heart; the command refuses to call that a measurement, and takes rows that it has not
    seen."""
    assert read_card(tuned).model == str(place / "model")
    exam = ["eval", "--model", str(tuned), "--json", "--output", str(place / "predictions.jsonl"), "--data"]
    assert main([*exam, str(place / "chats.jsonl")]) == 2
    assert "all are 10 rows that the model was trained on" in capsys.readouterr().err
    rows = [json.loads(line) for line in (place / "chats.jsonl").read_text().splitlines()]
    right = [r["right"] for r in evaluate(Local(*load(tuned), max_new_tokens=16), rows, progress=False)]
    assert sum(right) >= 9
    new = [{"question": f"Colour {i}?", "answer": "Blue."} for i in (3, 22, 41)]
    (place / "exam.jsonl").write_text("".join(json.dumps(r) + "\n" for r in new))
    assert main([*exam, str(place / "exam.jsonl")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["n"] == 2 and "1 rows that the model was trained on" in said.err
    assert len((place / "predictions.jsonl").read_text().splitlines()) == 2


def test_lora_and_train_again(place, capsys):
    out = place / "lora"
    assert (
        main(
            [
                "sft",
                "--model",
                str(place / "model"),
                "--data",
                str(place / "chats.jsonl"),
                "--output",
                str(out),
                "--epochs",
                "3",
            ]
        )
        == 0
    )
    assert main(["train", str(out / "run.yaml"), "--output", str(place / "again")]) == 0
    weights = [(p / "adapter_model.safetensors").read_bytes() for p in (out, place / "again")]
    assert weights[0] == weights[1], "the same card gave other weights"


def test_grpo_refuses_a_hopeless_start(place, capsys):
    rows = [{"messages": [{"role": "user", "content": "271827 + 1?"}], "answer": "271828"}] * 16
    (place / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert (
        main(
            [
                "grpo",
                "--model",
                str(place / "model"),
                "--data",
                str(place / "sums.jsonl"),
                "--output",
                str(place / "grpo"),
                "--steps",
                "1",
            ]
        )
        == 2
    )
    assert "same reward" in capsys.readouterr().err and not (place / "grpo").exists()


def test_export_serve_ask(tuned, place, capsys):
    from llmcourse.shipping import served

    assert main(["export", "--model", str(tuned), "--output", str(place / "gguf"), "--quant", "Q8_0"]) == 0
    assert (place / "gguf" / "Modelfile").read_text().count("\nFROM ./") == 1
    for model, engine in ((next((place / "gguf").glob("*.gguf")), "llama.cpp"), (tuned, "llama.cpp")):
        with served(model, engine=engine) as server:
            reply = server.client().chat.completions.create(
                model=server.client().models.list().data[0].id,
                temperature=0,
                max_tokens=20,
                messages=[{"role": "user", "content": "Colour 3?"}],
            )
            assert reply.choices[0].message.content.strip() == "Blue."
