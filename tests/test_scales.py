"""Every chapter runs at every scale: with look-alikes of its models, and on a pretend GPU where it wants a card.

t4 always; of the other scales one a chapter, in turn. A chapter that stays with the tutor at every scale is
run at t4 alone. `LLMCOURSE_SCALES=all` takes them all.
"""

import itertools
import json
import os
import subprocess
import sys

import gpu
import notebooks
import pytest

from llmcourse import methods
from llmcourse.card import read_card
from llmcourse.cli import main
from llmcourse.core import UserError, scale
from llmcourse.lookalike import lookalike
from llmcourse.models import load
from llmcourse.pretend import on_card, pretend_gpu
from llmcourse.rl import grpo
from llmcourse.scales import WHAT_LEARNS, to_train, bytes_by_method
from llmcourse.sft import sft
from llmcourse.training import way_to_train
from llmcourse.tutor import problems, to_chat

MODELS = {"t4": "llama-3.2-1b", "mps": "llama-3.2-1b", "l4": "llama-3.2-3b", "a100": "llama-3.1-8b",
          "h100": "llama-3.1-8b"}  # fmt: skip
OTHERS = itertools.cycle(["a100", "l4", "h100", "mps"])
EVERY = os.environ.get("LLMCOURSE_SCALES") == "all"
TUTOR = ("09b_ppo", "09c_rounds", "12_flywheel", "12b_leaving")
PAIRS = [(path, name) for path in notebooks.chapters()
         for name in (MODELS if EVERY else ["t4"] if path.stem in TUTOR else ["t4", next(OTHERS)])]  # fmt: skip
SPEED = "batch_size = 32\ngrad_accum = 1\n"  # one pass of a laptop's CPU holds more than a real 8B on its card
STARTUP = "from llmcourse.pretend import pretend_gpu\n_card = pretend_gpu()\n_card.__enter__()\n"
SHORTER = {  # the runs of a scale; what chapters do with the tutor stays as it is
    'sft(train_rows, "runs/06/full"': 'sft(train_rows[:64], "runs/06/full"',
    'sft(rows, runs / "lora"': 'sft(rows[:64], runs / "lora"',
    "seed=seed, max_steps=12, **how)": "seed=seed, max_steps=2, **how)",
    'prefer(pairs + more, "runs/08/dpo"': 'prefer(pairs[:16], "runs/08/dpo"',
    "prefer(pairs[:160], ": "prefer(pairs[:16], ",
    "reward_funcs=brief_reward, max_steps=16,": "reward_funcs=brief_reward, max_steps=3,",
    "pupils = problems(90, 7, KINDS)": "pupils = problems(20, 7, KINDS)",
    "critic=critic, seed=seed, steps=8)": "critic=critic, seed=seed, steps=1)",
    "max_steps=4, per_device_train_batch_size=32, learning": "max_steps=3, per_device_train_batch_size=8, learning",
}


def shorter(source):
    for long, short in SHORTER.items():
        source = source.replace(long, short)
    return source


def test_what_is_shortened_is_there():
    sources = "".join(notebooks.source(c) for path in notebooks.chapters() for c in cells(path))
    assert all(sources.count(long) == 1 for long in SHORTER)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="session")
