"""The map: every chapter is on it, with what it needs, its reading times are the estimates that it says they are,
and the README and the chapters agree with it."""

import json
import re
from pathlib import Path

from llmcourse.core import CHAPTERS
from llmcourse.figures import STOPS

NBS = Path(__file__).parent.parent / "nbs"
README = (NBS.parent / "README.md").read_text(encoding="utf-8")
TEXT = "\n\n".join(
    "".join(c["source"]) for c in json.loads((NBS / "index.ipynb").read_text())["cells"] if c["cell_type"] == "markdown"
)
ROW = r"^\| (\d\d[a-z]?) \| \[(\w+)\]\((\S+)\) \| .+\? \| (\d+ s) \| (\d+) min \| (.+) \|$"
ROWS = {r[0]: r for r in re.findall(ROW, TEXT, re.M)}


def reading(path: Path) -> float:
    "Minutes: 200 words a minute and ten seconds for each cell of code."
    cells = json.loads(path.read_text())["cells"]
    words = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    return words / 200 + sum(c["cell_type"] == "code" for c in cells) / 6


def test_every_chapter_is_on_the_map():
    assert {n: r[1] for n, r in ROWS.items()} == CHAPTERS
    for number, (_, name, page, *_, needs) in ROWS.items():
        assert page == f"{number}_{name}.ipynb" and (NBS / page).is_file()
        assert needs == "–" or all(n in CHAPTERS and n < number for n in needs.split(", ")), f"{number} needs {needs}"


def test_reading_times():
    "Within eight minutes, so that the table can be rounded and a chapter can be edited."
    for _, _, page, _, said, _ in ROWS.values():
        assert abs(int(said) - reading(NBS / page)) <= 8, (
            f"{page}: {reading(NBS / page):.0f} minutes, the map says {said}"
        )


def test_terms_are_spelled_out_at_first_use():
    for short, full in {
        "SFT": "supervised fine-tuning",
        "GRPO": "group relative policy optimisation",
        "GGUF": "llama.cpp's format",
        "LoRA": "low-rank adaptation",
    }.items():
        at = TEXT.index(short)
        assert full in " ".join(TEXT[at : at + 120].split()), short
    for page in ("glossary.ipynb", "01_models.ipynb", "workshop/tutor.ipynb"):
        assert f"]({page})" in TEXT
    assert "Only an hour? Read 01, 06 and 11" in TEXT and "Only an hour? Read 01, 06 and 11" in README


def test_the_readme_has_the_same_times_and_needs():
    rows = re.findall(r"^\| (\d\d[a-z]?) \| \[\w+\]\(nbs/\S+\) \| (.+\?) \| (\d+ s) \| (.*?) ?\|$", README, re.M)
    assert {n: (time, needs or "–") for n, _, time, needs in rows} == {n: (r[3], r[5]) for n, r in ROWS.items()}


def test_a_chapter_marks_its_own_place():
    "The picture of where you are follows the imports, and it was drawn."
    shown = set()
    for number, (_, _, page, *_) in ROWS.items():
        code = [c for c in json.loads((NBS / page).read_text())["cells"] if c["cell_type"] == "code"]
        for before, cell in zip(code, code[1:]):
            if found := re.fullmatch(r"pipeline\(\"(\w+)\"\)", "".join(cell["source"]).strip()):
                assert STOPS[found[1]][0] == number, f"{page} marks {found[1]}"
                assert "import" in "".join(before["source"]), f"{page}: not after the imports"
                assert any("image/png" in out.get("data", {}) for out in cell["outputs"]), f"{page}: not drawn"
                shown.add(number)
    assert {"02", "04", "10", "11"} <= shown
