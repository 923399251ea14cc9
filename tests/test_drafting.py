"""A draft changes no reply and no distribution, the formulas are the paper's, and a few steps of training teach it."""
import itertools
import json
from collections import Counter

import pytest
import torch
from rules import ROOT

from llmcourse import drafting, tutor
from llmcourse.core import read_jsonl
from llmcourse.models import encode, load, stop_ids
from llmcourse.pretraining import new_model


@pytest.fixture(scope="module")
def pair():
    (target, tokenizer), (draft, _) = load("tutor/sft"), load("tutor/draft")
    return target, draft, tokenizer


def prompts(tokenizer, n, seed=21):
    chats = [tutor.to_chat(p, answered=False)["messages"] for p in tutor.problems(n, seed, split="test")]
    return [encode(tokenizer, chat) for chat in chats]


def test_greedy_replies_are_the_same_with_and_without_a_draft(pair):
    "Two hundred problems, token for token; and most guesses are kept, so that drafts were really at work."
    target, draft, tokenizer = pair
    rows = drafting.own_replies(target, tokenizer, 66, 21, "test", tasks=("add", "sub", "story1"))
    rows += drafting.own_replies(target, tokenizer, 6, 21, "test", tasks=("story2", "story3"))
    assert len(rows) >= 205     # of 210; those that found no end are left out
    runs = []
    for prompt, reply in rows:
        readers = drafting.Reader(target), drafting.Reader(draft)
        said, passes = drafting.speculate(*readers, prompt, stop_ids(tokenizer))
        assert said == reply
        runs.append(passes)
    found = drafting.kept_share(runs)
    assert found["n"] > 3000 and found["correct"] / found["n"] > 0.8 and found["tokens"] > 3


@pytest.mark.parametrize("guesses", [1, 2, 5])
def test_any_number_of_guesses(pair, guesses):
    target, draft, tokenizer = pair
    for prompt in prompts(tokenizer, 1)[:2]:
        alone, one = drafting.speculate(drafting.Reader(target), None, prompt, stop_ids(tokenizer))
        readers = drafting.Reader(target), drafting.Reader(draft)
        said, passes = drafting.speculate(*readers, prompt, stop_ids(tokenizer), guesses)
        assert said == alone and len(passes) < len(one) and max(made for made, _ in passes) == guesses


def tables(seed):
    "Two models of four tokens that look at the last one only."
    both = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed)) / 2
    return [lambda text, n=1, table=table: table[text[-n:]] for table in both]


def chi_square(seed, temperature, n=4000):
    "Of the counts of the 64 texts of three tokens against their exact chances under the target."
    torch.manual_seed(seed)
    target, draft = tables(seed)
    one = drafting.chances(target(range(4), 4), temperature)
    texts = itertools.product(range(4), repeat=3)
    exact = {t: (one[0, t[0]] * one[t[0], t[1]] * one[t[1], t[2]]).item() for t in texts}
    texts = (drafting.speculate(target, draft, [0], [], 3, temperature, 3)[0] for _ in range(n))
    drawn = Counter(tuple(text[:3]) for text in texts)
    assert abs(sum(exact.values()) - 1) < 1e-9
    return sum((drawn[t] - n * p) ** 2 / (n * p) for t, p in exact.items())


LIMIT = 103.4     # 99.9 % of chi-squares with 63 degrees of freedom are below


def test_what_is_drawn_with_a_draft_is_what_the_target_draws():
    assert chi_square(0, 0.7) < LIMIT


def test_a_replacement_drawn_from_the_target_is_found_out(monkeypatch):
    "The usual mistake: after a refusal, draw from p instead of from what the draft gave too little."
    def wrong(p, new, q):
        for i, x in enumerate(new):
            if torch.rand(()) >= p[i][x] / q[i][x]: return new[:i] + [p[i].multinomial(1).item()]
        return new + [p[len(new)].multinomial(1).item()]
    monkeypatch.setattr(drafting, "checked", wrong)
    assert chi_square(0, 0.7) > LIMIT


def test_a_reply_ends_where_the_target_ends_it():
    "Token 3 ends a text: nothing follows it, and no guess is made behind it."
    torch.manual_seed(1)
    target, draft = tables(1)
    for _ in range(200):
        said, passes = drafting.speculate(target, draft, [0], [3], 3, 1.0, 8)
        assert 3 not in said[:-1] and (said[-1] == 3 or len(said) >= 8)
        assert all(kept <= made <= 3 for made, kept in passes)


def test_a_reader_forgets_what_was_taken_back(pair):
    target, _, tokenizer = pair
    reader, text = drafting.Reader(target), prompts(tokenizer, 1)[0]
    for other in (text, text[:9], text[:20] + text[:7], text, text):
        fresh = drafting.Reader(target)(other, 3)
        assert torch.allclose(reader(other, 3), fresh, atol=1e-3)


def test_the_formulas():
    assert drafting.tokens_a_pass(0.8, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))
    assert drafting.tokens_a_pass(1, 5) == 6 and drafting.tokens_a_pass(0, 5) == 1
    assert drafting.gain(0.9, 3, 0.1) == pytest.approx(3.439 / 1.3)
    assert drafting.gain(1, 3, 0, check=4) == 1     # checking four costs as much as making four: nothing to win


def test_the_share_that_is_kept():
    found = drafting.kept_share([[(3, 3), (3, 1)], [(3, 0), (1, 1)]])
    assert found["n"] == 10 and found["correct"] == 5 and found["alpha"] == 5 / 7 and found["tokens"] == 9 / 4
    assert found["low"] <= 0.5 <= found["high"]


def test_a_few_steps_teach_a_draft(pair):
    target, _, tokenizer = pair
    torch.manual_seed(0)
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    pupil = new_model(tokenizer, num_attention_heads=1, num_key_value_heads=1, **tiny)
    rows = drafting.own_replies(target, tokenizer, 8, seed=3)
    losses = drafting.distil(pupil, rows, tokenizer.pad_token_id, 40, 8, progress=False)
    assert len(losses) == 40 and losses[-1] < losses[0] - 1


def test_the_loss_looks_at_replies_only(pair):
    *_, tokenizer = pair
    rows = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9])]
    ids, on = drafting.laid_out(rows, tokenizer.pad_token_id)
    assert ids.roll(-1, 1)[on].tolist() == [8, 9, 6, 7, 8, 9]


def test_the_table_in_the_chapter_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import drafts
    rows = read_jsonl(ROOT / "data/drafts.jsonl")
    text = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/02_serve.ipynb").read_text())["cells"])
    lines = drafts.table(rows)
    assert len(lines) == 4 and all(line in text for line in lines)


def test_a_wider_body_says_the_same(pair, tmp_path, monkeypatch):
    "Zeros in the MLPs: every logit stays what it was, up to the order of sums."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import drafts
    monkeypatch.setattr(drafts, "to_gguf", lambda folder, path, kind: folder)
    wide, _ = load(drafts.widened(2, tmp_path))
    ids = torch.tensor([prompts(pair[2], 1)[0]])
    with torch.no_grad():
        assert torch.allclose(wide(ids).logits, pair[0](ids).logits, atol=1e-3)
    assert wide.config.intermediate_size == 2 * pair[0].config.intermediate_size
