"""Fold what a reader need not see at first, where people read: in JupyterLab, in VS Code and in the notebook as HTML.

    python tests/fold.py [notebook ...]     all of nbs/ by default; folding twice changes nothing

Sources of cells that only import, of `#| hide` cells and of solutions; and, in chapters, outputs of cells that call
`measured`, so that nobody reads the answer before guessing. A folded output opens when its cell runs.
"""
import ast
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def statements(source: str) -> list[ast.stmt]:
    "The statements of a cell; none if it is not plain Python, as with a `%magic`."
    try: return ast.parse(source).body
    except SyntaxError: return []


def only_imports(source: str) -> bool:
    body = statements(source)
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def called(node: ast.AST) -> str:
    "The name of the function that a call calls, else nothing."
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def is_solution(source: str) -> bool:
    "Does the cell end in `check(..., strict=True)`?"
    last = statements(source)[-1:]
    call = last[0].value if last and isinstance(last[0], ast.Expr) else None
    strict = [k for k in getattr(call, "keywords", []) if k.arg == "strict" and getattr(k.value, "value", 0) is True]
    return called(call) == "check" and bool(strict)


def is_answer(source: str) -> bool:
    "Does the cell compare a measurement with a guess? Its first argument is the id of a question."
    calls = [n for statement in statements(source) for n in ast.walk(statement) if called(n) == "measured" and n.args]
    return any(re.fullmatch(r"\d\d[a-z]?\.[a-z]", str(getattr(n.args[0], "value", ""))) for n in calls)


def folds(cell: dict, chapter: bool) -> dict[str, bool]:
    "What is folded of a cell, as JupyterLab notes it in the cell's metadata."
    if cell["cell_type"] != "code": return {}
    source = "".join(cell["source"])
    hidden = re.search(r"^#\|\s*hide\s*$", source, re.M) or only_imports(source) or is_solution(source)
    wanted = {"source_hidden": bool(hidden), "outputs_hidden": chapter and is_answer(source)}
    return {key: True for key, value in wanted.items() if value}


def summary_first(lines: list[str]) -> list[str]:
    "The first line is all that shows of a folded source, so let it be the one that says what is inside."
    directives = [line for line in lines if line.startswith("#|")]
    summary = [line for line in directives if line.startswith("#| code-summary")]
    if not summary or lines[:len(directives)] != directives: return lines
    return summary + [line for line in lines if line not in summary]


def fold(path: Path) -> bool:
    "Fold one notebook. True if that changed it."
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        cell["metadata"].pop("jupyter", None)
        cell["metadata"].pop("collapsed", None)      # JupyterLab's older word for it
        wanted = folds(cell, chapter=bool(re.match(r"\d\d[a-z]?_", path.name)))
        if wanted: cell["metadata"]["jupyter"] = wanted
        if wanted.get("source_hidden"): cell["source"] = summary_first(cell["source"])
    after = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if after != before: path.write_text(after, encoding="utf-8")
    return after != before


def main(words: list[str]) -> None:
    paths = [Path(word) for word in words] or sorted(NBS.rglob("*.ipynb"))
    changed = [path.name for path in paths if ".ipynb_checkpoints" not in path.parts and fold(path)]
    print(f"folded {', '.join(changed)}" if changed else "nothing to fold")


if __name__ == "__main__": main(sys.argv[1:])
