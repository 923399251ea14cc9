"""What our wrapper costs over the raw engine: CPU time and the clock, alternated reply by reply, with n and interval.

    python benchmarks/serving.py overhead [n]    llama.cpp and transformers, ours against the engine alone
    python benchmarks/serving.py door [n]        one adapter, by name through the door, against its number there
    python benchmarks/serving.py cache [n]       llama.cpp alone, its RAM cache of prompts off, against on

n is the number of rounds of 16 questions. With several adapters the RAM cache is off, because it forgets whose prompt
it holds; `door` asks the same engine both ways, so this is no part of its figure, and `cache` measures it by
itself: +17.7 % of the engine's CPU time (10.0 to 21.9; 8 x 16 pairs) where every question comes back.
"""
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmcourse.core import weights
from llmcourse.export import to_gguf
from llmcourse.serve import free_port, serve
from llmcourse.tutor import problems, to_chat

CHATS = [to_chat(p, answered=False)["messages"] for p in problems(16, 5, ("story1",), "test")]
RAW = """
import sys, threading, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_parallel, p.n_ctx = 4, 4 * 2048
if sys.argv[3:]: p.cache_ram_mib = int(sys.argv[3])
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


def cpu(pid: int) -> float:
    "CPU seconds of a process and its threads, which a busy machine does not stretch as it stretches the clock."
    return time.clock_gettime((~pid << 3) | 2)     # Linux's number for that process's clock


def asker(pid: int, url: str, model: str, key: str | None = None, **options):
    "A function that asks one question, and says how many milliseconds it took: of the server's CPU, and by the clock."
    from llmcourse.serve import connect

    client = connect(url, key)

    def ask(chat: list[dict]) -> tuple[float, float]:
        busy, start = cpu(pid), time.perf_counter()
        client.chat.completions.create(model=model, messages=chat, temperature=0, max_tokens=32, **options)
        seconds = time.perf_counter() - start
        time.sleep(0.005)   # a thread's time counts once it rests
        return 1000 * (cpu(pid) - busy), 1000 * seconds

    return ask


def compare(name: str, raw, ours, n: int) -> None:
    """Ask both every question, `n` times; print the median of the differences, with an interval. Neither gets a
    question right after the other, because the engine remembers its last prompts."""
    pairs, half = [], len(CHATS) // 2
    for i in range(-1, n):  # the first round warms up
        found = {}
        for k in range(len(CHATS)):
            for ask, chat in random.sample([(raw, k), (ours, (k + half) % len(CHATS))], 2):
                found[ask, chat] = ask(CHATS[chat])
        pairs += [(found[raw, k], found[ours, k]) for k in range(len(CHATS)) if i >= 0]
    for which, what in enumerate(("CPU ms", "ms by the clock")):
        base = statistics.median(one[which] for one, _ in pairs)
        more = [two[which] - one[which] for one, two in pairs]
        draws = sorted(statistics.median(random.choices(more, k=len(more))) for _ in range(1000))
        middle, low, high = statistics.median(more), draws[25], draws[974]
        share = [f"{100 * one / base:+.1f}" for one in (middle, low, high)]
        print(f"{name}: {share[0]} % ({share[1]} to {share[2]}), {middle:+.2f} {what} ({low:+.2f} to {high:+.2f}) "
              f"on {base:.1f} a reply; {n} x {len(CHATS)} pairs", flush=True)  # fmt: skip


def beside(name: str, words: list, port: int, path: Path, model: str, n: int) -> None:
    "The engine alone, started by `words`, against ours with the same model."
    raw = started(words, path.parent)
    try:
        until(f"http://127.0.0.1:{port}")
        with serve(path, n_threads=1, key="s3cret") as ours:
            alone = asker(raw.pid, f"http://127.0.0.1:{port}/v1", model)
            compare(name, alone, asker(ours.process.pid, ours.url, model, "s3cret"), n)
    finally:
        raw.kill()


def overhead(n: int, folder: Path) -> None:
    gguf, port = to_gguf("tutor/sft", folder / "tutor.gguf", "f32"), free_port()
    beside("llama.cpp", [sys.executable, "-c", RAW, str(gguf), str(port)], port, gguf, "tutor", n)
    words = ["transformers", "serve", "sft", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    beside("transformers", words, port, serve_folder(folder), "sft", n)


def serve_folder(folder: Path) -> Path:
    "tutor/sft as a whole model, because `transformers serve` takes no adapter."
    from llmcourse.models import load

    for part in load("tutor/sft"):
        part.save_pretrained(folder / "sft")
    return folder / "sft"


def door(n: int, folder: Path) -> None:
    from llmcourse.gguf_adapter import lora_to_gguf

    base = to_gguf("tutor/base", folder / "base.gguf", "f32")
    adapter = lora_to_gguf(weights() / "sft", folder / "sft.gguf")
    lora = {"extra_body": {"lora": [{"id": 0, "scale": 1.0}]}}
    with serve(base, n_threads=1, adapters={"sums": adapter}) as ours:
        log = ours.log(400)
        inner = re.search(r"behind the door: http://(\S+)", log)[1]
        pid = ours.process.pid
        compare("the door", asker(pid, f"http://{inner}/v1", "base", **lora), asker(pid, ours.url, "sums"), n)


def cache(n: int, folder: Path) -> None:
    gguf, asks, engines = to_gguf("tutor/sft", folder / "tutor.gguf", "f32"), [], []
    try:
        for more in ([], ["0"]):
            port = free_port()
            engines.append(started([sys.executable, "-c", RAW, str(gguf), str(port), *more], folder))
            until(f"http://127.0.0.1:{port}")
            asks.append(asker(engines[-1].pid, f"http://127.0.0.1:{port}/v1", "tutor"))
        compare("no RAM cache", *asks, n)
    finally:
        for engine in engines:
            engine.kill()


if __name__ == "__main__":
    what, n = sys.argv[1], int((sys.argv[2:] or [40])[0])
    with tempfile.TemporaryDirectory() as place:
        {"overhead": overhead, "door": door, "cache": cache}[what](n, Path(place))
