"""What the recording proxy costs: time to the first token and to the last, direct, through it, and through it with
recording, in turn, on the tutor behind llama.cpp. A round asks each way once, in random order; differences are within a
round. Prints medians in milliseconds, and the 95 % interval of the median difference (bootstrap, 2,000 draws).

    python benchmarks/collect.py [rounds] [--clients 1]
    python benchmarks/collect.py --disk     what fsync costs a turn

Measured on two idle CPU cores, n=100 rounds: first token 3.0 ms direct, +1.7 ms through it (1.6 to 1.8), +1.8 ms
recorded (1.7 to 1.9); whole reply 9.8 ms, +2.8 ms (2.2 to 4.4) and +4.2 ms (3.0 to 4.9). With a load of
10 to 16, where each hop between processes waits, n=200 rounds: first token
19.1 ms direct, +11.3 ms through it (9.6 to 12.8), +9.3 ms recorded (7.2 to 11.0); reply of some 25 pieces 40.9 ms,
+14.4 ms (11.2 to 18.0) and +14.2 ms (9.6 to 17.3). With 8 clients at once, n=8x25: whole reply 217 ms, +52 ms (10 to
81) and +70 ms (36 to 104). Recording itself cannot be told from passing on. A reply costs the proxy 5.7 ms of CPU
(n=24). All that was before a turn had to be on the disk; `--disk` says what that adds, on that disk: 0.16 ms a turn
(0.15 to 0.16, n=400), with 8 at once 0.51 ms (0.49 to 0.52), without fsync 0.02 ms and 0.01 ms.
"""

import argparse
import contextlib
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

WAYS = ("direct", "through", "recorded")


def timed(client, question: str, headers: dict) -> tuple[float, float]:
    "Milliseconds to the first piece of text and to the end."
    start, first = time.perf_counter(), None
    asked = [{"role": "user", "content": question}]
    options = dict(model="tutor", max_tokens=48, temperature=0, stream=True, extra_headers=headers)
    for chunk in client.chat.completions.create(messages=asked, **options):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
    return first * 1000, (time.perf_counter() - start) * 1000


def interval(values: list[float], rng: random.Random) -> tuple[float, float]:
    draws = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return draws[49], draws[1949]


def measure(server, collector, rounds: int, seed: int) -> dict[str, list]:
    "(first, whole) of each way, a round at a time."
    from llmcourse.servers import connect

    rng = random.Random(seed)
    urls = dict(zip(WAYS, (server.url, collector.url, collector.url)))
    clients = {way: connect(url) for way, url in urls.items()}
    found = {way: [] for way in WAYS}
    for n in range(-3, rounds):  # the first three warm up
        for way in rng.sample(WAYS, 3):
            headers = {"x-collect": "yes"} if way == "recorded" else {}
            one = timed(clients[way], f"What is {rng.randrange(10, 99)} plus {rng.randrange(10, 99)}?", headers)
            if n >= 0:
                found[way].append(one)
    return found


def disk(folder: str, clients: int, n: int = 400) -> dict[str, list]:
    "Milliseconds that a turn takes to be on the disk, with fsync and without, in turn."
    from unittest import mock

    from llmcourse.turnlog import TurnLog

    said = [{"role": "user", "content": "What is 47 plus 38?" * 20}]
    turn = dict(time="t", seconds=1, status=200, request={"messages": said}, reply=said[0])
    log, found = TurnLog(f"{folder}/disk{clients}.jsonl"), {"fsync": [], "none": []}

    def add(_) -> float:
        start = time.perf_counter()
        log.add(turn)
        return 1000 * (time.perf_counter() - start)

    with ThreadPoolExecutor(clients) as pool:
        for i in range(20):
            for way in found if i % 2 else reversed(found):
                with mock.patch("llmcourse.turnlog.os.fsync") if way == "none" else contextlib.nullcontext():
                    found[way] += pool.map(add, range(n // 20))
    log.close()
    return found


def said_disk() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for clients in (1, 8):
            found = disk(folder, clients)
            for way, ms in found.items():
                low, high = interval(ms, random.Random(0))
                print(f"{clients} at once, {way:<5} {statistics.median(ms):6.3f} ms a turn ({low:.3f} to {high:.3f}), "
                      f"95 % within {sorted(ms)[int(0.95 * len(ms))]:.2f} ms, n={len(ms)}")  # fmt: skip


def main() -> None:
    from llmcourse.export import to_gguf
    from llmcourse.proxy import Collecting
    from llmcourse.serve import serve

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("rounds", type=int, nargs="?", default=200)
    options.add_argument("--clients", type=int, default=1, help="at once, each with rounds of its own")
    options.add_argument("--disk", action="store_true", help="only what fsync costs a turn")
    options = options.parse_args()
    if options.disk:
        return said_disk()
    with tempfile.TemporaryDirectory() as folder:
        gguf = to_gguf("tutor/sft", Path(folder) / "tutor.gguf", "Q8_0")
        with (
            serve(gguf, n_parallel=4, n_threads=1) as server,
            Collecting(server.url, f"{folder}/log.jsonl") as collector,
        ):
            proxy = psutil.Process(collector.process.pid)
            spent = sum(proxy.cpu_times()[:2])
            with ThreadPoolExecutor(options.clients) as pool:
                all_of = list(pool.map(lambda i: measure(server, collector, options.rounds, i), range(options.clients)))
            spent = (sum(proxy.cpu_times()[:2]) - spent) / (2 * options.clients * (options.rounds + 3))
    found = {way: [one for part in all_of for one in part[way]] for way in WAYS}
    rng = random.Random(0)
    for i, what in enumerate(("first token", "whole reply")):
        direct = [one[i] for one in found["direct"]]
        print(f"{what:<12} direct    {statistics.median(direct):7.2f} ms, n={len(direct)}")
        for way in WAYS[1:]:
            more = [one[i] - base for one, base in zip(found[way], direct)]
            low, high = interval(more, rng)
            print(f"{'':<12} {way:<9} {statistics.median(more):+7.2f} ms ({low:+.2f} to {high:+.2f})")
    print(f"the proxy takes {spent * 1000:.1f} ms of CPU a reply")


if __name__ == "__main__":
    main()
