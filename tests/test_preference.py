"""Preferences: by hand and by TRL the same numbers, entries that are whole, and rows that are refused or found out."""

import itertools
import json
import math
import random
import re
import statistics

import datasets
import pytest
import torch
from conftest import ROOT

from llmcourse.card import read_card
from llmcourse.cli import main
from llmcourse.core import UserError, read_jsonl, scale as read_scale
from llmcourse.datacheck import check_data
from llmcourse.drill import drill
from llmcourse.intake import for_few
from llmcourse.manners import DECLINE, hint, hint_requests, is_decline, is_hint, manner_pairs, manner_thumbs, off_topic
from llmcourse.methods import method, rerun
from llmcourse.models import load
from llmcourse.pairs import correction_pairs, judged_pairs, pair_faults, pairs_from_thumbs
from llmcourse.preference import RELATIVES, best_of_n, bradley_terry, dpo_loss, prefer
from llmcourse.questions import as_batch
from llmcourse.rl import token_logps
from llmcourse.runthrough import run_through
from llmcourse.scorer import Scorer, load_scorer, with_score
from llmcourse.training import upstream

PAIRS = manner_pairs(3, 6)[:12]
THUMBS = manner_thumbs(3)[:12]
NAMES = ("reward-model", "dpo", "kto", "orpo", "cpo")


def rows_for(name):
    return THUMBS if name == "kto" else PAIRS


def hashes(run) -> dict:
    return {k: v for k, v in read_card(run).files.items() if k.endswith(".safetensors")}


