"""The pretend GPU finds the mistakes that a real one would, and computes what the CPU computes."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

from llmcourse.core import set_seed
from llmcourse.export import parity, to_gguf
from llmcourse.lora import lora_config
from llmcourse.models import Local, load
from llmcourse.pretend import on_card, pretend_gpu
from llmcourse.questions import as_batch
from llmcourse.rl import LOSS_TYPES, grpo, grpo_loss, token_logps
from llmcourse.sft import sft
from llmcourse.tutor import problems, to_chat


def card(*shape):
    return torch.ones(*shape, device="cuda")


def frozen_copy(x):
    "The mistake of a buffer that nobody registered: it stays behind when the module moves."
    layer = torch.nn.Linear(2, 2)
    layer.scale = torch.ones(2)
    layer.to("cuda")
    return layer(x) * layer.scale


MISTAKES = {
    "a mask made beside the model": lambda: card(2, 3) * torch.ones(2, 3),
    "a list of tensors": lambda: torch.cat([card(2), torch.ones(2)]),
    "a keyword argument": lambda: torch.where(card(2) > 0, card(2), other=torch.ones(2)),
    "ids that stayed on the CPU": lambda: torch.nn.functional.embedding(torch.tensor([0]), card(3, 2)),
    "labels that stayed on the CPU": lambda: torch.nn.functional.cross_entropy(card(2, 3), torch.tensor([0, 1])),
    "an index on the card into a CPU tensor": lambda: torch.ones(3)[torch.tensor([0], device="cuda")],
    "an assignment by index": lambda: card(3).__setitem__(torch.tensor([0, 1]), torch.ones(2)),
    "NumPy": lambda: card(2).numpy(),
    "NumPy, asked politely": lambda: __import__("numpy").asarray(card(2)),
    "a buffer that is not registered": lambda: frozen_copy(card(2)),
    "in place": lambda: card(2).add_(torch.ones(2)),
    "a CPU generator for numbers on the card": lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
    "a view of a CPU tensor": lambda: card(4) + torch.ones(2, 2).view(4),
    "a tensor that came back": lambda: card(2) + card(2).cpu(),
}
RIGHT = {
    "a number without dimensions": lambda: card(2) * torch.tensor(3.0),
    "a CPU index into a tensor on the card": lambda: card(3)[torch.tensor([0, 2])],
    "a slice filled from the CPU": lambda: card(3).__setitem__(slice(2), torch.zeros(2)),
    "copy_": lambda: card(2).copy_(torch.zeros(2)),
    "made where it belongs": lambda: card(2) + torch.tensor([1.0, 2.0], device=card(1).device),
    "made like it": lambda: card(2) + torch.ones_like(card(2)) + card(2).new_tensor([1.0, 2.0]),
    "moved": lambda: card(2) + torch.ones(2).to("cuda") + torch.ones(2).cuda() + torch.ones(2).to(card(1)),
    "brought back": lambda: torch.ones(2) + card(2).cpu() + card(2).to("cpu") + torch.tensor(card(2).tolist()),
    "NumPy of a copy": lambda: card(2).detach().cpu().numpy(),
    "a copied module": lambda: copy.deepcopy(torch.nn.Linear(2, 2).to("cuda"))(card(2)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match="device|numpy|indices"):
        MISTAKES[mistake]()


@pytest.mark.parametrize("right", RIGHT)
def test_right_code_passes(right):
    with pretend_gpu():
        RIGHT[right]()


def test_a_move_is_a_copy_and_the_place_is_told():
    with pretend_gpu():
        here = torch.zeros(2)
        there = here.to("cuda")
        there += 1
        assert here.tolist() == [0, 0] and there.tolist() == [1, 1]
        assert (there.device, there.is_cuda, here.is_cuda) == (torch.device("cuda:0"), True, False)
        assert there.to("cuda") is there and on_card(there.view(1, 2)) and not on_card(there.cpu())
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert not torch.cuda.is_available() and torch.ones(2).device.type == "cpu"


def stepped(device):
    "A reply, and the weights after two steps of AdamW."
    set_seed(1)
    net, tokenizer = load("tutor/base")
    net.to(device)
    ids = torch.tensor([tokenizer("What is 4 plus 3?")["input_ids"]], device=device)
    reply = Local(net, tokenizer, max_new_tokens=8)([{"role": "user", "content": "What is 4 plus 3?"}])
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-3)
    for _ in range(2):
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return reply, [p.detach().cpu() for p in net.parameters()]


def test_the_result_is_that_of_the_cpu():
    reply, weights = stepped("cpu")
    with pretend_gpu():
        its_reply, its_weights = stepped("cuda")
    assert its_reply == reply and all(torch.equal(a, b) for a, b in zip(weights, its_weights, strict=True))


# What the package does on a card: each of these was wrong, or could have been.


@pytest.fixture
def t4(tmp_path, monkeypatch):
    "The tutor at scale t4, on the pretend GPU."
    (tmp_path / "settings.ini").write_text("[t4]\nmodel = tutor/base\n[a100]\nmodel = tutor/base\n")
    monkeypatch.chdir(tmp_path)
    with pretend_gpu():
        yield tmp_path


def test_losses_of_rl(t4):
    net, tokenizer = load("tutor/base", "a100")
    chats = [to_chat(p, answered=False)["messages"] for p in problems(2, 1, ["add"])]
    batch = as_batch(tokenizer, chats, ["so 3.", "so 4."])
    old = token_logps(net, batch).detach()
    for kind in LOSS_TYPES:
        loss = grpo_loss(token_logps(net, batch), old, [1.0, -1.0], batch["completion_mask"], kind)
        loss.backward()
        assert on_card(loss)


def test_parity_with_a_model_on_the_card(t4):
    net, tokenizer = load("tutor/base", "a100", dtype="float32")
    found = parity(to_gguf("tutor/base", Path("base.gguf")), net, tokenizer, ["What is 1 + 1?"], 4)
    assert found["same"] == 1 and found["gap"] < 1e-3


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float16")
ROWS = [to_chat(p) for p in problems(8, 1, ["add", "sub"])]
WAYS = {"full": dict, "lora": lambda: dict(peft_config=lora_config()),
        "qlora": lambda: dict(peft_config=lora_config(), quantization_config=NF4)}  # fmt: skip


def test_a_base_saved_in_4_bits_goes_where_the_scale_says(t4):
    "transformers would take the card whenever there is one."
    net, tokenizer = load("tutor/base", quantization_config=NF4)
    for part in (net, tokenizer):
        part.save_pretrained("base4")
    assert load("base4")[0].device.type == "cpu" and load("base4", "a100")[0].device.type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", ["t4", "a100"])
def test_a_training_on_the_card(t4, scale, way):
    "A T4 has no bfloat16; TRL makes QLoRA's adapter of it all the same, and its gradients could not be scaled."
    run = sft(ROWS, "runs/x", scale=scale, max_steps=2, per_device_train_batch_size=2, **WAYS[way]())
    net, tokenizer = load(run, scale, merge=way != "qlora")
    assert net.device.type == "cuda"
    Local(net, tokenizer, max_new_tokens=4)([{"role": "user", "content": "1 + 1?"}])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora"])
def test_reinforcement_on_the_card(t4, way):
    rows = [{k: r[k] for k in ("task", "question", "answer")} for r in problems(8, 1, ["add", "sub"])]
    few = dict(max_steps=2, warmup_steps=0, max_completion_length=8, per_device_train_batch_size=8)
    few |= dict(gradient_accumulation_steps=1, probe_groups=0)
    assert grpo(rows, "runs/x", scale="t4", **few, **WAYS[way]()).is_dir()
