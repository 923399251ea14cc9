"""Every notebook runs from top to bottom; in chapters, stubs say "to do" and solutions pass."""
import re

import notebooks
import pytest

WORKSHOP = sorted((notebooks.NBS / "workshop").rglob("*.ipynb"))


@pytest.mark.parametrize("path", notebooks.chapters(), ids=lambda p: p.stem)
def test_chapter(path):
    nb = notebooks.run(path, scale="cpu", seed=42)
    number = path.name.split("_")[0]
    said = notebooks.text_outputs(nb)
    code = "\n".join(notebooks.source(c) for c in nb.cells if c.cell_type == "code")
    ids = set(re.findall(rf'check\("({number}\.\d)"', code))
    assert len(ids) >= 2, f"{path.name} has exercises {ids}"
    for i in ids:
        assert f"◻ {i} to do" in said, f"the stub of {i} does not say 'to do'"
        assert f"✓ {i} done" in said, f"the solution of {i} does not pass"
        assert re.search(rf'check\("{i}".*strict=True', code), f"the solution of {i} is not checked strictly"


@pytest.mark.parametrize("path", [notebooks.NBS / "index.ipynb", *WORKSHOP], ids=lambda p: p.stem)
def test_workshop(path):
    notebooks.run(path)
