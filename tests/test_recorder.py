"""What a run records, what `llmcourse explain` says about it, and whether the gallery agrees."""

import hashlib
import importlib.util
import json
import math
import shutil

import pytest
from conftest import ROOT

from llmcourse.card import read_card
from llmcourse.cli import main
from llmcourse.core import read_jsonl, set_seed
from llmcourse.explain import RULES, diagnose, ends, explanation
from llmcourse.flight import PANELS, flight, panels
from llmcourse.graders import how_right
from llmcourse.models import load, load_tokenizer
from llmcourse.pretraining import new_model
from llmcourse.probe import also_right
from llmcourse.recorder import Flight, exhibit, fixed_questions, read_flight, reply_logp
from llmcourse.rl import grpo, token_logps
from llmcourse.sft import sft
from llmcourse.questions import as_batch
from llmcourse.tutor import problems, to_chat

TINY = dict(
    max_steps=4,
    num_generations=4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_completion_length=6,
    learning_rate=1e-3,
    warmup_steps=1,
    probe_groups=0,
    bf16=False,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A model of a few thousand random weights, on disk."
    set_seed(0)
    place, tokenizer = tmp_path_factory.mktemp("model") / "tiny", load_tokenizer("tutor/base")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    new_model(tokenizer, num_key_value_heads=1, **sizes).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def asked():
    return [{k: r[k] for k in ("task", "question", "answer")} for r in problems(8, 3, ["add"])]


def chats():
    return [to_chat(p) for p in problems(8, 3, ["add"])]


def vowels(completions, **kw):
    return [sum(c in "aeiou" for c in said[-1]["content"]) / 10 for said in completions]


def run_of(name, *values, **others):
    "A flight of one curve, and of others by name."
    curves = {name: values} | others
    rows = [{"step": i + 1} | {k: v[i] for k, v in curves.items() if v[i] is not None} for i in range(len(values))]
    return Flight("runs/x", "grpo", rows)


# --- what is recorded


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    return grpo(asked(), tmp_path_factory.mktemp("runs") / "a", tiny, vowels, samples=2, seed=5, **TINY)


def test_a_run_records_what_it_says_and_how_far_it_has_moved(recorded):
    looks, log = read_jsonl(recorded / "samples.jsonl"), read_jsonl(recorded / "metrics.jsonl")
    assert [look["step"] for look in looks] == [0, 2, 4] and not any("samples" in row for row in log)
    assert len(looks[0]["samples"]) == 8 and {"prompt", "reply"} == set(looks[0]["samples"][0])
    drift = {row["step"]: row["drift"] for row in log if "drift" in row}
    assert list(drift) == [0, 2, 4] and drift[0] == 0 and drift[4] != 0
    assert [row["right"] for row in log if "reward" in row] == [0.0] * 4   # whatever is rewarded


def test_recording_changes_no_weight(recorded, tiny, tmp_path):
    other = grpo(asked(), tmp_path / "b", tiny, vowels, samples=0, seed=5, **TINY)
    assert not (other / "samples.jsonl").exists()
    assert read_card(other).files["model.safetensors"] == read_card(recorded).files["model.safetensors"]


def test_drift_is_what_the_start_thinks_of_its_replies_less_what_the_model_does(recorded, tiny):
    looks = read_jsonl(recorded / "samples.jsonl")
    tokenizer = load_tokenizer(tiny)
    prompts = [row["prompt"] for row in read_jsonl(recorded / "train.jsonl")]
    replies = [one["reply"].removesuffix("…") for one in looks[0]["samples"]]
    def mean(place):
        model = load(place, dtype="float32")[0]
        batch = as_batch(tokenizer, prompts, replies)
        batch["completion_mask"][:] = 1
        said = [len(tokenizer(reply, add_special_tokens=False)["input_ids"]) for reply in replies]
        logps = token_logps(model, batch)
        total = sum(row[:n].sum().item() for row, n in zip(logps, said, strict=True))
        assert reply_logp(model, tokenizer, prompts, replies) == pytest.approx(total / sum(said), abs=1e-4)
        return total / sum(said)
    found = read_flight(recorded).curve("drift")[-1][1]
    assert found == pytest.approx(mean(tiny) - mean(recorded), abs=1e-4)


def test_an_interrupted_run_keeps_its_first_look_and_can_be_explained(tiny, tmp_path, capsys):
    calls, options = [], dict(samples=1, seed=5, **TINY | dict(save_steps=2))

    def stops(completions, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return vowels(completions)

    with pytest.raises(KeyboardInterrupt):
        grpo(asked(), tmp_path / "a", tiny, stops, **options)
    found = read_flight(tmp_path / "a")   # the name that it will have
    assert not found.done and found.method == "grpo" and found.rows[-1]["step"] == 2
    assert "interrupted at step 2" in explanation(diagnose(tmp_path / "a.unfinished"))
    grpo(asked(), tmp_path / "a", tiny, stops, **options)
    assert [look["step"] for look in read_jsonl(tmp_path / "a/samples.jsonl")] == [0, 1, 2, 3, 4]


def test_sft_looks_only_if_it_is_told_to(tiny, tmp_path):
    sft(chats(), tmp_path / "a", tiny, max_steps=2)
    assert not (tmp_path / "a/samples.jsonl").exists()
    sft(chats(), tmp_path / "b", tiny, max_steps=2, samples=1)
    looks = read_jsonl(tmp_path / "b/samples.jsonl")
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert looks[0]["samples"][0]["prompt"] == chats()[0]["messages"][-2]["content"]


def test_questions_are_those_that_leave_room():
    tokenizer, turn = load_tokenizer("tutor/base"), lambda text: [{"role": "user", "content": text}]
    rows = [{"prompt": turn("2 + 2?")}, {"prompt": turn("2 + " * 200)}, {"messages": turn("nobody answers")}]
    rows += [{"messages": turn("Hello") + [{"role": "assistant", "content": "Hi"}]}]
    assert fixed_questions(tokenizer, rows, 60) == [turn("2 + 2?"), turn("Hello")]
    assert len(fixed_questions(tokenizer, rows * 10, 60, n=4)) <= 4 and fixed_questions(tokenizer, [], 60) == []


def test_right_is_judged_by_the_answer_and_not_by_the_reward():
    logged = {}
    reward = also_right(lambda completions, **columns: [9.0] * len(completions), how_right)
    said = [[{"role": "assistant", "content": text}] for text in ("so 4.\nAnswer: 4", "Answer: 5")]
    more = dict(answer=["4", "4"], task=["add", "add"], log_metric=logged.__setitem__)
    assert reward(completions=said, **more) == [9.0, 9.0] and logged == {"right": 0.5}
    logged.clear()
    reward(completions=said, rubric=["kind", "kind"], log_metric=logged.__setitem__)   # only a judge could tell
    reward(completions=said, log_metric=logged.__setitem__)                            # nobody could
    assert logged == {}


# --- reading it


def test_a_run_of_trl_itself_is_explained(tiny, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(tiny, dtype="float32")
    args = SFTConfig(str(tmp_path / "out"), max_steps=6, save_steps=6, logging_steps=1, use_cpu=True, bf16=False,
                     report_to="none", gradient_checkpointing=False, disable_tqdm=True)
    SFTTrainer(model, args=args, train_dataset=Dataset.from_list(chats()), processing_class=tokenizer).train()
    for place in (tmp_path / "out", tmp_path / "out/checkpoint-6", tmp_path / "out/checkpoint-6/trainer_state.json"):
        assert diagnose(place)["steps"] == 6


BAD = {
    "gone": "no such folder",
    "empty": "neither run.yaml nor trainer_state.json",
    "no log": "metrics.jsonl: missing",
    "empty log": "metrics.jsonl: empty",
    "no step": "no step was logged",
    "broken log": "metrics.jsonl:1: not JSON",
    "broken state": "trainer_state.json: not JSON",
    "other state": "no log_history",
    "early": "interrupted before its first checkpoint",
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_explained_is_one_line(fault, recorded, tmp_path, capsys):
    place = tmp_path / "run"
    if fault != "gone":
        place.mkdir()
    if fault in ("no log", "empty log", "no step", "broken log"):
        shutil.copy(recorded / "run.yaml", place)
        text = {"empty log": "", "no step": '{"train_runtime": 1.0}\n', "broken log": "{\n"}.get(fault)
        if text is not None:
            (place / "metrics.jsonl").write_text(text)
    if fault.endswith("state"):
        (place / "trainer_state.json").write_text("{" if fault == "broken state" else "{}")
    if fault == "early":
        shutil.copytree(recorded, tmp_path / "run.unfinished")
    assert main(["explain", str(place)]) == 2
    said = capsys.readouterr().err
    assert BAD[fault] in said and said.count("\n") == 1


# --- the rules, on curves made by hand

SPREAD = (0.5,) * 8
HEALTHY = dict(
    reward_std=SPREAD,
    right=(0.5, 0.5, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7),
    frac_reward_zero_std=(0.2,) * 8,
    entropy=(0.2, 0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.1),
    drift=(None, None, None, 0.01, None, None, None, 0.02),
    loss=(0.1,) * 8,
    **{"completions/mean_length": (40,) * 8, "completions/clipped_ratio": (0.05,) * 8},
)
ROSE = (0.5, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.8)
ILL = {
    "learning rate too high": dict(loss=(0.1,) * 7 + (math.nan,)),
    "replies cut off": {"completions/clipped_ratio": (0.6,) * 8},
    "reward is constant": dict(reward=(0.0,) * 8, reward_std=(0.0,) * 8, frac_reward_zero_std=(1.0,) * 8),
    "nothing to learn from": dict(reward=(0.9, 1.0) * 4, frac_reward_zero_std=(0.9,) * 8),
    "length blow-up": {"completions/mean_length": (40, 40, 50, 60, 70, 80, 90, 90), "right": (0.5,) * 8},
    "reward hacked": dict(reward=ROSE, right=(0.6, 0.6, 0.6, 0.6, 0.5, 0.4, 0.2, 0.2), reward_std=(0.2,) * 8),
    "entropy collapse": dict(entropy=(0.2, 0.2, 0.1, 0.1, 0.05, 0.01, 0.01, 0.01)),
    "KL blow-up": dict(drift=(None,) * 7 + (2.0,)),
    "overfitting": dict(eval_loss=(0.5, 0.4, 0.3, 0.2, 0.2, 0.25, 0.3, 0.4)),
    "learning rate too low": dict(drift=(None,) * 7 + (1e-7,), reward=(0.5, 0.6) * 4),
}


def test_every_rule_is_tried():
    assert {rule.name for rule in RULES} == set(ILL)
    assert all(rule.why and rule.source and rule.way and rule.unit for rule in RULES)


@pytest.mark.parametrize("name", [*ILL, "fine"])
def test_each_fault_is_named(name):
    curves = dict(reward=ROSE) | HEALTHY | ILL.get(name, {})
    said = diagnose(run_of("reward", *curves.pop("reward"), **curves))
    assert said["name"] == name and "\n" not in explanation(said) and (name == "fine") == (said["way"] == "")


def test_a_loss_alone_is_enough():
    falls = [2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6]
    assert diagnose(run_of("loss", *falls))["name"] == "fine"
    assert diagnose(run_of("loss", *falls[::-1]))["name"] == "learning rate too high"
    assert diagnose(run_of("loss", *[2.0] * 8))["name"] == "learning rate too low"
    assert "too few" in explanation(diagnose(run_of("loss", 2.0, 1.0)))


def test_ends_are_means_of_quarters():
    found = ends(run_of("loss", *range(12)), "loss")
    assert (found.first, found.last, found.begin, found.end) == (1, 10, "steps 1–3", "steps 10–12")
    assert ends(run_of("loss", 1, 2, 3), "loss") is None


# --- the picture and the command


def test_the_picture_has_a_panel_for_each_number_that_there_is(recorded):
    drawn = panels(read_flight(recorded))
    assert set(drawn) <= set(PANELS) and {"reward", "silent groups, share", "moved, nats a token"} <= set(drawn)
    fig = flight(recorded, "a", marks={"reward": 2})
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert [title for title in titles if title] == list(drawn)


def test_the_command(recorded, tmp_path, capsys):
    assert main(["explain", str(recorded), "--json", "--picture", str(recorded / "flight.svg")]) in (0, 1)
    said = json.loads(capsys.readouterr().out)
    assert said["method"] == "grpo" and said["steps"] == 4 and said["done"]
    assert (recorded / "flight.svg").read_bytes().startswith(b"<?xml")
    assert main(["explain", str(recorded), "--picture", "flight.pdf"]) == 2
    assert "a .png or a .svg" in capsys.readouterr().err


def test_preferences_are_judged_by_what_is_preferred():
    "The names that TRL's DPOTrainer logs."
    falls = dict(loss=(0.69, 0.69, 0.68, 0.67, 0.66, 0.66, 0.65, 0.65))
    rises = (0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9)
    assert diagnose(run_of("rewards/accuracies", *rises, **falls))["name"] == "fine"
    assert diagnose(run_of("rewards/accuracies", *[0.5] * 8, **falls))["name"] == "learning rate too low"
    assert {"margin of the chosen"} <= set(panels(run_of("rewards/margins", 0.0, 0.1)))


# --- the gallery

GALLERY = read_jsonl(ROOT / "data/gallery.jsonl")


def named(which: str, healthy: bool) -> tuple[int, int]:
    "How many are named right, of how many."
    rows = [row for row in GALLERY if row["set"] == which and (row["fault"] == "fine") == healthy]
    return sum(diagnose(exhibit(row))["name"] == row["fault"] for row in rows), len(rows)


def test_the_gallery_is_the_file_that_its_readme_names():
    raw = (ROOT / "data/gallery.jsonl").read_bytes()
    assert len(raw) < 1e6 and hashlib.sha256(raw).hexdigest() in (ROOT / "data/README.md").read_text(encoding="utf-8")


def test_the_gallery_is_made_by_its_benchmark():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "benchmarks/gallery.py")
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    wanted = {json.dumps([fault, which, how, seed, made.said(options)])
              for which, (settings, seeds) in made.SETS.items() for seed in seeds for fault, how, options in settings}
    there = [json.dumps([row[name] for name in ("fault", "set", "method", "seed", "settings")]) for row in GALLERY]
    assert len(set(there)) == len(there) and set(there) <= wanted
    names = {rule.name for rule in RULES} | {"fine"}
    assert {row["fault"] for row in GALLERY if row["set"] == "chosen"} == names
    assert {row["fault"] for row in GALLERY if row["set"] == "unseen"} == names


def test_runs_that_the_rules_have_not_seen_are_named():
    "The limits were chosen on the runs of the other two, and were not touched when these were looked at."
    assert named("chosen", healthy=False) == (17, 17) and named("chosen", healthy=True) == (6, 6)
    right, n = named("tried", healthy=False)
    assert n == 40 and right >= 39 and named("tried", healthy=True) == (12, 12)
    right, n = named("unseen", healthy=False)
    assert n == 40 and right >= 0.9 * n
    right, n = named("unseen", healthy=True)
    assert n == 20 and right >= 0.95 * n


def test_a_reward_that_falls_by_chance_is_not_a_rate_that_is_too_high():
    "Close to the start nothing has broken; far from it, a model that says one thing, and no better, has."
    fell = HEALTHY | dict(right=(0.5,) * 8, reward=(0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3))
    curves = dict(fell)
    assert diagnose(run_of("reward", *curves.pop("reward"), **curves))["name"] == "fine"
    curves = fell | dict(drift=(None,) * 7 + (2.0,), frac_reward_zero_std=(0.2,) * 5 + (1.0,) * 3,
                         reward=(0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2))  # fmt: skip
    assert diagnose(run_of("reward", *curves.pop("reward"), **curves))["name"] == "learning rate too high"


def test_entropy_that_falls_as_the_mistakes_do_is_learning():
    "And entropy that comes back was gone all the same."
    gone = dict(entropy=(0.2, 0.2, 0.15, 0.1, 0.08, 0.05, 0.05, 0.05), reward=ROSE)
    learned = HEALTHY | gone | dict(right=(0.5, 0.5, 0.6, 0.7, 0.8, 0.85, 0.88, 0.88))
    stuck = HEALTHY | gone | dict(right=(0.5,) * 8)
    back = stuck | dict(entropy=(0.2, 0.2, 0.1, 0.05, 0.01, 0.01, 0.1, 0.2))
    for curves, name in ((learned, "fine"), (stuck, "entropy collapse"), (back, "entropy collapse")):
        curves = dict(curves)
        assert diagnose(run_of("reward", *curves.pop("reward"), **curves))["name"] == name