def look(tmp_path_factory):
    "A function: the name of a model → a look-alike that has learnt to end its replies, so that nobody waits for it."
    place, made = tmp_path_factory.mktemp("looks"), {}
    rows = [to_chat(p) for p in problems(20, 1, ["add", "sub", "story1"])]
    for row in rows:
        row["messages"][-1]["content"] = f"Answer: {row['answer']}"

    def make(name):
        if name not in made:
            raw = lookalike(name, place / f"{name}-raw", hidden=256)
            made[name] = sft(rows, place / name, model=raw, max_steps=40, learning_rate=2e-3, warmup_steps=4)
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("path,name", PAIRS, ids=[f"{path.stem}-{name}" for path, name in PAIRS])
def test_a_chapter_at_a_scale(path, name, look, tmp_path, monkeypatch):
    room, startup = tmp_path / "nbs", tmp_path / "ipython/profile_default/startup"
    room.mkdir()
    startup.mkdir(parents=True)
    (tmp_path / "data").symlink_to(notebooks.ROOT / "data")
    pretend = scale(name)["device"] == "cuda"
    if pretend:
        (startup / "00-card.py").write_text(STARTUP)
    device = "" if pretend else "device = cpu\n"
    (room / "settings.ini").write_text(f"[{name}]\nmodel = {look(MODELS[name])}\nmax_new_tokens = 160\n{SPEED}{device}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nb = notebooks.run(path, tmp_path / path.name, cwd=room, change=shorter, scale=name)
    assert "✓" in notebooks.text_outputs(nb)


def odd_length(completions, **columns):
    return [float(len(c[-1]["content"]) % 2) for c in completions]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t4", "a100"])
def test_every_command_with_a_scale_keeps_to_the_card(name, look, tmp_path, monkeypatch):
    "Trained, repeated from its card, reinforced and examined on a pretend GPU; each tensor has to be on it."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text(f"[{name}]\nmodel = {look(MODELS[name])}\nmax_new_tokens = 8\n")
    data, at = str(notebooks.ROOT / "data/splits.jsonl"), ["--scale", name]
    commands = [
        ["sft", "--data", data, "--output", "mine", "--steps", "2", "--warmup", "0", *at],
        ["train", "mine/run.yaml", "--output", "again"],
        ["sft", "--data", data, "--output", "all", "--steps", "2", "--warmup", "0", "--full", *at],
        ["eval", "--model", "better", "--data", data, *at],
    ]
    once = dict(scale=name, reward_funcs=odd_length, max_steps=1, warmup_steps=0, max_completion_length=8)
    with pretend_gpu():
        assert on_card(load(look(MODELS[name]), name)[0].lm_head.weight)
        for command in commands[:-1]:
            assert main(command) == 0, command
        grpo(data, "better", "mine", **once)
        grpo(data, "leave-one-out", "mine", method="rloo", **once)
        assert main(commands[-1]) == 0
    assert main(["export", "--model", "better", "--quant", "Q8_0", "--output", "gguf"]) == 0


# The dial says how to train, and it fits.


def test_the_dial_trains_what_fits():
    from transformers import LlamaConfig

    from llmcourse.configs import LLAMAS

    shapes = {"t4": "Llama 3.2 1B", "l4": "Llama 3.2 3B", "a100": "Llama 3.1 8B", "h100": "Llama 3.1 8B"}
    for name, shape in shapes.items():
        dial, config = scale(name), LlamaConfig(**LLAMAS[shape])
        needs = bytes_by_method(config, dial["dtype"])
        assert needs[dial["method"]] < 0.75e9 * gpu.FITS[name] < needs["full"]
    assert set(MODELS) | {"cpu"} <= set(scale_names()) and all(scale(s)["method"] in WHAT_LEARNS for s in MODELS)
    assert scale("t4")["dtype"] == "float16"  # it has no bfloat16


def scale_names():
    with pytest.raises(UserError) as e:
        scale("?")
    return str(e.value).partition("there are ")[2].split(", ")


def test_to_train_says_it_in_one_line(capsys):
    assert to_train() == {"scale": "cpu", "model": "tutor/base"}
    said = "".join(capsys.readouterr()).strip()
    assert len(said.splitlines()) == 1 and "all weights of base, float32, 16 x 1 rows" in said and "0.042 GB" in said
    options = to_train(method="qlora")
    assert options["peft_config"].r == 16 and options["quantization_config"].load_in_4bit
    with pytest.raises(UserError, match="did you mean 'qlora'"):
        to_train(method="qlor")


def test_the_dial_chooses_the_attention(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[cpu]\nattn = eager\n")
    monkeypatch.chdir(tmp_path)
    assert load("tutor/base")[0].config._attn_implementation == "eager"


# `make gpu`, as far as it can be tested without a card.


def test_the_scale_that_a_card_holds():
    cards = {"Tesla T4": 15.6, "NVIDIA L4": 23.7, "A100-SXM4-40GB": 42.3, "H100 80GB": 85.0, "a small one": 8.2}
    assert [gpu.scale_for(gb) for gb in cards.values()] == ["t4", "l4", "a100", "h100", None]


def test_without_a_card_one_line():
    done = subprocess.run([sys.executable, "tests/gpu.py"], cwd=notebooks.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "no card here" in done.stderr


def test_mfu_of_known_cards_only():
    assert gpu.mfu("Tesla T4", 10**9, 1000, adapter=True, recomputed=True) == pytest.approx(6e12 / 65e12, abs=1e-3)
    assert gpu.mfu("a card of the future", 10**9, 1000, adapter=True, recomputed=True) is None


@pytest.mark.slow
def test_a_measurement_and_its_table(capsys, monkeypatch, tmp_path):
    "One chapter and one training, at scale cpu."
    monkeypatch.delenv("UNSLOTH_PYTHON", raising=False)
    monkeypatch.setattr(gpu, "gpu_tests", lambda: "not run in this test")
    (path,) = (p for p in notebooks.chapters() if p.name.startswith("05"))
    found = gpu.report_on("CPU of the test", 8.0, "cpu", [path])
    assert gpu.faults(json.loads(json.dumps(found))) == []
    (row,) = found["chapters"]
    assert row["ok"], row
    assert 0 < row["seconds"] and 0.1 < row["peak_gb"] < 50
    training = found["training"]
    assert training["tokens"] > 1000 and training["tokens_per_second"] > 0 and training["mfu"] is None, training
    assert "UNSLOTH_PYTHON" in found["unsloth"]
    text = gpu.table([found])
    assert "CPU of the test (cpu)" in text and f"| {path.stem} | {row['seconds']:.0f} s" in text
    broken = found | {"chapters": [{"chapter": "05_data"}], "training": None}
    del broken["card"]
    assert len(gpu.faults(broken)) == 3 and gpu.table([]) == "Not measured yet: `make gpu` fills this table."


# What the command line trains.


@pytest.mark.parametrize(
    ("method", "name", "asked", "way"),
    [
        ("sft", "cpu", {}, "lora"),
        ("grpo", "cpu", {}, "full"),
        ("grpo", "cpu", {"r": 8}, "lora"),
        ("grpo", "a100", {}, "lora"),
        ("grpo", "a100", {"full": True}, "full"),
        ("sft", "a100", {"r": 0}, "full"),
        ("sft", "t4", {"qlora": True}, "qlora"),
        ("sft", "mine", {}, "qlora"),
        ("sft", "mine", {"r": 4}, "qlora"),
        ("sft", "all", {}, "full"),
        ("sft", "all", {"r": 4}, "lora"),
    ],
)
def test_the_command_line_trains_what_the_dial_says(method, name, asked, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text(
        "".join(f"[{own}]\nmodel = m\ndevice = cuda\ndtype = bfloat16\nmethod = {how}\n" for own, how in
                (("mine", "qlora"), ("all", "full")))
    )  # fmt: skip
    asked = dict(full=False, r=None, qlora=False) | asked
    assert way_to_train(methods.method(method), scale(name), **asked) == way


@pytest.mark.parametrize("asked", [dict(full=True, r=8, qlora=False), dict(full=True, r=None, qlora=True),
                                   dict(full=False, r=0, qlora=True)])  # fmt: skip
def test_options_that_contradict_each_other(asked):
    with pytest.raises(UserError, match="Give it without --full|Give one of them"):
        way_to_train(methods.method("sft"), scale("cpu"), **asked)


def test_four_bits_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(notebooks.ROOT / "data/splits.jsonl")
    assert main(["sft", "--data", data, "--qlora", "--steps", "2", "--warmup", "0", "--output", "four"]) == 0
    card = read_card("four")
    assert card.settings["quantization_config"]["load_in_4bit"] and card.settings["peft_config"]["r"] == 16
