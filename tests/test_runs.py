"""Checkpoints that are whole or do not count, runs that go on to the bit, and folders that nobody spoils."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from llmcourse.card import Run, read_card, write_card
from llmcourse.core import UserError
from llmcourse.drill import drill
from llmcourse.rehearsal import rehearse
from llmcourse.resume import STATE_FILES, check_checkpoint, last_complete, seal
from llmcourse.runs import run_folder
from llmcourse.training import positive
from llmcourse.sft import sft
from llmcourse.tutor import problems, to_chat

ROWS = [{"messages": to_chat(p)["messages"]} for p in problems(20, 0, ("add", "story1"))]
CARD = Run("sft", "tutor/base", "a", "b", 1, "cpu", dict(learning_rate=1e-3))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A Llama so small that a run takes a second."
    from transformers import LlamaConfig, LlamaForCausalLM
    from llmcourse.models import load_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("small") / "model", load_tokenizer("tutor/base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")


def options(small, **more):
    return (
        dict(
            rows=ROWS, model=small, learning_rate=1e-2, per_device_train_batch_size=4, num_train_epochs=2, save_steps=3
        )
        | more
    )


def files(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def sealed(place, step):
    return seal(files(place / "writing", "model.safetensors", *STATE_FILES), place / "checkpoints" / f"step-{step:06d}")


def weights(folder):
    return {k: v for k, v in read_card(folder).files.items() if k.endswith(".safetensors")}


# checkpoints


def test_a_whole_checkpoint_is_found(tmp_path):
    for step in (5, 10, 100):
        sealed(tmp_path, step)
    assert last_complete(tmp_path / "checkpoints").name == "step-000100"
    assert last_complete(tmp_path / "none") is None


@pytest.mark.parametrize("name", [*STATE_FILES, "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("fault", ["gone", "changed", "empty"])
def test_a_broken_one_is_named_and_skipped(tmp_path, name, fault):
    sealed(tmp_path, 5)
    broken = sealed(tmp_path, 10) / name
    if fault == "gone":
        broken.unlink()
    else:
        broken.write_text("" if fault == "empty" else "{}")
    with pytest.raises(UserError, match=name):
        check_checkpoint(broken.parent)
    with pytest.warns(UserWarning, match=name):
        assert last_complete(tmp_path / "checkpoints").name == "step-000005"
    shutil.rmtree(tmp_path / "checkpoints/step-000005")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        last_complete(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", STATE_FILES)
def test_a_checkpoint_that_never_had_it_is_refused(tmp_path, name):
    "As `save_only_model=True` leaves it: the manifest is right, and the run would go on as another run."
    place = seal(
        files(tmp_path / "w", "model.safetensors", *(n for n in STATE_FILES if n != name)),
        tmp_path / "checkpoints/step-000001",
    )
    with pytest.raises(UserError, match=f"{name}: missing"):
        check_checkpoint(place)


def test_a_kill_while_writing_leaves_no_checkpoint(tmp_path):
    "Whatever was in the folder when the power went: without the last step, the renaming, it is not there."
    sealed(tmp_path, 5)
    files(tmp_path / "run/checkpoint-10", "model.safetensors", *STATE_FILES[:2])
    assert last_complete(tmp_path / "checkpoints").name == "step-000005"


# folders


def test_without_checkpoints_an_interruption_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CARD, keep=False) as folder:
        files(folder / "checkpoint-1", "x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_with_checkpoints_the_work_stays_and_then_moves(tmp_path):
    for last in (False, True):
        try:
            with run_folder(tmp_path / "run", CARD, keep=True) as folder:
                sealed(folder.parent, 5)
                files(folder / "more", "x")
                if not last:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert (tmp_path / "run.unfinished/checkpoints/step-000005").is_dir() and not (tmp_path / "run").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and (tmp_path / "run/more/x").is_file()


def test_a_run_that_never_saved_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), run_folder(tmp_path / "run", CARD, keep=True):
        raise ValueError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=2),
        dict(model_hash="c"),
        dict(data_hash="c"),
        dict(scale="t4"),
        dict(hyperparameters=dict(learning_rate=2e-3)),
        dict(hyperparameters=dict(learning_rate=1e-3, max_steps=5)),
        dict(hyperparameters={}),
    ],
)
def test_another_run_does_not_go_on_with_this_one(tmp_path, change):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CARD, keep=True) as folder:
        sealed(folder.parent, 5)
        raise KeyboardInterrupt
    field = (
        next(iter(change["hyperparameters"].keys() - {"learning_rate"} or ["learning_rate"]))
        if "hyperparameters" in change
        else next(iter(change))
    )
    with (
        pytest.raises(UserError, match=f"run.unfinished: an unfinished run with other settings .*{field}"),
        run_folder(tmp_path / "run", replace(CARD, **change), keep=True),
    ):
        pass
    with run_folder(tmp_path / "run", CARD, keep=True) as folder:
        assert last_complete(folder.parent / "checkpoints")


@pytest.mark.skipif(os.name == "nt", reason="locks by fcntl")
def test_two_processes_do_not_write_one_run(tmp_path):
    with run_folder(tmp_path / "run", CARD, keep=True) as folder:
        sealed(folder.parent, 5)
        code = (
            f"from llmcourse.card import Run; from llmcourse.runs import run_folder; from pathlib import "
            f"Path\nwith run_folder(Path({str(tmp_path / 'run')!r}), {CARD!r}, True): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode and "another process is training there" in other.stderr
        assert last_complete(folder.parent / "checkpoints")


def killed_at(count, output):
    "A run of `run_folder` in another process, killed before file operation number `count`. Returns its exit status."
    left = [count]

    def before(event, args):
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"}:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    def train():
        with run_folder(output, CARD, keep=True) as folder:
            if not last_complete(folder.parent / "checkpoints"):
                written = files(folder / "checkpoint-5", "model.safetensors", *STATE_FILES)
                seal(written, folder.parent / "checkpoints/step-000005")
            write_card(CARD, folder)
            files(folder / "more", "x")

    if not (child := os.fork()):
        sys.addaudithook(before)
        try:
            train()
        except BaseException as e:
            print(e, file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_at_any_file_operation_leaves_a_run_that_goes_on(earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a kill is no power cut
    for count in range(1, 1000):
        output = tmp_path / f"{count}/run"
        if earlier:
            files(output / "old", "x")
            write_card(CARD, output)
        if killed_at(count, output) != signal.SIGKILL:
            break
        assert not output.exists() or [p for p in output.glob("*/x")] and (output / "run.yaml").is_file()
        assert killed_at(1000, output) == 0, f"killed at {count}"
        assert [p.name for p in output.parent.iterdir()] == ["run"] and (output / "more/x").is_file()
    assert 30 < count < 1000


# training


def stop_at(step):
    "Ctrl-C at the beginning of a step."
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def test_drill_to_the_bit(small, tmp_path):
    """Full training and an adapter with dropout, killed and paused at random moments, end in the weights of an
    uninterrupted run."""
    for config in (None, lora()):
        place = tmp_path / "drill"  # the second drill finds what the first one left
        results = drill("sft", place, kills=4, moments=time.time_ns(), **options(small, peft_config=config))
        assert all(r["same"] for r in results), results
        assert all(r["exit"] in (-9, -15, 0, 75) for r in results)


def test_saving_changes_nothing(small, tmp_path):
    kept = sft(output=tmp_path / "kept", **options(small, peft_config=lora()))
    plain = sft(
        output=tmp_path / "plain", **{k: v for k, v in options(small, peft_config=lora()).items() if k != "save_steps"}
    )
    assert weights(kept) == weights(plain) and len({p.name for p in tmp_path.iterdir()}) == 2


def test_going_on_after_ctrl_c_keeps_the_whole_log(small, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from llmcourse import resume

    made = resume.bar

    def bar(*words):
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kw):
                if state.global_step == 7:
                    raise KeyboardInterrupt

        bar = made(*words)
        monkeypatch.setattr(type(bar), "on_step_begin", Stop.on_step_begin)
        return bar

    monkeypatch.setattr(resume, "bar", bar)
    with pytest.raises(KeyboardInterrupt):
        sft(output=tmp_path / "run", **options(small, logging_steps=1))
    assert last_complete(tmp_path / "run.unfinished/checkpoints").name == "step-000006"
    monkeypatch.setattr(resume, "bar", made)
    sft(output=tmp_path / "run", **options(small, logging_steps=1))
    steps = [
        json.loads(x)["step"]
        for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(x)
    ]
    assert steps == list(range(1, 21))
    straight = sft(output=tmp_path / "straight", **options(small, logging_steps=1))
    assert weights(straight) == weights(tmp_path / "run") and [p.name for p in sorted(tmp_path.iterdir())] == [
        "run",
        "straight",
    ]


def test_a_full_disk_loses_no_earlier_checkpoint(small, tmp_path, monkeypatch):
    from llmcourse import resume

    sealing = resume.seal

    def seal(folder, place, seconds=0):
        if place.name == "step-000009":
            raise OSError(28, "No space left on device")
        return sealing(folder, place, seconds)

    monkeypatch.setattr(resume, "seal", seal)
    with pytest.raises(OSError):
        sft(output=tmp_path / "run", **options(small))
    assert last_complete(tmp_path / "run.unfinished/checkpoints").name == "step-000006"
    monkeypatch.setattr(resume, "seal", sealing)
    assert sft(output=tmp_path / "run", **options(small)).is_dir() and not (tmp_path / "run.unfinished").exists()


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 16 MB."
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


FILLS = """
import shutil
from llmcourse import resume
from llmcourse.cli import cli
sealing = resume.seal
def seal(folder, place, seconds=0):
    sealed = sealing(folder, place, seconds)
    if place.name == "step-000006":   # somebody else takes all that is left, but for a part of a checkpoint
        with open(DISK + "/filler", "wb", buffering=0) as f: f.write(bytes(shutil.disk_usage(DISK).free - LEFT))
    return sealed
