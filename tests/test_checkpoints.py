"""The shipped checkpoints are what their cards say, small enough, good enough, and can be made again."""

import json
import shutil
import subprocess
import sys

import pytest

from llmcourse import checkpoints as ck
from llmcourse.card import read_card
from llmcourse.core import weights


def by_task(rows):
    return {r["task"]: r for r in rows}


def test_files_are_what_the_cards_say():
    assert ck.verify() == ["base", "draft", "grpo", "rl", "sft", "tools"]


def test_a_changed_file_is_found(tmp_path):
    copy = shutil.copytree(weights(), tmp_path / "weights")
    (copy / "sft" / "adapter_config.json").write_text("{}")
    with pytest.raises(Exception, match="adapter_config.json"):
        ck.verify(copy)


def test_size_and_format():
    files = [p for p in weights().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 22e6  # 20 MB in the wheel, where the JSON is compressed
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_base_rows_suit_k_quants():
    from safetensors import safe_open

    with safe_open(weights() / "base" / "model.safetensors", "pt") as f:
        shapes = [f.get_slice(k).get_shape() for k in f.keys()]
    assert all(s[-1] % 256 == 0 for s in shapes)


def test_scores_of_an_unseen_draw():
    "The command prints what the package promises, on problems drawn now."
    words = [
        sys.executable,
        "-c",
        "from llmcourse.cli import cli; cli()",
        "scores",
        "--json",
        "--n",
        "60",
        "--checkpoints",
        "base,sft",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(set(r) == {"checkpoint", "task", "n", "correct", "low", "high"} for r in rows)
    base, sft = (by_task([r for r in rows if r["checkpoint"] == f"tutor/{c}"]) for c in ("base", "sft"))
    assert base["chat format"]["correct"] == 0
    assert all(base[t]["high"] >= 0.95 for t in ("add", "sub"))
    assert all(base[f"{t} at once"]["low"] <= 0.15 for t in ("add", "sub"))
    assert sft["chat format"]["high"] >= 0.95
    assert sft["add"]["high"] >= 0.90 and sft["sub"]["high"] >= 0.80 and sft["story1"]["high"] >= 0.75


def test_cards_hold_scores_with_intervals():
    for name in ("base", "sft", "grpo", "rl", "tools", "draft"):
        card = read_card(weights() / name)
        assert all(r["n"] >= 300 and r["low"] <= r["correct"] / r["n"] <= r["high"] for r in card.after), name


@pytest.mark.slow
def test_rebuilt_sft_lands_in_its_interval(tmp_path):
    "The supervised checkpoint is made again from the shipped base, with another seed, and scores like the shipped one."
    from llmcourse.lora import lora_config
    from llmcourse.sft import sft

    sft(
        ck.sft_rows(7),
        tmp_path / "sft",
        model="tutor/base",
        seed=7,
        peft_config=lora_config(**ck.LORA_RECIPE),
        **ck.SFT_RECIPE,
    )
    new, old = (
        by_task(ck.score_model(tmp_path / "sft", n=60, seed=5, progress=False)),
        by_task(read_card(weights() / "sft").after),
    )
    for task in ("add", "sub", "story1", "story2", "chat format"):
        assert new[task]["high"] >= old[task]["low"] - 0.05, (task, new[task], old[task])


def test_more_problems_than_there_are():
    from llmcourse.core import UserError
    from llmcourse.tutor import problems

    with pytest.raises(UserError, match="20000 problems of add: there are not that many"):
        problems(20_000, tasks=("add",), split="test")


def test_every_checkpoint_says_what_it_is():
    for name in ("base", "sft", "grpo", "rl", "tools", "draft"):
        assert (weights() / name / "README.md").read_text().startswith("---\n"), name
    assert (weights() / "base" / "README.md").read_text() == ck.ABOUT_BASE
    assert (weights() / "draft" / "README.md").read_text() == ck.ABOUT_DRAFT


def test_the_draft_is_small_and_its_guesses_are_kept():
    folder = weights() / "draft"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 320e3
    same = [(weights() / name / "tokenizer.json").read_bytes() for name in ("draft", "sft")]
    assert same[0] == same[1]  # guesses are ids, so both must mean the same by them
    kept = by_task(read_card(folder).after)
    assert all(kept[f"kept, T={t}"]["low"] > 0.8 for t in ("0", "0.7"))


def test_a_draft_is_rebuilt_by_its_name(tmp_path, monkeypatch, capsys):
    "The whole way of `llmcourse checkpoints --names draft`, cut to a few replies and steps."
    monkeypatch.setattr(ck, "DRAFT_REPLIES", dict(n=4, seed=42))
    monkeypatch.setattr(ck, "DRAFT_RECIPE", dict(steps=20, batch_size=4, seed=0))
    monkeypatch.setattr(ck, "score_model", lambda name, n: [ck._row(str(name), "kept, T=0", [{"right": False}])])
    shutil.copytree(weights() / "sft", tmp_path / "sft")
    shutil.copytree(weights() / "base", tmp_path / "base")
    monkeypatch.setenv("LLMCOURSE_WEIGHTS", str(tmp_path))
    ck.rebuild(tmp_path, ["draft"])
    assert ck.verify(tmp_path) == ["base", "draft", "sft"]
    card = read_card(tmp_path / "draft")
    assert (card.method, card.model, card.hyperparameters["steps"]) == ("distil", "tutor/sft", 20)
    assert card.model_hash == read_card(weights() / "draft").model_hash
    assert "tutor/draft kept, T=0: 0/1" in capsys.readouterr().out
