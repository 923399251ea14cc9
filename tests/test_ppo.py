"""PPO by hand: each formula against a slow obvious one, faults that must not pass, and a run that leaves its folder."""

import inspect
import math
import statistics

import pytest
import torch
from rules import ROOT

from llmcourse.card import read_card
from llmcourse.core import UserError, read_jsonl, set_seed
from llmcourse.models import load, load_tokenizer
from llmcourse.ppo import (
    ADVANTAGES,
    credit,
    explained_variance,
    gae,
    improve,
    ppo_loss,
    rollout,
    sampled_tokens,
    token_rewards,
    token_values,
    value_loss,
    value_model,
    whiten,
)
from llmcourse.pporun import ppo
from llmcourse.pretraining import new_model
from llmcourse.questions import as_batch
from llmcourse.rl import advantages, exact_reward, grpo_loss, token_logps
from llmcourse.tutor import problems, to_chat

LENGTHS = [5, 3, 1, 4]


@pytest.fixture
def parts():
    "Rewards, values and a mask of four replies of different lengths; what is beyond an end is rubbish."
    draw = torch.Generator().manual_seed(3)
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in LENGTHS])
    rewards, values = torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)
    return rewards * mask, torch.where(mask > 0, values, 99.0), mask


def slow_gae(rewards, values, gamma, lam):
    "The definition: for one reply, the sum over all later surprises, each worth (γλ)^k."
    n = len(rewards)
    ahead = [*values[1:], 0.0]
    surprise = [rewards[t] + gamma * ahead[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * surprise[k] for k in range(t, n)) for t in range(n)]


# ---- generalised advantage estimation


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.5), (0.5, 1.0)])
def test_gae_is_its_definition(parts, gamma, lam):
    "Also after the end: a value beyond it is expected by nobody, though 99 is there."
    rewards, values, mask = parts
    found = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(LENGTHS):
        want = slow_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert found[i, :n].tolist() == pytest.approx(want, abs=1e-4)
        assert (found[i, n:] == 0).all()


def bootstraps_at_the_end(rewards, values, mask, gamma=1.0, lam=0.95):
    "A planted fault: at the end it goes on expecting what it expected last."
    return gae(rewards + gamma * values * last_of(mask), values, mask, gamma, lam)


def last_of(mask):
    return torch.nn.functional.one_hot(mask.sum(1).long() - 1, mask.shape[1])


def ignores_the_mask(rewards, values, mask, gamma=1.0, lam=0.95):
    return gae(rewards, values, torch.ones_like(mask), gamma, lam)


def forgets_gamma(rewards, values, mask, gamma=1.0, lam=0.95):
    return gae(rewards, values, mask, 1.0, lam)


@pytest.mark.parametrize("fault", [bootstraps_at_the_end, ignores_the_mask, forgets_gamma])
def test_planted_faults_are_not_gae(parts, fault):
    rewards, values, mask = parts
    want = [slow_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), 0.9, 0.95) for i, n in enumerate(LENGTHS)]
    found = fault(rewards, values, mask, 0.9, 0.95)
    assert any(found[i, :n].tolist() != pytest.approx(want[i], abs=1e-4) for i, n in enumerate(LENGTHS))


def test_monte_carlo_believes_what_was_paid(parts):
    rewards, values, mask = parts
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(gae(rewards, values, mask, lam=1.0), (to_go - values) * mask, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "rloo"])
def test_with_the_siblings_as_critic_it_is_the_group(kind):
    "λ = 1 and no value head: Dr. GRPO with the mean of all, RLOO with the mean of the others."
    scores = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5, 0.0, 0.0, 1.0])
    mask = torch.tensor([[1.0] * n + [0.0] * (6 - n) for n in (6, 2, 3, 1, 5, 6, 4, 2)])
    groups = scores.view(2, 4)
    mean = groups.mean(1, keepdim=True).expand(2, 4) if kind == "none" else (groups.sum(1, keepdim=True) - groups) / 3
    values = mean.reshape(-1, 1).expand_as(mask) * mask
    zero = torch.zeros_like(mask)
    found = gae(token_rewards(scores, zero, zero, mask), values, mask, lam=1.0)
    want = torch.tensor(advantages(scores.tolist(), 4, kind))[:, None] * mask
    assert torch.allclose(found, want, atol=1e-6)


# ---- the loss


@pytest.fixture
def moved():
    "Log-probabilities before and after a move that is large enough to be clipped, and scores of two groups of two."
    draw = torch.Generator().manual_seed(1)
    old = -torch.rand(4, 5, generator=draw)
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in LENGTHS])
    return old + 0.4 * torch.randn(4, 5, generator=draw), old, mask, [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["group", "none", "rloo"])
def test_without_a_critic_it_is_the_loss_of_chapter_09(moved, kind):
    now, old, mask, scores = moved
    now.requires_grad_()
    paid = token_rewards(torch.tensor(scores), old, old, mask)
    ours = ppo_loss(now, old, credit(kind, paid, 0 * old, mask, 2), mask)
    theirs = grpo_loss(now, old, advantages(scores, 2, kind), mask)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    grads = [torch.autograd.grad(loss, now)[0] for loss in (ours, theirs)]
    assert torch.allclose(*grads, atol=1e-7) and grads[0].abs().sum() > 0