resume.seal = seal
cli()
"""


@pytest.mark.parametrize("left", [0, 900_000])  # not a file more; the weights, but no optimizer
def test_a_disk_that_fills_up_in_a_checkpoint(left, small, small_disk, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    words = ["sft", "--model", small, "--data", data, "--full", "--steps", "12", "--save-steps", "3", "--output"]
    words = [str(word) for word in words]
    python = [sys.executable, "-c"]
    code = FILLS.replace("LEFT", str(left)).replace("DISK", repr(str(small_disk)))
    full = subprocess.run([*python, code, *words, small_disk / "run"], capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    said = [line for line in full.stderr.splitlines() if "llmcourse: " in line or "Error" in line]
    assert len(said) == 1 and said[0].endswith("no space left on the disk. Free some and run the same command again")
    assert "Traceback" not in full.stderr and "Exception" not in full.stderr
    assert last_complete(small_disk / "run.unfinished/checkpoints").name == "step-000006"
    (small_disk / "filler").unlink()
    again = [*python, "from llmcourse.cli import cli; cli()", *words]
    done = subprocess.run([*again, small_disk / "run"], capture_output=True, text=True)
    assert done.returncode == 0 and "going on from step 6" in done.stderr, done.stderr
    subprocess.run([*again, tmp_path / "straight"], capture_output=True, check=True)
    assert weights(small_disk / "run") == weights(tmp_path / "straight")


def test_what_an_unfinished_run_takes_is_not_asked_for_again(small, tmp_path, monkeypatch):
    "Room for the whole run but for what its checkpoints take already is enough to go on, and not to begin."
    from llmcourse.models import load
    from llmcourse.runs import room_for_run

    with pytest.raises(KeyboardInterrupt):
        sft(output=tmp_path / "run", **options(small), callbacks=[stop_at(8)])
    size = load(small)[0].num_parameters()
    taken = sum(f.stat().st_size for f in (tmp_path / "run.unfinished").rglob("*") if f.is_file())
    whole = (4 + 1 + 3 * 12) * size
    assert taken > 2 * 12 * size  # two checkpoints, of weights and of AdamW's two numbers
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=whole - taken))
    with pytest.raises(UserError, match=r"MB free, .* MB needed"):
        room_for_run(tmp_path / "another", size, keep=True, adapter=False)
    assert sft(output=tmp_path / "run", **options(small)).is_dir()


def test_the_command_pauses_with_code_75_and_goes_on(small, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    words = [
        sys.executable,
        "-c",
        "from llmcourse.cli import cli; cli()",
        "sft",
        "--model",
        small,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--full",
        "--epochs",
        "60",
        "--save-steps",
        "20",
    ]
    shot = subprocess.Popen([str(w) for w in words], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("run.unfinished/checkpoints/step-*")) and shot.poll() is None:
        time.sleep(0.05)
    shot.send_signal(signal.SIGTERM)
    said = shot.communicate(timeout=60)[1]
    assert shot.returncode == 75 and "the same command goes on" in said
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0 and read_card(tmp_path / "run").seconds > 0


# cards


def test_a_card_brings_its_own_scale_along(small, tmp_path, monkeypatch, capsys):
    from llmcourse.cli import main

    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (here / "settings.ini").write_text("[mine]\nbatch_size = 5\nmax_length = 256\n")
    (here / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    monkeypatch.chdir(here)
    assert main(["sft", "--model", str(small), "--data", "chats.jsonl", "--scale", "mine", "--steps", "3"]) == 0
    card = read_card(here / "runs/sft")
    assert card.scale == "mine" and card.dial["batch_size"] == 5 and card.dial["device"] == "cpu"
    monkeypatch.chdir(there)
    assert main(["train", str(here / "runs/sft"), "--output", "again"]) == 0
    assert weights(there / "again") == weights(here / "runs/sft")
    assert "settings.ini" not in capsys.readouterr().err
    (there / "settings.ini").write_text("[mine]\nbatch_size = 2\nmax_length = 256\n")
    assert main(["train", str(here / "runs/sft"), "--output", "third"]) == 0
    assert "settings.ini says batch_size 2 by now; the card's own values count" in capsys.readouterr().err
    assert weights(there / "third") == weights(here / "runs/sft") and read_card("third").dial == card.dial


def test_a_card_from_before_it_kept_the_scale_opens(small, tmp_path):
    from llmcourse.methods import rerun

    run = sft(output=tmp_path / "run", **options(small, peft_config=lora()) | dict(max_steps=2, save_steps=50))
    write_card(replace(read_card(run), dial={}), run)
    assert weights(rerun(run, tmp_path / "again")) == weights(run)


def test_a_card_with_a_misspelt_field_is_refused(small, tmp_path):
    from llmcourse.methods import rerun

    run = sft(output=tmp_path / "run", **options(small, peft_config=lora()) | dict(max_steps=2, save_steps=50))
    text = (run / "run.yaml").read_text()
    for right, wrong in (
        ("learning_rate", "learningrate"),
        ("lora_alpha", "lora_alfa"),
        ("hyperparameters:", "hyperparameter:"),
        ("peft_type: LORA", "peft_type: LORE"),
    ):
        (run / "run.yaml").write_text(text.replace(right, wrong))
        with pytest.raises(UserError, match=f"did you mean '{right.split(': ')[-1].strip(':')}'"):
            rerun(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


# the dress rehearsal: each fault is planted, and named


def trainer(small, tmp_path, rows=ROWS, net=None, **more):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from llmcourse.models import load
    from llmcourse.data import tokenize

    model, tokenizer = load(small)
    settings = (
        dict(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=512,
        )
        | more
    )
    encoded = [tokenize(tokenizer, r["messages"]) for r in rows]
    return SFTTrainer(
        net or model, args=SFTConfig(**settings), train_dataset=Dataset.from_list(encoded), processing_class=tokenizer
    )


def test_a_sound_trainer_passes_and_stays_as_it_was(small, tmp_path):
    import torch

    t = trainer(small, tmp_path)
    before, state = {k: v.clone() for k, v in t.model.state_dict().items()}, torch.get_rng_state()
    found = rehearse(t)
    assert set(found) == {"vocabulary", "schedule", "memory", "packing", "gradient"}
    assert torch.equal(state, torch.get_rng_state()) and all(
        torch.equal(v, before[k]) for k, v in t.model.state_dict().items()
    )
    assert all(p.grad is None for p in t.model.parameters())


def test_it_names_a_token_without_an_embedding(small, tmp_path):
    t = trainer(small, tmp_path)
    t.model.resize_token_embeddings(200)
    with pytest.raises(UserError, match="vocabulary: the rows hold token .* 200 embeddings"):
        rehearse(t)


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_steps=1, warmup_steps=1),
        dict(learning_rate=0.0),
        dict(num_train_epochs=1, per_device_train_batch_size=64, warmup_steps=0.1),
    ],
)
def test_it_names_a_schedule_that_never_learns(small, tmp_path, settings, capsys):
    with pytest.raises(UserError, match="schedule: the learning rate is 0 in all"):
        rehearse(trainer(small, tmp_path, **settings))
    rehearse(trainer(small, tmp_path, max_steps=3, warmup_steps=10))
    assert "all 3 steps are warm-up" in capsys.readouterr().err


def test_it_names_frozen_weights_and_a_loss_that_is_no_number(small, tmp_path):
    t = trainer(small, tmp_path)
    t.model.requires_grad_(False)
    with pytest.raises(UserError, match="gradient: no weight gets one"):
        rehearse(t)
    t = trainer(small, tmp_path)
    t.model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(UserError, match="the loss of the longest batch is nan"):
        rehearse(t)


def test_it_names_what_to_change_when_memory_is_short(small, tmp_path, monkeypatch):
    import torch

    t = trainer(small, tmp_path)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(t.model, "forward", full)
    with pytest.raises(UserError, match="out of memory: halve --batch-size.* 8 rows of up to"):
        rehearse(t)


GROWTH = """
import gc, re, sys
from pathlib import Path
from llmcourse import training, memory, tutor
from llmcourse.lora import lora_config
from llmcourse.sft import sft
def status(key): return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def fitted(*words):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")   # the peak begins here
    before = status("VmRSS")
    fit(*words)
    print(status("VmHWM") - before, predicted[0])
