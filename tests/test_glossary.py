"""The glossary: every link to it finds its term, every term names its chapter, and the anchors are the same
everywhere."""

import json
import re
from pathlib import Path

import pytest

from llmcourse.core import CHAPTERS

NBS = Path(__file__).parent.parent / "nbs"
CELLS = ["".join(c["source"]) for c in json.loads((NBS / "glossary.ipynb").read_text())["cells"]]
ENTRIES = dict(re.findall(r"^### (.+)\n\n((?:(?!^#).*\n?)+)", "\n\n".join(CELLS), re.M))
TAG = re.compile(r"\*Chapter (?:\[(\d\d[a-z]?)\]\((\d\d[a-z]?_\w+\.ipynb)\)|(\d\d[a-z]?), not written yet)\.\*$")
PAGES = sorted(NBS.rglob("*.ipynb"))


def anchor(heading: str) -> str:
    "Where a heading's link leads: JupyterLab and nbconvert keep the letters as they are, Quarto makes them small."
    return heading.replace(" ", "-")


def test_size():
    assert 40 <= len(ENTRIES) <= 90
    assert len(ENTRIES) == len(re.findall(r"^### ", "\n\n".join(CELLS), re.M)), "a term is there twice"


@pytest.mark.parametrize("term", ENTRIES)
def test_entry(term):
    "An anchor that is the same in Jupyter and on the site, two sentences at most, and a chapter."
    assert re.fullmatch(r"[a-z][a-z0-9]*([ -][a-z0-9]+)*", term), (
        f"{term!r}: small letters, digits, spaces and hyphens only"
    )
    text = " ".join(ENTRIES[term].split())
    tag = TAG.search(text)
    assert tag, f"{term} names no chapter: {text[-60:]!r}"
    number, page, missing = tag.groups()
    if missing:
        assert missing not in CHAPTERS, f"{term}: chapter {missing} is written by now, link to it"
    else:
        assert page == f"{number}_{CHAPTERS.get(number)}.ipynb" and (NBS / page).is_file(), f"{term} links to {page}"
    said = TAG.sub("", text).strip()
    assert said[-1] in '."' and len(re.findall(r"[.!?]\"?(?= [A-Z`*\d]|$)", said)) <= 2, (
        f"{term}: more than two sentences"
    )


def test_index_of_terms():
    "The line on top has every term once, in order."
    links = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", CELLS[1])
    assert [t for t, _ in links] == sorted(ENTRIES)
    assert all(anchor(t) == a for t, a in links)


def links(text: str) -> list[str]:
    "The terms that a text links to."
    return re.findall(r"\]\((?:\.\./)*glossary\.ipynb#([^)]*)\)", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_find_their_term(path):
    anchors = {anchor(t) for t in ENTRIES}
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
    own = [a for c in cells if path.name == "glossary.ipynb" for a in re.findall(r"\]\(#([\w-]+)\)", c)]
    lost = [a for c in cells for a in links(c) if a not in anchors] + [a for a in own if a not in anchors]
    assert not lost, f"{path.name} links to {lost}, which the glossary does not have"


def test_a_lost_link_is_found():
    assert links("[nats](glossary.ipynb#nats), [loss](../glossary.ipynb#loss), [x](glossary.ipynb#)") == [
        "nats",
        "loss",
        "",
    ]
    assert "nats" not in map(anchor, ENTRIES) and "loss" in map(anchor, ENTRIES)
