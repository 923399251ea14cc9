"""Measure the course on this machine's card, for a table that anybody can add to: `make gpu`.

python tests/gpu.py                          every chapter, one training, the tests marked gpu
python tests/gpu.py --scale cpu 06 09        two chapters, at a scale of your choice
python tests/gpu.py --table                  what has been measured so far

It writes artifacts/gpu/CARD.json; copy that to data/gpu/ and send it. Unsloth needs an environment of its own: if you
have one with llmcourse in it, name its Python in $UNSLOTH_PYTHON, and the training is measured there, too.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FITS = {"h100": 70, "a100": 36, "l4": 20, "t4": 13}  # scale → GB of memory that it needs, the largest first
PEAK = {"T4": 65, "L4": 121, "A100": 312, "H100": 989}  # 10¹² operations a second in 16 bits, dense: data sheets
FIELDS = {"card": str, "memory_gb": float, "scale": str, "date": str, "versions": dict, "chapters": list,
          "training": dict, "unsloth": (dict, str), "gpu_tests": str}  # fmt: skip
AT_EXIT = """import atexit, os, sys
def _peak():
    import resource
    torch = sys.modules.get("torch")
    on_card = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0
    size = on_card or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(os.environ["LLMCOURSE_PEAK"], "w") as f: f.write(str(size))
