"""Nothing that exists is overwritten or removed, unless it is an earlier result of the same kind."""

import shutil
from pathlib import Path

import pytest

from llmcourse.cli import main
from llmcourse.card import Run, write_card
from llmcourse.core import UserError, model_path, write_aside, write_jsonl
from llmcourse.models import load_tokenizer


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    from llmcourse.export import to_gguf

    return to_gguf("tutor/sft", tmp_path_factory.mktemp("gguf") / "sft.gguf", verify=False)


def writers(gguf):
    "Every function that takes an `output`, as name → call."
    from llmcourse.export import modelfile, quantize, to_gguf
    from llmcourse.lora import merge

    chat = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}] * 2

    def train(out):
        from llmcourse.sft import sft

        return sft(chat, out, max_steps=1, per_device_train_batch_size=2, warmup_steps=0)

    return {
        "to_gguf": lambda out: to_gguf("tutor/sft", out, verify=False),
        "quantize": lambda out: quantize(gguf, out, "Q8_0"),
        "modelfile": lambda out: modelfile(gguf, load_tokenizer("tutor/sft"), out),
        "merge": lambda out: merge("tutor/sft", out),
        "sft": train,
        "write_jsonl": lambda out: write_jsonl(out, [{"a": 1}]),
    }


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["to_gguf", "quantize", "modelfile", "merge", "sft", "write_jsonl"])
def test_strangers_stay(name, gguf, tmp_path):
    "A folder with photos, a text, a link to each, and the model's own folder are refused and stay as they are."
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("a cat")
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "link.txt").symlink_to("notes.txt")
    (tmp_path / "link").symlink_to("photos")
    shutil.copytree(model_path("tutor/base"), tmp_path / "model")
    (tmp_path / "model/run.yaml").unlink()
    before = contents(tmp_path)
    for stranger in ("photos", "notes.txt", "link.txt", "link", "model"):
        with pytest.raises(UserError, match="Choose another output"):
            writers(gguf)[name](tmp_path / stranger)
        assert contents(tmp_path) == before, stranger


@pytest.mark.parametrize("name", ["to_gguf", "quantize", "modelfile", "merge", "sft", "write_jsonl"])
def test_an_earlier_result_is_replaced(name, gguf, tmp_path):
    for _ in range(2):
        writers(gguf)[name](tmp_path / "result")
    assert (tmp_path / "result").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_not_quantised_onto_itself(gguf, tmp_path):
    copy = shutil.copy(gguf, tmp_path / "a.gguf")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="Choose another output"):
        writers(copy)["quantize"](copy)
    assert contents(tmp_path) == before


def test_export_leaves_a_folder_with_the_gguf_name(tmp_path, capsys):
    place = tmp_path / "out/sft-Q8_0.gguf"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years of work")
    assert main(["export", "--model", "tutor/sft", "--output", str(tmp_path / "out")]) == 2
    assert (place / "thesis.txt").exists() and "not an earlier result" in capsys.readouterr().err


def test_predictions_do_not_replace_the_data(tmp_path, capsys):
    data = write_jsonl(
        tmp_path / "test.jsonl",
        [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}],
    )
    before = contents(tmp_path)
    assert main(["eval", "--data", str(data), "--output", str(data)]) == 2
    assert contents(tmp_path) == before


def test_a_card_is_not_written_over_another_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("services: {}")
    with pytest.raises(UserError, match="not an earlier result"):
        write_card(Run("sft"), tmp_path)


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(UserError):
        with write_aside(tmp_path / "x") as aside:
            aside.write_text("ours")
            (tmp_path / "x").write_text("theirs")
    assert contents(tmp_path) == {"x": b"theirs"}
