"""`llmcourse doctor` on machines that it is told about: a fake nvidia-smi, another system, an older driver."""

import os
import stat
import sys

import pytest
import torch

from llmcourse.cards import NCCL, ROOM, Card, cards, scale_for
from llmcourse.cli import main
from llmcourse.core import scale
from llmcourse.doctor import examine


@pytest.fixture
def machine(tmp_path, monkeypatch):
    "Pretend: `machine(*cards, cuda=...)`, each card as nvidia-smi lists it. Returns {what: (found, advice)}."

    def pretend(*rows, cuda=None, code=0, system=None, cpu="x86_64"):
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!{sys.executable}\nimport sys\nprint({os.linesep.join(rows)!r})\nsys.exit({code})\n")
        smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        for name in NCCL:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if system:
            monkeypatch.setattr("platform.system", lambda: system)
            monkeypatch.setattr("platform.machine", lambda: cpu)
        return {name: (found, advice) for name, found, advice in examine()}

    return pretend


def test_two_4090s_hang_unless_told(machine, monkeypatch):
    row = "NVIDIA GeForce RTX 4090, 24564, 580.65.06"
    found, advice = machine(row, row, cuda="13.0")["GPUs"]
    assert found == "2 × NVIDIA GeForce RTX 4090, 24 GiB, driver 580.65.06"
    assert advice == "cards of this kind hang without: export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert dict((w, a) for w, _, a in examine())["GPUs"].endswith("export NCCL_IB_DISABLE=1")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert dict((w, a) for w, _, a in examine())["GPUs"] == ""


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4070 Ti SUPER"])
def test_their_siblings_hang_too_but_one_alone_does_not(machine, name):
    row = f"{name}, 24576, 580.65.06"
    assert "NCCL_P2P_DISABLE=1" in machine(row, row)["GPUs"][1]
    assert machine(row)["GPUs"][1] == ""


def test_cards_that_reach_each_other_need_nothing(machine):
    row = "NVIDIA A100-SXM4-80GB, 81920, 580.65.06"
    assert machine(row, row)["GPUs"] == ("2 × NVIDIA A100-SXM4-80GB, 80 GiB, driver 580.65.06", "")


def test_a_t4_has_no_bfloat16(machine):
    found, advice = machine("Tesla T4, 15360, 580.65.06")["scale"]
    assert found == "t4: unsloth/Llama-3.2-1B-Instruct, float16; no bfloat16 on this card" and not advice


@pytest.mark.parametrize(
    "name,mib,best",
    [
        ("Tesla T4", 15360, "t4"),
        ("Tesla V100-SXM2-32GB", 32768, "t4"),
        ("Quadro RTX 8000", 49152, "t4"),
        ("NVIDIA TITAN RTX", 24576, "t4"),
        ("NVIDIA GeForce RTX 2060 SUPER", 8192, ""),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "t4"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA A10G", 23028, "l4"),
        ("NVIDIA GeForce RTX 3090", 24576, "l4"),
        ("NVIDIA RTX A6000", 49140, "a100"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "a100"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H200", 143771, "h100"),
    ],
)
def test_the_scale_for_a_card(name, mib, best):
    assert scale_for([Card(name, mib / 1024, "580.65.06")]) == best


def test_the_smallest_of_several_cards_decides():
    big, small = Card("NVIDIA A100-SXM4-40GB", 40, "580"), Card("Tesla T4", 15, "580")
    assert scale_for([big, small]) == scale_for([small, big]) == "t4"


def test_every_scale_with_a_gpu_is_offered():
    assert {name for name in ROOM if scale(name)["device"] == "cuda"} == {"t4", "l4", "a100", "h100"}


def test_a_small_gpu(machine):
    found, advice = machine("NVIDIA GeForce RTX 2060 SUPER, 8192, 580.65.06")["scale"]
    assert found.startswith("cpu") and "batch_size = 1" in found and not advice


def test_a_driver_too_old_for_this_torch(machine):
    row = "NVIDIA A100-SXM4-40GB, 40960, 535.129.03"
    advice = machine(row, cuda="13.0")["torch"][1]
    assert advice.startswith("CUDA 13.0 needs driver 580 or newer, here is 535.129.03: update the driver")
    assert "--torch-backend=auto" in advice and "\n" not in advice
    assert "CUDA_VISIBLE_DEVICES" in machine(row, cuda="12.6")["torch"][1]


def test_a_torch_for_the_cpu_beside_a_gpu(machine):
    assert "this torch is built for the CPU: pip install uv" in machine("NVIDIA L4, 23034, 580.65.06")["torch"][1]


def test_nvidia_smi_that_fails_is_quoted(machine, capsys):
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert machine(said, code=9)["GPUs"] == ("none", said)
    assert main(["doctor"]) == 1 and f"✗ GPUs         none\n  → {said}" in capsys.readouterr().out


def test_a_card_whose_memory_is_not_told(machine):
    "As on machines whose GPU shares the memory of the CPU: [N/A]."
    assert machine("NVIDIA GB10, [N/A], 580.65.06")["scale"] == (
        "the one whose model fits: this GPU does not tell its memory",
        "",
    )
    assert cards()[0] == [Card("NVIDIA GB10", 0, "580.65.06")]


def test_windows(machine):
    found, advice = machine(system="Windows", cpu="AMD64")["system"]
    assert found.startswith("Windows AMD64") and advice.startswith("use WSL2")


def test_apple(machine):
    said = machine(system="Darwin", cpu="arm64")
    assert said["system"][1] == "" and "device = mps" in said["scale"][0] and said["scale"][0].startswith("cpu")


def test_no_gpu(machine):
    assert machine()["GPUs"] == ("none", "") and machine()["scale"] == ("cpu", "")
