"""What our wrapper costs over the raw engine, and what a draft model brings: alternated, with n and interval.

    python benchmarks/serving.py overhead [rounds]    llama.cpp and transformers, ours against the engine alone
    python benchmarks/serving.py door [rounds]        one adapter: by name through the door, or its number at the engine
    python benchmarks/serving.py draft [steps]        train a one-layer draft on the tutor's replies, then measure it
"""
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmcourse.core import weights
from llmcourse.export import to_gguf
from llmcourse.serve import bench, free_port, serve
from llmcourse.tutor import problems, to_chat

CHATS = [to_chat(p, answered=False)["messages"] for p in problems(16, 5, ("story1",), "test")]
RAW = """
import sys, threading, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_parallel, p.n_ctx = 4, 4 * 2048
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(p)
threading.Event().wait()
"""


def started(words: list, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until(url: str) -> None:
    import httpx

    for _ in range(3000):
        try:
            if httpx.get(url + "/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"{url} does not answer")


def speed(url: str, model: str | None = None, **options) -> float:
    "Tokens a second of one client, one request after the other."
    return bench(url, CHATS, model=model, max_tokens=32, **options)["tokens_per_second"]


def compare(name: str, raw, ours, rounds: int) -> None:
    "Alternate the two, and print the mean share of time that ours takes on top, with its 95 % interval."
    raw(), ours()   # warm
    ratios = []
    for i in range(rounds):
        pair = [raw, ours] if i % 2 else [ours, raw]
        found = {f: f() for f in pair}
        ratios.append(100 * (found[raw] / found[ours] - 1))
    mean, spread = statistics.mean(ratios), 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5
    interval = f"{mean - spread:+.1f} to {mean + spread:+.1f}"
    print(f"{name}: {mean:+.1f} % ({interval}; {rounds} rounds of {len(CHATS)} replies)", flush=True)


def overhead(rounds: int, folder: Path) -> None:
    gguf = to_gguf("tutor/sft", folder / "tutor.gguf", "f32")
    port = free_port()
    raw = started([sys.executable, "-c", RAW, str(gguf), str(port)], folder)
    try:
        until(f"http://127.0.0.1:{port}")
        with serve(gguf, n_threads=1, key="s3cret") as ours:
            compare("llama.cpp, ours over raw", lambda: speed(f"http://127.0.0.1:{port}/v1", "tutor"),
                    lambda: speed(ours.url, key="s3cret"), rounds)
    finally:
        raw.kill()
    words = ["transformers", "serve", "sft", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    path = Path(serve_folder(folder))
    raw = started(words, path.parent)
    try:
        until(f"http://127.0.0.1:{port}")
        with serve(path, n_threads=1, key="s3cret") as ours:
            compare("transformers, ours over raw", lambda: speed(f"http://127.0.0.1:{port}/v1", "sft"),
                    lambda: speed(ours.url, "sft", key="s3cret"), rounds)
    finally:
        raw.kill()


def serve_folder(folder: Path) -> Path:
    "tutor/sft as a whole model, because `transformers serve` takes no adapter."
    from llmcourse.models import load

    for part in load("tutor/sft"):
        part.save_pretrained(folder / "sft")
    return folder / "sft"


def door(rounds: int, folder: Path) -> None:
    from llmcourse.gguf_adapter import lora_to_gguf

    base = to_gguf("tutor/base", folder / "base.gguf", "f32")
    adapter = lora_to_gguf(weights() / "sft", folder / "sft.gguf")
    lora = {"extra_body": {"lora": [{"id": 0, "scale": 1.0}]}}
    with serve(base, n_threads=1, adapters={"sums": adapter}) as ours:
        log = ours.log(400)
        inner = re.search(r"behind the door: http://(\S+)", log)[1]
        compare("one adapter, through the door over llama.cpp's own port",
                lambda: speed(f"http://{inner}/v1", "base", **lora), lambda: speed(ours.url, "sums"), rounds)


if __name__ == "__main__":
    what, n = sys.argv[1], int((sys.argv[2:] or [10])[0])
    with tempfile.TemporaryDirectory() as place:
        {"overhead": overhead, "door": door}[what](n, Path(place))