def test_an_advantage_a_token_is_each_token_s_own(moved):
    "By hand, token by token."
    now, old, mask, _ = moved
    gains = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    terms = []
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            ratio, gain = math.exp(now[i, t] - old[i, t]), gains[i, t].item()
            terms.append(-min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain))
    assert grpo_loss(now, old, gains, mask).item() == pytest.approx(statistics.fmean(terms), abs=1e-5)


def test_a_clipped_value_has_no_gradient():
    "Beyond ±0.2 towards the return; one that has moved away from it keeps its own."
    values = torch.tensor([[0.1, 0.5, -0.5]], requires_grad=True)
    one = torch.ones(1, 3)
    loss = value_loss(values, 0 * one, one, one)
    loss.backward()
    assert loss.item() == pytest.approx((0.9**2 + 0.8**2 + 1.5**2) / 6)
    assert values.grad[0].tolist() == pytest.approx([-0.9 / 3, 0, -1.5 / 3])


def test_the_value_loss_counts_the_tokens_of_replies_only(parts):
    _, values, mask = parts
    assert value_loss(values, values, values, mask).item() == 0
    torn = torch.where(mask > 0, values, -1e6)
    assert value_loss(torn, torn, values + 1, mask).item() == pytest.approx(0.5, abs=1e-4)


def test_whitening_counts_the_tokens_of_replies_only(parts):
    _, values, mask = parts
    kept = whiten(values, mask)[mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6) and kept.std().item() == pytest.approx(1, abs=1e-5)
    assert (whiten(values, mask)[mask == 0] == 0).all()
    assert (whiten(0 * values, mask) == 0).all()  # all alike: no NaN


def test_explained_variance(parts):
    _, values, mask = parts
    assert explained_variance(values, values, mask) == pytest.approx(1)
    assert explained_variance(0 * values, values, mask) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-values, values, mask) == pytest.approx(-3, abs=1e-5)
    assert explained_variance(values, 0 * values, mask) == 0  # nothing to explain


# ---- rewards of tokens


