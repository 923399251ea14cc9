"""Nothing that exists is overwritten or removed, unless it is an earlier result of the same kind."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from llmcourse.cli import main
from llmcourse.card import Run, write_card
from llmcourse.core import MARK, Scratch, UserError, model_path, sweep, write_aside, write_jsonl
from llmcourse.models import load_tokenizer


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    from llmcourse.export import to_gguf

    return to_gguf("tutor/sft", tmp_path_factory.mktemp("gguf") / "sft.gguf", verify=False)


def writers(gguf):
    "Every function that takes an `output`, as name → call."
    from llmcourse.export import modelfile, quantize, to_gguf
    from llmcourse.lora import merge

    chat = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}] * 2

    def train(out):
        from llmcourse.sft import sft

        return sft(chat, out, max_steps=1, per_device_train_batch_size=2, warmup_steps=0)

    return {
        "to_gguf": lambda out: to_gguf("tutor/sft", out, verify=False),
        "quantize": lambda out: quantize(gguf, out, "Q8_0"),
        "modelfile": lambda out: modelfile(gguf, load_tokenizer("tutor/sft"), out),
        "merge": lambda out: merge("tutor/sft", out),
        "sft": train,
        "write_jsonl": lambda out: write_jsonl(out, [{"a": 1}]),
    }


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["to_gguf", "quantize", "modelfile", "merge", "sft", "write_jsonl"])
def test_strangers_stay(name, gguf, tmp_path):
    "A folder with photos, a text, a link to each, and the model's own folder are refused and stay as they are."
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("a cat")
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "link.txt").symlink_to("notes.txt")
    (tmp_path / "link").symlink_to("photos")
    shutil.copytree(model_path("tutor/base"), tmp_path / "model")
    (tmp_path / "model/run.yaml").unlink()
    before = contents(tmp_path)
    for stranger in ("photos", "notes.txt", "link.txt", "link", "model"):
        with pytest.raises(UserError, match="Choose another output"):
            writers(gguf)[name](tmp_path / stranger)
        assert contents(tmp_path) == before, stranger


@pytest.mark.parametrize("name", ["to_gguf", "quantize", "modelfile", "merge", "sft", "write_jsonl"])
def test_an_earlier_result_is_replaced(name, gguf, tmp_path):
    for _ in range(2):
        writers(gguf)[name](tmp_path / "result")
    assert (tmp_path / "result").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_not_quantised_onto_itself(gguf, tmp_path):
    copy = shutil.copy(gguf, tmp_path / "a.gguf")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="Choose another output"):
        writers(copy)["quantize"](copy)
    assert contents(tmp_path) == before


def test_export_leaves_a_folder_with_the_gguf_name(tmp_path, capsys):
    place = tmp_path / "out/sft-Q8_0.gguf"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years of work")
    assert main(["export", "--model", "tutor/sft", "--output", str(tmp_path / "out")]) == 2
    assert (place / "thesis.txt").exists() and "not an earlier result" in capsys.readouterr().err


def test_predictions_do_not_replace_the_data(tmp_path, capsys):
    data = write_jsonl(
        tmp_path / "test.jsonl",
        [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}],
    )
    before = contents(tmp_path)
    assert main(["eval", "--data", str(data), "--output", str(data)]) == 2
    assert contents(tmp_path) == before


def test_a_card_is_not_written_over_another_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("services: {}")
    with pytest.raises(UserError, match="not an earlier result"):
        write_card(Run("sft"), tmp_path)


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(UserError):
        with write_aside(tmp_path / "x") as aside:
            aside.write_text("ours")
            (tmp_path / "x").write_text("theirs")
    assert contents(tmp_path) == {"x": b"theirs"}


# --- every output argument of the command line ------------------------------------------------------------------

ROW = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Answer: 4"}]}
STRANGERS = ["photos", "notes.txt", "link.txt", "link", "models/mine", "models", ".", "rows.jsonl", "notes.txt/deep"]
COMMANDS = {
    "sft": ["sft", "--model", "models/mine", "--data", "rows.jsonl", "--steps", "1"],
    "grpo": ["grpo", "--model", "models/mine", "--steps", "1"],
    "rloo": ["rloo", "--model", "models/mine", "--steps", "1"],
    "train": ["train", "run/run.yaml"],
    "eval": ["eval", "--n", "1", "--json"],
    "export": ["export", "--model", "models/mine"],
}
ADDS = {"export"}  # its output is a folder to put two files into, beside whatever is there
AT_ONCE = [(name, place) for name in COMMANDS for place in STRANGERS if (name, place) != ("train", "models/mine")]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "What somebody has on the disk: photos, notes, links, a model, rows, an earlier run."
    place = tmp_path / "disk"
    (place / "photos").mkdir(parents=True)
    (place / "photos/cat.jpg").write_text("a cat")
    (place / "notes.txt").write_text("my notes")
    (place / "link.txt").symlink_to("notes.txt")
    (place / "link").symlink_to("photos")
    shutil.copytree(model_path("tutor/base"), place / "models/mine")
    shutil.copytree(model_path("tutor/sft"), place / "run")
    write_jsonl(place / "rows.jsonl", [ROW] * 20)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("name, stranger", AT_ONCE)
def test_no_command_touches_what_is_there(name, stranger, home, capsys):
    before = contents(home)
    code = main([*COMMANDS[name], "--output", stranger])
    said = capsys.readouterr().err.strip().splitlines()
    after = contents(home)
    assert {key: after.get(key) for key in before} == before
    if name in ADDS and Path(stranger).is_dir():
        assert code == 0 and len(after) == len(before) + 2
        return
    assert code == 2 and len(after) == len(before)
    assert said[-1].startswith("llmcourse: ") and "Traceback" not in "".join(said)
    assert not [path for path in home.rglob(".*") if path.is_dir()]


@pytest.mark.parametrize("name", [*COMMANDS, "demo"])
def test_no_command_writes_where_it_may_not(name, home, capsys):
    "A place that even root may not write to."
    words = COMMANDS.get(name, ["demo", "--n", "1", "--steps", "1"])
    before = contents(home)
    assert main([*words, "--output", "/sys/llmcourse"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("llmcourse: ") and contents(home) == before


@pytest.mark.parametrize("stranger", ["notes.txt", "rows.jsonl", "notes.txt/deep", "mixed"])
def test_the_demo_does_not_touch_what_is_there(stranger, home, capsys):
    (home / "mixed/sft").mkdir(parents=True)  # the name of its first run
    (home / "mixed/sft/thesis.txt").write_text("years of work")
    before = contents(home)
    assert main(["demo", "--n", "1", "--steps", "1", "--output", stranger]) == 2
    assert contents(home) == before


def test_checkpoints_are_not_built_over_a_stranger(home):
    "In another process, because the command changes where checkpoints are looked for."
    (home / "built/base").mkdir(parents=True)
    (home / "built/base/thesis.txt").write_text("years of work")
    before = contents(home)
    words = ["checkpoints", "--names", "base", "--output", "built"]
    code = "import sys; from llmcourse.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not an earlier result" in done.stderr and contents(home) == before


def test_a_chat_is_not_kept_in_a_stranger(home):
    from llmcourse.chatdb import open_db

    with sqlite3.connect("other.db") as other:
        other.execute("CREATE TABLE photos (name)")
    other.close()
    before = contents(home)
    for stranger in (*STRANGERS, "other.db", "/sys/llmcourse.db"):
        with pytest.raises(UserError):
            open_db(stranger)
        assert contents(home) == before, stranger


def test_a_file_does_not_replace_a_folder(gguf, tmp_path):
    "Not even an empty one."
    (tmp_path / "empty").mkdir()
    for name in ("to_gguf", "quantize", "modelfile", "write_jsonl"):
        with pytest.raises(UserError, match="a folder"):
            writers(gguf)[name](tmp_path / "empty")
        assert (tmp_path / "empty").is_dir() and len(list(tmp_path.iterdir())) == 1


# --- what a killed process leaves -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from llmcourse.core import Scratch, write_aside
with Scratch() as room, write_aside(Path(sys.argv[1])) as aside:
    (room / "big").write_text("half of it")
    aside.write_text("half of it")
    print(room, flush=True)
    if sys.argv[2] == "die": os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_the_next_run_sweeps_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / ".mine.gguf.backup").mkdir()  # a name like ours, and no mark in it
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    words = [sys.executable, "-c", KILLED, str(tmp_path / "mine.gguf")]
    dead = subprocess.run([*words, "die"], capture_output=True, text=True, env=env)
    left = [Path(dead.stdout.strip()), *tmp_path.glob(".mine.gguf.*/mine.gguf")]
    assert dead.returncode == -signal.SIGKILL and len(left) == 2 and all(path.exists() for path in left)
    living = subprocess.Popen([*words, "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    room = Path(living.stdout.readline().strip())
    assert not any(path.exists() for path in left)  # swept by the one that lives
    with Scratch(), write_aside(tmp_path / "other.gguf") as aside:
        aside.write_text("GGUF")
    with pytest.raises(UserError), write_aside(tmp_path / "mine.gguf") as aside:
        raise UserError("an error")
    assert room.exists() and len([*tmp_path.glob(".mine.gguf.*/mine.gguf")]) == 1  # and what it holds stays
    living.communicate()
    assert not room.exists() and (tmp_path / "mine.gguf").read_text() == "half of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.gguf.backup", "mine.gguf", "other.gguf", "tmp"]


def test_an_export_that_is_killed_leaves_nothing_for_long(tmp_path):
    "The command itself, killed in the middle; the next one cleans up."
    code = (
        "import os, signal, sys, llmcourse.converter as c\n"
        "from llmcourse.cli import main\n"
        "c.check_words = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    words = ["export", "--model", "tutor/sft", "--output", str(tmp_path / "out")]
    dead = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, timeout=120)
    assert dead.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").glob(".sft*")) and list((tmp_path / "tmp").iterdir())
    again = subprocess.run(
        [sys.executable, "-c", code.splitlines()[1] + "\nimport sys; sys.exit(main(sys.argv[1:]))", *words], env=env
    )
    assert again.returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "sft-Q8_0.gguf"]
    assert not list((tmp_path / "tmp").glob("llmcourse-*"))


def test_only_marked_folders_are_swept(tmp_path):
    for name in (".x.1", ".x.2"):
        (tmp_path / name).mkdir()
    (tmp_path / ".x.1" / MARK).touch()
    (tmp_path / ".y.1").mkdir()
    (tmp_path / ".y.1" / MARK).touch()
    assert sweep(tmp_path, ".x.") == [tmp_path / ".x.1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.2", ".y.1"]


def test_many_at_once_keep_their_folders(tmp_path):
    "Each sweeps when it begins; nobody may lose the folder that another has just made."
    code = (
        "import sys; from llmcourse.core import Scratch\n"
        "for _ in range(100):\n"
        "    with Scratch(sys.argv[1], '.x.') as room: (room / 'a').write_text('a'); assert (room / 'a').exists()"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [p.wait(120) for p in running] == [0] * 4 and not list(tmp_path.iterdir())
