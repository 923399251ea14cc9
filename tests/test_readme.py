"""The README does what it says: each of its commands is run as it is written, in order, on the files of data/."""

import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llmcourse.cli import COMMANDS
from llmcourse.demo import show_ladder
from llmcourse.serve import remote

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^ {4}(llmcourse .+?)(?:\s+# (.*))?$", TEXT, re.M)  # (command, comment)
ELSEWHERE = {
    "demo": "5 minutes; test_demo.py runs it small",
    "checkpoints": "20 minutes; test_checkpoints.py runs its parts",
}
FOREVER = {"serve": 8080, "chat": 7860}  # commands that run until Ctrl-C, and their ports
QUESTION = [{"role": "user", "content": "What is 25 plus 31?"}]
SHOWS = {
    "course list": ["06 sft"],
    "scores": ["tutor/base", "tutor/sft"],
    "data check data/sick": ["✗", "!", "38 errors"],
    "data check data/splits": ["train 48, validation 16, test 16", "0 errors"],
    "plan": ["fits", "no price known for the t4"],
    "xray data/chats": ["80 rows", "end_trained"],
    "xray data/calls": ["32 rows", "calculate"],
    "agree": ["facts, service", "regex, facts", "kappa"],
    "eval --model tutor/tools": ["calls: names", "calls: arguments"],
    "eval --model tutor/base": [" 0 %"],
    "eval --model runs/mine --data data/splits": ["story2"],
    "eval --model runs/mine --data data/gsm8k": ["64"],
    "rehearse": ["the same weights, to the bit", "greedy tokens equal", "the real run: 48 rows"],
    "explain": ["runs/mine: fine: "],
    "sft": ["runs/mine"],
    "train": ["runs/mine-again"],
    "data check data/preferences": ["longer wins", "0 errors"],
    "dpo": ["runs/preferred"],
    "kto": ["runs/liked"],
    "orpo": ["runs/orpo"],
    "cpo": ["runs/cpo"],
    "reward-model": ["runs/marks"],
    "grpo --model runs/mine --data data/gsm8k.jsonl --steps": ["runs/reinforced"],
    "grpo --model runs/mine --data data/gsm8k.jsonl --reward": ["runs/own"],
    "reward check": ["right: 72 replies", "✓ the reference earns more", "✗ empty does not earn less"],
    "rloo": ["runs/rloo"],
    "prompts test": ["tutor 2: measurably worse than tutor 1", "tokens in"],
    "push": ["adapter_model.safetensors", "the rows; --with-rows sends them", "nothing was sent: --dry-run"],
    "export": ["runs/gguf/reinforced-Q4_K_M.gguf", "Modelfile"],
    "parity": ["same       reinforced-Q4_K_M.gguf", "reference  transformers, in float32"],
    "doctor": ["checkpoints"],
    "chatlog expire": ["0 conversations deleted"],
    "flywheel run": ["live: runs/flywheel/round", "the rounds as a picture: runs/flywheel/rounds.svg"],
    "flywheel status": ["round 1: 66 opinions", "live: runs/flywheel/round"],
}
MAKES = {
    "sft": "runs/mine/run.yaml",
    "train": "runs/mine-again/run.yaml",
    "dpo": "runs/preferred/run.yaml",
    "kto": "runs/liked/run.yaml",
    "orpo": "runs/orpo/run.yaml",
    "cpo": "runs/cpo/run.yaml",
    "reward-model": "runs/marks/run.yaml",
    "grpo": "runs/reinforced/run.yaml",
    "rloo": "runs/rloo/run.yaml",
    "export": "runs/gguf/reinforced-Q4_K_M.gguf",
    "parity": "runs/parity.html",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a link to data/, so that runs/ ends up there."
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def environment(home: Path) -> dict:
    "As in a shell after `. .venv/bin/activate`, with this tree's package first."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "LLMCOURSE_HOME": str(home / "home"), "NO_COLOR": "1"}


def short(command: str) -> str:
    return re.sub(r"[^\w/.-]+", " ", command.removeprefix("llmcourse "))[:48].strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command,comment",
    [x for x in LINES if x[0].split()[1] not in FOREVER],
    ids=lambda x: short(x) if x.startswith("llmcourse") else "",
)
def test_command(command, comment, place):
    done = subprocess.run(
        command, shell=True, cwd=place, env=environment(place), capture_output=True, text=True, timeout=400
    )
    said, words = done.stdout + done.stderr, command.removeprefix("llmcourse ")
    wanted = int(m[1]) if (m := re.search(r"exit code (\d)", comment)) else 0
    if words == "doctor" and done.returncode == 1:
        print("exit code 1: the doctor found something on this machine\n" + said)
        wanted = 1
    assert done.returncode == wanted, said
    assert "Traceback" not in said
    shows = [w for start, each in SHOWS.items() if words.startswith(start) for w in each]
    assert shows and [w for w in shows if w not in done.stdout] == [], said
    if made := MAKES.get(words.split()[0]):
        assert (place / made).stat().st_size > 100
    if words.startswith("eval --model runs/mine --data data/splits"):
        right = sum(int(n) for n in re.findall(r"^ *\w+ +8 +(\d)", done.stdout, re.M))
        assert right >= 24, f"10 epochs used to give 32 of 32, now {right}\n{said}"


def wait_for(process, port: int, seconds: int = 120) -> None:
    "Until somebody listens at the port."
    for _ in range(seconds * 5):
        assert process.poll() is None, process.communicate()[0]
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nobody listens at {port} after {seconds} s")


