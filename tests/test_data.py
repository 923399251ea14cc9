"""Rows in every form and back, files with planted faults, templates as transformers draws them, bounded memory."""

import copy
import csv
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from jinja2 import TemplateError
from hypothesis import HealthCheck, given, settings, strategies as st

from llmcourse import rows as reader
from llmcourse.copies import NearDuplicates
from llmcourse.core import UserError
from llmcourse.data import tokenize
from llmcourse.datacheck import check_data
from llmcourse.faults import text_faults, turn_faults
from llmcourse.files import LONGEST, lines
from llmcourse.forms import FORMATS, canonical, detect
from llmcourse.forms import from_messages, from_preference, to_messages, to_preference, to_unpaired
from llmcourse.labels import end_ids
from llmcourse.models import load_tokenizer
from llmcourse.rows import conversations, side
from llmcourse.synthesis import synthesize, to_pairs
from llmcourse.templates import GALLERY, dress
from llmcourse.tutor import problems, to_chat
from llmcourse.xray import xray, xray_file

many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
user, said, system = (
    (lambda t: {"role": "user", "content": t}),
    (lambda t: {"role": "assistant", "content": t}),
    (lambda t: {"role": "system", "content": t}),
)
CHAT = [user("What is 2+2?"), said("4")]


def read(source, take="all", **options):
    return [row.data for row in reader.read(source, take, **options)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tutor/base")


def jsonl(path: Path, *rows) -> Path:
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return path


def said_of(report) -> str:
    return "\n".join(f"{level} {place} {what}" for level, place, what in report.found)


def check(path, *rows, **options):
    return check_data(jsonl(path, *rows) if rows else path, tokens_per_second=1000, **options)


# --- forms and back

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
plain = text.filter(lambda t: "<|im_" not in t)
extras = st.fixed_dictionaries(
    {},
    optional={
        "split": st.sampled_from(["train", "test"]),
        "source": text,
        "score": st.floats(0, 5),
        "id": st.integers(),
    },
)
weight = st.fixed_dictionaries({}, optional={"weight": st.sampled_from([0, 1]), "name": text})
calls = st.just([{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}])
turn = st.builds(
    lambda role, content, more, tools: (
        {"role": role, "content": content}
        | (more if role == "assistant" else {})
        | ({"tool_calls": tools} if role == "assistant" and tools else {})
    ),
    st.sampled_from(["user", "assistant", "tool", "system"]),
    text,
    weight,
    st.none() | calls,
)
chat = st.builds(lambda m, e: {"messages": m, **e}, st.lists(turn, min_size=1, max_size=6), extras)
once = st.builds(
    lambda s, q, a, e: {"messages": [*([system(s)] if s else []), user(q), said(a)], **e}, text, plain, plain, extras
)


@many
@given(chat, st.sampled_from(["messages", "sharegpt"]))
def test_any_chat_goes_there_and_back(row, form):
    out = from_messages(copy.deepcopy(row), form)
    assert detect(out) == form and to_messages(out) == row
    assert to_messages(json.loads(json.dumps(out))) == row


@many
@given(once, st.sampled_from(["alpaca", "dolly", "prompt-completion", "chatml"]))
def test_one_question_goes_there_and_back(row, form):
    out = from_messages(row, form)
    assert detect(out) == form and to_messages(out) == row
    assert from_messages(to_messages(out), form) == out


@many
@given(plain, extras)
def test_plain_text_goes_there_and_back(t, more):
    row = {"messages": [said(t)], **more}
    assert to_messages(from_messages(row, "text")) == row


@many
@given(chat, st.sampled_from(FORMATS))
def test_back_without_loss_or_not_at_all(row, form):
    try:
        out = from_messages(row, form)
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert to_messages(out) == row


@many
@given(
    st.lists(st.builds(user, text) | st.builds(said, text), min_size=1, max_size=3),
    text,
    text,
    extras,
    st.sampled_from(["preference", "implicit", "openai-dpo"]),
)
def test_comparisons_go_there_and_back(prompt, a, b, more, form):
    row = {"prompt": [*prompt, user("so?")], "chosen": [said("x" + a)], "rejected": [said("y" + b)], **more}
    assert to_preference(from_preference(row, form)) == row


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "conversations",
                    "role",
                    "content",
                    "from",
                    "value",
                    "prompt",
                    "completion",
                    "label",
                    "chosen",
                    "rejected",
                    "input",
                    "instruction",
                    "output",
                    "preferred_output",
                    "non_preferred_output",
                    "completions",
                    "text",
                    "history",
                    "system",
                    "response",
                    "score",
                ]
            ),
            x,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@many
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "messages",
                "conversations",
                "prompt",
                "completion",
                "label",
                "chosen",
                "rejected",
                "instruction",
                "input",
                "output",
                "response",
                "text",
                "history",
                "system",
                "completions",
                "preferred_output",
                "non_preferred_output",
            ]
        ),
        JUNK,
        max_size=5,
    )
)
def test_any_junk_is_a_row_or_one_line(row):
    try:
        out = canonical(row, "data.jsonl:3")
    except UserError as e:
        assert str(e).startswith("data.jsonl:3") and "\n" not in str(e).strip()
        return
    for c in conversations(out):
        assert all(isinstance(m["content"], str) and m["role"] in ("system", "user", "assistant", "tool") for m in c)
        list(turn_faults(c))


