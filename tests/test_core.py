"""Edges of core: files survive interrupts, cards are strict, the dial is layered."""

import json
import signal
import subprocess
import sys
import time

from pathlib import Path

import pytest

from llmcourse.card import Run, read_card, write_card
from llmcourse.core import UserError, file_hash, read_jsonl, scale, write_aside, write_jsonl


def test_own_settings_win_key_by_key(tmp_path):
    (tmp_path / "settings.ini").write_text("[cpu]\nbatch_size = 3\n[mine]\nmodel = x/y\n")
    (tmp_path / "deep").mkdir()
    assert scale("cpu", tmp_path / "deep")["batch_size"] == 3
    assert scale("cpu", tmp_path)["device"] == "cpu"
    assert scale("mine", tmp_path)["model"] == "x/y"
    assert scale("cpu", tmp_path, batch_size=9)["batch_size"] == 9


def test_broken_settings_are_named(tmp_path):
    (tmp_path / "settings.ini").write_text("[cpu\nx")
    with pytest.raises(UserError, match="settings.ini"):
        scale("cpu", tmp_path)


def test_write_aside_replaces_a_folder_whole(tmp_path):
    for content in ("one", "two"):
        with write_aside(tmp_path / "run", Path.is_dir) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "two"]


def test_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    code = (
        "import sys, time; from llmcourse.core import write_jsonl\n"
        "def rows():\n    yield {'a': 2}; print('half', flush=True); time.sleep(60); yield {'a': 3}\n"
        f"write_jsonl({str(path)!r}, rows())"
    )
    for sig in (signal.SIGINT, signal.SIGKILL):
        p = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a shell's background job ignores it
        p.stdout.readline()
        time.sleep(0.1)
        p.send_signal(sig)
        p.wait(10)
        assert read_jsonl(path) == [{"a": 1}]
        if sig == signal.SIGINT:
            assert [x.name for x in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "content,place",
    [(b"", "empty"), (b'{"a": 1}\n\xff\xfe', "not UTF-8"), (b'{"a": 1}\n"x"\n', ":2"), (b"\n\n{oops\n", ":3")],
)
def test_bad_jsonl(tmp_path, content, place):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=place):
        read_jsonl(tmp_path / "x.jsonl")


def test_bom_and_unicode_survive(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "ä\u2028b"}\n', encoding="utf-8-sig")
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": "ä\u2028b"}]


def test_cards_are_strict(tmp_path):
    write_card(Run("sft", seed=1), tmp_path)
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text() + "sead: 2\n")
    with pytest.raises(UserError, match="did you mean 'seed'"):
        read_card(tmp_path)
    (tmp_path / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        read_card(tmp_path / "run.yaml")


def test_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    one = file_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_hash(tmp_path) != one
    (tmp_path / "b").write_text(json.dumps(2))
    assert len({one, file_hash(tmp_path), file_hash(tmp_path / "b")}) == 3


def test_an_error_names_the_line_of_the_file_also_behind_blank_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"b": "\xff"}\n')
    with pytest.raises(UserError, match="chats.jsonl:3: byte 8 .*UTF-8"):
        read_jsonl(path)


def test_a_run_talks_on_stderr_also_where_a_kernel_was_imported(capsys):
    import ipykernel.iostream  # noqa: F401  as a plot or a widget may do

    from llmcourse.progress import tell

    tell("SFT: 3 rows")
    assert capsys.readouterr() == ("", "SFT: 3 rows\n")