def test_drift_is_paid_for(moved):
    "More probable than in the reference costs, less is paid, each token by itself; the score is at the last token."
    now, old, mask, scores = moved
    found = token_rewards(scores, now, old, mask, beta=0.5)
    for i, n in enumerate(LENGTHS):
        want = [-0.5 * (now[i, t] - old[i, t]).item() for t in range(n)]
        want[-1] += scores[i]
        assert found[i].tolist() == pytest.approx(want + [0.0] * (5 - n), abs=1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_no_advantage_beyond_the_end(parts, kind):
    rewards, values, mask = parts
    found = credit(kind, rewards, values, mask, 2)
    assert found.shape == mask.shape and (found[mask == 0] == 0).all() and found.abs().sum() > 0


def test_an_unknown_kind_in_one_line():
    one = torch.ones(2, 1)
    with pytest.raises(UserError, match="unknown kind of advantage 'grpo': .*there are gae, rloo"):
        credit("grpo", one, one, one, 2)


# ---- a critic, a rollout, a run, on a model of a few thousand weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    set_seed(0)
    place, tokenizer = tmp_path_factory.mktemp("model") / "tiny", load_tokenizer("tutor/base")
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    new_model(tokenizer, **size).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rows():
    asked = problems(6, 3, ["add"])
    return [{"prompt": to_chat(r, answered=False)["messages"], "answer": r["answer"]} for r in asked]


SHORT = dict(steps=2, questions=2, group=2, max_new_tokens=5)


def test_a_critic_begins_at_zero_and_shares_nothing(tiny, rows):
    model, tokenizer = load(tiny)
    critic, batch = value_model(model), as_batch(tokenizer, [rows[0]["prompt"]] * 2, ["47+38: so 85.", "Answer: 85"])
    assert (token_values(critic, batch) == 0).all()
    assert token_values(critic, batch).shape == token_logps(model, batch).shape
    was = token_logps(model, batch)
    with torch.no_grad():
        for p in critic.parameters():
            p += 0.1
    assert torch.equal(token_logps(model, batch), was)


def test_a_value_does_not_know_its_token(tiny, rows):
    "A change at one place moves later values and none up to it."
    model, tokenizer = load(tiny)
    critic, batch = value_model(model), as_batch(tokenizer, [rows[0]["prompt"]], ["47+38: ones 7+8=15, carry 1"])
    torch.nn.init.normal_(critic.lm_head.weight)
    with torch.no_grad():
        was = token_values(critic, batch)
        batch["completion_ids"][0, 4] += 1
        now = token_values(critic, batch)
    assert torch.allclose(was[0, :5], now[0, :5], atol=1e-6) and not torch.allclose(was[0, 5], now[0, 5], atol=1e-6)


def test_a_rollout_holds_what_was_sampled(tiny, rows):
    model, tokenizer = load(tiny)
    set_seed(1)
    seen = {}

    def reward(prompts, completions, answer):
        seen.update(n=len(prompts), answers=answer, texts=[c[-1]["content"] for c in completions])
        return [0.5, None]

    taken = rollout(model, None, model, tokenizer, rows[:2], reward, beta=0.1, max_new_tokens=6)
    assert seen["n"] == 2 and seen["answers"] == [r["answer"] for r in rows[:2]]
    assert taken["scores"].tolist() == [0.5, 0.0]  # None: no opinion
    assert (taken["drift"] == 0).all() and taken["rewards"].sum(1).tolist() == [0.5, 0.0]
    assert torch.allclose(taken["old"], token_logps(model, taken), atol=1e-5)


def likes_digits(completions, **columns):
    return [sum(c.isdigit() for c in reply[-1]["content"]) / 5 for reply in completions]


FAST = dict(questions=4, group=8, max_new_tokens=5, learning_rate=2e-2, critic_rate=1e-2)


@pytest.mark.parametrize("kind", [kind for kind in ADVANTAGES if kind != "raw"])
def test_a_reward_is_learned(tiny, rows, kind):
    "A model of random words is paid for digits, and writes them."
    model, tokenizer = load(tiny)
    set_seed(2)
    critic = value_model(model) if kind == "gae" else None
    log = improve(model, critic, tokenizer, rows, likes_digits, kind=kind, beta=0.0, steps=15, **FAST)
    assert log[-1]["reward"] > 1.5 > 0.7 > log[0]["reward"]


def test_a_penalty_holds_the_model(tiny, rows):
    "The same run with and without; the drift of the last rollout is a divergence, so it is above 0 but for chance."
    drift = {}
    for beta in (0.0, 5.0):
        model, tokenizer = load(tiny)
        set_seed(2)
        log = improve(model, value_model(model), tokenizer, rows, likes_digits, beta=beta, steps=15, **FAST)
        drift[beta] = log[-1]["kl"]
    assert drift[0.0] > 0.5 and drift[5.0] < drift[0.0] / 2


def test_the_end_of_a_reply_that_was_cut_is_not_learned():
    "Nobody sampled its dots and its end token; and a whole reply keeps its end."
    tokenizer = load_tokenizer("tutor/base")
    chats = [[{"role": "user", "content": "Hi"}]] * 3
    batch = sampled_tokens(tokenizer, chats, ["Answer: 44", "Answer: 44…", "Answer: 4…"])
    whole = len(tokenizer("Answer: 44", add_special_tokens=False)["input_ids"])
    assert batch["completion_mask"].sum(1).tolist()[:2] == [whole + 1, whole]
    assert batch["completion_ids"][0, whole] == batch["completion_ids"][1, whole] == tokenizer.eos_token_id
    assert torch.equal(batch["completion_ids"][0], batch["completion_ids"][1])


def test_a_run_leaves_its_folder(tiny, tmp_path):
    asked = problems(6, 3, ["add"])
    run = ppo(asked, tmp_path / "ppo", tiny, likes_digits, seed=7, **SHORT)
    card, log = read_card(run), read_jsonl(run / "metrics.jsonl")
    assert (card.method, card.seed, card.data) == ("ppo", 7, "train.jsonl") and card.hyperparameters["lam"] == 1.0
    assert {"reward", "kl", "explained", "tokens", "clipped", "cpu_seconds"} == set(log[0]) and len(log) == 2
    assert len(read_jsonl(run / "train.jsonl")) == 6 and "TRL" not in (run / "README.md").read_text()
    again = ppo(asked, tmp_path / "again", tiny, likes_digits, seed=7, **SHORT)
    weights = [torch.cat([p.flatten() for p in load(place)[0].parameters()]) for place in (run, again, tiny)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(lambda_=0.9), "unknown option of ppo 'lambda_'"),
        (dict(kind="grpo"), "unknown kind of advantage 'grpo'"),
        (dict(questions=7), "6 rows, but a rollout asks 7"),
        (dict(beta=-1), "beta=-1: has to be 0 or more"),
        (dict(reward=lambda completions, **columns: [math.nan] * len(completions)), "gave nan to the reply"),
    ],
)
def test_what_cannot_work_leaves_nothing(tiny, tmp_path, options, words):
    with pytest.raises(UserError, match=words) as e:
        ppo(problems(6, 3, ["add"]), tmp_path / "ppo", tiny, **SHORT | options)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_the_exact_reward_is_the_default():
    assert inspect.signature(ppo).parameters["reward"].default is exact_reward


# ---- the comparison that the chapter draws


def test_the_comparison_holds_each_kind_once_a_seed_at_equal_completions():
    start, *found = read_jsonl(ROOT / "data/ppo.jsonl")
    assert start["kind"] == "start" and len(start["solved"]) == start["n"] == 100
    assert sorted((r["kind"], r["seed"]) for r in found) == sorted(
        (kind, seed) for kind in ("mean", "rloo", "group", "gae") for seed in (42, 43, 44)
    )
    for row in found:
        assert len(row["solved"]) == row["n"] == 100 and row["completions"] == 256 and len(row["reward"]) == 8
        assert ("noise" in row) == (row["kind"] == "gae")
