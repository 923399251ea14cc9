"""The page for a reader's own rows: it runs, stops in one line at bad rows, and shows only commands that exist."""

import json
import re
import shlex
from pathlib import Path

import notebooks
import pytest

from llmcourse.cli import COMMANDS, command
from llmcourse.options import parse

PAGE = notebooks.NBS / "your_own.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
TEXT = "\n\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
CODE = ["".join(c["source"]) for c in CELLS if c["cell_type"] == "code"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder for the page to write its runs into, beside data/ as in the repository."
    folder = tmp_path_factory.mktemp("page")
    (folder / "nbs").mkdir()
    (folder / "data").symlink_to(notebooks.ROOT / "data")
    (folder / "nbs/your_own.ipynb").write_bytes(PAGE.read_bytes())
    return folder


def run(place: Path, **parameters):
    return notebooks.run(place / "nbs/your_own.ipynb", place / "out.ipynb", **parameters)


@pytest.mark.slow
def test_the_page_runs_and_training_helps(place, monkeypatch):
    monkeypatch.delenv("LLMCOURSE_JUDGE_URL", raising=False)
    nb = run(place)
    said = notebooks.text_outputs(nb)
    for name in ("data check", "agree", "plan", "rehearse", "xray", "doctor", "eval", "sft", "export", "serve", "chat"):
        assert f"$ llmcourse {name}" in said, name
    before, after = (
        [json.loads(x) for x in (place / f"nbs/runs/your_own-{when}.jsonl").read_text().splitlines()]
        for when in ("before", "after")
    )
    assert len(before) == len(after) == 60 and sum(r["right"] for r in before) == 0
    assert sum(r["right"] for r in after) >= 35, "it used to be 47 of 60"
    assert sum(r["reply"].startswith("Thank you for asking.") for r in after) >= 55
    assert after[0]["reply"] in said, "the served file says what the model says"
    assert re.search(r"a page of \d\d,\d\d\d bytes", said)


@pytest.mark.parametrize(
    "text,words",
    [
        ('{"messages": [{"role": "user", "content": "Hi?"}\n', "line 1: not JSON"),
        ('{"messages": [{"role": "user", "content": "Hi?"}]}\n', "no assistant turn"),
        (None, "no such file"),
    ],
)
def test_bad_rows_stop_the_page_in_one_line(place, text, words):
    if text is not None:
        (place / "bad.jsonl").write_text(text)
    name = "../nowhere.jsonl" if text is None else "../bad.jsonl"
    with pytest.raises(Exception, match="Stopped here"):
        run(place, rows=name)
    outputs = [
        o for c in json.loads((place / "out.ipynb").read_text())["cells"] for o in c.get("outputs", []) if "text" in o
    ]
    said = "".join("".join(o["text"]) for o in outputs)
    assert words in said and "Traceback" not in said
    assert "llmcourse eval" not in said


def test_a_reader_changes_three_words():
    (cell,) = [c for c in CELLS if "parameters" in c["metadata"].get("tags", [])]
    assert re.findall(r"^(\w+) = ", "".join(cell["source"]), re.M) == ["rows", "model", "scale"]


def lines() -> list[str]:
    "The commands of the page, in its code and its text, with an example in place of each value."
    found = re.findall(r'"(llmcourse .+?)"', "\n".join(CODE)) + re.findall(r"(?:\$ |`)(llmcourse [^`\n]+)", TEXT)
    return [re.sub(r"\{(\w+)\}", "1", line) for line in found]


@pytest.mark.parametrize("line", lines())
def test_each_command_takes_the_options_that_the_page_gives_it(line):
    name, *words = shlex.split(line)[1:]
    told = parse(command(name), f"llmcourse {name}", words)
    if name == "rehearse":
        parse(command(told["job"]), f"llmcourse rehearse {told['job']}", told["words"])


def test_the_page_shows_every_step():
    shown = {shlex.split(line)[1] for line in lines()}
    steps = {"data", "agree", "plan", "rehearse", "xray", "doctor", "eval", "sft", "train", "export", "serve", "chat"}
    assert steps <= shown <= set(COMMANDS)


def test_the_sections_are_those_of_the_table_at_the_top():
    table = re.findall(r"^\| (\d) \| ([\w ]+?)(?:: .*?)? \|", TEXT, re.M)
    assert len(table) == 9 and table == re.findall(r"^## (\d)\. (.+)$", TEXT, re.M)


def test_the_counts_from_chapter_06_are_those_that_it_measured():
    cells = json.loads((notebooks.NBS / "06_sft.ipynb").read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    shown = "\n".join("".join(o.get("data", {}).get("text/plain", [])) for o in outputs)
    told = re.search(r"(\d+), (\d+) and (\d+) of 100 new", " ".join(TEXT.split()))
    last = [re.search(rf"^{chats} +\d+ +\d+ +\d+ +(\d+)$", shown, re.M)[1] for chats in (6, 24, 96)]
    assert list(told.groups()) == last


def test_the_page_is_linked_first():
    readme = (notebooks.ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\((nbs/[^)]+)\)", readme) if link.endswith(".ipynb")]
    assert links[0] == "nbs/your_own.ipynb"
    index = "\n".join("".join(c["source"]) for c in json.loads((notebooks.NBS / "index.ipynb").read_text())["cells"])
    assert re.findall(r"\]\(([\w/]+\.ipynb)", index)[0] == "your_own.ipynb"


def test_no_secret_and_no_price_without_its_day():
    assert not re.search(r"hf_\w{10}|sk-\w{10}", TEXT + "\n".join(CODE))
    for line in TEXT.splitlines():
        assert not re.search(r"\$ ?\d+[.,]\d\d|\d+ (USD|dollars|\$)", line) or re.search(r"20\d\d-\d\d-\d\d", line), (
            line
        )
