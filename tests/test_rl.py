"""Chapter 09: rewards, advantages and losses equal TRL's; a run can be repeated; what cannot work is refused before it
starts."""

import json
import math
import random
import statistics

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from llmcourse.card import read_card
from llmcourse.core import UserError, read_jsonl, set_seed
from llmcourse.models import load, load_tokenizer
from llmcourse.probe import probe
from llmcourse.questions import as_batch, final_answer, problem_rows, reply_text
from llmcourse.rl import GRPO, LOSS_TYPES, RLOO, advantages, exact_reward, grpo, grpo_loss, rl_defaults, token_logps
from llmcourse.methods import rerun
from llmcourse.rows import read
from llmcourse.core import scale as read_scale
from llmcourse.pretraining import new_model
from llmcourse.tutor import is_right, problems, to_chat

TINY = dict(
    max_steps=2,
    num_generations=4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_completion_length=6,
    learning_rate=1e-3,
    probe_groups=2,
    bf16=False,
)
REPLIES = ["47+38: so 85. 85-29: so 56.\nAnswer: 56", "Answer: 5", "47+38: ones 7+8=15, carry 1", "so 56.\nAnswer: 56"]


def taken(rows, rewards):
    return problem_rows(read(rows, "train"), {"reward_funcs": rewards})


def vowels(completions, **columns):
    return [sum(c in "aeiou15" for c in reply_text(x)) / 7 for x in completions]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A model of a few thousand random weights, on disk."
    set_seed(0)
    place, tokenizer = tmp_path_factory.mktemp("model") / "tiny", load_tokenizer("tutor/base")
    new_model(
        tokenizer,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rows():
    return [{k: r[k] for k in ("task", "question", "answer")} for r in problems(8, 3, ["add"])]


@pytest.fixture(scope="module")
def parts(tiny):
    "A model, a tokenizer, a batch of four replies with their masks, and an older policy's log-probabilities."
    model, tokenizer = load(tiny)
    chats = [[{"role": "user", "content": "Hi there!"}]] * 4
    batch = as_batch(tokenizer, chats, REPLIES)
    with torch.no_grad():
        now = token_logps(model, batch)
    return model, tokenizer, batch, now, now + 0.3 * torch.randn(now.shape, generator=torch.Generator().manual_seed(1))


# ---- rewards


@pytest.mark.parametrize(
    "text,answer,reward",
    [
        ("so 85.\nAnswer: 85", "85", 1),
        ("Answer: 85", "85", 1),
        ("so 85.\nAnswer: 85\n", "85", 1),
        ("so 85.\nAnswer: 85", 85, 1),
        ("so 85.\nAnswer: 75", "85", 0),
        ("so 85.", "85", 0),
        ("so 85. Answer: 85", "85", 0),
        ("Answer: 85\nor 75", "85", 0),
        ("Answer: 85\nAnswer: 75", "85", 0),
        ("Answer: 850", "85", 0),
        ("Answer: 85.", "85", 0),
        ("Answer: 85 apples", "85", 0),
        ("Answer: ", "85", 0),
        ("", "85", 0),
        ("Answer: 85…", "85", 0),
        ("Answer: -3", "-3", 1),
        ("Answer: Paris", "Paris", 1),
    ],
)
def test_exact_reward(text, answer, reward):
    assert (
        exact_reward([text], [answer])
        == exact_reward([[{"role": "assistant", "content": text}]], [answer], task=["x"], prompts=["p"])
        == [reward]
    )


def test_exact_reward_is_the_grade_of_the_evals():
    rng, bits = random.Random(0), ["Answer: ", "85", "75", "\n", " ", "so", "…", "."]
    for _ in range(3000):
        text = "".join(rng.choices(bits, k=rng.randint(0, 6)))
        assert exact_reward([text], ["85"]) == [float(is_right(text, "85"))], repr(text)


def test_one_reward_each():
    with pytest.raises(ValueError):
        exact_reward(["Answer: 1"], ["1", "2"])
    assert exact_reward([], []) == [] and final_answer("Answer: 1\nAnswer: 2") == "2"


# ---- advantages


@pytest.mark.parametrize("kind", ["group", "none", "rloo"])
def test_advantages_sum_to_zero_in_each_group(kind):
    rng = random.Random(1)
    for _ in range(50):
        group, rewards = (g := rng.randint(2, 9)), [rng.random() for _ in range(3 * g)]
        out = advantages(rewards, group, kind)
        assert len(out) == len(rewards)
        for i in range(0, len(out), group):
            assert math.isclose(sum(out[i : i + group]), 0, abs_tol=1e-9)


def test_advantages_of_equal_rewards_are_zero():
    for kind in ("group", "none", "rloo"):
        assert advantages([1.0] * 4 + [0.0] * 4, 4, kind) == [0.0] * 8


def test_rloo_is_a_stretched_mean():
    rewards = [1.0, 0.0, 0.0, 0.3]
    assert all(
        math.isclose(a, 4 / 3 * b) for a, b in zip(advantages(rewards, 4, "rloo"), advantages(rewards, 4, "none"))
    )


@pytest.mark.parametrize("rewards,group", [([1, 0, 1], 2), ([], 2), ([1, 0], 1)])
def test_incomplete_groups_are_refused(rewards, group):
    with pytest.raises(UserError, match="whole groups"):
        advantages(rewards, group)


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="did you mean 'group'"):
        advantages([1, 0], 2, "groups")


