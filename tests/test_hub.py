"""Names on the Hub, against a stand-in of it on this machine: what is downloaded, and what is said when it is not."""

from pathlib import Path

import pytest
import torch
from hub import TOKEN

from llmcourse.core import UserError, model_path
from llmcourse.files import lines
from llmcourse.models import load

BASE = Path(model_path("tutor/base"))
ROOT = Path(__file__).parent.parent


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_model_is_downloaded_once(hub):
    name = hub.add("someone/tiny", BASE)
    net, tokenizer = load(name)
    assert same(net, load(BASE)[0]) and tokenizer.chat_template
    weights = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert len(weights) == 1
    load(name)
    again = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert again == weights


def test_weights_in_shards(hub, tmp_path):
    net, tokenizer = load(BASE)
    net.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same(load(hub.add("someone/shards", tmp_path / "shards"))[0], net)


def test_the_token_goes_to_the_hub_and_no_further(hub):
    name = hub.add("someone/gated", BASE, gated=True)
    hub.log_in(licence=True)
    load(name)
    tokens = {path.split("/")[1]: token for _, path, token in hub.asked}
    assert tokens["someone"] == TOKEN and tokens["cdn"] == ""


def test_rows_of_a_data_set(hub, tmp_path):
    (tmp_path / "rows").mkdir()
    text = (ROOT / "data/splits.jsonl").read_text()
    (tmp_path / "rows/train.jsonl").write_text(text)
    found = list(lines(hub.add("someone/rows", tmp_path / "rows", kind="datasets")))
    assert len(found) == len(text.splitlines())
    with pytest.raises(UserError, match="someone/none: neither a file here nor on the Hub"):
        list(lines("someone/none"))
