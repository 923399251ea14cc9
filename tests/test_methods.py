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
from llmcourse.tutor import problems


# --- the entry: more reading, which is continued pre-training on texts


def _texts(rows: list[Row], ours: dict) -> list[dict]:
    for row in rows:
        if row.form != "text":
            raise UserError(f"{row.place}: a row of the form {row.form}, and reading takes texts")
    return [{"text": row.data["messages"][-1]["content"]} for row in rows]


def _defaults(dial: dict, parameters: int, adapter: bool) -> dict:
    return dict(
        learning_rate=5e-4,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        max_length=64,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        save_steps=2,
    )


def _trainer(work: Work):
    from datasets import Dataset

    return upstream("SFTTrainer")(
        work.net,
        args=work.args,
        train_dataset=Dataset.from_list(work.data),
        processing_class=work.tokenizer,
        peft_config=work.ours["peft_config"],
    )


READ = Method(
    name="read",
    about="Read more texts.",
    example="llmcourse read --data texts.jsonl",
    title="A model that has read more",
    config="SFTConfig",
    model="tutor/base",
    take=_texts,
    defaults=_defaults,
    trainer=_trainer,
)


# --- and what it gets for that


TEXTS = [{"text": f"{p['question']}\nWorking: {p['working']}\n"} for p in problems(6, 0, ("add", "sub"))]


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    monkeypatch.setitem(METHODS, "read", f"{__name__}.READ")
    monkeypatch.setitem(cli.COMMANDS, "read", cli.training)  # made from the table when the command line starts


def hashes(run) -> dict:
    return {k: v for k, v in read_card(run).files.items() if k.endswith(".safetensors")}


def test_it_trains_and_its_card_repeats_it(tmp_path):
    run = train(method("read"), TEXTS, tmp_path / "run", seed=3)
    card = read_card(run)
    assert card.method == "read" and card.hyperparameters["max_length"] == 64 and set(card.settings) <= set(OURS)
    assert read_jsonl(run / "train.jsonl") == TEXTS and "A model that has read more" in (run / "README.md").read_text()
    assert hashes(rerun(run, tmp_path / "again")) == hashes(run)


def test_the_command_line_has_it(tmp_path, capsys):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    assert main(["read", "--data", str(data), "--output", str(tmp_path / "run"), "--steps", "1", "--r", "4"]) == 0
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert main(["train", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "run") == hashes(tmp_path / "again")
    assert main(["read", "--data", str(ROOT / "data/chats.jsonl"), "--output", str(tmp_path / "no")]) == 2
    assert "chats.jsonl:1: a row of the form messages" in capsys.readouterr().err
    assert main(["read"]) == 2 and "no rows of its own" in capsys.readouterr().err


def test_names_and_numbers_are_looked_at_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("llmcourse.training.load_to_train", lambda *words: pytest.fail("a model was loaded"))
    for options, said in (
        ({"max_lenght": 1}, "SFTConfig has no 'max_lenght': did you mean 'max_length'"),
        ({"learning_rate": 0}, "more than 0"),
    ):
        with pytest.raises(UserError, match=said):
            train(method("read"), TEXTS, tmp_path / "run", **options)


def test_its_schedule_is_rehearsed(tmp_path):
    with pytest.raises(UserError, match="schedule: the learning rate is 0"):
        train(method("read"), TEXTS, tmp_path / "run", max_steps=1, warmup_steps=1)
    assert not list(tmp_path.iterdir())


def test_it_survives_being_shot(tmp_path):
    shots = drill("read", tmp_path, kills=2, moments=1, rows=TEXTS, save_steps=1, model="tutor/base")
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