# ---- the batch and its log-probabilities


def test_log_probabilities_do_not_feel_the_padding(parts):
    model, tokenizer, batch, now, _ = parts
    for i, reply in enumerate(REPLIES):
        alone = as_batch(tokenizer, [[{"role": "user", "content": "Hi there!"}]], [reply])
        n = alone["completion_ids"].shape[1]
        assert batch["completion_mask"][i].sum() == n
        assert torch.allclose(now[i, :n], token_logps(model, alone)[0], atol=1e-5)


def test_prompts_of_unequal_length(parts):
    model, tokenizer, *_ = parts
    chats = [[{"role": "user", "content": "Hi!"}], [{"role": "user", "content": "What is 12 plus 34? " * 3}]]
    both = as_batch(tokenizer, chats, ["Answer: 1", "Answer: 46"])
    assert (
        both["prompt_mask"][0, 0] == 0
        and both["prompt_mask"][:, -1].all()
        and (both["prompt_ids"] == tokenizer.bos_token_id).sum() == 2
    )
    alone = token_logps(model, as_batch(tokenizer, chats[:1], ["Answer: 1"]))[0]
    assert torch.allclose(token_logps(model, both)[0, : len(alone)], alone, atol=1e-5)


# ---- losses


def by_the_book(now, old, gains, mask, loss_type, epsilon=0.2, longest=160):
    "The objective, token by token, in plain Python."
    rows = []
    for i in range(len(now)):
        row = []
        for t in range(now.shape[1]):
            if not mask[i, t]:
                continue
            r = math.exp(float(now[i, t]) - float(old[i, t]))
            row.append(-min(r * gains[i], min(max(r, 1 - epsilon), 1 + epsilon) * gains[i]))
        rows.append(row)
    if loss_type == "grpo":
        return statistics.fmean(statistics.fmean(r) for r in rows)
    total = math.fsum(map(math.fsum, rows))
    return total / (len(rows) * longest if loss_type == "dr_grpo" else sum(map(len, rows)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_equals_the_book_and_trl(parts, tmp_path, loss_type):
    model, tokenizer, batch, now, old = parts
    gains, mask = advantages([1, 0, 0, 1], 4), batch["completion_mask"]
    ours = grpo_loss(now, old, gains, mask, loss_type).item()
    assert math.isclose(ours, by_the_book(now, old, gains, mask, loss_type), abs_tol=1e-5)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=160,
        loss_type=loss_type,
    )
    trainer = GRPOTrainer(
        model, exact_reward, args, Dataset.from_list([{"prompt": "Hi", "answer": "1"}]), processing_class=tokenizer
    )
    inputs = batch | {"advantages": torch.tensor(gains), "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    theirs = trainer.compute_loss(model.eval(), inputs)
    assert math.isclose(ours, theirs.item(), abs_tol=1e-5)


def test_gradient_equals_trl(parts, tmp_path):
    model, tokenizer, batch, now, old = parts
    gains, mask = advantages([1, 0, 0, 1], 4), batch["completion_mask"]
    weight = model.model.layers[0].mlp.up_proj.weight
    (ours,) = torch.autograd.grad(grpo_loss(token_logps(model, batch), old, gains, mask), weight)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
    )
    trainer = GRPOTrainer(
        model, exact_reward, args, Dataset.from_list([{"prompt": "Hi", "answer": "1"}]), processing_class=tokenizer
    )
    inputs = batch | {"advantages": torch.tensor(gains), "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    (theirs,) = torch.autograd.grad(trainer.compute_loss(model.eval(), inputs), weight)
    assert ours.abs().max() > 0 and torch.allclose(ours, theirs, atol=1e-6)


def test_advantages_equal_those_of_trl(tiny, tmp_path):
    """TRL is handed our rewards through a reward function that reads them from a list, for GRPO with and without
    scaling, and for RLOO."""
    model, tokenizer = load(tiny)
    rewards = [random.Random(2).random() for _ in range(8)]
    for config, trainer, extra, kind in (
        (GRPOConfig, GRPOTrainer, {}, "group"),
        (GRPOConfig, GRPOTrainer, {"scale_rewards": "none"}, "none"),
        (RLOOConfig, RLOOTrainer, {"beta": 0.0}, "rloo"),
    ):
        args = config(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=3,
            max_steps=1,
            learning_rate=0.0,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **extra,
        )
        t = trainer(
            model,
            lambda completions, **kw: rewards,
            args,
            Dataset.from_list([{"prompt": "Hi"}, {"prompt": "Ho"}]),
            processing_class=tokenizer,
        )
        t.train()
        assert torch.allclose(
            torch.tensor(list(t._logs["advantages"])), torch.tensor(advantages(rewards, 4, kind)), atol=1e-5
        ), kind


def test_first_loss_is_zero_but_its_gradient_is_not(parts):
    model, _, batch, now, _ = parts
    gains = advantages([1, 0, 0, 1], 4)
    logps = token_logps(model, batch)
    loss = grpo_loss(logps, logps.detach(), gains, batch["completion_mask"], "grpo")
    loss.backward()
    assert abs(loss.item()) < 1e-6 and max(p.grad.abs().max() for p in model.parameters()) > 1e-4
    model.zero_grad()


def test_a_clipped_token_has_no_gradient():
    logps = torch.tensor([[0.5], [0.1]], requires_grad=True)  # ratios e^0.5 > 1.2, e^0.1 < 1.2
    grpo_loss(logps, torch.zeros(2, 1), [1.0, 1.0], torch.ones(2, 1)).backward()
    assert logps.grad[0] == 0 and logps.grad[1] < 0


def test_unknown_loss_is_refused():
    with pytest.raises(UserError, match="unknown loss type 'ppo'"):
        grpo_loss(torch.zeros(1, 1), torch.zeros(1, 1), [1.0], torch.ones(1, 1), "ppo")


# ---- the run


@pytest.fixture(scope="module")
def run(tiny, rows, tmp_path_factory):
    return grpo(rows, tmp_path_factory.mktemp("runs") / "a", model=tiny, reward_funcs=vowels, seed=5, **TINY)


def test_run_folder(run, tiny):
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "train.jsonl",
        "metrics.jsonl",
        "run.yaml",
        "README.md",
    } <= {p.name for p in run.iterdir()}
    assert not list(run.glob("*.bin")) and not (run / "reference").exists()
    card = read_card(run)
    assert card.method == "grpo" and card.model == str(tiny) and card.settings["reward_funcs"] == [f"{__name__}.vowels"]
    assert card.before["probe"]["groups"] == 2 and card.hyperparameters["max_steps"] == 2
    log = [r for r in read_jsonl(run / "metrics.jsonl") if "reward" in r]
    assert len(log) == 2 and all("frac_reward_zero_std" in r for r in log)
    load(run)


def test_rerun_gives_the_same_weights(run, tmp_path):
    again = rerun(run, tmp_path / "again")
    assert read_card(again).files["model.safetensors"] == read_card(run).files["model.safetensors"]
    assert (again / "train.jsonl").read_text() == (run / "train.jsonl").read_text()


def test_another_seed_gives_other_weights(run, tiny, rows, tmp_path):
    other = grpo(rows, tmp_path / "b", model=tiny, reward_funcs=vowels, seed=6, **TINY)
    assert read_card(other).files["model.safetensors"] != read_card(run).files["model.safetensors"]


def test_an_interrupted_run_goes_on_and_ends_the_same(tiny, rows, tmp_path):
    calls, options = [], dict(model=tiny, seed=5, **TINY | dict(max_steps=4, save_steps=2, probe_groups=0))

    def stops(completions, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # two steps are saved, the third is lost
        return vowels(completions)

    with pytest.raises(KeyboardInterrupt):
        grpo(rows, tmp_path / "a", reward_funcs=stops, **options)
    again = grpo(rows, tmp_path / "a", reward_funcs=stops, **options)
    assert len(calls) == 3 + 2 and [p.name for p in tmp_path.iterdir()] == ["a"]
    straight = grpo(rows, tmp_path / "b", reward_funcs=stops, **options)
    assert read_card(again).files["model.safetensors"] == read_card(straight).files["model.safetensors"]


def test_rerun_refuses_changed_data_and_foreign_cards(run, tmp_path):
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "train.jsonl").write_text((copy / "train.jsonl").read_text().replace('"task": "add"', '"task": "sub"', 1))
    with pytest.raises(UserError, match="changed since the run"):
        rerun(copy, tmp_path / "x")
    (copy / "train.jsonl").unlink()
    with pytest.raises(UserError, match="rows of this run are gone"):
        rerun(copy, tmp_path / "x")
    (copy / "run.yaml").write_text("method: sft\n")
    with pytest.raises(UserError, match="cannot be repeated"):
        rerun(copy, tmp_path / "x")


def test_rerun_of_a_reward_that_cannot_be_imported(run, tmp_path):
    import shutil, yaml

    copy = shutil.copytree(run, tmp_path / "copy")
    card = yaml.safe_load((copy / "run.yaml").read_text())
    card["settings"]["reward_funcs"] = ["__main__.mine"]
    (copy / "run.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(UserError, match="cannot be imported"):
        rerun(copy, tmp_path / "x")
    assert (rerun(copy, tmp_path / "x", reward_funcs=[vowels]) / "run.yaml").is_file()


def test_rloo_lora_and_two_rewards(tiny, rows, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    out = grpo(
        rows,
        tmp_path / "rloo",
        model=tiny,
        reward_funcs=[vowels, exact_reward],
        method="rloo",
        peft_config=config,
        **TINY,
    )
    assert read_card(out).method == "rloo" and (out / "adapter_model.safetensors").is_file()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    load(out)


def test_kl_is_measured_against_the_start_and_not_its_base(tiny, rows, tmp_path):
    """An adapter as start: TRL would take its base as reference. With next to no learning rate the KL term must then
    be 0."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    start = grpo(rows, tmp_path / "adapter", model=tiny, reward_funcs=vowels, peft_config=config, **TINY)
    out = grpo(rows, tmp_path / "kl", model=start, reward_funcs=vowels, beta=0.1, **TINY | {"learning_rate": 1e-12})
    kl = [r["kl"] for r in read_jsonl(out / "metrics.jsonl") if "kl" in r]
    assert kl and max(map(abs, kl)) < 1e-6


# ---- what is refused


@pytest.mark.parametrize(
    "given,message",
    [
        (dict(learning_rat=1), "did you mean 'learning_rate'"),
        (dict(method="ppo"), "unknown method 'ppo'"),
        (dict(num_generations=3), "be a multiple of 3"),
        (dict(per_device_train_batch_size=400), "each step takes 100 different prompts"),
        (dict(scale="cp"), "did you mean 'cpu'"),
    ],
)
def test_settings_that_cannot_work(tiny, rows, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        grpo(rows, tmp_path / "no", model=tiny, reward_funcs=vowels, **TINY | given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad,message",
    [
        ([], "no rows"),
        ([{"question": "1+1?"}], r"rows\[0\]: no reference"),
        ([{"answer": "2"}], r"rows\[0\]"),
        (["text"], r"rows\[0\]"),
        ([{"question": "1+1?", "answer": "2"}, {"messages": [{"role": "assistant", "content": "2"}]}], r"rows\[1\]"),
        ([{"question": "1+1? " * 2000, "answer": "2"}] * 2, "room for"),
    ],
)
def test_rows_that_cannot_work(tiny, tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        grpo(bad, tmp_path / "no", model=tiny, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_rows_keep_what_rewards_need(tmp_path):
    chats = [to_chat(p) for p in problems(2, 1, ["add"])]
    want = [p["answer"] for p in problems(2, 1, ["add"])]
    assert [r["answer"] for r in taken(chats, [exact_reward])] == want
    own = [{"messages": c["messages"]} for c in chats]  # the answer is what the assistant's turn ends in
    assert [r["answer"] for r in taken(own, [exact_reward])] == want
    assert all(r["prompt"][-1]["role"] == "user" for r in taken(own, [exact_reward]))
    mixed = [{"question": "a", "answer": 1, "level": 2}, {"question": "b", "answer": "x", "level": "hard"}]
    assert taken(mixed, [exact_reward]) == [
        {"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in (("a", "1"), ("b", "x"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [chats[0], {"messages": chats[1]["messages"][:-1]}]))
    with pytest.raises(UserError, match="rows.jsonl:2: no 'answer'"):
        taken(path, [exact_reward])


def test_rows_of_other_forms(tmp_path):
    asked = lambda rows: [(r["prompt"][-1]["content"], r["answer"]) for r in taken(rows, [exact_reward])]
    assert asked([{"question": "How many?", "answer": "3 * 400 = 1,200\n#### 1,200"}]) == [
        ("How many?", "1200")
    ]  # GSM8K
    assert asked([{"prompt": "1+1?", "answer": 2}]) == [("1+1?", "2")]
    assert asked([{"instruction": "1+1?", "output": "ones 1+1=2\nAnswer: 2"}]) == [("1+1?", "2")]  # Alpaca
    assert asked([{"prompt": "1+1?", "completion": "Answer: 2"}]) == [("1+1?", "2")]
    (tmp_path / "rows.csv").write_text("question,answer\n1+1?,2\n2+2?,4\n")
    assert asked(tmp_path / "rows.csv") == [("1+1?", "2"), ("2+2?", "4")]


def test_a_reward_without_spread_is_refused_before_training(tiny, rows, tmp_path):
    for value, way in ((1.0, "harder"), (0.0, "easier")):
        with pytest.raises(UserError, match=f"silent.*{way}"):
            grpo(
                rows,
                tmp_path / "no",
                model=tiny,
                reward_funcs=lambda completions, value=value, **kw: [value] * len(completions),
                **TINY,
            )
    assert list(tmp_path.iterdir()) == []


def test_probe_counts(tiny, rows):
    model, tokenizer = load(tiny)
    ready = taken(rows, [vowels])

    def some(completions, prompts, **kw):
        return [float(i % 2) if p == prompts[0] else 1.0 for i, p in enumerate(prompts)]

    assert probe(model, tokenizer, ready, [some], groups=4, num_generations=2, max_new_tokens=2) == dict(
        groups=4, silent=3, reward=0.875, best=1.0
    )


def test_ctrl_c_leaves_nothing(tiny, rows, tmp_path):
    calls = []

    def stops(completions, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # the probe, a step, and then
        return vowels(completions)

    with pytest.raises(KeyboardInterrupt):
        grpo(rows, tmp_path / "no", model=tiny, reward_funcs=stops, **TINY)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_defaults_fill_64_replies_at_every_scale():
    for scale in ("cpu", "t4", "a100"):
        for lora in (True, False):
            for method in ("grpo", "rloo"):
                d = {"grpo": GRPO, "rloo": RLOO}[method].defaults(read_scale(scale), 10**9, lora)
                assert d["per_device_train_batch_size"] * d["gradient_accumulation_steps"] == 64
    assert (
        rl_defaults(read_scale("cpu"), 3e6)["learning_rate"] > 10 * rl_defaults(read_scale("cpu"), 1e9)["learning_rate"]
    )
    assert rl_defaults(read_scale("t4"), 1e9)["fp16"] and not rl_defaults(read_scale("t4"), 1e9)["bf16"]
