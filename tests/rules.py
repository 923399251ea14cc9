"""The rules of the house that a number can hold, each with those that break it.

    python tests/rules.py       what breaks which rule today
"""
import ast
import json
import pprint
import re
from collections.abc import Iterator
from pathlib import Path

from fold import only_imports, statements

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"\d\d[a-z]?_", p.name)]
FOREIGN = ("__init__.py", "_modidx.py")
MODULES = sorted(p for p in (ROOT / "llmcourse").rglob("*.py") if p.name not in FOREIGN)
PYTHON = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
CELLS, EXPORTED, RUN, LONG_CELL, LONG_CELLS, WIDE, MODULE, FUNCTION = 75, 0.35, 40, 15, 2, 120, 350, 30

# a public name that two modules define → why that confuses nobody
SAME_NAME = dict.fromkeys(("bench", "rehearse", "scores", "serve", "train", "xray"),
                          "the command of that name calls the function")


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> list[str]:
    "The sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def lines(source: str) -> int:
    return source.count("\n") + 1


def exported(source: str) -> bool:
    return bool(re.search(r"^#\| ?exports?\b", source, re.M))


def too_many_cells(path: Path) -> bool:
    return len(json.loads(path.read_text(encoding="utf-8"))["cells"]) > CELLS


def too_much_exported(path: Path) -> bool:
    cells = code(path)
    return sum(lines(c) for c in cells if exported(c)) > EXPORTED * sum(map(lines, cells))


def one_class(source: str) -> bool:
    found = statements(source)
    return len(found) == 1 and isinstance(found[0], ast.ClassDef)


def too_long_exported(path: Path) -> bool:
    "More exported lines in a row than a screen, without a cell that runs. A class, which no cell border cuts, is one."
    run = longest = 0
    for cell in code(path):
        size = min(lines(cell), RUN) if one_class(cell) else lines(cell)
        run = run + size if exported(cell) else 0
        longest = max(longest, run)
    return longest > RUN


def too_many_long_cells(path: Path) -> bool:
    return sum(lines(cell) > LONG_CELL for cell in code(path)) > LONG_CELLS


def mixed_imports(path: Path) -> bool:
    "A cell that imports and does more: nbdev runs it for the site, without the cells before it."
    def mixed(source: str) -> bool:
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in statements(source))
        return imports and not only_imports(source) and not re.search(r"^#\|\s*eval:\s*false", source, re.M)
    return any(map(mixed, code(path)))


def wide(path: Path) -> bool:
    text = "\n".join(code(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return any(len(line) > WIDE for line in text.splitlines() if not line.startswith("__all__ = "))   # nbdev wraps it


def private_imports(path: Path) -> bool:
    "A private name of one module in another, or in a lesson."
    sources = code(path) if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    nodes = [node for source in sources for statement in statements(source) for node in ast.walk(statement)]
    ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("llmcourse"))]
    return any(re.match(r"_(?!_)", name.name) for node in ours for name in node.names)


def too_long_a_module(path: Path) -> bool:
    return len(path.read_text(encoding="utf-8").splitlines()) > MODULE


def long_functions(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return any(f.end_lineno - f.lineno + 1 > FUNCTION for f in functions)


def public_names(path: Path) -> Iterator[str]:
    "What a module defines at its top, without a leading underscore."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names = [node.name]
        yield from (name for name in names if not name.startswith("_"))


def defined_in() -> dict[str, set[str]]:
    "The modules that define a public name."
    where: dict[str, set[str]] = {}
    for path in MODULES:
        if path.parent.name == "exercises": continue      # each has its EXERCISES
        for name in public_names(path): where.setdefault(name, set()).add(path.stem)
    return where


def defined_twice() -> set[str]:
    "Public names with two meanings, as in `name: module, module`."
    twice = {name: modules for name, modules in defined_in().items() if len(modules) > 1 and name not in SAME_NAME}
    return {f"{name}: {', '.join(sorted(modules))}" for name, modules in twice.items()}


RULES = {
    f"a chapter has at most {CELLS} cells": (too_many_cells, CHAPTERS),
    f"a chapter exports at most {EXPORTED:.0%} of its code": (too_much_exported, CHAPTERS),
    f"at most {RUN} exported lines in a row": (too_long_exported, NOTEBOOKS),
    f"at most {LONG_CELLS} code cells of a chapter are over {LONG_CELL} lines": (too_many_long_cells, CHAPTERS),
    "imports are alone in their cell": (mixed_imports, NOTEBOOKS),
    f"a line has at most {WIDE} characters": (wide, [*NOTEBOOKS, *PYTHON]),
    "a private name stays in its module": (private_imports, [*NOTEBOOKS, *MODULES]),
    f"a module has at most {MODULE} lines": (too_long_a_module, MODULES),
    f"a function has at most {FUNCTION} lines": (long_functions, MODULES),
}
ONE_MEANING = "a public name has one meaning"


def offenders() -> dict[str, set[str]]:
    "For each rule, who breaks it."
    found = {rule: {place(p) for p in paths if breaks(p)} for rule, (breaks, paths) in RULES.items()}
    return found | {ONE_MEANING: defined_twice()}


if __name__ == "__main__":
    broken = {rule: found for rule, found in offenders().items() if found}
    pprint.pprint(broken, width=120, compact=True)
