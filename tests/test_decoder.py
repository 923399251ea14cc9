"""Our decoder and our scoring say what the library says: tokens, chances, gradients, and whole steps of GRPO and RLOO.
What they were not made for goes to the library."""

import contextlib
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from llmcourse import decoder, scoring
from llmcourse.batches import complete, pad_rows
from llmcourse.configs import LLAMAS
from llmcourse.core import set_seed
from llmcourse.decoder import Cache, decoding, llama_inside, narrowed, next_logits, settings_for_decode
from llmcourse.lookalike import PUBLIC, lookalike
from llmcourse.models import encode, load, load_tokenizer, stop_ids
from llmcourse.pretraining import new_model
from llmcourse.questions import reply_text
from llmcourse.scoring import token_scores, without_waste
from llmcourse.tutor import problems

TOKENIZER = load_tokenizer("tutor/base")
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id


def tiny(seed=0, **sizes):
    "A model of a few thousand random weights, whose replies go on for long."
    set_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return new_model(TOKENIZER, **shape | dict(num_key_value_heads=2) | sizes).eval()


def adapter(net, **options):
    "A LoRA whose weights are not zero."
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(net, config).eval()


def batch(n=12, seed=0, longest=20):
    "Random prompts of unequal lengths, some of them equal."
    chance = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 900, (1 + i % longest,), generator=chance).tolist() for i in range(n)]
    return pad_rows([*rows, *rows[: n // 2]], PAD)


@contextlib.contextmanager
def ours_only(monkeypatch, times=1):
    "The block fails unless `decode` is called so many times."
    calls, plain = [], decoder.decode
    with monkeypatch.context() as m:
        m.setattr(decoder, "decode", lambda *a, **k: calls.append(1) or plain(*a, **k))
        yield
    assert len(calls) == times


def both(model, ids, mask, **how):
    "The library's tokens and ours, with the state that each leaves the random numbers in."
    found = []
    for block in (contextlib.nullcontext(), decoding(model)):
        torch.manual_seed(1)
        with block, torch.inference_mode():
            found.append(model.generate(input_ids=ids, attention_mask=mask, pad_token_id=PAD, **how))
        found.append(torch.get_rng_state())
    return found


def same(model, ids, mask, **how):
    theirs, their_state, ours, our_state = both(model, ids, mask, **how)
    return torch.equal(theirs, ours) and torch.equal(their_state, our_state)


# ---- which models


def test_the_tutor_is_known_with_and_without_its_adapter():
    for merge in (True, False):
        model, _ = load("tutor/sft", merge=merge)
        assert type(llama_inside(model)).__name__ == "LlamaForCausalLM"
    assert llama_inside(load("tutor/tools", merge=False)[0]) is not None


def changed(net, what):
    "A model with something that `decode` was not made for."
    if what == "16 bits":
        return net.to(torch.bfloat16)
    if what == "one matrix in 16 bits":
        net.lm_head.to(torch.bfloat16)
    if what == "hook":
        net.model.layers[1].register_forward_hook(lambda module, args, out: out)
    if what == "forward":
        net.model.layers[0].self_attn.forward = net.model.layers[0].self_attn.forward
    if what == "class":
        net.model.layers[0].mlp.up_proj.__class__ = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn"})
    if what == "quantised":
        net.is_quantized = True
    if what == "rope":
        net.config.rope_parameters["rope_type"] = "dynamic"
    if what == "attention":
        net.config._attn_implementation = "flex_attention"
    if what == "dropout":
        return adapter(net, lora_dropout=0.1).train()
    if what == "prompt tuning":
        return get_peft_model(net, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    if what == "alora":
        return adapter(net, alora_invocation_tokens=[5])
    return net


CHANGES = ["16 bits", "one matrix in 16 bits", "hook", "forward", "class", "quantised", "rope", "attention", "dropout",
           "prompt tuning", "alora"]


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_not_known_goes_to_the_library(what, monkeypatch):
    model = changed(tiny(tie_word_embeddings=what != "one matrix in 16 bits"), what)
    assert llama_inside(model) is None
    with decoding(model):
        assert "generate" not in vars(model)
    if what in ("16 bits", "hook", "quantised", "prompt tuning", "dropout"):
        with ours_only(monkeypatch, times=0):
            assert same(model, *batch(), max_new_tokens=3)


@pytest.mark.parametrize("name", ["Qwen2Config", "MistralConfig", "Gemma2Config"])
def test_other_architectures_go_to_the_library(name):
    import transformers

    config = getattr(transformers, name)(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4)
    assert llama_inside(transformers.AutoModelForCausalLM.from_config(config)) is None


def test_dropout_that_is_not_at_work_changes_nothing():
    assert llama_inside(adapter(tiny(), lora_dropout=0.1)) is not None
    assert llama_inside(adapter(tiny()).train()) is not None


@pytest.mark.parametrize("how", [dict(num_beams=2), dict(repetition_penalty=1.3), dict(min_length=5),
                                 dict(min_p=0.1, do_sample=True), dict(no_repeat_ngram_size=2),
                                 dict(num_return_sequences=2, do_sample=True), dict(suppress_tokens=[1, 2]),
                                 dict(return_dict_in_generate=True),
                                 dict(streamer=1), dict(max_new_tokens=None)], ids=str)
def test_other_settings_go_to_the_library(how):
    usual = dict(max_new_tokens=4, pad_token_id=PAD)
    assert settings_for_decode(tiny(), **usual) and settings_for_decode(tiny(), **usual | how) is None


def test_prompts_filled_up_on_the_right_or_without_a_mask_go_to_the_library(monkeypatch):
    net, (ids, mask) = tiny(), batch()
    with ours_only(monkeypatch, times=0):
        assert same(net, ids, mask.flip(1), max_new_tokens=3)
        assert same(net, ids[:1, -3:], None, max_new_tokens=3)


def test_the_block_leaves_the_model_as_it_was():
    net = tiny()
    with pytest.raises(ZeroDivisionError):
        with decoding(net), decoding(net):
            assert "generate" in vars(net)
            raise ZeroDivisionError
    assert "generate" not in vars(net)


# ---- the same numbers


SHAPES = [{}, dict(num_attention_heads=4, num_key_value_heads=4), dict(num_attention_heads=8, num_key_value_heads=1),
          dict(head_dim=16), dict(tie_word_embeddings=False), dict(attention_bias=True, mlp_bias=True),
          dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)), dict(hidden_act="gelu")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forward_pass_is_the_librarys(shape):
    net, (ids, mask) = tiny(**shape), batch()
    assert llama_inside(net) is net
    for layers in (net, adapter(tiny(**shape))):
        inside = llama_inside(layers)
        with torch.inference_mode():
            cache = Cache(inside, (mask == 0).sum(1), 30)
            first = next_logits(inside, cache, ids[:, :1])
            ours = next_logits(inside, cache, ids[:, 1:])
            places = (mask.cumsum(1) - 1).clamp(min=0)
            theirs = layers(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
        assert torch.allclose(ours, theirs, atol=1e-5) and first.shape == ours.shape


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_look_alikes_decode_the_same(name, tmp_path, monkeypatch):
    net, _ = load(lookalike(name, tmp_path / "small"))
    with ours_only(monkeypatch):
        assert same(net, *batch(), max_new_tokens=40, do_sample=False)
    assert same(net, *batch(), max_new_tokens=40, do_sample=True, top_k=0)
    assert len(PUBLIC) == len(LLAMAS) >= 3


@pytest.fixture(scope="module")
def asked():
    rows = [encode(TOKENIZER, [{"role": "user", "content": p["question"]}]) for p in problems(24, 4, split="test")]
    assert len(rows) == 120 and len({*map(len, rows)}) > 10
    return rows


@pytest.mark.parametrize("name, merge", [("tutor/sft", True), ("tutor/sft", False), ("tutor/tools", False)])
def test_the_tutor_says_the_same(name, merge, asked, monkeypatch):
    "All replies of 120 problems of unequal length, most of which end early."
    model, _ = load(name, merge=merge)
    rows = asked if merge else asked[::6]
    with ours_only(monkeypatch):
        assert same(model, *pad_rows(rows, PAD), max_new_tokens=160, do_sample=False, eos_token_id=stop_ids(TOKENIZER))


SAMPLED = [{}, dict(top_k=0), dict(temperature=0.7, top_k=0), dict(temperature=1.6, top_k=5), dict(top_p=0.8, top_k=0),
           dict(temperature=2.0, top_p=0.5, top_k=30)]


@pytest.mark.parametrize("how", SAMPLED, ids=str)
def test_with_the_same_seed_the_same_is_sampled(how, asked, monkeypatch):
    model, _ = load("tutor/sft")
    with ours_only(monkeypatch):
        assert same(model, *pad_rows(asked[:20] * 2, PAD), max_new_tokens=60, do_sample=True, **how)


def test_narrowed_is_what_transformers_does():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    logits[0] = 1.0                                 # all alike
    for temperature, top_k, top_p in [(0.5, 3, 0.9), (1.0, 0, 0.3), (2.0, 100, 0.999), (1.0, 1, 1.0)]:
        theirs = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
        theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
        assert torch.equal(narrowed(logits, temperature, top_k, top_p), theirs)


def surprise(counted, shares) -> float:
    "The p-value of a chi-square test, by Wilson and Hilferty's approximation; rare tokens are one class."
    n = counted.sum()
    often = shares * n >= 5
    expected = torch.cat([shares[often] * n, (shares[~often] * n).sum()[None]])
    found = torch.cat([counted[often], counted[~often].sum()[None]])
    kept = expected > 0
    if found[~kept].sum(): return 0.0           # what cannot be has been drawn
    square, free = ((found - expected)[kept] ** 2 / expected[kept]).sum().item(), int(kept.sum()) - 1
    z = ((square / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free))
    return math.erfc(z / math.sqrt(2)) / 2


@pytest.mark.parametrize("how", [dict(top_k=0), dict(temperature=1.5, top_k=30, top_p=0.9)], ids=str)
def test_tokens_are_drawn_as_often_as_they_should_be(how):
    "The first two tokens of 10 000 texts from nothing; the test sees a temperature that is a tenth off."
    model, _ = load("tutor/base")
    ids = torch.tensor([[TOKENIZER.bos_token_id]])
    rows = ids.expand(2500, -1)
    torch.manual_seed(3)
    sampled = dict(max_new_tokens=2, do_sample=True, pad_token_id=PAD, eos_token_id=EOS, **how)
    with decoding(model):
        drawn = torch.cat([model.generate(rows, attention_mask=rows * 0 + 1, **sampled)[:, -2:] for _ in range(4)])
    n = model.config.vocab_size
    counted = torch.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n).double()
    with torch.no_grad():
        one = model(ids).logits[:, -1]
        two = model(torch.cat([ids.expand(n, -1), torch.arange(n)[:, None]], 1)).logits[:, -1]

    def chances(**how):
        first, second = (narrowed(x, **how).double().softmax(-1) for x in (one, two))
        return (first.T * second).flatten()

    assert surprise(counted, chances(**how)) > 1e-3
    assert surprise(counted, chances(**how | dict(temperature=1.1 * how.get("temperature", 1.0)))) < 1e-6


def test_ends_at_once_and_one_token_only(monkeypatch):
    net, (ids, mask) = tiny(), batch()
    with torch.no_grad():
        first = both(net, ids, mask, max_new_tokens=1, do_sample=False)[0][:, -1]
    for ends, n in (([*set(first.tolist())], 9), ([first[0].item()], 9), ([EOS], 1), (int(first[1]), 4)):
        with ours_only(monkeypatch):
            assert same(net, ids, mask, max_new_tokens=n, do_sample=False, eos_token_id=ends)
    ended = both(net, ids, mask, max_new_tokens=9, do_sample=False, eos_token_id=[*set(first.tolist())])[2]
    assert ended.shape[1] == ids.shape[1] + 1


def test_many_ends_and_few_rows_left(monkeypatch):
    "With a third of the vocabulary as ends, most rows are dropped on the way."
    net, (ids, mask) = tiny(vocab_size=1024), batch(40)
    taken, plain = [], Cache.take
    monkeypatch.setattr(Cache, "take", lambda self, *a: taken.append(1) or plain(self, *a))
    how = dict(max_new_tokens=60, do_sample=True, top_k=0, temperature=3.0, eos_token_id=[*range(0, 1000, 30)])
    assert same(net, ids, mask, **how) and len(taken) > 4


@pytest.mark.parametrize("stop", ["\n", ", carry", "5"])
def test_stop_texts(stop, monkeypatch):
    model, _ = load("tutor/base")
    rows = [TOKENIZER(f"{p['question']}\nWorking:")["input_ids"] for p in problems(3, 1)]
    with ours_only(monkeypatch):
        ours = complete(model, TOKENIZER, rows, [EOS], 40, stop=stop)
    monkeypatch.setattr(decoder, "llama_inside", lambda model: None)
    assert ours == complete(model, TOKENIZER, rows, [EOS], 40, stop=stop)


# ---- scoring


def rectangle(seed=0):
    "Prompts filled up on the left, replies on the right, as from TRL; one reply is empty."
    ids, mask = batch(10, seed)
    chance = torch.Generator().manual_seed(seed)
    replies = torch.randint(0, 900, (len(ids), 7), generator=chance)
    long = torch.randint(1, 8, (len(ids), 1), generator=chance)
    long[3] = 0
    mixed = torch.randperm(len(ids), generator=chance)
    return torch.cat([ids, replies], 1)[mixed], torch.cat([mask, (torch.arange(7) < long).long()], 1)[mixed], 7


def trainer(cls, config, model, folder, **options):
    args = config(output_dir=str(folder), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
                  num_generations=4, per_device_train_batch_size=8, max_completion_length=12, max_steps=3,
                  logging_steps=1, learning_rate=1e-3, disable_tqdm=True, save_strategy="no", **options)
    rows = [{"prompt": [{"role": "user", "content": p["question"]}]} for p in problems(4, 3, ["add", "story2"])]
    return cls(model, vowels, args, Dataset.from_list(rows), processing_class=TOKENIZER)


def vowels(completions, **columns):
    return [sum(c in "aeiou15" for c in reply_text(x)) / 7 for x in completions]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_and_gradients_are_trls(shape, temperature, tmp_path):
    ids, mask, keep = rectangle()
    model = adapter(tiny(**shape)) if temperature != 1 else tiny(**shape)
    stock = trainer(GRPOTrainer, GRPOConfig, model, tmp_path, temperature=temperature)
    weigh = torch.randn(len(ids), keep, generator=torch.Generator().manual_seed(5))
    found = []
    for score in (stock._get_per_token_logps_and_entropies, None):
        model.zero_grad()
        if score: logps, entropies, _ = score(model, ids, mask, keep, compute_entropy=True)
        else: logps, entropies = token_scores(llama_inside(model), ids, mask, keep, temperature)
        (logps * weigh).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        found.append((logps.detach(), entropies.detach(), gradient))
    for theirs, ours in zip(*found):
        assert torch.allclose(theirs, ours, atol=1e-5, rtol=1e-4)
    assert found[0][2].abs().max() > 1e-2 and (found[1][0][mask[:, -keep:] == 0] == 0).all()


def logged(trainer) -> list[dict]:
    trainer.train()
    return [row for row in trainer.state.log_history if "reward" in row]


HOW = [(dict(beta=0.0), False), (dict(beta=0.0), True), (dict(beta=0.1), True),
       (dict(beta=0.0, gradient_accumulation_steps=2, num_iterations=2), False),
       (dict(beta=0.1, temperature=0.8, top_k=50), True)]


@pytest.mark.parametrize("cls, config", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("how, lora", HOW, ids=str)
def test_a_training_goes_the_same_way(cls, config, how, lora, tmp_path, monkeypatch):
    "Rewards, entropy, KL and weights of three steps, with the same random numbers; and it is ours that does the work."
    ends, calls = [], []
    plain, decode = scoring.token_scores, decoder.decode
    monkeypatch.setattr(scoring, "token_scores", lambda *a: calls.append("score") or plain(*a))
    monkeypatch.setattr(decoder, "decode", lambda *a, **k: calls.append("decode") or decode(*a, **k))
    for kind in (cls, without_waste(cls)):
        set_seed(2)
        model = adapter(tiny()) if lora else tiny()
        run = trainer(kind, config, model, tmp_path, seed=2, **how)
        log = logged(run)
        ends.append((log, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])))
        assert bool(calls) == (kind is not cls)
    assert {*calls} == {"score", "decode"}
    (their_log, theirs), (our_log, ours) = ends
    for name in ("reward", "entropy", "kl", "completions/mean_length", "grad_norm"):
        for a, b in zip(their_log, our_log, strict=True):
            assert math.isclose(a.get(name, 0), b.get(name, 0), rel_tol=1e-3, abs_tol=1e-6), name
    moved = adapter(tiny()) if lora else tiny()
    start = torch.cat([p.detach().flatten() for p in moved.parameters() if p.requires_grad])
    assert (theirs - ours).abs().max() < 1e-4 < 1e-3 < (theirs - start).abs().max()


@pytest.mark.parametrize("name, value", [("bf16", True), ("gradient_checkpointing", True), ("entropy_coef", 0.01)])
def test_a_training_with_other_settings_is_trls(name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "token_scores", None)
    model = tiny()
    rows = [{"prompt": p["question"]} for p in problems(4, 3, ["add"])]
    args = dict(bf16=False, gradient_checkpointing=False) | {name: value}
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", num_generations=4, max_steps=1,
                      per_device_train_batch_size=4, max_completion_length=4, save_strategy="no", **args)
    without_waste(GRPOTrainer)(model, vowels, args, Dataset.from_list(rows), processing_class=TOKENIZER).train()