def ask_server(port: int, folder: Path) -> None:
    "As an application would."
    assert remote(f"http://127.0.0.1:{port}/v1", max_tokens=80)(QUESTION).startswith("25+31: ")


def ask_page(port: int, folder: Path) -> None:
    "As the page does when somebody presses Enter; the answer is then in the database."
    root = f"http://127.0.0.1:{port}"
    get = lambda path: json.load(urllib.request.urlopen(root + path, timeout=30))
    config = get("/config")
    box = next(c["id"] for c in config["components"] if c["type"] == "textbox" and c["props"].get("placeholder"))
    submit = next(d for d in config["dependencies"] if [box, "submit"] in d["targets"])
    body = dict(
        data=[QUESTION[0]["content"], None, "You are a maths tutor.", 0, None, None],
        fn_index=submit["id"],
        session_hash="readme",
        trigger_id=box,
    )
    request = urllib.request.Request(
        f"{root}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).read()
    with urllib.request.urlopen(f"{root}/gradio_api/queue/data?session_hash=readme", timeout=60) as events:
        for line in events:
            if b"process_completed" in line:
                break
    assert json.loads(line.removeprefix(b"data: "))["success"], line
    with sqlite3.connect(folder / "runs/chat.db") as db:
        assert "25+31: " in "\n".join(db.iterdump()), "no answer in the database"


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c, _ in LINES if c.split()[1] in FOREVER], ids=short)
def test_command_until_ctrl_c(command, place):
    "Started, asked one question, stopped by Ctrl-C as from a terminal; the port is free again."
    name = command.split()[1]
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", FOREVER[name])) == 0:
            pytest.skip(f"something else on this machine is using port {FOREVER[name]}")
    process = subprocess.Popen(
        shlex.split(command),
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )
    try:
        wait_for(process, FOREVER[name])
        {"serve": ask_server, "chat": ask_page}[name](FOREVER[name], place)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (0, 130) and "Traceback" not in said and f"127.0.0.1:{FOREVER[name]}" in said, (
        process.returncode,
        said,
    )
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", FOREVER[name])) != 0, "the port is still taken"


def test_every_command_is_shown():
    "Each has a line that runs, except two that take longer, which `make` runs and other tests cover."
    shown = {c.split()[1] for c, _ in LINES}
    for name, why in ELSEWHERE.items():
        assert f"make {name}" in TEXT
        print(f"llmcourse {name} has no line of its own: {why}")
    assert shown == COMMANDS.keys() - ELSEWHERE.keys() - {"contract", "bench", "collect", "passwd"}
    assert "`llmcourse passwd ada people.txt`" in TEXT  # it asks for a password: tests/test_shared_chat.py
    assert "`llmcourse contract URL`" in TEXT  # it needs a server: tests/test_server_contract.py
    assert "`llmcourse bench URL`" in " ".join(TEXT.split())  # and so does this: tests/test_serve.py
    assert "`llmcourse collect --url " in TEXT and "`llmcourse collect rows" in TEXT  # tests/test_collect.py
    assert len(LINES) == len(re.findall(r"^ +llmcourse ", TEXT, re.M))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", TEXT, re.M))
    assert {"demo", "test", "lab"} <= named <= targets, named - targets


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert len(links) >= 12
    for link in links:
        if link == "nbs/images/ladder.png" and not (ROOT / link).exists():
            pytest.skip(f"{link} is not drawn yet")
        assert (ROOT / link).exists(), link


def test_the_ladder_is_the_picture():
    "The text shows the same run as the picture."
    source = ROOT / "nbs/images/ladder.jsonl"
    if not source.exists():
        pytest.skip(f"{source.name} is not there yet")
    ladder = show_ladder([json.loads(x) for x in source.read_text(encoding="utf-8").splitlines()])
    assert "\n".join(f"    {x}".rstrip() for x in ladder.splitlines()) in "\n".join(
        x.rstrip() for x in TEXT.splitlines()
    )


def test_every_chapter_is_in_the_table():
    rows = dict(re.findall(r"^\| (\d\d[a-z]?) \| \[\w+\]\((nbs/\S+\.ipynb)\)", TEXT, re.M))
    assert set(rows.values()) == {f"nbs/{p.name}" for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert all(f"nbs/{number}_" in path for number, path in rows.items())


def test_words_are_explained_and_the_clone_line_is_the_sites():
    "Each short name is spelled out where it first appears; file names do not count."
    words = " ".join(re.sub(r"\S+\.(ipynb|png)\b", "", TEXT).split())
    for word, meaning in {
        "SFT": "supervised fine-tuning",
        "LoRA": "low-rank adaptation",
        "GRPO": "group relative policy optimisation",
        "GGUF": "llama.cpp's format",
        "RLOO": "REINFORCE leave-one-out",
    }.items():
        first = words.index(word, words.index("Make a Llama"))
        assert meaning in words[first : first + 60], word
    url = re.search(r"repo-url: (\S+)", (ROOT / "_quarto.yml").read_text())[1]
    assert f"git clone {url}" in TEXT


def test_the_picture_is_there_once_and_first():
    assert TEXT.count("nbs/images/ladder.png") == 1
    assert TEXT.index("nbs/images/ladder.png") < TEXT.index("    rung") < TEXT.index("## ")


def test_the_order_of_the_page():
    "What it is, for whom, the course, then the rest; how to choose a torch comes last."
    headings = re.findall(r"^## (.+)$", TEXT, re.M)
    assert headings[:3] == ["Two commands", "Who is it for?", "The course"] and "torch" in headings[-1]
    assert "torch" not in re.sub(r"`\w+`", "", TEXT[: TEXT.index("## The course")])
