"""A model goes to a stand-in for the Hub: what is sent, what never is, and one line that says why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hub import TOKEN, Answer, Refused

from llmcourse.card import model_card, read_card, write_card
from llmcourse.cli import main
from llmcourse.core import model_path
from llmcourse.models import Local, load

ROOT = Path(__file__).parent.parent
ADAPTER, WHOLE = Path(model_path("tutor/sft")), Path(model_path("tutor/base"))
NAME = "someone/mine"


@pytest.fixture
def run(tmp_path):
    "A LoRA run of the tutor, with what a training leaves beside it."
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "runs/mine"))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/optimizer.pt").write_bytes(b"a pickle")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / ".env").write_text("OPENAI_API_KEY=sk-" + "a" * 30)
    (folder / "chats.json").write_text("[]")
    return folder


@pytest.fixture
def mine(hub):
    "A Hub on which `someone` is logged in."
    hub.log_in(writes=("someone",))
    return hub


def push(capsys, *words, code: int = 0) -> str:
    "Push, with this exit code: what was printed, or the one line of an error."
    assert main(["push", *map(str, words)]) == code
    out, err = capsys.readouterr()
    assert TOKEN not in out + err and "Traceback" not in err
    if not code:
        return out
    lines = [x for x in err.splitlines() if x.startswith("llmcourse: ")]
    assert len(lines) == 1 and err.strip().endswith(lines[0]) and len(lines[0]) < 320, err
    return lines[0]


def there(hub, name: str = NAME) -> Path:
    return hub.repos["models", name].revisions["main"]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != ".gitattributes"}


def changed(hub) -> list[str]:
    "The requests that may have changed something."
    return [path for method, path, _ in hub.asked if method in ("POST", "PUT") and "paths-info" not in path]


SENT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "run.yaml",
    "README.md",
    "metrics.jsonl",
}


def test_there_and_back(mine, run, capsys):
    "Loaded by its name on the Hub, it gives the same replies, and whoever sees it sees a model and nothing else."
    out = push(capsys, run, NAME)
    assert f"{mine.url}/{NAME}/commit/" in out
    repo = mine.repos["models", NAME]
    assert repo.private and len(repo.commits) == 1 and names(there(mine)) == SENT == {*repo.commits[0][1]}
    asked = [[{"role": "user", "content": f"What is {a} plus {a + 7}?"}] for a in (12, 25, 31)]
    assert Local(*load(NAME)).batch(asked) == Local(*load(run)).batch(asked)


def test_a_whole_model_and_an_export(mine, tmp_path, capsys):
    from llmcourse.shipping import export_folder

    push(capsys, WHOLE, "someone/whole")
    assert "model.safetensors" in names(there(mine, "someone/whole")) and load("someone/whole")
    export_folder("tutor/sft", tmp_path / "gguf")
    assert "no licence is named" in push(capsys, tmp_path / "gguf", "someone/file")
    sent = names(there(mine, "someone/file"))
    assert sent == {*names(tmp_path / "gguf"), "README.md"} and "Modelfile" in sent
    assert "library_name: gguf" in (there(mine, "someone/file") / "README.md").read_text()
    (there(mine, "someone/file") / "README.md").write_text("# Written there\n")
    push(capsys, tmp_path / "gguf", "someone/file")
    assert (there(mine, "someone/file") / "README.md").read_text() == "# Written there\n"


def test_private_unless_told(mine, run, capsys):
    assert "private" in push(capsys, run, NAME)
    assert mine.repos["models", NAME].private
    push(capsys, run, "someone/open", "--public")
    assert not mine.repos["models", "someone/open"].private
    before = len(changed(mine))
    assert "is there already, and public" in push(capsys, run, "someone/open", code=2)
    assert len(changed(mine)) == before
    assert "is private and stays so" in push(capsys, run, NAME, "--public")
    assert mine.repos["models", NAME].private


def test_a_dry_run_asks_nobody(mine, run, capsys):
    out = push(capsys, run, NAME, "--dry-run")
    assert not mine.asked and not mine.repos and "nothing was sent: --dry-run" in out
    assert all(f"  {name} " in out for name in SENT)
    assert "train.jsonl" in out and "the rows; --with-rows sends them" in out
    mine.close()
    push(capsys, run, NAME, "--dry-run")


def test_rows_stay(mine, run, capsys):
    rows = (run / "train.jsonl").read_bytes()
    push(capsys, run, NAME)
    listed = [x for x in mine.sent if b'"path"' in x]
    assert listed and not [x for x in listed if b'"train.jsonl"' in x] and "train.jsonl" not in names(there(mine))
    push(capsys, run, NAME, "--with-rows")
    assert (there(mine) / "train.jsonl").read_bytes() == rows


def test_pickles_are_refused(mine, tmp_path, run, capsys):
    "Beside weights they stay here, and it is said; as the only weights they are no model."
    out = push(capsys, run, NAME)
    assert "training_args.bin" in out and "a pickle, which can run code" in out
    assert not [x for x in mine.sent if b"a pickle" in x or b"training_args" in x]
    pickled = Path(shutil.copytree(WHOLE, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "only pickled weights (pytorch_model.bin)" in push(capsys, pickled, "someone/pickled", code=2)
    assert ("models", "someone/pickled") not in mine.repos


SECRETS = {
    "README.md": "log in with " + TOKEN,
    "run.yaml": "# password: tulip2024",
    "metrics.jsonl": json.dumps({"key": "AKIA" + "Q7" * 8}),
    "chat_template.jinja": "{# ghp_" + "a" * 36 + " #}",
}


@pytest.mark.parametrize("file", SECRETS)
def test_a_secret_is_refused(mine, run, file, capsys):
    with (run / file).open("a") as f:
        f.write("\n" + SECRETS[file] + "\n")
    said = push(capsys, run, NAME, code=2)
    assert f"{file}:" in said and "holds a" in said and "nothing was sent" in said and SECRETS[file] not in said
    assert not mine.asked


def test_a_secret_in_the_rows(mine, run, capsys):
    "A word for a password is what rows are full of; a key is a key."
    with (run / "train.jsonl").open("a") as f:
        f.write('{"text": "the password: tulip2024"}\n')
    push(capsys, run, NAME, "--with-rows")
    with (run / "train.jsonl").open("a") as f:
        f.write('{"text": "' + TOKEN + '"}\n')
    before = len(mine.asked)
    assert "train.jsonl:" in push(capsys, run, NAME, "--with-rows", code=2) and len(mine.asked) == before


def test_the_token_goes_to_the_hub_and_nowhere_else(mine, run, capsys, tmp_path):
    push(capsys, run, NAME)
    lfs = [(method, token) for method, path, token in mine.asked if path.startswith("/lfs/")]
    assert lfs == [("PUT", "")] and not [x for x in mine.sent if TOKEN.encode() in x]
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != mine.home / "token"]
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]


def test_the_card_is_the_hubs(mine, run, capsys, tmp_path):
    "The front matter is whole, the base is a name on the Hub or is said in a sentence; the file here is as it was."
    from huggingface_hub import ModelCard

    own = (run / "README.md").read_text()
    assert "its base is tutor/base, which is not on the Hub" in push(capsys, run, NAME)
    card = ModelCard((there(mine) / "README.md").read_text())
    assert card.data.license == "apache-2.0" and card.data.library_name == "peft" and card.data.base_model is None
    assert "llmcourse" in card.data.tags and "its base, `tutor/base`, comes with the [llmcourse]" in card.text
    assert (run / "README.md").read_text() == own
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/base"}))
    push(capsys, run, "someone/other", "--license", "llama3.2")
    card = ModelCard((there(mine, "someone/other") / "README.md").read_text())
    assert card.data.license == "llama3.2" and card.data.base_model == "someone/base"
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path)}))
    assert "a folder that nobody else has. Push that one first" in push(capsys, run, NAME, code=2)


def test_no_path_of_this_machine_goes_up(mine, tmp_path, capsys):
    folder, start = Path(shutil.copytree(WHOLE, tmp_path / "second")), str(tmp_path / "first")
    card = replace(read_card(folder), method="sft", model=start, settings={"validation": f"{Path.home()}/rows.jsonl"})
    write_card(card, folder)
    (folder / "README.md").write_text(model_card(card, "A second one"))
    push(capsys, folder, NAME)
    sent = {p.name: p.read_text() for p in there(mine).iterdir() if p.suffix in (".md", ".yaml")}
    assert not [name for name, text in sent.items() if start in text or str(Path.home()) in text]
    assert "model: first" in sent["run.yaml"] and "base_model" not in sent["README.md"]
    assert "a model that is not on the Hub, `first`" in sent["README.md"]


def test_what_is_there_stays(mine, run, capsys, tmp_path):
    "A second push adds and replaces, in a commit of its own, and says what it leaves."
    push(capsys, run, NAME)
    (there(mine) / "notes.txt").write_text("by hand")
    (run / "README.md").write_text("# A better card\n")
    assert "has 1 more files, which stay: notes.txt" in push(capsys, run, NAME)
    repo = mine.repos["models", NAME]
    assert names(there(mine)) == SENT | {"notes.txt"} and [paths for _, paths in repo.commits][1:] == [["README.md"]]
    before = there(mine)
    assert "adapter_config.json, which would stay" in push(capsys, WHOLE, NAME, code=2) and there(mine) == before


def test_a_change_in_between(mine, run, capsys, monkeypatch):
    push(capsys, run, NAME)
    asked = Answer.preupload

    def meanwhile(self, repo):
        repo.commits.append(("by somebody else", []))
        asked(self, repo)

    monkeypatch.setattr(Answer, "preupload", meanwhile)
    (run / "README.md").write_text("# A better card\n")
    assert "somebody has changed it meanwhile. Run the same command again" in push(capsys, run, NAME, code=2)


def test_one_line_says_why_not(hub, run, capsys, monkeypatch):
    assert "no token for the Hub. Log in (hf auth login)" in push(capsys, run, NAME, code=2) and not hub.asked
    hub.log_in(writes=("someone",))
    assert "your token may not write there" in push(capsys, run, "stranger/mine", code=2)
    hub.add("stranger/open", WHOLE)
    assert "your token may not write there" in push(capsys, WHOLE, "stranger/open", "--public", code=2)
    for name in ("mine", "some one/mine", "a/b/c"):
        assert f"{name}: not a name on the Hub. Give owner/name" in push(capsys, run, name, code=2)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "old" * 11)
    assert "the Hub does not know your token. Log in again" in push(capsys, run, NAME, code=2)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in push(capsys, run, NAME, code=2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert ("models", NAME) not in hub.repos
    hub.close()
    assert "the Hub was not reached. Check the network" in push(capsys, run, NAME, code=2)


def test_the_hub_refuses_the_large_file(mine, run, capsys, monkeypatch):
    "Then there is no commit at all."

    def refuse(self, sha):
        raise Refused(403, "", "expired")

    monkeypatch.setattr(Answer, "keep", refuse)
    assert "may not write there" in push(capsys, run, NAME, code=2)
    assert not mine.repos["models", NAME].commits and not names(there(mine))


@pytest.mark.parametrize("what", ["nowhere", "empty", "rows", "cut", "unfinished"])
def test_not_a_model(mine, run, tmp_path, what, capsys):
    folder = tmp_path / what
    if what != "nowhere":
        folder.mkdir()
    if what == "rows":
        shutil.copy(ROOT / "data/splits.jsonl", folder)
    if what == "cut":
        shutil.copytree(run, folder, dirs_exist_ok=True)
        whole = (run / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    if what == "unfinished":
        shutil.copy(run / "run.yaml", folder)
    why = {"nowhere": "no such folder", "cut": "not a whole safetensors file"}.get(what, "not a model")
    assert why in push(capsys, folder, NAME, code=2) and not mine.asked


def test_ctrl_c_leaves_no_half_commit(mine, run):
    "Interrupted while a large file is on its way: code 130, and the repository is as it was."
    mine.stall = threading.Event()
    words = [sys.executable, "-c", "from llmcourse.cli import cli; cli()", "push", str(run), NAME]
    env = os.environ | mine.env | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words,
        env=env,
        cwd=run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert mine.busy.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        mine.stall.set()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert not mine.repos["models", NAME].commits and not names(there(mine))
