"""Every benchmark runs once, small. What it measures is its own business."""

import subprocess
import sys

import pytest
from rules import ROOT

BENCHMARKS = {
    "sft": ["1", "--small"],
    "grpo": ["1", "--small"],
    "seeds": ["7", "--small"],
    "rounds": ["1", "--small"],
    "sweep": ["--small", "sweep.jsonl"],
    "ppo": ["--small", "ppo.jsonl"],
    "export": ["1", "--small", "--quants", "Q8_0"],
    "preference": ["--small", "preference.jsonl"],
    "gallery": ["--small", "gallery.jsonl"],
    "collect": ["3"],
    "flywheel": ["honest", "1", "--small"],
    "serving": ["door", "1"],
    "drafts": ["--small", "drafts.jsonl"],
}


def test_all_benchmarks_are_run_here():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(BENCHMARKS)


@pytest.mark.parametrize("name, more", [*((name, []) for name in BENCHMARKS), ("export", ["--adapter"])])
def test_a_benchmark_runs(name, more, tmp_path):
    "In another process, for each sets its own seeds and threads, and writes to a folder of its own."
    done = subprocess.run(
        [sys.executable, ROOT / f"benchmarks/{name}.py", *BENCHMARKS[name], *more],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {"sft": "ours / trl: median", "grpo": "trl / ours: ", "seeds": "seed 7, T=1:", "sweep": "1/1  method",
            "export": "small Q8_0    ours / stock:", "ppo": "mean 42: 0/2, reward [0.0]",
            "preference": "dpo, seed 1:", "rounds": "done: 31 measurements",
            "gallery": "chosen fine: grpo, seed 1", "collect": "whole reply  direct ",
            "flywheel": "done: 1 measurements", "serving": "the door: ",
            "drafts": "| × 1 | 10.5 | tutor/draft | "}
    assert said[name] in done.stdout
