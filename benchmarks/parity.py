"""Which exports does the parity gate pass, and which planted faults does it find?

    python benchmarks/parity.py kinds,faults 1,2,3 [--small] [parity.jsonl]
    python benchmarks/parity.py rope 1,2,3,4,5,6,7,8,9,10 [--small] [parity.jsonl]

`kinds`: `tutor/grpo` as each type of file; `faults`: the same model spoiled on the way, as F16, Q8_0 and Q4_K_M. A seed
draws other problems, 20 of each of five kinds, for faults 8, and with them other prompts; the weights stay. `rope`: a
tutor with Llama 3's rope, whose weights each seed moves by 1 %, and the same with another factor, which only the
slowest waves feel. Each file is a line of JSON, added as it is made; `data/parity.jsonl` holds them. What was measured
already is not measured again.
"""
import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from llmcourse import converter
from llmcourse.converter import to_gguf
from llmcourse.core import read_jsonl, weights
from llmcourse.paritygate import refer
from llmcourse.paritypage import parity_line
from llmcourse.parityruns import measure_file

SMALL = "--small" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
FILE = next((word for word in WORDS if word.endswith(".jsonl")), None)
MODEL = weights() / "grpo"
KINDS = ("f16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
LINES = []
KEPT = ("kind", "MB", "prompts", "prompts same", "replies", "replies same", "places", "nats", "nats low", "nats high",
        "likeliest same", "task", "faults")


def note(about: dict, gguf: Path, model) -> None:
    "Measure a file, print what was found, and keep it."
    found = parity_line(measure_file(gguf, model.tokenizer, model.cases, model.rows, model.grade), model)
    LINES.append(about | {name: found[name] for name in KEPT if name in found})
    print(json.dumps(LINES[-1]), flush=True)
    if FILE:
        with open(FILE, "a", encoding="utf-8") as f:
            f.write(json.dumps(LINES[-1]) + "\n")


def altered(folder: Path, to: Path, name: str, old: str, new: str) -> Path:
    "A copy of a model with some text of a file replaced."
    shutil.copytree(folder, to)
    text = (to / name).read_text()
    assert old in text, name
    (to / name).write_text(text.replace(old, new))
    return to


def with_rope(folder: Path, to: Path, factor: float) -> Path:
    "A copy of a model with Llama 3's rope."
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config["max_position_embeddings"] = 16384
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps(config))
    return to


def moved(to: Path, seed: int, share: float, name: str = "") -> Path:
    "A copy of the model with noise in each matrix whose name holds `name`, as a share of its spread."
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, to)
    draw, tensors = torch.Generator().manual_seed(seed), load_file(to / "model.safetensors")
    for key, w in tensors.items():
        if w.ndim == 2 and name in key:
            noise = torch.randn(w.shape, generator=draw) * w.float().std()
            tensors[key] = (w.float() + share * noise).to(w.dtype)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def spoiled(room: Path) -> dict[str, Path]:
    "Fault → the model to export."
    ends = shutil.copytree(MODEL, room / "ends")
    for file in ends.glob("*.j*"):
        text = file.read_text().replace('"eos_token": "<|eot_id|>"', '"eos_token": "<|end_of_text|>"')
        file.write_text(text.replace('"eos_token_id": 1022', '"eos_token_id": 1017').replace("<|eot_id|>", "<|finis|>"))
    head, eps = "<|end_header_id|>\n", '"rms_norm_eps": 1e-0'
    return {"q and k not dealt": MODEL,
            "another rope": altered(MODEL, room / "rope", "config.json", "10000.0", "30000.0"),
            "another eps": altered(MODEL, room / "eps", "config.json", eps + "6", eps + "5"),
            "a newline less": altered(MODEL, room / "line", "chat_template.jinja", head + "\n", head),
            "no trim": altered(MODEL, room / "trim", "chat_template.jinja", "m['content'] | trim", "m['content']"),
            "an unknown end token": ends,
            "moved embeddings": moved(room / "embeddings", 0, 0.5, "embed_tokens"),
            "another model": weights() / "base"}


def measure(part: str, seed: int, room: Path) -> None:
    "All files of one part."
    gguf, n = room / "a.gguf", 1 if SMALL else {"kinds": 20, "faults": 8}.get(part)
    if part == "rope":
        right = with_rope(moved(room / "moved", seed, 0.01), room / "right", 8.0)
        model, wrong = refer(right, n=1, seed=seed), with_rope(right, room / "wrong", 32.0)
        for kind in KINDS[:1] if SMALL else ("Q8_0", "Q5_K_M", "Q4_K_M"):
            for fault, folder in (("none", right), ("another factor", wrong)):
                note({"part": part, "seed": seed, "fault": fault}, to_gguf(folder, gguf, kind, verify=False), model)
        return
    model = refer(MODEL, n=n, seed=seed)
    if part == "kinds":
        for kind in KINDS[:1] if SMALL else KINDS:
            note({"part": part, "seed": seed, "fault": "none"}, to_gguf(MODEL, gguf, kind, verify=False), model)
    if part == "faults":
        for fault, folder in spoiled(room).items():
            for kind in KINDS[:1] if SMALL else ("f16", "Q8_0", "Q4_K_M"):
                dealt = (lambda w, heads: w) if fault == "q and k not dealt" else converter.permute
                with patch.object(converter, "permute", dealt):
                    to_gguf(folder, gguf, kind, verify=False)
                note({"part": part, "seed": seed, "fault": fault}, gguf, model)


def main() -> None:
    parts, seeds = (WORDS[0] if WORDS else "kinds").split(","), (WORDS[1] if len(WORDS) > 1 else "1").split(",")
    there = {(line["part"], line["seed"]) for line in read_jsonl(FILE)} if FILE and Path(FILE).is_file() else set()
    for part in parts:
        for seed in map(int, seeds):
            if (part, seed) in there:
                continue
            with tempfile.TemporaryDirectory() as room:
                measure(part, seed, Path(room))
    print(f"done: {len(LINES)} measurements")


if __name__ == "__main__":
    main()