@pytest.mark.parametrize(
    "row,want",
    [
        (
            {
                "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
                "source": "x",
                "score": 5.2,
            },
            [user("2+2?"), said("4")],
        ),  # FineTome
        (
            {"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
            [user("2+2?"), said("4")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
                "system": "Be brief.",
            },
            [system("Be brief."), user("2+2?"), said("4")],
        ),
        ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, [user("Add.\n\n2 and 2"), said("4")]),
        (
            {"instruction": "Add.", "context": "", "response": "4", "category": "open_qa"},
            [user("Add."), said("4")],
        ),  # Dolly
        (
            {"instruction": "3+3?", "input": "", "output": "6", "history": [["2+2?", "4"]]},
            [user("2+2?"), said("4"), user("3+3?"), said("6")],
        ),
        ({"prompt": "2+2?", "completion": "4"}, [user("2+2?"), said("4")]),
        ({"prompt": [user("2+2?")], "completion": [said("4")]}, [user("2+2?"), said("4")]),
        ({"question": "2+2?", "answer": "4"}, [user("2+2?"), said("4")]),
        ({"text": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"}, [user("2+2?"), said("4")]),
        ("2+2 is 4", [said("2+2 is 4")]),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                    said("4"),
                ]
            },
            [system("Be brief."), user("2+2?"), said("4")],
        ),
        (
            {"messages": [user("Rain?"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            [user("Rain?"), {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
        ),
    ],
)
def test_known_forms(row, want):
    assert to_messages(row)["messages"] == want


def test_what_is_beside_the_messages_stays():
    row = {
        "messages": [user("hi"), said("no") | {"weight": 0}, user("hi"), said("yes") | {"weight": 1}],
        "tools": [{"type": "function"}],
        "split": "test",
    }
    assert to_messages(row) == row


@pytest.mark.parametrize(
    "row,words",
    [
        ({"mesages": []}, "'mesages' may be 'messages'"),
        ({}, "columns (none)"),
        ({"messages": "hi"}, "not a list of turns"),
        ({"messages": ["hi"]}, "turn 0 is a str"),
        ({"messages": [{"role": "asistant", "content": ""}]}, "role 'asistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "Images"),
        ({"text": "<|im_start|>user\nhi"}, "outside of the ChatML turns"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "use to_preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "use to_unpaired"),
        ([1], "a list, not an object"),
    ],
)
def test_unreadable_rows_say_why(row, words):
    with pytest.raises(UserError, match="data.jsonl:9") as e:
        to_messages(row, "data.jsonl:9")
    assert words in str(e.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [user("2+2?")], "chosen": [said("4")], "rejected": [said("5")]},
        {"chosen": [user("2+2?"), said("4")], "rejected": [user("2+2?"), said("5")]},
        {
            "prompt": "2+2?",
            "prompt_id": "a",
            "chosen": [user("2+2?"), said("4")],
            "rejected": [user("2+2?"), said("5")],
            "messages": [user("2+2?"), said("4")],
            "score_chosen": 9.0,
        },
        {
            "input": {"messages": [user("2+2?")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said("4")],
            "non_preferred_output": [said("5")],
        },
        {
            "instruction": "2+2?",
            "completions": [
                {"response": "5", "overall_score": 1},
                {"response": "4", "overall_score": 9.5},
                {"response": "22", "overall_score": 3},
            ],
        },
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    ],
)
def test_known_comparisons(row):
    out = to_preference(row)
    assert (out["prompt"], out["chosen"], out["rejected"]) == ([user("2+2?")], [said("4")], [said("5")])
    assert out.get("score_chosen") == row.get("score_chosen") and out.get("prompt_id") == row.get("prompt_id")


def test_comparison_of_plain_texts_without_a_prompt():
    out = to_preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (out["prompt"], out["chosen"], out["rejected"]) == (
        [user("The sky is")],
        [said(" blue.")],
        [said(" green.")],
    )


@pytest.mark.parametrize(
    "row,words",
    [
        ({"chosen": [user("a"), said("b")], "rejected": [user("c"), said("d")]}, "no prompt in common"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt in common"),
        ({"prompt": "q", "completions": [{"response": "a", "score": 1}]}, "different scores"),
        ({"input": "x", "preferred_output": [], "non_preferred_output": []}, 'no "messages"'),
        ({"prompt": "q", "chosen": [], "rejected": [said("a")]}, "do not answer"),
        ({"messages": CHAT}, "no better and worse"),
    ],
)
def test_bad_comparisons(row, words):
    with pytest.raises(UserError, match=words):
        to_preference(row)


@pytest.mark.parametrize(
    "label,want",
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("True", True),
        ("false", False),
        (" No ", False),
        (1.0, True),
    ],
)
def test_labels(label, want):
    assert to_unpaired({"prompt": "a", "completion": "b", "label": label})["label"] is want


@pytest.mark.parametrize("label", ["good", "", 2, -1, [], {"a": 1}, 0.5])
def test_labels_that_are_none(label):
    with pytest.raises(UserError, match="neither true nor false"):
        to_unpaired({"prompt": "a", "completion": "b", "label": label})


# --- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": CHAT, "split": "train"},
        {"messages": [user('Ünï “\u2028” , "x"\nline?'), said("é")], "split": "test"},
    ]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["messages", "split"])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == rows, path.name
        assert read(path, "exam") == rows[1:], path.name


@pytest.mark.parametrize(
    "line,words",
    [
        (b"{not json\n", "not JSON"),
        (b'{"text": "caf\xe9"}\n', "byte 14 is not UTF-8"),
        (b"[1, 2]\n", "a list, not an object"),
        (b'{"text": "\\ud83d"}\n', "half a character"),
        (b"[" * 20000 + b"\n", "not JSON"),
        (b'{"text": "' + b"a" * LONGEST + b'"}\n', "longer than 16 MB"),
    ],
)
def test_bad_lines_are_named_and_the_rest_is_read(line, words, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, b"\n", line, {"messages": CHAT})
    found = list(lines(path))
    assert [n for n, _ in found] == [1, 3, 4] and words in found[1][1]
    with pytest.raises(UserError, match=r"a.jsonl:3: "):
        read(path)


def test_json_in_a_cell_is_an_answer_unless_it_is_turns(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as f:
        csv.writer(f).writerows(
            [
                ["prompt", "completion"],
                ["as JSON?", '{"a": 1}'],
                ["as a list?", "[1, 2]"],
                [json.dumps([user("hi")]), "[oh"],
            ]
        )
    assert [c["messages"] for c in read(path)] == [
        [user("as JSON?"), said('{"a": 1}')],
        [user("as a list?"), said("[1, 2]")],
        [user("hi"), said("[oh")],
    ]


def test_files_of_another_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}".encode("utf-16").decode("latin-1"), encoding="latin-1")
    with pytest.raises(UserError, match="UTF-16"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(UserError, match="name the file .json"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(UserError, match="a.csv:2: more cells"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\na,b\n\xe9,c\n")
    with pytest.raises(UserError, match="not to be read as CSV"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(UserError, match="not Parquet"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="kind of file"):
        read(jsonl(tmp_path / "a.jsnl", {"text": "a"}))
    for name in ("nowhere.jsonl", "./x/y", str(tmp_path), "nowhere"):
        with pytest.raises(UserError, match="no such file"):
            read(name)


def test_a_name_on_the_hub_without_a_network():
    with pytest.raises(UserError, match="nobody/nothing: neither a file here nor on the Hub"):
        read("nobody/nothing")


def test_a_data_set_on_the_hub(monkeypatch):
    "FineTome's columns, as `datasets` streams them."
    import datasets

    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return iter(
            [
                {
                    "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
                    "source": "x",
                    "score": 5.2,
                }
            ]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("mlabonne/FineTome-100k", revision="main") == [
        {"messages": [user("2+2?"), said("4")], "source": "x", "score": 5.2}
    ]
    assert asked == {"name": "mlabonne/FineTome-100k", "split": "train", "streaming": True, "revision": "main"}


# --- split


@many
@given(st.lists(text.filter(str.strip), min_size=1, max_size=20, unique_by=lambda t: " ".join(t.casefold().split())))
def test_the_split_is_by_question(questions):
    rows = [{"messages": [user(q), said("a")]} for q in questions]
    sides = [side(r, 0.5) for r in rows]
    assert [side(r, 0.5) for r in reversed(rows)] == sides[::-1]
    assert sides == [
        side({"messages": [system("s"), user(" " + q + "  "), said("other"), user("more"), said("b")]}, 0.5)
        for q in questions
    ]


def test_the_split_is_the_same_in_every_process_and_honours_the_row():
    rows = [{"messages": [user(f"What is {i}?"), said("a")]} for i in range(2000)]
    sides = [side(r) for r in rows]
    assert 150 < sides.count("test") < 250
    code = """from llmcourse.rows import side
print([side({'messages': [{'role': 'user', 'content': f'What is {i}?'}]}) for i in range(50)])"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": h}
        ).stdout.strip()
        for h in "12"
    }
    assert runs == {str(sides[:50])}
    assert [side(rows[0] | {"split": s}) for s in ("test", "Train", "val", "validation", "dev")] == [
        "test",
        "train",
        "validation",
        "validation",
        "validation",
    ]
    assert side({"prompt": [user("What is 3?")], "chosen": [said("a")], "rejected": [said("b")]}) == sides[3]
    assert [side(r, salt="x") for r in rows] != sides
    with pytest.raises(UserError, match="unknown split 'tset'"):
        side(rows[0] | {"split": "tset"})


# --- near-duplicates


def test_minhash_finds_copies_and_spares_others():
    near = NearDuplicates()
    base = " ".join(f"word{i}" for i in range(60))
    assert near.add("a", base) is None
    assert near.add("b", base.upper().replace("WORD59", "end"))[0] == "a"
    assert near.add("c", " ".join(f"other{i}" for i in range(60))) is None
    assert near.add("d", "") is None and near.add("e", "") is not None
    small = NearDuplicates(most=10)
    for i in range(50):
        small.add(i, f"row number {i} of many {i * 7}")
    assert len(small.kept) == 10


# --- templates


@pytest.mark.parametrize("family", GALLERY)
def test_our_templates_train_each_answer_with_its_end(family, tokenizer):
    t = dress(tokenizer, family)
    chat = [user("2+2?"), said("4"), user("3+3?"), said("6")]
    trained = [l for l in tokenize(t, chat)["labels"] if l != -100]
    end = GALLERY[family][2]
    assert t.decode(trained).replace(" ", "") == f"4{end}6{end}"
    assert xray(t, chat).faults() == [] and t.convert_tokens_to_ids(end) in end_ids(t)


@pytest.mark.parametrize("family", GALLERY)
def test_the_mask_is_found_without_generation_marks(family, tokenizer):
    marked, bare = dress(tokenizer, family), dress(tokenizer, family)
    bare.chat_template = bare.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    chat = [user("2+2?"), said("4"), user("3+3?"), said("6")]
    one, two = tokenize(marked, chat), tokenize(bare, chat)
    assert one["input_ids"] == two["input_ids"]
    n = {"Phi-3": -2}.get(family)  # without marks the EOS behind the whole chat is trained, too
    assert one["labels"][:n] == two["labels"][:n] or family in ("Llama 2", "Mistral", "Alpaca")
    assert (
        bare.decode([l for l in two["labels"][:n] if l != -100]).replace(" ", "")
        == f"4{GALLERY[family][2]}6{GALLERY[family][2]}"
    )


CHATS = [
    [user("2+2?"), said("4")],
    [user(" Hi \n"), said(" Hello "), user("Bye"), said("Bye!")],
    [system("Be brief."), user("2+2?"), said("4")],
]


@pytest.mark.parametrize(
    "family,name",
    [
        ("Llama 3", "llama3"),
        ("Llama 3.1", "llama3_1"),
        ("Llama 3.1", "llama3_2"),
        ("ChatML", "qwen2_5"),
        ("Phi-3", "phi3"),
        ("Gemma", "gemma"),
    ],
)
@pytest.mark.parametrize("chat", CHATS, ids=["plain", "spaces", "system"])
@pytest.mark.parametrize("open_turn", [False, True])
def test_our_templates_say_what_the_makers_say(family, name, chat, open_turn, tokenizer):
    "The makers' own templates, as TRL ships them, rendered by transformers."
    path = Path(str(resources.files("trl"))) / f"chat_templates/{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this TRL does not ship {name}")
    if name == "qwen2_5" and chat[0]["role"] != "system":
        chat = [system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), *chat]
    t = dress(tokenizer, family)
    draw = lambda **k: t.apply_chat_template(
        chat[:-1] if open_turn else chat,
        tokenize=False,
        add_generation_prompt=open_turn,
        date_string="26 Jul 2024",
        **k,
    )
    if family == "Gemma" and chat[0]["role"] == "system":
        for k in ({}, {"chat_template": path.read_text()}):
            with pytest.raises(Exception, match="[Ss]ystem"):
                draw(**k)
        return
    theirs = draw(chat_template=path.read_text())
    if name == "qwen2_5" and chat[0]["role"] == "system" and len(chat) > 1 and "Qwen" in chat[0]["content"]:
        chat = chat[:]  # Qwen writes this system turn even if there is none
    assert draw() == theirs


LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("family,theirs", [("Llama 2", LLAMA_2), ("Mistral", MISTRAL)])
@pytest.mark.parametrize("chat", CHATS, ids=["plain", "spaces", "system"])
def test_llama_2_and_mistral(family, theirs, chat, tokenizer):
    t = dress(tokenizer, family)
    if family == "Mistral" and chat[0]["role"] == "system":
        for template in (None, theirs):
            with pytest.raises(TemplateError):
                t.apply_chat_template(chat, tokenize=False, chat_template=template)
        return
    assert t.apply_chat_template(chat, tokenize=False) == t.apply_chat_template(
        chat, tokenize=False, chat_template=theirs
    )


def test_alpaca_is_stanfords_prompt(tokenizer):
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    assert (
        dress(tokenizer, "Alpaca").apply_chat_template(CHAT, tokenize=False)
        == prompt.format(instruction="What is 2+2?") + "4</s>"
    )


# --- tokens


def test_a_weight_of_zero_is_not_trained(tokenizer):
    chat = [user("2+2?"), said("five") | {"weight": 0}, user("No."), said("4") | {"weight": 1}]
    row = tokenize(tokenizer, chat)
    assert tokenizer.decode([l for l in row["labels"] if l != -100]) == "4<|eot_id|>"
    assert (
        row["input_ids"]
        == tokenize(tokenizer, [{k: v for k, v in m.items() if k != "weight"} for m in chat])["input_ids"]
    )


def test_tools_reach_the_template(tokenizer):
    t = copy.deepcopy(tokenizer)
    t.chat_template = "{{ tools | tojson if tools else '' }}" + t.chat_template
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert "weather" in t.decode(tokenize(t, CHAT, tools=tools)["input_ids"]) and "weather" not in t.decode(
        tokenize(t, CHAT)["input_ids"]
    )


def test_xray_sees_faults_and_paints(tokenizer):
    ids = tokenize(tokenizer, CHAT)["input_ids"]
    bos, eot = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert xray(tokenizer, {"input_ids": ids, "labels": [-100] * len(ids)}).faults() == ["nothing is trained"]
    assert "twice" in xray(tokenizer, {"input_ids": [bos, *ids], "labels": [-100, *ids]}).faults()[0]
    assert (
        "never learn to stop"
        in xray(tokenizer, {"input_ids": ids, "labels": [-100 if t == eot else t for t in ids]}).faults()[0]
    )
    picture = xray(tokenizer, [user("\x1b[31mred\x07"), said("4")])
    assert "\x1b[31m" not in picture.ansi() and "\x07" not in picture.ansi() and "\x1b[30;42m" in picture.ansi()
    assert xray(tokenizer, {"input_ids": ids, "labels": ids}).counts["trained"] == len(ids)


def test_xray_file_names_the_line(tmp_path, tokenizer):
    gemma = dress(tokenizer, "Gemma")
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": [system("x"), *CHAT]})
    assert xray_file(path, tokenizer)[1]["rows"] == 2
    with pytest.raises(UserError, match="a.jsonl:2: this model's chat template refuses"):
        xray_file(path, gemma)


# --- the doctor


def chats(n=40):
    return [{"messages": to_chat(p)["messages"]} for p in problems(n // 4, 5, ["add", "sub", "story1", "story2"])]


def test_healthy_rows_are_healthy(tmp_path):
    report = check(tmp_path / "a.jsonl", *chats(), epochs=1)
    assert report.code == 0 and report.found == [] and report.rows == 40, repr(report)
    assert report.run["steps"] == 3 and report.run["seconds"] == report.run["tokens"] / 1000
    exact = sum(len(tokenize(load_tokenizer("tutor/base"), r["messages"])["input_ids"]) for r in chats())
    assert report.run["tokens"] == exact


PLANTED = [
    ([{"messages": [user("What?")]}], "error", "no assistant turn"),
    ([{"messages": []}], "error", "no assistant turn"),
    ([{"messages": [*CHAT, user("and?")]}], "error", "ends with a turn of the user"),
    ([{"messages": [user(" "), said("4")]}], "error", "turn 0 (user) is empty"),
    ([{"messages": [user("q"), said("")]}], "error", "turn 1 (assistant) is empty"),
    ([{"messages": [user("q"), said("4") | {"weight": 0}]}], "error", "weight 0"),
    ([{"messages": [user("q"), said("4") | {"weight": 0.5}]}], "error", "weight 0.5"),
    ([{"messages": [user("a"), user("b"), said("4")]}], "warning", "both the user's"),
    ([{"messages": [user("same"), said("same")]}], "warning", "repeats turn 0"),
    ([{"messages": [said("Hello"), *CHAT]}], "warning", "speaks first"),
    ([{"messages": [user("q"), system("s"), said("4")]}], "warning", "a system turn that is not the first"),
    ([{"messages": [user("q"), {"role": "tool", "content": "x"}, said("4")]}], "warning", "no tool was called"),
    ([{"messages": [{"role": "robot", "content": "x"}]}], "error", "role 'robot'"),
    ([b"{oops\n"], "error", "not JSON"),
    ([b'{"text": "\xff"}\n'], "error", "not UTF-8"),
    ([{"mesages": CHAT}], "error", "may be 'messages'"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "error", "takes one answer a row"),
    ([{"instruction": "3 and 4", "input": "", "output": "7"}], "warning", "mixed formats"),
    ([chats()[2]], "warning", "a copy of line 3"),
    (
        [
            {
                "messages": [
                    system("x"),
                    *chats()[30]["messages"][1:-1],
                    said(chats()[30]["messages"][-1]["content"] + " !"),
                ]
            }
        ],
        "warning",
        "the same as line 31",
    ),
    ([{"messages": [user("q"), said("word " * 500)]}], "warning", "not learn to stop"),
    ([{"messages": [user("word " * 500), said("4")]}], "error", "nothing of it would be trained"),
    ([{"messages": [user("q"), said("token ghp_" + "a1" * 18)]}], "error", "a GitHub token (ghp_…)"),
    ([{"messages": [user("password: hunter22x"), said("ok")]}], "warning", "a password"),
    ([{"messages": [user("q"), said("-----BEGIN RSA PRIVATE KEY-----")]}], "error", "a private key"),
    ([{"messages": [user("q"), said("sk-proj-" + "x1" * 15)]}], "error", "an API key"),
    ([{"messages": [user("mail jo@school.org"), said("ok")]}], "warning", "an e-mail address"),
    ([{"messages": [user("<s>[INST] hi [/INST]"), said("ok")]}], "warning", "rendered already"),
    ([{"messages": [user("cafÃ©"), said("ok")]}], "warning", "wrongly decoded"),
    ([{"messages": CHAT, "split": "tset"}], "error", "split 'tset'"),
]


@pytest.mark.parametrize("rows,level,words", PLANTED, ids=[p[2] for p in PLANTED])
def test_planted_faults_are_found_at_their_line(rows, level, words, tmp_path):
    report = check(tmp_path / "a.jsonl", *chats(), *rows)
    assert any(lv == level and place == "line 41" and words in what for lv, place, what in report.found), repr(report)
    assert report.code == (2 if level == "error" else 1), repr(report)
    assert "hunter22x" not in repr(report) and "a1a1a1" not in repr(report)


@pytest.mark.parametrize(
    "harmless",
    [
        "What is a password?",
        "The secret: practise every day.",
        "Use tokens: they are words.",
        "price = 12 @ 3 each",
        "a < b and [1, 2]",
        "café – naïve “quotes”",
        "skip-level meeting of the risk-averse task-force-leader-group",
        "see user@example.com",
        "List<String> x; <b>bold</b>",
    ],
)
def test_the_doctor_spares_harmless_texts(harmless):
    assert list(text_faults(harmless)) == []


def test_comparisons_and_ratings(tmp_path):
    row = lambda i, bad="no": {
        "prompt": f"Question number {i} about {i * i}?",
        "chosen": f"yes {i}",
        "rejected": bad + (f" {i}" if bad == "no" else ""),
    }
    assert check(tmp_path / "a.jsonl", *(row(i) for i in range(9))).code == 0
    assert "chosen and rejected are the same" in said_of(
        check(tmp_path / "a.jsonl", *(row(i) for i in range(9)), row(9, "yes 9"))
    )
    thumbs = [
        {"prompt": f"Question number {i} about {i * i}?", "completion": str(i), "label": i % 2 == 0} for i in range(9)
    ]
    assert check(tmp_path / "a.jsonl", *thumbs).code == 0
    assert "line 10" in said_of(check(tmp_path / "a.jsonl", *thumbs, thumbs[0] | {"label": "meh"}))


def test_leaks_inside_a_file_and_between_two(tmp_path):
    rows = [r | {"split": "test" if i % 5 == 0 else "train"} for i, r in enumerate(chats())]
    leak = {
        "messages": [system("other"), user(rows[5]["messages"][1]["content"].upper()), said("x y z")],
        "split": "train",
    }
    report = check(tmp_path / "a.jsonl", *rows, leak, epochs=1)
    assert ("error", "line 41", "the question is in test too, line 6: a leak between the splits") in report.found, repr(
        report
    )
    assert report.run["steps"] == 3
    jsonl(tmp_path / "b.jsonl", *chats()[3:5])
    two = check(tmp_path / "a.jsonl", *chats(), against=tmp_path / "b.jsonl")
    assert (
        "error",
        "b.jsonl line 2",
        "the question is in a.jsonl too, line 5: a leak between the splits",
    ) in two.found, repr(two)
    by_hash = [r | {"split": side(r, 0.3)} for r in chats()]
    assert check(tmp_path / "c.jsonl", *by_hash).code == 0


def test_the_template_of_the_model_decides(tmp_path, tokenizer):
    gemma = dress(tokenizer, "Gemma")
    assert check(tmp_path / "a.jsonl", *chats(), tokenizer=tokenizer).code == 0
    report = check(tmp_path / "a.jsonl", *chats(), tokenizer=gemma)
    assert report.count["error"] == 40 and "no system role" in repr(report) 
    assert "40 such rows, also 2, 3, …" in repr(report)


def test_dial_decides_length_and_steps(tmp_path):
    report = check(tmp_path / "a.jsonl", *chats(), scale="t4", model="tutor/base", epochs=2.5, price=2.0)
    assert report.run["max_length"] == 1024 and report.run["batch"] == 8 and report.run["steps"] == 13
    assert report.run["cost"] == pytest.approx(report.run["tokens"] / 1000 / 3600 * 2)


def test_estimate_beyond_the_sample(tmp_path):
    full, part = check(tmp_path / "a.jsonl", *chats(400)), check(tmp_path / "a.jsonl", sample=100)
    assert len(part.run["lengths"]) == 100 and part.run["tokens"] == pytest.approx(full.run["tokens"], rel=0.1)
    assert "(estimated from 100 of 400 rows)" in repr(part) and "estimated" not in repr(full)


def test_report_does_not_obey_what_it_prints(tmp_path):
    report = check(tmp_path / "a.jsonl", {"messages": [{"role": "\x1b[31mx\n✗ line 9", "content": "a"}]})
    assert "\x1b" not in repr(report) and "line 1" in repr(report)


MEMORY = """
import resource, sys
from llmcourse.datacheck import check_data
check_data(sys.argv[1], tokens_per_second=1)            # everything is imported and filled once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = check_data(sys.argv[2], tokens_per_second=1)
print(report.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux")
def test_memory_is_bounded(tmp_path):
    "A file of 60 MB takes a few MB more than one of 6 MB: what it grows by is 25 bytes a row."
    pad = " ".join(f"w{i}" for i in range(450))

    def write(path, n):
        with path.open("w") as f:
            for i in range(n):
                f.write(json.dumps({"messages": [user(f"Question {i}"), said(f"{i} {pad}")]}) + "\n")
        return path

    small, large = write(tmp_path / "small.jsonl", 2800), write(tmp_path / "large.jsonl", 28_000)
    assert large.stat().st_size > 6e7
    out = subprocess.run([sys.executable, "-c", MEMORY, small, large], capture_output=True, text=True)
    rows, grown = map(int, out.stdout.split()[-2:])
    assert rows == 28_000 and grown < 30_000, f"{grown / 1000:.0f} MB more"


# --- synthetic rows


def test_synthesize_verifies_deduplicates_and_remembers():
    replies = iter(["4", "5", "4", "boom", "4 ", "6"])

    def verify(row, reply):
        if reply == "boom":
            raise ValueError("no number")
        return reply.strip() == row["answer"]

    seeds = [
        {"question": "2+2?", "answer": "4", "id": "a"},
        {"messages": [system("s"), user("1+4?"), said("old")], "answer": "5"},
    ]
    kept, refused = synthesize(lambda chat: next(replies), seeds, verify, samples=3, name="fake")
    assert [(r["messages"][-1]["content"], r["provenance"]["seed"], r["provenance"]["sample"]) for r in kept] == [
        ("4", "a", 0),
        ("5", 1, 0),
    ]
    assert [r["provenance"]["refused"] for r in refused] == [
        "a copy",
        "the verifier, with ValueError: no number",
        "a copy",
        "the verifier",
    ]
    assert kept[1]["messages"][:-1] == [system("s"), user("1+4?")] and kept[0]["provenance"] == {
        "generator": "fake",
        "verifier": "verify",
        "seed": "a",
        "sample": 0,
    }
    assert kept[0]["answer"] == "4"
    (pair,) = to_pairs(kept, refused)
    assert (pair["prompt"][-1], pair["chosen"], pair["rejected"]) == (user("1+4?"), [said("5")], [said("6")])
    assert to_preference(pair) == pair


def test_synthesize_asks_in_batches():
    class Batches:
        def batch(self, chats):
            self.seen = chats
            return ["4"] * len(chats)

    generate = Batches()
    kept, _ = synthesize(
        generate,
        [{"question": "2+2?"}, {"question": "1+3?"}],
        lambda row, reply: True,
        samples=1,
        ask=lambda row: [user("Q: " + row["question"])],
    )
    assert (
        generate.seen == [[user("Q: 2+2?")], [user("Q: 1+3?")]]
        and len(kept) == 2
        and kept[0]["provenance"]["generator"] == "Batches"
    )


# --- commands


def test_commands(tmp_path, capsys):
    from llmcourse.cli import main

    good, bad = (
        jsonl(tmp_path / "good.jsonl", *chats()),
        jsonl(tmp_path / "bad.jsonl", *chats(), {"messages": [user("What?")]}),
    )
    speed = ["--tokens-per-second", "1000"]
    assert main(["data", "check", str(good), *speed]) == 0 and "0 errors, 0 warnings" in capsys.readouterr().out
    assert main(["data", "check", str(bad), *speed]) == 2 and "✗ line 41: no assistant turn" in capsys.readouterr().out
    jsonl(tmp_path / "copy.jsonl", *chats(), chats()[0])
    assert main(["data", "check", str(tmp_path / "copy.jsonl"), *speed]) == 1
    assert main(["data", "chekc", str(good)]) == 2 and "did you mean 'check'" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "no.jsonl")]) == 2 and "no such file" in capsys.readouterr().err
    assert main(["xray", str(good), "--rows", "1"]) == 0 and "[<|eot_id|>]" in capsys.readouterr().out
    assert main(["xray", str(tmp_path / "no.jsonl")]) == 2


def test_what_was_not_looked_at_is_said(tmp_path, monkeypatch):
    "Beyond its memory the doctor looks for copies no more, and says so."
    from functools import partial
    from llmcourse import datacheck

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": to_chat(p)["messages"]}) + "\n" for p in problems(20, 1, ["add"])))
    assert "looked for" not in str(check_data(path))
    monkeypatch.setattr(datacheck, "Seen", partial(datacheck.Seen, 5))
    assert "copies and leaks were looked for among the first 5 rows only" in str(check_data(path))
