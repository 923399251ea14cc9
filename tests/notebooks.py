"""Run notebooks under papermill, as the tests and `make course` do."""
import os
import re
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
ARTIFACTS = ROOT / "artifacts"


def chapters() -> list[Path]:
    return sorted(NBS.glob("[0-9][0-9]*_*.ipynb"))


def source(cell) -> str:
    return "".join(cell["source"])


def run(path: Path, output: Path | None = None, progress: bool = False, cwd: Path | None = None, change=None,
        **parameters) -> dict:
    """Execute a notebook, in its own folder by default; cells flagged `eval: false` are left out. `change` may make
    other sources of the cells'. Returns what came out."""
    import nbformat
    import papermill
    from papermill.iorw import load_notebook_node

    path = path.resolve()
    output = output or ARTIFACTS / path.relative_to(NBS)
    output.parent.mkdir(parents=True, exist_ok=True)
    nb = load_notebook_node(str(path))
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*eval:\s*false", source(c), re.M)]
    for cell in nb.cells if change else ():
        cell.source = change(cell.source)
    filtered = output.with_suffix(".in.ipynb")
    nbformat.write(nb, filtered)
    dial = "\n".join(source(c) for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    known = set(re.findall(r"^(\w+)\s*=", dial, re.M))
    assert set(parameters) <= known, f"{path.name} has no parameters {set(parameters) - known}, only {known}"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("LLMCOURSE_HOME", str(ARTIFACTS / "home"))     # a test run is nobody's progress
    try:
        return papermill.execute_notebook(
            str(filtered), str(output), parameters=parameters, cwd=str(cwd or path.parent), kernel_name="python3",
            progress_bar=progress, extra_arguments=["--IPKernelApp.log_level=40"])
    finally:
        filtered.unlink()


def text_outputs(nb) -> str:
    "All text that the cells of an executed notebook printed."
    outputs = [output for cell in nb["cells"] for output in cell.get("outputs", [])]
    return "\n".join("".join(o.get("text", "")) for o in outputs if o["output_type"] == "stream")


def main() -> int:
    "Run every chapter, with progress; say how long each took."
    failed = []
    for path in chapters():
        start = time.time()
        try:
            run(path, progress=True)
        except Exception as e:
            failed.append(path.name)
            print(f"✗ {path.name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}, see artifacts/{path.name}")
        else:
            print(f"✓ {path.name} in {time.time() - start:.0f} s")
    print(f"{len(chapters()) - len(failed)} passed, {len(failed)} failed; executed notebooks are in artifacts/")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
