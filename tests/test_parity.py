"""The parity report as the gate: healthy files pass, and each planted fault is found and named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from llmcourse import converter
from llmcourse.cli import main
from llmcourse.converter import to_gguf
from llmcourse.core import weights
from llmcourse.gguf_adapter import lora_to_gguf
from llmcourse.paritygate import Found, refer, unlike
from llmcourse.models import load
from llmcourse.parityruns import divergence, exact_in_file, exact_in_net, measure_file, measure_url, otherwise
from llmcourse.parityruns import text_parts
from test_export import make_model

MODEL = "tutor/grpo"
SEED = int(os.environ.get("PARITY_SEED", 1))


@pytest.fixture(scope="module")
def known():
    "What transformers makes of the conversations; 40 problems."
    return refer(MODEL, n=8, seed=SEED)


def said_of(gguf, known, adapter=None):
    return unlike(measure_file(gguf, known.tokenizer, known.cases, known.rows, adapter=adapter), known)


def altered(folder, **texts):
    "A copy of the model with some text of a file replaced: {file: (old, new)}; `config_json` stands for config.json."
    shutil.copytree(weights() / MODEL.split("/")[1], folder)
    for name, (old, new) in texts.items():
        file = folder / name.replace("_json", ".json").replace("_jinja", ".jinja")
        text = file.read_text()
        assert old in text, name
        file.write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize("kind", ["f16", "Q8_0", "Q4_K_M"])
def test_healthy_files_pass(kind, known, tmp_path):
    assert said_of(to_gguf(MODEL, tmp_path / "a.gguf", kind, verify=False), known) == []


def test_rows_of_q_and_k_not_dealt(known, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "permute", lambda w, n_heads: w)
    said = said_of(to_gguf(MODEL, tmp_path / "a.gguf", "f16"), known)
    assert any("nats from the model" in fault for fault in said) and any("answers" in fault for fault in said)


def test_a_wrong_rope(known, tmp_path):
    config = json.loads((weights() / MODEL.split("/")[1] / "config.json").read_text())
    theta = str(config["rope_parameters"]["rope_theta"])
    other = altered(tmp_path / "other", config_json=(f'"rope_theta": {theta}', '"rope_theta": 30000.0'))
    assert any("nats from the model" in f for f in said_of(to_gguf(other, tmp_path / "a.gguf", "f16"), known))


@pytest.mark.parametrize("shape, old, new", [("head_dim", 8.0, 32.0), ("linear", 2.0, 4.0)])
def test_a_wrong_rope_factor(shape, old, new, tmp_path):
    "Llama 3's stretch of the slow waves shows late; so one conversation is long."
    make_model(tmp_path / "model", shape)
    model = refer(tmp_path / "model", n=1)
    assert said_of(to_gguf(tmp_path / "model", tmp_path / "a.gguf", "f16", verify=False), model) == []
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["rope_parameters"]["factor"] == old
    config["rope_parameters"]["factor"] = new
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    said = said_of(to_gguf(tmp_path / "model", tmp_path / "b.gguf", "f16", verify=False), model)
    assert any("nats from the model" in fault for fault in said)


@pytest.mark.parametrize("shape", ["head_dim", "linear"])
def test_few_bits_hide_no_wrong_rope(shape, tmp_path):
    "Rope and eps are compared exactly: with what transformers computes, and at any number of bits."
    make_model(tmp_path / "model", shape)
    ours = exact_in_net(load(tmp_path / "model")[0])
    for kind in ("Q8_0", "Q4_K_M"):
        file = to_gguf(tmp_path / "model", tmp_path / "a.gguf", kind, verify=False)
        assert otherwise(ours, exact_in_file(file)) == []
    config = json.loads((tmp_path / "model/config.json").read_text())
    rope = config["rope_parameters"]
    wrong = {"head_dim": {"factor": 32.0}, "linear": {"rope_type": "default"}}[shape]
    for said, change in (("another rope", {"rope_parameters": rope | wrong}), ("in its norms", {"rms_norm_eps": 1e-5})):
        (tmp_path / "model/config.json").write_text(json.dumps(config | change))
        file = to_gguf(tmp_path / "model", tmp_path / "b.gguf", "Q4_K_M", verify=False)
        (fault,) = otherwise(ours, exact_in_file(file))
        assert said in fault and "\n" not in fault


def test_another_eps_is_named_though_nothing_else_shows_it(known, tmp_path):
    other = altered(tmp_path / "other", config_json=('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.1e-06'))
    assert said_of(to_gguf(other, tmp_path / "a.gguf", "Q8_0", verify=False), known) == [
        "has 1.1e-06 in its norms, not 1e-06"
    ]


def test_rows_and_how_to_grade_them_are_taken_too():
    rows = [{"messages": [{"role": "user", "content": "Say yes."}]}]
    model = refer(MODEL, (rows, lambda row, reply: True))
    assert model.rows == rows and [r["right"] for r in model.results] == [True]


TWISTS = [("<|end_header_id|>\n\n", "<|end_header_id|>\n"), ("m['content'] | trim", "m['content']")]


@pytest.mark.parametrize("old, new", TWISTS)
def test_another_template(old, new, known, tmp_path):
    other = altered(tmp_path / "other", chat_template_jinja=(old, new))
    said = said_of(to_gguf(other, tmp_path / "a.gguf", "f16"), known)
    assert len(said) >= 1 and "prompts differently" in said[0]


def test_an_end_token_that_the_engine_does_not_know(known, tmp_path):
    folder = altered(tmp_path / "other")
    for file in folder.glob("*.j*"):
        text = file.read_text().replace('"eos_token": "<|eot_id|>"', '"eos_token": "<|end_of_text|>"')
        text = text.replace('"eos_token_id": 1022', '"eos_token_id": 1017')
        file.write_text(text.replace("<|eot_id|>", "<|finis|>"))
    said = said_of(to_gguf(folder, tmp_path / "a.gguf", "f16", verify=False), known)
    assert any("goes on behind '<|eot_id|>'" in fault for fault in said)


def test_embeddings_untied(known, tmp_path):
    import torch

    net, tokenizer = load(MODEL)
    head = net.get_output_embeddings().weight.detach()
    net.config.tie_word_embeddings = False
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    net.lm_head.weight = torch.nn.Parameter(head + 0.5 * head.std() * noise)
    net.save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    assert any("nats from" in f for f in said_of(to_gguf(tmp_path / "untied", tmp_path / "a.gguf", "f16"), known))


def test_too_few_bits(known, tmp_path):
    assert said_of(to_gguf(MODEL, tmp_path / "a.gguf", "Q2_K", verify=False), known)


def test_an_adapter_beside_its_base_is_compared_too(known, tmp_path):
    sft = refer("tutor/sft", n=4)
    assert unlike(sft.merged, sft) == []
    base, beside = to_gguf("tutor/base", tmp_path / "b.gguf", "f16", verify=False), tmp_path / "a.gguf"
    lora_to_gguf("tutor/sft", beside)
    assert said_of(base, sft, beside) == []
    assert any("nats from the model" in fault for fault in said_of(base, sft))


def test_a_server_is_compared_by_what_it_says(known, tmp_path):
    from llmcourse.serve import serve

    good = to_gguf(MODEL, tmp_path / "good.gguf", "Q8_0", verify=False)
    other = altered(tmp_path / "other", chat_template_jinja=("<|end_header_id|>\n\n", "<|end_header_id|>\n"))
    bad = to_gguf(other, tmp_path / "bad.gguf", "Q8_0", verify=False)
    for file, faults in ((good, 0), (bad, 1)):
        with serve(file) as server:
            found = measure_url(server.url, known.tokenizer, known.cases, known.rows[:8])
        assert bool(unlike(found, known._replace(results=known.results[:8]))) == bool(faults) and len(found.kl) > 5
    assert "prompts differently" in unlike(found)[0] and found.template.startswith("token ")


def test_a_server_that_shows_no_prompt_is_judged_by_its_length(known, monkeypatch):
    from llmcourse import parityruns

    monkeypatch.setattr(parityruns, "_shown", lambda ask, case: None)
    found = Found("a", "server")
    for count in (len(known.cases[0].ids), 5, None):
        parityruns._prompt(found, None, known.cases[0], count)
    assert found.prompts == [True, False, None] and found.template.startswith("5 tokens for 'What is")


def test_a_server_that_gives_no_probabilities_is_judged_by_its_replies():
    about = dict(kind="server", prompts=[None, None], kl=[], top1=[])
    assert unlike(Found("a", replies=[True, True], **about)) == []
    assert "1 of 2 replies differ" in unlike(Found("a", replies=[True, False], **about))[0]


def test_the_divergence_is_never_more_than_the_whole_one():
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = (np.log(rng.dirichlet(np.full(30, 0.3)) + 1e-12) for _ in range(2))
        whole = float((np.exp(p) * (p - q)).sum())
        some = [divergence(p, {int(i): q[i] for i in np.argsort(-q)[:k]}) for k in (1, 5, 15, 30)]
        assert all(a <= b + 1e-6 for a, b in zip(some, some[1:])) and abs(some[-1] - whole) < 1e-4


def test_where_texts_part_is_one_line():
    assert text_parts("a\nb", "a\nc") == r"'a\nc', not 'a\nb'" and text_parts("ab", "a") == "'a', not 'ab'"


def test_the_command(known, tmp_path, capsys):
    "0 for the same model, 1 for another, with a page that names the fault; 2 for bad input."
    good, bad = (to_gguf(m, tmp_path / f"{m[6:]}.gguf", "f16", verify=False) for m in (MODEL, "tutor/base"))
    page = tmp_path / "parity.html"
    assert main(["parity", MODEL, str(good), "--n", "1", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["kind"] for line in lines] == ["reference", "F16"] and lines[1]["prompts same"] == lines[1]["prompts"]
    assert lines[1]["task"]["n"] == 5 and lines[1]["nats"] < 1e-4
    assert main(["parity", MODEL, str(good), str(bad), "--n", "1", "--report", str(page)]) == 1
    out = capsys.readouterr().out
    assert "✗ base.gguf: " in out and "✗ grpo.gguf" not in out
    text = page.read_text()
    assert text.count("<!doctype html>") == 1 and "1 of 2 are not the same model" in text and "base.gguf" in text
    assert "http://" not in text and "https://" not in text and "<script" not in text


WRONG = {
    "none": ([], "nothing to compare"),
    "missing": (["no.gguf"], "no.gguf: no such file"),
    "cut short": (["cut.gguf"], "cut.gguf: not a whole GGUF file"),
    "foreign": (["text.gguf"], "text.gguf: not a whole GGUF file"),
    "other architecture": (["gpt2.gguf"], "gpt2.gguf: llama.cpp cannot load it"),
    "no server": (["--url", "http://127.0.0.1:9/v1"], "nothing answers there"),
    "a folder for the page": (["whole.gguf", "--report", "."], "a folder"),
    "another file": (["whole.gguf", "--report", "text.gguf"], "already there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    import gguf

    words, why = WRONG[case]
    monkeypatch.chdir(tmp_path)
    whole = to_gguf("tutor/base", tmp_path / "whole.gguf", "Q8_0", verify=False).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:700_000])
    (tmp_path / "text.gguf").write_text("not a model")
    writer = gguf.GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert main(["parity", MODEL, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert why in said and len(said.splitlines()) == 1


def test_an_export_that_is_another_model_is_not_put_in_place(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(["export", "--model", MODEL, "--output", str(out)]) == 0
    assert "the same model: " in capsys.readouterr().err
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(converter, "permute", lambda w, n_heads: w)
    words = ["export", "--model", MODEL, "--output", str(out)]
    assert main(words) == 1
    said = capsys.readouterr().err.strip()
    assert "not the model that it was made of" in said and "--despite-parity" in said and "\n" not in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert main([*words, "--despite-parity"]) == 0
    assert "not the model" in capsys.readouterr().err
    assert (out / "grpo-Q8_0.gguf").read_bytes() != before["grpo-Q8_0.gguf"]


def test_an_adapter_that_is_exported_wrong_is_not_put_in_place(tmp_path, monkeypatch, capsys):
    from llmcourse import gguf_adapter

    out = tmp_path / "out"
    monkeypatch.setattr(gguf_adapter, "permute", lambda w, n_heads: w)
    assert main(["export", "--model", "tutor/sft", "--adapter", "--output", str(out)]) == 1
    assert "base-Q8_0.gguf + sft-lora.gguf: not the model" in capsys.readouterr().err
    assert not [p for p in out.rglob("*") if p.is_file()]


def test_a_model_that_is_too_large_to_compare_is_exported_and_said(tmp_path, monkeypatch, capsys):
    from llmcourse import paritygate

    monkeypatch.setattr(paritygate, "free_memory", lambda device: 1e6)
    assert main(["export", "--model", MODEL, "--output", str(tmp_path / "out")]) == 0
    assert "not compared with its model" in capsys.readouterr().err and (tmp_path / "out/grpo-Q8_0.gguf").is_file()
    assert main(["parity", MODEL, str(tmp_path / "out/grpo-Q8_0.gguf")]) == 2
    assert "are free. Compare it on a larger machine" in capsys.readouterr().err


def test_a_template_without_an_end_token(tmp_path, capsys):
    other = altered(tmp_path / "other", chat_template_jinja=("<|eot_id|>", ""))
    assert main(["export", "--model", str(other), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "writes no end token behind a reply" in said
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_file_that_may_not_grow(tmp_path):
    "As on a full disk, but by the system's limit for this process: one line, nothing left, not even the adapter."
    code = (
        "import resource, sys; from llmcourse.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["export", "--model", "tutor/sft", "--output", str(tmp_path / "out"), "--adapter"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "too large" in done.stderr.lower()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
