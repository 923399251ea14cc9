"""A method that is not in the repository gets a card, repeats, resumes, rehearsal, drill and a command by one entry."""

import json
import sys

import pytest
from conftest import ROOT

from llmcourse import cli, methods
from llmcourse.card import OURS, Run, read_card
from llmcourse.cli import main
from llmcourse.core import UserError, read_jsonl, weights
from llmcourse.drill import drill
from llmcourse.methods import METHODS, method, rerun
from llmcourse.rows import Row
from llmcourse.training import Method, Work, train, upstream
from llmcourse.tutor import problems, to_chat


# --- the entry: direct preference optimisation


def _pairs(rows: list[Row], ours: dict) -> list[dict]:
    for row in rows:
        if "chosen" not in row.data:
            raise UserError(f"{row.place}: a row of the form {row.form}, and DPO takes comparisons")
    return [{name: row.data[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def _defaults(dial: dict, parameters: int, adapter: bool) -> dict:
    return dict(
        learning_rate=5e-4,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        beta=0.1,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        save_steps=2,
    )


def _trainer(work: Work):
    from datasets import Dataset

    return upstream("DPOTrainer")(
        work.net,
        args=work.args,
        train_dataset=Dataset.from_list(work.data),
        processing_class=work.tokenizer,
        peft_config=work.ours["peft_config"],
    )


DPO = Method(
    name="dpo",
    about="Teach what people prefer.",
    example="llmcourse dpo --data pairs.jsonl",
    title="Taught by comparisons",
    config="DPOConfig",
    model="tutor/sft",
    take=_pairs,
    defaults=_defaults,
    trainer=_trainer,
)


# --- and what it gets for that


def pair(p: dict) -> dict:
    chat = to_chat(p)["messages"]
    return {
        "prompt": chat[:-1],
        "chosen": chat[-1:],
        "rejected": [{"role": "assistant", "content": f"Answer: {p['answer']}"}],
    }


PAIRS = [pair(p) for p in problems(6, 0, ("add", "sub"))]


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    monkeypatch.setitem(METHODS, "dpo", f"{__name__}.DPO")
    monkeypatch.setitem(cli.COMMANDS, "dpo", cli.training)  # made from the table when the command line starts


def hashes(run) -> dict:
    return {k: v for k, v in read_card(run).files.items() if k.endswith(".safetensors")}


def test_it_trains_and_its_card_repeats_it(tmp_path):
    run = train(method("dpo"), PAIRS, tmp_path / "run", seed=3)
    card = read_card(run)
    assert card.method == "dpo" and card.hyperparameters["beta"] == 0.1 and set(card.settings) <= set(OURS)
    assert read_jsonl(run / "train.jsonl") == PAIRS and "Taught by comparisons" in (run / "README.md").read_text()
    assert hashes(rerun(run, tmp_path / "again")) == hashes(run)


def test_the_command_line_has_it(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert main(["dpo", "--data", str(data), "--output", str(tmp_path / "run"), "--steps", "1", "--r", "4"]) == 0
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert main(["train", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "run") == hashes(tmp_path / "again")
    assert main(["dpo", "--data", str(ROOT / "data/chats.jsonl"), "--output", str(tmp_path / "no")]) == 2
    assert "chats.jsonl:1: a row of the form messages" in capsys.readouterr().err
    assert main(["dpo"]) == 2 and "no rows of its own" in capsys.readouterr().err


def test_names_and_numbers_are_looked_at_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("llmcourse.training.load_to_train", lambda *words: pytest.fail("a model was loaded"))
    for options, said in (
        ({"betta": 1}, "DPOConfig has no 'betta': did you mean 'beta'"),
        ({"learning_rate": 0}, "more than 0"),
    ):
        with pytest.raises(UserError, match=said):
            train(method("dpo"), PAIRS, tmp_path / "run", **options)


def test_its_schedule_is_rehearsed(tmp_path):
    with pytest.raises(UserError, match="schedule: the learning rate is 0"):
        train(method("dpo"), PAIRS, tmp_path / "run", max_steps=1, warmup_steps=1)
    assert not list(tmp_path.iterdir())


def test_it_survives_being_shot(tmp_path):
    shots = drill("dpo", tmp_path, kills=2, moments=1, rows=PAIRS, save_steps=1, model="tutor/sft")
    assert all(shot["same"] for shot in shots), shots


def test_an_entry_is_short():
    "What a newcomer writes: the lines between the two headings of this file."
    text = open(__file__, encoding="utf-8").read()
    entry = text.partition("# --- the entry")[2].partition("# --- and")[0]
    assert len([line for line in entry.splitlines()[1:] if line.strip()]) <= 40


def test_every_entry_of_the_table_is_whole():
    for name in METHODS:
        entry = method(name)
        assert entry.name == name and entry.about.endswith(".") and f"llmcourse {name}" in entry.example
        assert upstream(entry.config).__dataclass_fields__
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        method("gpro")


def test_a_card_from_before_settings_still_opens():
    run = read_card(weights() / "grpo")
    assert run.settings["reward_funcs"] == ["llmcourse.rl.exact_reward"] and not set(OURS) & set(run.hyperparameters)
    assert isinstance(run, Run) and methods.method(run.method).name == "grpo" and sys.modules["llmcourse.rl"]
