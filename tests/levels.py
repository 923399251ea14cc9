"""Who imports whom: the real imports between the modules, and their picture.

    python tests/levels.py      draws nbs/images/levels.svg from LEVEL in tests/test_house.py and the modules themselves
"""
import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rules import MODULES, ROOT

PICTURE = ROOT / "nbs/images/levels.svg"
WIDTH, HEIGHT, LEFT, BOX, TALL = 1080, 88, 70, 104, 30   # of the picture, a level, its label, and a module, in pixels


def own_name(path: Path) -> str:
    "The name of a module; all exercises are one."
    return "exercises" if path.parent.name == "exercises" else path.stem


def modules() -> list[str]:
    return sorted({own_name(path) for path in MODULES})


def imports(path: Path, top_only: bool) -> Iterator[str]:
    "Names of the modules that a file imports, relative ones written out."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = "llmcourse" + (".exercises" if path.parent.name == "exercises" else "")
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package if node.level else ""
            name = ".".join(x for x in (base, node.module) if x)
            yield name
            if name == "llmcourse":
                yield from (f"llmcourse.{a.name}" for a in node.names)


def edges() -> list[tuple[str, str]]:
    "(module, module that it imports), each once."
    known, found = set(modules()), set()
    for path in MODULES:
        others = {name.split(".")[1] for name in imports(path, top_only=False) if name.startswith("llmcourse.")}
        found |= {(own_name(path), other) for other in others & known if other != own_name(path)}
    return sorted(found)


def places(level: dict[str, int]) -> dict[str, tuple[float, float]]:
    "The middle of each module's box: level 0 at the bottom, a level's modules side by side."
    rows: dict[int, list[str]] = {}
    for name in modules(): rows.setdefault(level[name], []).append(name)
    top = max(rows)
    gap = {k: (WIDTH - LEFT) / len(names) for k, names in rows.items()}
    return {name: (LEFT + gap[k] * (i + 0.5), HEIGHT * (top - k + 0.5)) for k, names in rows.items()
            for i, name in enumerate(names)}


def line(a: tuple[float, float], b: tuple[float, float]) -> str:
    "From the foot of one box to the head of another."
    (x, y), (u, v) = a, b
    y, v = y + TALL / 2, v - TALL / 2
    return (f'<path d="M{x:.0f} {y:.0f} C{x:.0f} {y + 34:.0f} {u:.0f} {v - 34:.0f} {u:.0f} {v:.0f}" '
            f'fill="none" stroke="#4a7fb5" stroke-opacity="0.45"/>')


def box(name: str, x: float, y: float) -> str:
    return (f'<rect x="{x - BOX / 2:.0f}" y="{y - TALL / 2:.0f}" width="{BOX}" height="{TALL}" rx="6" fill="#eef4fb" '
            f'stroke="#2f5d8a"/><text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{escape(name)}</text>')


def nearest(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    "The imports without those that another module on the way imports already."
    below: dict[str, set[str]] = {}
    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set()       # two modules that import each other end here
            below[name] = {o for a, b in found if a == name for o in {b} | reach(b)}
        return below[name]
    return [(a, b) for a, b in found if not any(b in reach(o) for x, o in found if x == a and o != b)]


def draw(level: dict[str, int]) -> str:
    "The picture, as SVG. An import that follows from two others is left out."
    at = places(level)
    rows = sorted({level[name] for name in at})
    height = HEIGHT * (max(rows) + 1)
    labels = [f'<text x="8" y="{HEIGHT * (max(rows) - k + 0.5) + 5:.0f}" fill="#777">level {k}</text>' for k in rows]
    parts = [line(at[a], at[b]) for a, b in nearest(edges())] + [box(name, *xy) for name, xy in at.items()] + labels
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="14">')
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *parts, "</svg>", ""])


def main() -> None:
    from test_house import LEVEL
    PICTURE.write_text(draw(LEVEL), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(modules())} modules, {len(edges())} imports")


if __name__ == "__main__": main()