# Each entry is whole.


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_and_its_card_repeats_it(name, tmp_path):
    run = prefer(rows_for(name), tmp_path / "run", method=name, seed=3, max_steps=2, per_device_train_batch_size=4)
    card = read_card(run)
    assert card.method == name and card.hyperparameters["max_steps"] == 2
    assert read_jsonl(run / "train.jsonl") == rows_for(name)
    assert [row for row in read_jsonl(run / "metrics.jsonl") if row.get("grad_norm", 0) > 0]
    assert hashes(rerun(run, tmp_path / "again")) == hashes(run)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_each_opens_again(name, tmp_path):
    from llmcourse.lora import lora_config

    how = dict(max_steps=1, warmup_steps=0, per_device_train_batch_size=4, peft_config=lora_config(r=4))
    run = prefer(rows_for(name), tmp_path / "run", method=name, **how)
    assert (run / "adapter_model.safetensors").is_file()
    if name == "reward-model":
        scorer = load_scorer(run)
        marks = scorer([row["prompt"] + row["chosen"] for row in PAIRS])
        assert len(set(marks)) > 6 and marks == scorer([row["prompt"] + row["chosen"] for row in PAIRS])
    else:
        load(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_survives_being_shot(name, tmp_path):
    shots = drill(name, tmp_path, kills=2, moments=1, rows=rows_for(name), save_steps=1, max_steps=3,
                  per_device_train_batch_size=4)  # fmt: skip
    assert all(shot["same"] for shot in shots), shots


@pytest.mark.parametrize("relative", sorted(set(RELATIVES) - set(NAMES)))
def test_a_relative_is_one_argument_away(relative, tmp_path):
    run = prefer(PAIRS, tmp_path / "run", method=relative, max_steps=1, per_device_train_batch_size=4, warmup_steps=0)
    said = read_card(run).hyperparameters["loss_type"]
    assert relative in (said if isinstance(said, str) else said[0])


def test_the_schedule_is_rehearsed(tmp_path):
    with pytest.raises(UserError, match="schedule: the learning rate is 0"):
        prefer(PAIRS, tmp_path / "run", max_steps=1, warmup_steps=1)
    assert not list(tmp_path.iterdir())


def test_the_command_line_has_them(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert main(["dpo", "--data", str(data), "--output", str(tmp_path / "run"), "--steps", "2", "--r", "4"]) == 0
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert main(["kto", "--data", str(data), "--output", str(tmp_path / "no")]) == 2
    assert "pairs.jsonl:1: a comparison" in capsys.readouterr().err
    assert main(["dpo", "--data", str(ROOT / "data/thumbs.jsonl"), "--output", str(tmp_path / "no")]) == 2
    assert "one reply with a thumb, and this method compares two" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_is_rehearsed(name):
    lines = []
    size = run_through(name, dict(rows=rows_for(name) * 2, output="runs/x", scale="t4", seed=1), say=lines.append)
    assert "the same weights, to the bit" in "\n".join(lines) and size["rows"] == 24
    assert ("gives marks" in "\n".join(lines)) == (name == "reward-model")


def test_a_batch_of_kto_is_never_one_row():
    for scale in ("cpu", "t4", "a100"):
        assert method("kto").defaults(read_scale(scale), 10**9, True)["per_device_train_batch_size"] >= 2
    assert for_few(dict(desirable_weight=1.0, per_device_train_batch_size=16), 6)["per_device_train_batch_size"] == 2


# By hand and by TRL.


def sums(net, words, side):
    batch = as_batch(words, [row["prompt"] for row in PAIRS[:4]], [row[side][0]["content"] for row in PAIRS[:4]])
    mask = batch["completion_mask"]
    return (token_logps(net, batch) * mask).sum(1), mask.sum(1)


def trl_loss(name, net, words, **settings):
    entry = method(name)
    config = dict(output_dir="unused", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                  per_device_train_batch_size=4)  # fmt: skip
    args = upstream(entry.config)(**config | settings)
    date = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    rows = datasets.Dataset.from_list([row | date for row in PAIRS[:4]])
    return upstream(f"{'DPO' if name == 'dpo' else 'Reward'}Trainer")(
        net, args=args, train_dataset=rows, processing_class=words)  # fmt: skip


def moved(net, by=0.02):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += by * p.std() * torch.randn_like(p)
    return net


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_by_hand_is_trls(loss_type, beta):
    start, words = load("tutor/sft", dtype="float32")
    net, _ = load("tutor/sft", dtype="float32")
    moved(net)
    trainer = trl_loss("dpo", net, words, loss_type=[loss_type], beta=beta)
    trainer.ref_model = start
    theirs = trainer.compute_loss(net, trainer.data_collator(list(trainer.train_dataset))).item()
    with torch.no_grad():
        (good, long), (bad, short) = sums(net, words, "chosen"), sums(net, words, "rejected")
        ref = [sums(start, words, side)[0] for side in ("chosen", "rejected")]
    ours = dpo_loss(good, bad, *ref, beta, loss_type, (long, short)).item()
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)


def test_both_begin_at_ln_2(tmp_path):
    for name, loss in (("dpo", dict(loss_type=["sigmoid"])), ("reward-model", {})):
        run = prefer(PAIRS, tmp_path / name, method=name, max_steps=2, per_device_train_batch_size=12, **loss)
        assert read_jsonl(run / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), name


def test_the_reference_is_the_start_and_not_its_base(tmp_path):
    "TRL would load the base by its name; `tutor/sft` is an adapter that was merged into it."
    run = prefer(PAIRS, tmp_path / "run", max_steps=1, warmup_steps=0, loss_type=["sigmoid"], learning_rate=1e-9)
    assert read_jsonl(run / "metrics.jsonl")[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_bradley_terry_is_trls_loss():
    net, words = load("tutor/sft", dtype="float32")
    marks = with_score(net, words)
    torch.manual_seed(1)
    torch.nn.init.normal_(marks.score.weight, std=0.05)
    trainer = trl_loss("reward-model", marks, words)
    theirs = trainer.compute_loss(marks, trainer.data_collator(list(trainer.train_dataset))).item()
    scorer = Scorer(marks, words, batch_size=3)
    good, bad = (torch.tensor(scorer([r["prompt"] + r[side] for r in PAIRS[:4]])) for side in ("chosen", "rejected"))
    assert bradley_terry(good, bad).item() == pytest.approx(theirs, abs=1e-5) and abs(theirs - math.log(2)) > 1e-3


def test_best_of_n_is_the_mean_over_all_draws():
    rng = random.Random(0)
    proxy, gold = [rng.random() for _ in range(8)], [float(rng.random() < 0.5) for _ in range(8)]
    for n in (1, 3, 8):
        draws = [max(zip((proxy[i] for i in some), (gold[i] for i in some)))
                 for some in itertools.combinations(range(8), n)]  # fmt: skip
        assert best_of_n(proxy, gold, n) == pytest.approx([statistics.fmean(d[k] for d in draws) for k in (0, 1)])
    with pytest.raises(UserError, match="n=9: there are 8 replies"):
        best_of_n(proxy, gold, 9)


# Rows: made, refused, found out.

CHAT = [{"role": "user", "content": "2+2?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("dpo", {"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "chosen and rejected are the same"),
        ("dpo", {"prompt": "2+2?", "completion": "4", "label": True}, "one reply with a thumb"),
        ("dpo", {"prompt": "2+2?", "completion": "4"}, "takes comparisons"),
        ("dpo", {"prompt": "2+2?", "chosen": "", "rejected": "5"}, "is empty"),
        ("dpo", {"prompt": "1 " * 400, "chosen": "4", "rejected": "5"}, "a prompt of .* tokens, max_length is 320"),
        ("dpo", {"prompt": "2+2?", "chosen": "4 " * 400, "rejected": "5"}, "with the chosen reply, max_length is 320"),
        ("orpo", {"prompt": "2+2?", "chosen": "4", "rejected": "5 " * 400}, "with the rejected reply"),
        ("reward-model", {"prompt": CHAT, "chosen": said("4"), "rejected": said("5"), "tools": [{"type": "function"}]},
         "has tools"),
        ("kto", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "a comparison"),
        ("kto", {"prompt": "2+2?", "completion": "4"}, "replies with a thumb"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_one_line(name, row, why, tmp_path):
    with pytest.raises(UserError, match=rf"(?s)^rows\[1\]: .*{why}") as e:
        prefer([rows_for(name)[0], row], tmp_path / "run", method=name)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_thumbs_that_are_all_alike(tmp_path):
    with pytest.raises(UserError, match="its thumb is like those of all 3 rows"):
        prefer([row | {"label": True} for row in THUMBS[:3]], tmp_path / "run", method="kto")


def test_implicit_prompts_and_texts_are_taken(tmp_path):
    rows = [{"chosen": CHAT + said("4"), "rejected": CHAT + said("5")},
            {"prompt": "2+3?", "chosen": "5", "rejected": "6"}]  # fmt: skip
    run = prefer(rows * 2, tmp_path / "run", max_steps=1, warmup_steps=0)
    assert [row["chosen"] for row in read_jsonl(run / "train.jsonl")][:2] == [said("4"), said("5")]


def test_a_reward_model_writes_nothing_and_a_writer_gives_no_marks(tmp_path):
    run = prefer(PAIRS, tmp_path / "run", method="reward-model", max_steps=1, warmup_steps=0)
    with pytest.raises(UserError, match="a reward model, which gives marks"):
        load(run)
    with pytest.raises(UserError, match="without a head that gives marks"):
        load_scorer("tutor/sft")
    scorer = load_scorer(run)
    scorer.net.config.vocab_size = 100
    with pytest.raises(UserError, match="a tokenizer of another model"):
        scorer([CHAT + said("4")])


def test_three_places_to_get_pairs_from():
    rated = (("4", 1), ("5", 0), ("6", 0), ("4", 0))
    thumbs = [dict(prompt=CHAT, completion=said(text), label=up) for text, up in rated]
    assert pairs_from_thumbs(thumbs) == [dict(prompt=CHAT, chosen=said("4"), rejected=said("5"))]
    assert pairs_from_thumbs(thumbs[:1] * 2 + thumbs[3:]) == []
    assert judged_pairs([CHAT, CHAT], [["5", "4"], ["4", "4"]], [[0, 1], [1, 1]]) == pairs_from_thumbs(thumbs)
    assert correction_pairs([CHAT] * 3, ["5", "4", "7"], ["4", "4 ", ""]) == pairs_from_thumbs(thumbs)


def pair(prompt, good, bad):
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": said(good), "rejected": said(bad)}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (pair("2+2?", "4", "4"), "are the same"),
        (pair("2+2?", "It is 4.", "it is  4."), "differ only in case or spacing"),
        (pair("2+2? The answer is 4.", "2+2=4\nAnswer: 4", "Answer: 22"), "gives the chosen answer away"),
        (pair("2+2? (Solution: 4)", "so 4", "so 5"), "gives the chosen answer away"),
        (pair("Say: the cat sat down.", "the cat sat down.", "No."), "gives the chosen answer away"),
        (pair("2+2?", "Answer: 4", "Answer: 5"), ""),
        (pair("Is the answer 5 or 4?", "It is 4", "It is 5"), ""),
        (pair("What is 40 plus 4?", "Answer: 44", "Answer: 4"), ""),
    ],
)
def test_what_a_pair_shows_by_itself(row, what):
    found = [text for _, text in pair_faults(row)]
    assert (found and what in found[0]) if what else not found


def test_the_doctor_finds_what_only_a_whole_file_shows(tmp_path):
    rows = [pair(f"{i}+1?", f"That makes {i + 1}.", f"{i}") for i in range(25)]
    def check(rows, **more):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(check_data(tmp_path / "x.jsonl", **more))
    assert "longer wins: in 100% of 25 pairs" in check(rows)
    even = rows[:12] + [pair(f"{i}+2?", f"{i + 2}", "I do not know.") for i in range(12)]
    assert "longer wins" not in check(even) and "contradicts" not in check(even)
    turned = pair("3+1?", "3", "That makes 4.")
    for purpose in ("preferences", "dpo", "reward-model"):
        assert "line 25: contradicts line 4" in check(even + [turned], purpose=purpose)
    thumbs = [dict(prompt=CHAT, completion=said(str(i)), label=True) for i in range(25)]
    assert "all 25 thumbs are the same" in check(thumbs)
    assert "contradicts line 1" in check(thumbs + [dict(thumbs[0], label=False)])


# The tutor's manners.


def test_requests_of_the_two_sides_share_nothing():
    train, test = ({r["prompt"][-1]["content"] for r in hint_requests(40, s, side) + off_topic(90, s, side)}
                   for s, side in ((1, "train"), (2, "test")))  # fmt: skip
    assert not train & test


def test_the_judges_tell_hints_from_help_and_refusals_from_sums():
    for row in hint_requests(30, 4):
        solved = f"{row['working']}\nAnswer: {row['answer']}"
        assert is_hint(hint(row), row) and not is_hint(solved, row) and not is_hint(row["working"], row)
        assert not is_hint(DECLINE, row) and not is_hint("", row) and not is_decline(hint(row))
    assert is_decline(DECLINE) and not is_decline("Ask me a sum.") and not is_decline("7. " + DECLINE)


def test_pairs_show_also_when_not_to():
    rows = manner_pairs(5, 30)
    bad = [row["rejected"][0]["content"] for row in rows]
    kept = [text for text in bad if text == DECLINE or re.fullmatch(r"\d+[+-]\d+\.", text)]
    assert 0.3 < len(kept) / len(rows) < 0.6 and all(not list(pair_faults(row)) for row in rows)