atexit.register(_peak)
"""


def scale_for(gigabytes: float) -> str | None:
    "The largest scale that a card of so much memory holds; None if it is too small for all of them."
    return next((scale for scale, needed in FITS.items() if gigabytes >= needed), None)


def this_card() -> tuple[str, float]:
    "Name and memory in GB of the first card; of the machine, if there is none."
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return card.name, card.total_memory / 1e9
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"CPU {platform.machine()}", pages / 1e9


def mfu(card: str, parameters: int, tokens_per_second: float, adapter: bool, recomputed: bool) -> float | None:
    "The share of the card's operations that the model's own are; None for a card whose peak we do not know."
    peak = next((10**12 * n for name, n in PEAK.items() if re.search(rf"\b{name}\b", card)), None)
    each = (4 if adapter else 6) + 2 * recomputed  # operations for each weight and token: forward 2, backward 2 or 4
    return round(each * parameters * tokens_per_second / peak, 3) if peak else None


def train(scale: str, engine: str = "trl", rows: int = 400) -> dict:
    "One training at that scale, in this process: tokens a second without the first steps, MFU, peak memory."
    import torch
    from transformers import TrainerCallback

    from llmcourse.scales import to_train
    from llmcourse.sft import sft
    from llmcourse.tutor import problems, to_chat

    class Clock(TrainerCallback):
        stamps, net = [], None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            Clock.stamps.append((time.perf_counter(), state.num_input_tokens_seen))
            Clock.net, Clock.args = model, args

    how = to_train(scale)
    with tempfile.TemporaryDirectory() as folder:
        data = [to_chat(p) for p in problems(rows // 4, 1, ["add", "sub", "story1", "story2"])]
        sft(
            data,
            Path(folder) / "run",
            callbacks=[Clock()],
            engine=engine,
            include_num_input_tokens_seen="non_padding",
            **how,
        )
    warm = Clock.stamps[2:]
    seconds, tokens = warm[-1][0] - warm[0][0], warm[-1][1] - warm[0][1]
    size = Clock.net.num_parameters()
    on_card = torch.cuda.is_available() and scale != "cpu"
    share = mfu(this_card()[0], size, tokens / seconds, "peft_config" in how, Clock.args.gradient_checkpointing)
    return {
        "engine": engine, "model": str(how["model"]), "steps": len(warm) - 1, "tokens": tokens,
        "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1),
        "mfu": share if on_card else None,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_card else None,
    }  # fmt: skip


def train_apart(python: str, scale: str, engine: str) -> dict | str:
    "The same in a process of its own, perhaps of another environment: the measurement, or one line that says why not."
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [python, __file__, "--scale", scale, "--train", engine]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        return json.loads(last)
    return "not measured: " + (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]


def unsloth(scale: str) -> dict | str:
    python = os.environ.get("UNSLOTH_PYTHON")
    if not python:
        return "not measured: $UNSLOTH_PYTHON does not name a Python with unsloth and llmcourse"
    return train_apart(python, scale, "unsloth")


def measure_chapter(path: Path, scale: str, **options) -> dict:
    "Run one chapter in a kernel of its own: seconds, and its peak of memory on the card (on a CPU: of the process)."
    import notebooks

    with tempfile.TemporaryDirectory() as folder:
        startup = Path(folder) / "profile_default/startup"
        startup.mkdir(parents=True)
        (startup / "00-peak.py").write_text(AT_EXIT)
        peak, old = Path(folder) / "peak", dict(os.environ)
        os.environ |= {"IPYTHONDIR": folder, "LLMCOURSE_PEAK": str(peak)}
        start = time.perf_counter()
        output = ROOT / "artifacts/gpu" / scale / path.name
        try:
            notebooks.run(path, output, scale=scale, **options)
            why = ""
        except Exception as e:
            why = (str(e).strip().splitlines() or [type(e).__name__])[-1][:200]
        finally:
            seconds = round(time.perf_counter() - start, 1)
            os.environ.clear()
            os.environ |= old
        size = round(int(peak.read_text()) / 1e9, 2) if peak.is_file() else None
    return {"chapter": path.stem, "ok": not why, "seconds": seconds, "peak_gb": size} | ({"why": why} if why else {})


def versions() -> dict:
    names = ("torch", "transformers", "trl", "peft", "accelerate", "llmcourse")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def faults(report: dict) -> list[str]:
    "What is wrong with a measurement that somebody sent."
    found = [f"no {k}" for k in FIELDS if k not in report]
    found += [f"{k} is a {type(report[k]).__name__}" for k, kind in FIELDS.items()
              if k in report and not isinstance(report[k], kind)]  # fmt: skip
    for row in report.get("chapters", []):
        if {"chapter", "ok", "seconds", "peak_gb"} - row.keys():
            found.append(f"a chapter without all of its fields: {row}")
    return found


def table(reports: list[dict]) -> str:
    "What was measured, a column a card, in Markdown."
    if not reports:
        return "Not measured yet: `make gpu` fills this table."
    heads = [f"{r['card']} ({r['scale']})" for r in reports]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted({c["chapter"] for r in reports for c in r["chapters"]}):
        rows = [next((c for c in r["chapters"] if c["chapter"] == name), None) for r in reports]
        lines.append(f"| {name} | " + " | ".join(map(_cell, rows)) + " |")
    for key, what in (("training", "TRL"), ("unsloth", "Unsloth")):
        lines.append(f"| {what}, tokens a second | " + " | ".join(_speed(r[key]) for r in reports) + " |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    memory = f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
    return f"{row['seconds']:.0f} s{memory}" if row["ok"] else "failed"


def _speed(found: dict | str) -> str:
    if isinstance(found, str) or "tokens_per_second" not in found:
        return "not measured"
    share = f", MFU {found['mfu']:.0%}" if found.get("mfu") else ""
    return f"{found['tokens_per_second']:,.0f}{share}"


def measured() -> list[dict]:
    "All measurements that are here: those that were contributed, and those of this machine."
    places = sorted([*(ROOT / "data/gpu").glob("*.json"), *(ROOT / "artifacts/gpu").glob("*.json")])
    return list({p.name: json.loads(p.read_text()) for p in places}.values())


def gpu_tests() -> str:
    "The last line of the tests marked gpu."
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ["nothing"])[-1]


def report_on(card: str, gigabytes: float, scale: str, chapters: list[Path]) -> dict:
    rows = []
    for path in chapters:
        rows.append(measure_chapter(path, scale))
        print(json.dumps(rows[-1]), flush=True)
    return {
        "card": card, "memory_gb": round(gigabytes, 1), "scale": scale, "versions": versions(), "chapters": rows,
        "date": datetime.date.today().isoformat(), "training": _as_dict(train_apart(sys.executable, scale, "trl")),
        "unsloth": unsloth(scale), "gpu_tests": gpu_tests(),
    }  # fmt: skip


def _as_dict(found: dict | str) -> dict:
    return found if isinstance(found, dict) else {"why": found}


def main(argv: list[str] | None = None) -> int:
    import notebooks

    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("chapters", nargs="*", help="numbers; all by default")
    words.add_argument("--scale", help="by default the largest that the card holds")
    words.add_argument("--table", action="store_true", help="print what has been measured so far")
    words.add_argument("--train", metavar="ENGINE", help="measure one training in this process, and print it")
    given = words.parse_args(argv)
    if given.table:
        print(table(measured()))
        return 0
    card, gigabytes = this_card()
    scale = given.scale or (scale_for(gigabytes) if not card.startswith("CPU") else None)
    if scale is None:
        print("no card here that holds a scale: t4 needs 13 GB. Try: python tests/gpu.py --scale cpu", file=sys.stderr)
        return 2
    if given.train:
        print(json.dumps(train(scale, given.train)))
        return 0
    chosen = [p for p in notebooks.chapters() if not given.chapters or p.name[:2] in given.chapters]
    found = report_on(card, gigabytes, scale, chosen)
    assert not faults(found), faults(found)
    place = ROOT / "artifacts/gpu" / f"{re.sub('[^A-Za-z0-9]+', '-', card).lower()}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n")
    print(table([found]), f"\n{place.relative_to(ROOT)}: copy it to data/gpu/ and send it, if you like")
    return int(not all(row["ok"] for row in found["chapters"]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main())
