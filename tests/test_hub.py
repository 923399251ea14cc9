"""Names on the Hub, against a stand-in of it on this machine: what is downloaded, and what is said when it is not."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub import TOKEN, Answer, Refused

from llmcourse.core import UserError, model_path
from llmcourse.export import to_gguf
from llmcourse.files import lines
from llmcourse.models import load, load_tokenizer
from llmcourse.sft import sft

BASE = Path(model_path("tutor/base"))
ROOT = Path(__file__).parent.parent


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_model_is_downloaded_once(hub):
    name = hub.add("someone/tiny", BASE)
    net, tokenizer = load(name)
    assert same(net, load(BASE)[0]) and tokenizer.chat_template
    weights = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert len(weights) == 1
    load(name)
    again = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert again == weights


def test_weights_in_shards(hub, tmp_path):
    net, tokenizer = load(BASE)
    net.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same(load(hub.add("someone/shards", tmp_path / "shards"))[0], net)


def test_the_token_goes_to_the_hub_and_no_further(hub):
    name = hub.add("someone/gated", BASE, gated=True)
    hub.log_in(licence=True)
    load(name)
    tokens = {path.split("/")[1]: token for _, path, token in hub.asked}
    assert tokens["someone"] == TOKEN and tokens["cdn"] == ""


ONE_LINE = {
    "someone/none": "no such folder here, and not on the Hub. Check the name",
    "someone/gated": "its owner wants you to accept a licence. Do so on {url}/someone/gated and log in (hf auth login)",
    "someone/empty": "no model there, neither config.json nor adapter_config.json",
    "someone/pickled": "no weights as safetensors there. Pickled ones can run code",
    "some one/none": "no such folder here, and not on the Hub",
}


@pytest.fixture
def troubled(hub, tmp_path):
    "A Hub on which each name of ONE_LINE is what it says."
    hub.add("someone/gated", BASE, gated=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/README.md").write_text("# Soon\n")
    hub.add("someone/empty", tmp_path / "empty")
    pickled = shutil.copytree(BASE, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.add("someone/pickled", pickled)
    return hub


@pytest.mark.parametrize("name", ONE_LINE)
@pytest.mark.parametrize("use", ["load", "export"])
def test_one_line_says_why_not(troubled, tmp_path, name, use):
    with pytest.raises(UserError) as caught:
        load(name) if use == "load" else to_gguf(name, tmp_path / "out.gguf")
    said = str(caught.value)
    assert said.startswith(f"{name}: {ONE_LINE[name].format(url=troubled.url)}") and "\n" not in said
    assert len(said) < 240 and not list(tmp_path.glob("*.gguf"))
    assert not [path for _, path, _ in troubled.asked if path.endswith(".bin")]


def test_logged_in_without_the_licence(troubled):
    troubled.log_in(licence=False)
    with pytest.raises(UserError, match="accept a licence"):
        load("someone/gated")


def test_revisions(hub, tmp_path):
    "A branch or tag is another model; one that is not there is said in one line."
    older = shutil.copytree(model_path("tutor/rl"), tmp_path / "rl")
    hub.add("someone/tiny", BASE)
    hub.add("someone/tiny", older, revision="v1")
    new, old = load("someone/tiny")[0], load("someone/tiny", revision="v1")[0]
    assert same(new, load(BASE)[0]) and same(old, load(older)[0]) and not same(new, old)
    with pytest.raises(UserError, match="someone/tiny: no revision 'v9'. Its branches and tags are on http"):
        load("someone/tiny", revision="v9")


@pytest.mark.parametrize("name", ["tutor/sft", "tutor/tools"])
def test_an_adapter(hub, name):
    "Its base is fetched too, and it is checked and merged as one in a folder."
    net, tokenizer = load(hub.add("someone/adapter", Path(model_path(name))))
    assert same(net, load(name)[0]) and tokenizer.chat_template


def test_a_base_that_is_on_the_hub(hub, tmp_path):
    folder = shutil.copytree(model_path("tutor/sft"), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = hub.add("someone/base", BASE)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert same(load(hub.add("someone/adapter", folder))[0], load("tutor/sft")[0])
    config["base_model_name_or_path"] = "someone/none"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="someone/none: no such folder here, and not on the Hub"):
        load(folder)


def test_a_tokenizer_comes_without_weights(hub):
    load_tokenizer(hub.add("someone/tiny", BASE))
    assert not [path for _, path, _ in hub.asked if "safetensors" in path]


def test_the_hub_is_gone(hub):
    "What is here already loads at once; what is not is refused at once. transformers would ask for 47 and 117 seconds."
    name = hub.add("someone/tiny", BASE)
    there = load(name)[0]
    hub.close()
    start = time.time()
    assert same(load(name)[0], there)
    with pytest.raises(UserError, match="someone/none: no such folder here, and the Hub was not reached"):
        load("someone/none")
    assert time.time() - start < 10


def test_the_hub_is_ill(hub, monkeypatch):
    monkeypatch.setattr(Answer, "route", lambda *_: (_ for _ in ()).throw(Refused(503, "", "Service unavailable")))
    with pytest.raises(UserError, match="someone/tiny: the Hub could not give it \\(status 503\\)"):
        load("someone/tiny")


def test_a_full_disk_is_said(hub, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="someone/tiny: not downloaded from the Hub .*No space left on device"):
        load("someone/tiny")


def test_no_chat_template(hub, tmp_path):
    "Loading is fine; whoever needs the template says so in one line, with the way out."
    bare = shutil.copytree(BASE, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    name = hub.add("someone/bare", bare)
    assert load(name)[1].chat_template is None
    with pytest.raises(UserError, match="no chat template. (Use|Take) an instruct model"):
        sft(ROOT / "data/splits.jsonl", tmp_path / "run", model=name)
    assert not (tmp_path / "run").exists()


def test_the_command_line_in_a_process_of_its_own(hub, tmp_path):
    "Exit code 2, one line, and the token is nowhere: not on the screen, not in a file."
    hub.add("someone/gated", BASE, gated=True)
    hub.log_in(licence=False)
    words = [Path(sys.executable).parent / "llmcourse", "export", "--model", "someone/gated", "--output", "out"]
    env = os.environ | hub.env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [x for x in done.stderr.splitlines() if x.startswith("llmcourse: ")]
    assert (
        done.returncode == 2 and len(lines) == 1 and "accept a licence" in lines[0] and "Traceback" not in done.stderr
    )
    hub.log_in(licence=True)
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != hub.home / "token"]
    assert any(p.suffix == ".gguf" for p in written)
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()] and TOKEN not in done.stdout + done.stderr


def test_rows_of_a_data_set(hub, tmp_path):
    (tmp_path / "rows").mkdir()
    text = (ROOT / "data/splits.jsonl").read_text()
    (tmp_path / "rows/train.jsonl").write_text(text)
    found = list(lines(hub.add("someone/rows", tmp_path / "rows", kind="datasets")))
    assert len(found) == len(text.splitlines())
    with pytest.raises(UserError, match="someone/none: neither a file here nor on the Hub"):
        list(lines("someone/none"))
    hub.add("someone/licensed", tmp_path / "rows", kind="datasets", gated=True)
    with pytest.raises(UserError, match="someone/licensed: its owner wants you to accept a licence"):
        list(lines("someone/licensed"))
