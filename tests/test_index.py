"""The map: every chapter is on it, with what it needs, and its reading times are those that it says it estimates."""

import json
import re
from pathlib import Path

from llmcourse.core import CHAPTERS

NBS = Path(__file__).parent.parent / "nbs"
TEXT = "\n\n".join(
    "".join(c["source"]) for c in json.loads((NBS / "index.ipynb").read_text())["cells"] if c["cell_type"] == "markdown"
)
ROWS = {
    r[0]: r
    for r in re.findall(
        r"^\| (\d\d) \| \[(\w+)\]\((\S+)\) \| .+\? \| ([\d.]+) min \| (\d+) min \| (.+) \|$", TEXT, re.M
    )
}


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
    "Within eight minutes, so that a table in prose may be rounded and a chapter may be edited."
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
    assert "An hour? Do 01, 06, 11." in TEXT
