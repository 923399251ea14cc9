"""A whole job is tried on a look-alike of its model: it names the fault and its stage, or what the real run takes."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmcourse.card import read_card, write_card
from llmcourse.cli import main
from llmcourse.core import UserError, file_hash, write_jsonl
from llmcourse.lookalike import original_config
from llmcourse.lora import lora_config
from llmcourse.models import load_tokenizer
from llmcourse.runthrough import run_through
from llmcourse.trial import STEPS, on_a_laptop, sampled
from llmcourse.methods import method, settled

ROOT = Path(__file__).parent.parent
SPLITS = str(ROOT / "data/splits.jsonl")
GSM8K = str(ROOT / "data/gsm8k.jsonl")
STAGES = ["job", "model", "rows", "train", "resume", "merge", "export", "serve"]
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"


def said_by(job: str, disk=None, **options) -> tuple[list[str], dict]:
    "The lines of a rehearsal, and what the real run takes."
    lines = []
    return lines, run_through(job, options, disk, lines.append)


def fault(job: str, disk=None, **options) -> str:
    "The one line of a rehearsal that finds something."
    with pytest.raises(UserError) as caught:
        run_through(job, options, disk, lambda line: None)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert left_behind() == []
    return str(caught.value)


@pytest.fixture(autouse=True)
def own_room(tmp_path, monkeypatch):
    "A folder for temporary things that nobody else sweeps."
    (tmp_path / "room").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "room"))


def left_behind() -> list[str]:
    return [p.name for p in Path(tempfile.gettempdir()).glob("llmcourse-rehearse-*")]


def stages(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines if line[0] in "✓–"]


def model_with(place: Path, template=None, tokens=()) -> Path:
    "The folder of a real model: config and tokenizer of the tutor's, changed."
    tokenizer = load_tokenizer("tutor/base")
    if template:
        tokenizer.chat_template = template(tokenizer.chat_template)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(place)
    original_config("tutor/base").save_pretrained(place)
    return place


@pytest.fixture
def rows(tmp_path) -> Path:
    "Chats with a system turn, short ones."
    return write_jsonl(tmp_path / "rows.jsonl", [json.loads(x) for x in Path(SPLITS).read_text().splitlines()])


def assert_as_planned(size: dict, rows: str, **options) -> None:
    "The plan of the same job says the same; tokens of rows differ by the tokenizer, which is not there."
    from llmcourse.planner import needed
    from llmcourse.planreport import plan_job

    method = "lora" if size["method"] == "sft" else "full"
    plan = plan_job("llama-3.2-1b", rows, "t4", method=method, r=8, **options)
    assert (plan.rows, plan.amount.steps) == (size["rows"], size["steps"])
    assert plan.job.batch_size * plan.job.grad_accum == size["batch"]
    if size["replies"]:
        assert plan.amount.tokens == size["tokens"]
    gib = float(re.search(r"card: ([\d.]+) of 15 GiB", size["card"])[1])
    assert abs(needed(plan.job) / 2**30 - gib) < 0.25, (needed(plan.job) / 2**30, gib)


# it goes well


def test_an_adapter_all_the_way():
    lines, size = said_by("sft", rows=SPLITS, scale="t4", model=LLAMA, peft_config=lora_config(r=8))
    assert stages(lines) == STAGES
    assert "kill -9 in step 3, on from step 2: the same weights, to the bit" in lines[STAGES.index("resume") + 1]
    assert "greedy tokens equal to those of transformers" in lines[STAGES.index("serve") + 1]
    assert size["rows"] == 48 and size["hyper"]["fp16"] and not size["hyper"]["bf16"]
    assert size["steps"] == 24 and size["batch"] == 6, "48 rows: three epochs in small batches"
    assert_as_planned(size, SPLITS)
    assert size["hyper"]["learning_rate"] == 2e-4, "the rate of a billion weights, not of the look-alike's thousands"
    assert left_behind() == []


def test_it_says_what_the_real_run_then_takes(tmp_path):
    "Steps and tokens are those of the run itself."
    from llmcourse.sft import sft

    options = dict(num_train_epochs=2, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    _, size = said_by("sft", rows=SPLITS, model="tutor/base", peft_config=lora_config(r=4), **options)
    run = sft(SPLITS, tmp_path / "run", "tutor/base", peft_config=lora_config(r=4), **options)
    log = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert size["steps"] == max(row["step"] for row in log)
    seen = read_card(run).before["tokens"]
    assert abs(size["tokens"] - 2 * seen) <= 2, (size, seen)


def test_grpo_and_a_family_that_is_not_exported(tmp_path):
    lines, size = said_by("grpo", rows=GSM8K, scale="t4", max_steps=7)
    assert stages(lines) == [name for name in STAGES if name != "merge"]
    assert size["steps"] == 7 and size["replies"] and size["hyper"]["max_completion_length"] == 512
    assert size["tokens"] == 7 * size["batch"] * 512
    assert_as_planned(size, GSM8K, task="grpo", steps=7)
    from transformers import GPT2Config

    GPT2Config(n_positions=1024).save_pretrained(tmp_path / "gpt2")
    load_tokenizer("tutor/base").save_pretrained(tmp_path / "gpt2")
    lines, _ = said_by("sft", rows=SPLITS, model=str(tmp_path / "gpt2"), max_length=320)
    assert stages(lines)[-2:] == ["resume", "export"] and lines[STAGES.index("export")].startswith("–")
    assert "GPT2LMHeadModel" in lines[STAGES.index("export")]


def test_a_card_is_rehearsed_with_its_own_settings(tmp_path, capsys):
    options = ["--data", SPLITS, "--steps", "2", "--r", "4", "--output", str(tmp_path / "run")]
    assert main(["sft", *options]) == 0
    assert main(["rehearse", str(tmp_path / "run/run.yaml")]) == 0
    out = capsys.readouterr().out
    assert "the real run: 48 rows in batches of" in out and ", 2 steps," in out
    assert main(["rehearse", str(tmp_path / "run"), "--steps", "3"]) == 2
    assert "a card says it all" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["room", "run"]


def test_a_laptop_changes_only_what_it_must():
    real = settled(
        method("sft"),
        dict(device="cuda", dtype="float16", batch_size=2, grad_accum=4, max_length=1024),
        10**9,
        10_000,
        dict(neftune_noise_alpha=5.0, optim="adafactor"),
        adapter=True,
    )
    here = on_a_laptop(real, 300)
    changed = {k for k in real if here.get(k) != real[k]}
    assert changed == {
        "num_train_epochs",
        "gradient_accumulation_steps",
        "max_length",
        "fp16",
        "logging_steps",
        "save_steps",
    }
    assert here["max_steps"] == STEPS and here["neftune_noise_alpha"] == 5.0 and here["optim"] == "adafactor"


def test_of_a_large_file_the_longest_rows_are_tried():
    from llmcourse.rows import Row

    many = [Row(f"r:{i}", i, "chat", None, {"messages": "x" * (i % 7)}) for i in range(9000)]
    many[4321] = Row("r:4321", 4321, "chat", None, {"messages": "x" * 500})
    tried = sampled(many)
    assert many[4321] in tried and len(tried) <= 2000 and [r.number for r in tried] == sorted(r.number for r in tried)


# the faults


def test_rows_that_are_too_long(rows, tmp_path):
    place = model_with(tmp_path / "model")
    here = dict(rows=str(rows), model=str(place), scale="t4", max_length=75)
    said = fault("sft", **here)
    assert re.search(
        r"rows: \S+rows.jsonl:\d+: \d+ tokens, max_length is 75; \d+ of 48 rows would lose their end. "
        r"Give --max-length \d+",
        said,
    ), said
    lines, _ = said_by("sft", **here, skip_bad=True)
    assert stages(lines)[-1] == "serve", "with --skip-bad that is a choice"
    config = json.loads((place / "config.json").read_text()) | {"max_position_embeddings": 64}
    (place / "config.json").write_text(json.dumps(config))
    said = fault("sft", rows=str(rows), model=str(place))
    assert "and the model reads 64" in said and said.startswith("rows: ")


def test_a_template_that_drops_turns(rows, tmp_path):
    loop = "{% for m in messages %}"
    deaf = model_with(tmp_path / "deaf", lambda t: t.replace(loop, loop.replace(" %}", " if m['role'] != 'system' %}")))
    assert "drops the text of turn 0 (system)" in fault("sft", rows=str(rows), model=str(deaf))
    deaf = model_with(tmp_path / "deaf2", lambda t: t.replace(loop, loop.replace(" %}", " if m['role'] != 'tool' %}")))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "tool_calls": [call], "content": ""},
        {"role": "tool", "tool_call_id": "1", "content": "17"},
        {"role": "assistant", "content": "17."},
    ]
    from llmcourse.calculator import TOOL_TEMPLATE

    deaf = model_with(tmp_path / "deaf3", lambda t: re.sub(r"m\['content'\]( \| trim)?(?= \+ '<\|eot_id\|>')", "''", t))
    assert "drops the text of turn 0 (system)" in fault("sft", rows=str(rows), model=str(deaf))
    assert "tool" in TOOL_TEMPLATE
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    data = write_jsonl(tmp_path / "tools.jsonl", [{"messages": turns, "tools": [tool]}] * 8)
    silent = model_with(
        tmp_path / "deaf4", lambda t: TOOL_TEMPLATE.replace(loop, loop.replace(" %}", " if m.role != 'tool' %}"))
    )
    assert "drops the text of turn 2 (tool)" in fault("sft", rows=str(data), model=str(silent))


def test_a_template_without_an_end_token(rows, tmp_path):
    place = model_with(tmp_path / "model", lambda t: t.replace("<|eot_id|>", "\\n"))
    assert "no end token would be trained" in fault("sft", rows=str(rows), model=str(place))


def test_a_tokenizer_larger_than_the_embeddings(rows, tmp_path):
    place = model_with(tmp_path / "model", tokens=["<|mine|>", "<|yours|>"])
    assert fault("sft", rows=str(rows), model=str(place)).startswith(
        "model: the tokenizer goes up to token 1,025, the model has 1,024 embeddings"
    )


def test_a_layer_that_the_architecture_does_not_have(rows):
    config = lora_config(target_modules=["q_proj", "c_attn"])  # PEFT would train the first, and say nothing
    assert "model: unknown layer of a llama in target_modules: 'c_attn'" in fault(
        "sft", rows=str(rows), scale="a100", peft_config=config
    )


def broken_reward(completions, **columns):
    return [1.0 / len(columns["nothing"]) for _ in completions]


def test_a_reward_that_raises():
    said = fault("grpo", rows=GSM8K, scale="t4", reward_funcs=[broken_reward])
    assert said.startswith("train: ") and "the reward broken_reward failed (KeyError: 'nothing')" in said


def test_bfloat16_on_a_card_without_it(rows, tmp_path, monkeypatch):
    assert "scale t4: bf16=True, and this card has no bfloat16" in fault(
        "sft", rows=str(rows), scale="t4", bf16=True, fp16=False
    )
    text = (ROOT / "settings.ini").read_text().replace("dtype = float16", "dtype = bfloat16")
    (tmp_path / "settings.ini").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert "this card has no bfloat16" in fault("sft", rows=str(rows), scale="t4")


def test_a_disk_that_is_too_small(rows):
    said = fault("sft", disk=60, rows=str(rows), scale="a100", peft_config=lora_config())
    assert "16.06 GB of weights" in said and "there are 60.0 GB" in said and "Rent 79 GB" in said
    assert said.startswith("disk: 16.06")
    lines, _ = said_by("sft", disk=80, rows=str(rows), scale="a100", peft_config=lora_config())
    assert any("disk: 72.27 GB" in line for line in lines)


@pytest.mark.parametrize("words", [["--disk", "5"], ["--disk=5"]])
def test_the_disk_may_stand_behind_the_job(rows, words, capsys):
    assert main(["rehearse", "sft", "--data", str(rows), "--scale", "t4", *words]) == 2
    err = capsys.readouterr().err
    assert "there are 5.0 GB" in err and "disk: " in err and "skip-bad" not in err, err
    assert main(["rehearse", "sft", "--disk", "much"]) == 2
    assert "--disk much: give the free GB" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(tmp_path):
    chat = [{"role": "user", "content": "12 plus " * 600}]
    data = write_jsonl(tmp_path / "long.jsonl", [{"messages": chat, "answer": "1"}] * 70)
    said = fault("grpo", rows=str(data), model="tutor/sft")
    assert "a prompt of" in said and "beside a reply of 160" in said and said.startswith("rows: ")


def test_a_method_that_is_unknown(capsys):
    start = time.perf_counter()
    assert main(["rehearse", "sfft", "--data", SPLITS]) == 2
    said = capsys.readouterr()
    assert "unknown method 'sfft': did you mean 'sft'?" in said.err and said.err.count("\n") == 1 and not said.out
    assert time.perf_counter() - start < 3
    assert main(["rehearse", "sft", "--dat", SPLITS]) == 2
    assert "did you mean '--data'" in capsys.readouterr().err


def test_a_card_of_an_unknown_method(tmp_path):
    from llmcourse.card import Run

    write_card(Run("mystery"), tmp_path)
    assert "unknown method in" in fault(str(tmp_path))


# from the Hub


class Hub(SimpleHTTPRequestHandler):
    "The few addresses that the Hub's client asks, for one model: a folder."

    asked: list[str] = []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body=False):
        Hub.asked.append(self.path)
        name = self.path.split("?")[0].rpartition("/resolve/main/")[2]
        file = self.server.folder / name
        if "/resolve/main/" not in self.path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        for key, value in {
            "ETag": f'"{file_hash(file)}"',
            "X-Repo-Commit": "0" * 40,
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_of_a_hub_model_only_config_and_tokenizer_are_read(tmp_path, rows):
    from llmcourse.templates import dress

    folder = tmp_path / "hub"
    tokenizer = dress(load_tokenizer("tutor/base"), "Llama 3")
    tokenizer.add_tokens([f"<|own{i}|>" for i in range(7)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = copy.deepcopy(original_config("llama-3.2-3b"))
    config.vocab_size = len(tokenizer)
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"nobody reads me")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = folder
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    words = ["rehearse", "sft", "--data", str(rows), "--model", "somebody/Sums-3B", "--scale", "a100"]
    code = f"from llmcourse.cli import main; raise SystemExit(main({words}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "somebody/Sums-3B: a llama of 2,822 million weights; 1,031 tokens, 1,031 embeddings" in done.stdout
    files = {path.split("?")[0].rpartition("/resolve/main/")[2] for path in Hub.asked if "/resolve/" in path}
    assert "config.json" in files and "tokenizer.json" in files
    assert [f for f in files if f.endswith((".safetensors", ".bin", ".gguf", ".index.json", ".pt"))] == []


# it is interrupted


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(how, tmp_path, rows):
    "In whatever stage: no folder, and no process."
    place = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a socket's path has to be short
    env = os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(ROOT)}
    words = ["rehearse", "sft", "--data", str(rows), "--scale", "t4"]
    code = (
        f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from llmcourse.cli import main; raise SystemExit(main({words}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    for line in process.stdout:
        if " rows " in line:
            break
    time.sleep(1.0)  # two trainings run
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how] and "Traceback" not in err, err
    assert list(place.glob("llmcourse-*")) == [] and sorted(p.name for p in tmp_path.iterdir()) == [
        "room",
        "rows.jsonl",
    ]
    time.sleep(1)
    alive = subprocess.run(["ps", "-eo", "sid,cmd"], capture_output=True, text=True).stdout
    mine = [
        x
        for x in alive.splitlines()
        if x.split()[:1] == [str(process.pid)] and "<defunct>" not in x and "resource_tracker" not in x
    ]
    assert mine == [], mine


def test_a_public_llama_that_cannot_be_reached_keeps_its_own_template():
    "Its template prints tools; the tutor's, whose tokenizer stands in, does not."
    from llmcourse.trial import words_of

    words, owner = words_of("meta-llama/Llama-3.2-1B-Instruct")
    assert owner == "tutor/base" and "tools" in words.chat_template