def count(*words):
    predicted.append(counted(*words))
    return predicted[-1]
predicted, fit, counted = [], training._fit, memory.training_bytes
training._fit, memory.training_bytes = fitted, count
turns = [turn for p in tutor.problems(9, 0, ("add",)) for turn in tutor.to_chat(p)["messages"][-2:]]
config = lora_config(r=16, lora_alpha=32) if sys.argv[2] == "lora" else None
options = dict(max_length=400, max_steps=1, warmup_steps=0)
sft([{"messages": turns}] * 32, sys.argv[1], "tutor/base", peft_config=config, **options)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to read the peak from")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_memory_of_a_training_is_foretold(kind, tmp_path):
    words = [sys.executable, "-c", GROWTH, tmp_path / "run", kind]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grew, predicted = map(float, done.stdout.split()[-2:])
    assert grew > 1e9 and 1 / 1.5 < predicted / grew < 1.5, f"predicted {predicted / grew:.2f} of what it took"


def test_a_training_without_room_is_refused_before_it_starts(small, tmp_path, monkeypatch, capsys):
    from llmcourse import memory
    from llmcourse.cli import main

    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    words = ["sft", "--model", small, "--data", data, "--output", tmp_path / "run", "--full", "--steps", "4"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 5e6)
    assert main([str(w) for w in words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("llmcourse: memory: ") and "smaller --batch-size, --max-length or --r" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chats.jsonl"]
    assert main([str(w) for w in [*words, "--batch-size", "1"]]) == 0


def test_packing_is_measured(small, tmp_path):
    "Packed rows give their own logits, or packing is refused: here the positions that tell the rows apart are lost."
    t = trainer(small, tmp_path, packing=True)
    assert "logits as alone" in rehearse(t)["packing"]
    right = type(t.model).forward

    def blind(self, *args, position_ids=None, **kwargs):
        return right(self, *args, **kwargs)

    t.model.forward = blind.__get__(t.model)
    with pytest.raises(UserError, match="packing: rows in one batch see each other"):
        rehearse(t)


def test_tracking_is_one_word_away(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = sft(output=tmp_path / "run", **options(small, report_to="tensorboard", logging_steps=2))
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents*")).parent))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(2, 21, 2))


# a card is complete: what it says decides the weights, and nothing else does

BASE = dict(max_steps=5, learning_rate=1e-2, weight_decay=0.1, per_device_train_batch_size=8, max_length=512)
MATTERS = dict(
    seed=7,
    learning_rate=2e-2,
    max_steps=6,
    lr_scheduler_type="linear",
    warmup_steps=3,
    weight_decay=0.5,
    max_grad_norm=0.01,
    optim="adamw_torch",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_length=80,
    assistant_only_loss=False,
    bf16=None,
    train_sampling_strategy=None,
    neftune_noise_alpha=5,
    freeze_trainable_layers=1,
    adam_beta1=0.5,
)
NOT = dict(gradient_checkpointing=True, logging_steps=1, save_steps=2, report_to="tensorboard")
ADAPTER = dict(
    r=8,
    lora_alpha=64,
    lora_dropout=0.5,
    target_modules=["q_proj"],
    use_rslora=True,
    use_dora=True,
    init_lora_weights="pissa",
)


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    run = sft(ROWS, tmp_path_factory.mktemp("base") / "run", small, **BASE)
    return read_card(run).hyperparameters, weights(run)


def changed(name, value, hyper):
    return {name: not hyper["bf16"] if name == "bf16" else "random" if name == "train_sampling_strategy" else value}


@pytest.mark.parametrize("name", [*MATTERS, *NOT])
def test_a_field_of_the_card_decides(name, small, base, tmp_path):
    hyper, before = base
    value = changed(name, (MATTERS | NOT)[name], hyper)
    run = sft(ROWS, tmp_path / "run", small, **BASE | value)
    card = read_card(run)
    assert (asdict(card) | card.settings | card.hyperparameters)[name] == value[name], "the card does not say it"
    assert (weights(run) != before) == (name in MATTERS)
    if name != "optim":
        assert set(hyper) - {"peft_config", "quantization_config", "loftq", "freeze_trainable_layers"} - set(
            MATTERS
        ) - set(NOT) <= {"num_train_epochs", "packing", "fp16", "save_strategy", "use_liger_kernel", "engine"}, (
            "a new hyperparameter without a test"
        )


@pytest.mark.parametrize("name", ADAPTER)
def test_a_field_of_the_adapter_decides(name, small, tmp_path):
    from llmcourse.lora import lora_config

    one, other = (
        sft(ROWS, tmp_path / k, small, peft_config=lora_config(**dict(r=4, lora_alpha=8) | more), **BASE)
        for k, more in (("a", {}), ("b", {name: ADAPTER[name]}))
    )
    assert read_card(other).settings["peft_config"][name] == ADAPTER[name] and weights(one) != weights(other)


def test_other_rows_and_another_model_are_seen(small, base, tmp_path):
    assert weights(sft(ROWS[:-1], tmp_path / "rows", small, **BASE)) != base[1]
    assert weights(sft(ROWS, tmp_path / "model", tmp_path / "rows", **BASE)) != base[1]


@pytest.mark.parametrize(
    "hyper,said",
    [({"learning_rate": "4e-3"}, "YAML"), ({"max_steps": 0}, "more than 0"), ({"learning_rate": 0}, "more than 0")],
)
def test_numbers_that_are_none(hyper, said):
    with pytest.raises(UserError, match=said):
        positive(hyper)


def test_an_adapter_over_four_bits_goes_on_to_the_same_weights(tmp_path):
    "TRL trains it in bfloat16, and PEFT reads it back in float32."
    from llmcourse.loading import four_bits
    from llmcourse.lora import lora_config

    rows = [to_chat(p) for p in problems(8, 42, ["add"])]
    how = dict(peft_config=lora_config(), quantization_config=four_bits(), max_steps=4, warmup_steps=0)
    how |= dict(save_strategy="steps", save_steps=2)
    sft(rows, tmp_path / "straight", **how)
    with pytest.raises(KeyboardInterrupt):
        sft(rows, tmp_path / "stopped", callbacks=[stop_at(3)], **how)
    sft(rows, tmp_path / "stopped", **how)
    hashes = [read_card(tmp_path / name).files["adapter_model.safetensors"] for name in ("straight", "stopped")]
    assert hashes[0] == hashes[1]
