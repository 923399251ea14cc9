"""The command line: help that helps, and one line, code 2 and nothing half-written for bad input."""

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from llmcourse.cli import COMMANDS, command, main, usage
from llmcourse.options import parse

ROOT = Path(__file__).parent.parent
CHAT = {
    "messages": [{"role": "user", "content": "What is 12 plus 34?"}, {"role": "assistant", "content": "Answer: 46"}]
}


def bad(capsys, *words) -> str:
    "Run a command that must refuse: code 2, one line on stderr, no traceback."
    code = main([str(w) for w in words])
    err = capsys.readouterr().err.strip()
    assert code == 2, f"code {code}: {err}"
    said = [x for x in err.splitlines() if x.startswith("llmcourse: ")]
    assert len(said) == 1 and err.endswith(said[0]) and "Traceback" not in err, err
    return said[0]


def jsonl(path: Path, *lines) -> Path:
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def test_help_lists_every_command_and_option(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parse(command(name), f"llmcourse {name}", ["--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and f"llmcourse {name}" in said
    assert "llmcourse COMMAND --help" in usage()


def test_usage_shows_what_an_action_may_be(capsys):
    "And the command takes just those."
    with_action = [name for name in COMMANDS if "action" in inspect.signature(command(name)).parameters]
    assert {"flywheel", "data", "prompts", "chatlog", "collect", "course", "reward"} <= {*with_action}
    for name in with_action:
        kinds = get_args(get_type_hints(command(name))["action"])
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"{{{','.join(kinds)}}}" in capsys.readouterr().out
        files = ["a.jsonl"] * (name in ("data", "prompts", "reward"))
        assert kinds and main([name, "no-such-action", *files]) == 2
        assert capsys.readouterr().err.rstrip().endswith((", ".join(kinds), f"the only one is {kinds[0]}"))


def test_parity_takes_a_model(capsys):
    with pytest.raises(SystemExit):
        main(["parity", "--help"])
    assert "model [files ...]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,hint",
    [
        (["demp"], "did you mean 'demo'"),
        (["sft", "--scale", "h10"], "did you mean 'h100'"),
        (["grpo", "--scale", "a10"], "did you mean 'a100'"),
        (["course", "list", "--chapter", "99"], "unknown chapter '99'"),
        (["scores", "--checkpoints", "tutor/bse"], "did you mean 'tutor/base'"),
        (["eval", "--model", "tutor/ftt"], "unknown checkpoint"),
        (["export", "--model", "./nowhere"], "no such folder"),
        (["export", "--quant", "Q9_9"], "Q9_9"),
        (["train", "nowhere/run.yaml"], "no run card there"),
        (["sft", "--data", "nowhere.jsonl"], "no such file"),
        (["sft", "--dat", "chats.jsonl"], "did you mean '--data'"),
        (["serve", "--prot=80"], "did you mean '--port'"),
        (["eval", "--n", "many"], "--n"),
        (["xray"], "file"),
        (["data", "check", "a.jsonl", "b.jsonl"], "b.jsonl"),
    ],
)
def test_wrong_words(words, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in bad(capsys, *words)
    assert list(p for p in tmp_path.rglob("*") if p.name != "home") == []


@pytest.mark.parametrize("command", ["sft", "grpo", "eval"])
@pytest.mark.parametrize(
    "lines,place",
    [
        ([], "empty"),
        ([CHAT, "{not json\n"], "data.jsonl:2"),
        ([CHAT, {"messages": [{"content": "no role"}]}], "data.jsonl:2"),
        ([CHAT, {"note": "no messages"}], "data.jsonl:2"),
        ([CHAT, "[1, 2]\n"], "data.jsonl:2"),
    ],
    ids=["empty", "not-json", "no-role", "no-messages", "a-list"],
)
def test_bad_data_names_the_line(command, lines, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = jsonl(tmp_path / "data.jsonl", *lines)
    line = bad(capsys, command, "--data", data, *([] if command == "eval" else ["--output", tmp_path / "out"]))
    assert place in line or (command == "eval" and "row 2" in line), line
    assert not (tmp_path / "out").exists()


def test_model_without_tokenizer_or_template(capsys, tmp_path):
    from llmcourse.models import load

    model, tokenizer = load("tutor/base")
    model.save_pretrained(tmp_path / "bare")
    assert "tokenizer" in bad(capsys, "eval", "--model", tmp_path / "bare", "--n", "1")
    model.save_pretrained(tmp_path / "mute")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "mute")
    assert "chat template" in bad(capsys, "eval", "--model", tmp_path / "mute", "--n", "1")


def test_adapter_of_another_base(capsys, tmp_path):
    import shutil
    from llmcourse.core import weights
    from llmcourse.pretraining import new_model
    from llmcourse.models import load_tokenizer

    other, tokenizer = tmp_path / "other", load_tokenizer("tutor/base")
    new_model(tokenizer, num_hidden_layers=2).save_pretrained(other)
    tokenizer.save_pretrained(other)
    adapter = shutil.copytree(weights() / "sft", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    assert "adapter" in bad(capsys, "eval", "--model", adapter, "--n", "1")


def test_a_folder_that_is_not_there_yet(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["chat", "--model", "runs/gguf", "--port", 0], ["serve", "--model", "./mine", "--port", 0]):
        said = bad(capsys, *words)
        assert f"{words[2]}: no such folder. `llmcourse export --output {words[2]}` makes one" in said


def test_help_says_that_an_earlier_run_is_replaced(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    assert "An earlier run is replaced" in " ".join(capsys.readouterr().out.split())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize("checkpoint, file", [("sft", "adapter_model.safetensors"), ("base", "model.safetensors")])
@pytest.mark.parametrize(
    "fault, why",
    [("cut", "not fully covered"), ("pointer", "git lfs pull"), ("empty", "empty"), ("page", "a web page")],
)
def test_damaged_weights_are_called_damaged(checkpoint, file, fault, why, capsys, tmp_path, monkeypatch):
    import shutil
    from llmcourse.core import weights

    monkeypatch.chdir(tmp_path)
    whole = (Path(shutil.copytree(weights() / checkpoint, "mine")) / file).read_bytes()
    faults = {"cut": whole[: len(whole) // 2], "pointer": POINTER, "empty": b"", "page": b"<!DOCTYPE html><html>"}
    (tmp_path / "mine" / file).write_bytes(faults[fault])
    commands = ["eval --n 1", "sft --steps 4", "grpo --steps 4", "export", "serve --engine transformers --port 0"]
    for words in commands:
        said = bad(capsys, *words.split(), "--model", "mine")
        assert f"mine/{file}: not a whole safetensors file" in said and why in said and "not fit" not in said, words
    assert not (tmp_path / "runs").exists()


def test_too_long_a_prompt(capsys, tmp_path):
    data = jsonl(tmp_path / "long.jsonl", {"messages": [{"role": "user", "content": "12 plus " * 2000}], "answer": "1"})
    assert "tokens" in bad(capsys, "eval", "--data", data)


def test_port_in_use(capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert str(port) in bad(capsys, "serve", "--port", port)
        assert str(port) in bad(capsys, "chat", "--port", port, "--url", "http://127.0.0.1:9/v1")


def test_open_host_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("LLMCOURSE_API_KEY", raising=False)
    assert "key" in bad(capsys, "serve", "--host", "0.0.0.0", "--port", "0")


def test_full_disk(capsys, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for words in (["sft"], ["grpo"], ["export"], ["demo"]):
        assert "free" in bad(capsys, *words)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_doctor_finds_a_damaged_checkpoint(capsys, tmp_path, monkeypatch):
    import shutil
    from llmcourse.core import weights

    copy = shutil.copytree(weights(), tmp_path / "weights")
    assert main(["doctor"]) == 0
    with (copy / "base" / "model.safetensors").open("r+b") as f:
        f.seek(5000)
        f.write(b"\0\1\2\3")
    monkeypatch.setenv("LLMCOURSE_WEIGHTS", str(copy))
    assert main(["doctor"]) == 1
    assert "model.safetensors" in capsys.readouterr().out


def test_a_real_process_exits_with_2_and_no_traceback():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from llmcourse.cli import cli; import sys; sys.argv = ['llmcourse', 'sft', '--scale', 'x']; cli()",
        ],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (
        done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("llmcourse: unknown scale")
    )


ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PROGRAM = f"{sys.executable} -c 'from llmcourse.cli import cli; cli()'"


@pytest.mark.parametrize("reader", ["head -1", "true"])  # `true` is gone before the first line
@pytest.mark.parametrize(
    "words",
    [
        "data check data/gsm8k.jsonl",
        "xray data/gsm8k.jsonl",
        "scores --n 1 --checkpoints sft --json",
        "--help",
        "sft --help",
        "--version",
    ],
)
def test_a_reader_that_has_seen_enough(words, reader):
    line = f"{PROGRAM} {words} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=ENV)
    assert done.returncode in (0, 141) and done.stderr == ""
    assert len(done.stdout.splitlines()) == (reader != "true")


def test_a_full_disk_under_the_standard_output():
    done = subprocess.run(["bash", "-c", f"{PROGRAM} --help > /dev/full"], capture_output=True, text=True, env=ENV)
    assert done.returncode == 2
    assert (
        done.stderr == "llmcourse: while writing: no space left on the disk. Free some and run the same command again\n"
    )


def test_eval_leaves_rows_of_training_out(capsys, tmp_path):
    from llmcourse.exam import exam_rows

    ask = lambda i: {
        "messages": [
            {"role": "user", "content": f"{i} plus {i}?"},
            {"role": "assistant", "content": f"Answer: {2 * i}"},
        ]
    }
    rows = [ask(i) | {"split": s} for i, s in enumerate(("train", "test", "train"))]
    assert len(exam_rows(jsonl(tmp_path / "a.jsonl", *rows), None)) == 1
    assert "2 rows of the split train are left out" in capsys.readouterr().err
    assert "all rows are in train" in bad(capsys, "eval", "--data", jsonl(tmp_path / "b.jsonl", rows[0]))
    assert "c.jsonl:2: unknown split 'tset'" in bad(
        capsys, "eval", "--data", jsonl(tmp_path / "c.jsonl", CHAT, ask(2) | {"split": "tset"})
    )
    (tmp_path / "d.csv").write_text("question;answer\n1+1?;2\n")
    (row,) = exam_rows(tmp_path / "d.csv", None)
    assert row["place"].endswith("d.csv:2") and [m["content"] for m in row["messages"]] == ["1+1?", "2"]


def test_more_that_cannot_work(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "runs").mkdir()
    assert "a file" in bad(capsys, "export", "--output", "file")
    assert "no such folder" in bad(capsys, "eval", "--model", "runs/nope")
    assert "max_steps" in bad(capsys, "grpo", "--steps", "0")
    assert "epochs" in bad(capsys, "data", "check", jsonl(tmp_path / "a.jsonl", CHAT), "--epochs", "-1")
    (tmp_path / "e.csv").write_text("question,answer\n1+1?,2\n2+2?,\n")
    assert "e.csv:3" in bad(capsys, "grpo", "--data", "e.csv")


def test_a_leak_between_files_of_one_name(capsys, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    one, two = (jsonl(tmp_path / side / "data.jsonl", CHAT) for side in ("train", "test"))
    assert (
        main(["data", "check", str(one), "--against", str(two)]) == 2
        and "a leak between the splits" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words,said",
    [
        (["scores", "--n", "0"], "--n 0: give at least 1"),
        (["export", "--model", "runs/none"], "runs/none: no such folder. Give a model folder"),
        (["sft", "--model", "runs/none"], "runs/none: no such folder. Give a model folder"),
        (["data", "chek", "x"], "did you mean 'check'? the only one is check"),
    ],
)
def test_one_line_says_what_to_do(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
