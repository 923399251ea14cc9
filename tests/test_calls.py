"""Calls of tools, end to end: read, compared, trained, evaluated, served as trained, carried out."""

import json
from pathlib import Path

import pytest

from llmcourse.calculator import CALCULATOR, TOOL_TEMPLATE, calculate, shown, tool_chat, tool_rows, with_calculator
from llmcourse.calls import call_scores, grade_call, parse_calls, split_calls, wanted_calls
from llmcourse.cli import main
from llmcourse.core import UserError, weights
from llmcourse.evals import evaluate, wilson
from llmcourse.exam import exam_rows
from llmcourse.labels import draw
from llmcourse.models import load_tokenizer
from llmcourse.tutor import is_right, problems

DATA = Path(__file__).parent.parent / "data"
ADD = {"name": "add", "arguments": {"a": 1, "b": [2, {"c": True}]}}
ARGUMENTS = json.dumps(ADD["arguments"])


def message(*calls):
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": f} for f in calls]}


@pytest.mark.parametrize(
    "reply",
    [
        message({"name": "add", "arguments": ARGUMENTS}),
        message(ADD),
        '{"name": "add", "parameters": ARGUMENTS}',
        '<|python_tag|>{"type": "function", "name": "add", "parameters": ARGUMENTS}<|eom_id|>',
        '{"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}',
        'Let me add.\n<tool_call>\n{"name": "add", "arguments": ARGUMENTS}\n</tool_call>',
        '[TOOL_CALLS][{"name": "add", "arguments": ARGUMENTS}]',
        "<function=add>ARGUMENTS</function>",
        "[add(a=1, b=[2, {'c': True}])]",
        '<think>\nMaybe {"name": "sub", "arguments": {}}?\n</think>\n\n{"name": "add", "arguments": ARGUMENTS}',
        '<think>\n<tool_call>{"name": "sub", "arguments": {}}</tool_call>?</think>'
        '<tool_call>{"name": "add", "arguments": ARGUMENTS}</tool_call>',
        '```json\n{"name": "add", "arguments": ARGUMENTS}\n```',
        'I add.\n\n```json\n[{"name": "add", "arguments": ARGUMENTS}]\n```\nDone.',
        '```\n{"name": "add", "parameters": ARGUMENTS}\n```',
        "[TOOL_CALLS]add[ARGS]ARGUMENTS",
        "I add.[TOOL_CALLS]add[ARGS]ARGUMENTS</s>",
        "[TOOL_CALLS]add[CALL_ID]aB3dE5fG7[ARGS]ARGUMENTS",
        "[TOOL_CALLS]addARGUMENTS",
        '<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2, {"c": true}]\n</parameter>\n</function>',
        '<tool_call>\n<function=add>\n<parameter=a>1</parameter>\n<parameter=b>[2, {"c": true}]</parameter>\n'
        "</function>\n</tool_call>",
        '{"tool_calls": [{"name": "add", "arguments": ARGUMENTS}]}',
        '```json\n{"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}]}\n```',
    ],
)
def test_every_format_is_read(reply):
    reply = reply.replace("ARGUMENTS", ARGUMENTS) if isinstance(reply, str) else reply
    assert parse_calls(reply) == [ADD]
    assert grade_call({"messages": [], "answer": ADD}, reply)


@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "{}", "null", '{"name": "Anna"}', '{"name": 3, "arguments": {}}', "add(1)", "{" * 9000, "[" * 9000,
     "f(" * 500, '{"name": "add", "arguments": {}} and more', "<tool_call>add</tool_call>", "f(a=print)", "1 is 1",
     'Here:\n```json\n{"name": "Anna", "age": 7}\n```', "```json\n[1, 2]\n```", "```python\nadd(a=1)\n```",
     '<think>{"name": "add", "arguments": {}}</think>It is 3.', '<think>{"name": "add", "arguments": {}}',
     '<think><tool_call>{"name": "add", "arguments": {}}</tool_call></think>3', '{"tool_calls": "none"}',
     '{"tool_calls": []}', '{"tool_calls": [{"name": "Anna"}]}', 'Say {"name": "add", "arguments": {}}, I think.',
     "Mistral writes [TOOL_CALLS] first.", "The tag <parameter=a> is Qwen's."],
)  # fmt: skip
def test_words_are_no_call(text):
    assert parse_calls(text) == []


@pytest.mark.parametrize(
    "given,right",
    [('{"n": 85}', True), ('{"n": 85.0}', True), ('{"n": "85"}', False), ('{"n": 84}', False), ('{"n": true}', False),
     ('{"n": 85, "m": 1}', False), ("{}", False), ("85", False), ("{n: 85}", False), (json.dumps('{"n": 85}'), False)],
)  # fmt: skip
def test_arguments_are_equal_as_json(given, right):
    row = {"messages": [], "answer": {"name": "f", "arguments": {"n": 85}}}
    assert grade_call(row, message({"name": "f", "arguments": given})) == right


def test_several_calls_of_mistral_and_qwen():
    two = [{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {"b": ["x", 2]}}]
    assert parse_calls('[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]sub[ARGS]{"b": ["x", 2]}') == two
    said = '{"name": "add", "arguments": {"a": "<function=f>"}}'
    assert parse_calls(f"<tool_call>{said}</tool_call>") == [json.loads(said)]
    assert parse_calls('[TOOL_CALLS]add[ARGS]{"a": 1') == [{"name": "add", "arguments": None}]
    tag = "<tool_call>\n<function=%s>\n<parameter=%s>\n%s\n</parameter>\n</function>\n</tool_call>\n"
    assert parse_calls(tag % ("add", "a", 1) + tag % ("sub", "b", '["x", 2]')) == two
    assert parse_calls(tag % ("say", "text", "two\nlines")) == [{"name": "say", "arguments": {"text": "two\nlines"}}]


def test_a_parameter_is_a_text_where_its_schema_wants_one():
    "Qwen3-Coder writes every parameter bare, so 8000 may be a text."
    schema = {"type": "object", "properties": {"zip": {"type": "string"}, "n": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": schema}}]
    said = "<function=find><parameter=zip>8000</parameter><parameter=n>2</parameter></function>"
    wanted = {"name": "find", "arguments": {"zip": "8000", "n": 2}}
    assert parse_calls(said, tools) == [wanted] and parse_calls(said)[0]["arguments"]["zip"] == 8000
    assert grade_call({"messages": [], "answer": wanted, "tools": tools}, said)


def test_one_is_not_true():
    row = {"messages": [], "answer": {"name": "f", "arguments": {"n": 1}}}
    assert not grade_call(row, "f(n=True)") and grade_call(row, "f(n=1.0)")


def test_what_is_missing_or_invented_counts():
    row = {"messages": [], "answer": [{"name": "f", "arguments": {"a": 1, "b": 2}}, {"name": "g", "arguments": {}}]}
    right_of = lambda reply: tuple(call_scores(row, reply)[k] for k in ("name", "arguments", "right", "of", "invented"))
    assert right_of("[g(), f(b=2, a=1)]") == (True, True, 2, 2, 0)
    assert right_of("[g(), f(a=1, b=3)]") == (True, False, 1, 2, 0)
    assert right_of("f(a=1, b=2)") == (False, False, 2, 2, 0)
    assert right_of("[g(), f(a=1, b=2), f(a=1, b=2)]") == (False, False, 2, 2, 2)
    assert right_of("I do not know.") == (False, False, 0, 2, 0)


def test_words_beside_a_call_that_the_template_drops_are_said(capsys, tmp_path):
    "By the doctor and by the training. The row is still trained: its call is there."
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    ask = {"role": "user", "content": "2+2?"}
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    said = {"role": "assistant", "content": "Let me add.", "tool_calls": [call]}
    rows = [{"messages": [ask, turn], "tools": [add]} for turn in (said | {"content": None}, said)]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["data", "check", str(path), "--model", "tutor/tools"])
    report = capsys.readouterr().out
    assert "line 2: the model's chat template leaves out the text of turn 1 (assistant)" in report
    main(["sft", "--data", str(path), "--model", "tutor/tools", "--steps", "1", "--output", str(tmp_path / "run")])
    assert f"out of 1 of 2 rows: the text of turn 1 (assistant) ({path}:2)" in "".join(capsys.readouterr())


def test_parallel_calls_are_split_and_said(capsys):
    "The template of tutor/tools takes one call a turn, as Llama 3.1's does. Nothing of the row is lost."
    from llmcourse.chats import encode_chat, say_what_changes
    from llmcourse.rows import read

    tokenizer = load_tokenizer("tutor/base")
    tokenizer.chat_template = TOOL_TEMPLATE
    found = read(DATA / "tools.jsonl")
    rows, places = [row.data for row in found], [row.place for row in found]
    encoded = [encode_chat(tokenizer, row, place) for row, place in zip(rows, places)]
    say_what_changes(tokenizer, rows, places)
    said = "".join(capsys.readouterr())
    assert "6 rows call several tools at once, and the template takes one call a turn: they are split" in said
    two = next(row for row in found if len(row.data["messages"][2].get("tool_calls", [])) == 2)
    assert f"(first {two.place})" in said
    for row, tokens in zip(found, encoded):
        trained = tokenizer.decode([t for t in tokens["labels"] if t != -100])
        for m in row.data["messages"]:
            for c in m.get("tool_calls", []):
                assert json.dumps(json.loads(c["function"]["arguments"])) in trained
    two = next(row for row in found if len(row.data["messages"][2].get("tool_calls", [])) == 2)
    cut = two.data | {"messages": two.data["messages"][:3]}
    with pytest.raises(UserError, match=f"{two.place}: .*turn 2 calls 2 tools at once, and their results do not"):
        encode_chat(tokenizer, cut, two.place)


def test_the_doctor_says_that_parallel_calls_are_split(capsys):
    "As the trainer does: how many, and where first. A template that takes several at once has nothing to say."
    line = "6 rows call several tools at once, and the template takes one call a turn: they are split, one call after "
    assert main(["data", "check", str(DATA / "tools.jsonl"), "--model", "tutor/tools", "--tokens-per-second", "1"]) == 0
    assert line + "the other (first line 2)\n" in capsys.readouterr().out


def test_the_doctor_counts_rows_whose_calls_are_split(tmp_path):
    from llmcourse.datacheck import check_data
    from test_ollama import dressed, family

    def split(name, rows=DATA / "tools.jsonl", **options):
        report = check_data(rows, tokenizer=dressed(family(name)), max_length=9999, tokens_per_second=1, **options)
        assert report.as_dict()["split_calls"] == len(report.split)
        assert ("split, one" in str(report)) == bool(report.split)
        return len(report.split), str(report)

    assert split("tutor")[0] == 6 and split("qwen2_5_training")[0] == 0 and split("tutor", purpose="eval")[0] == 0
    one = tmp_path / "one.jsonl"
    one.write_text((DATA / "tools.jsonl").read_text().splitlines()[1] + "\n")
    n, said = split("tutor", one)
    assert n == 1 and "1 row calls several tools at once, and the template takes one call a turn: it is split" in said


def test_results_follow_their_calls_by_id():
    ask = {"role": "user", "content": "?"}
    calls = [{"id": i, "function": {"name": i, "arguments": "{}"}} for i in "xyz"]
    answers = [{"role": "tool", "content": i.upper(), "tool_call_id": i} for i in "zxy"]
    chat = split_calls([ask, {"role": "assistant", "content": "", "tool_calls": calls}, *answers, ask])
    assert [m["content"] for m in chat] == ["?", "", "X", "", "Y", "", "Z", "?"]


def test_a_listed_tool_is_not_a_printed_call():
    "A template that prints the list of tools and no call would train an empty answer."
    from jinja2 import TemplateError

    from llmcourse.labels import check_calls

    tokenizer = load_tokenizer("tutor/base")
    tokenizer.chat_template = "{{ tools }}" + tokenizer.chat_template
    with pytest.raises(TemplateError, match="does not print the call of 'calculate' in turn 1"):
        check_calls(tokenizer, tool_chat(problems(1)[0]), [CALCULATOR])


@pytest.mark.parametrize("start,change", [(1.0, "+1"), (True, "+1"), ("1", "+1"), (1, "1"), (1, "+1+1"), (1, "+9" * 9)])
def test_the_calculator_takes_nothing_else(start, change):
    with pytest.raises(UserError):
        calculate(start, change)


def test_tool_rows_keep_the_held_out_numbers_out():
    from llmcourse.tutor import held_out

    calls = [json.loads(c["function"]["arguments"]) for row in tool_rows() for m in row["messages"]
             for c in m.get("tool_calls", [])]  # fmt: skip
    assert len(calls) > 1200 and not any(held_out(c["start"], c["change"][0], int(c["change"][1:])) for c in calls)


def test_woken_tokens_and_the_template_are_on_the_card(tmp_path):
    "A run with new tokens and a template of its own is repeated from its card, to the bit."
    from llmcourse.lora import lora_config
    from llmcourse.methods import rerun
    from llmcourse.models import load
    from llmcourse.sft import sft

    config = lora_config(r=2, lora_alpha=4, trainable_token_indices={"embed_tokens": [1, 90, 92]})
    first = sft(tool_rows(n=8), tmp_path / "a", model="tutor/sft", peft_config=config, chat_template=TOOL_TEMPLATE,
                wake_tokens=2, max_steps=2, loss_type="nll", max_length=384)  # fmt: skip
    again = rerun(first, tmp_path / "b")
    assert (first / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    net, tokenizer = load(first)
    old = load("tutor/sft")[0].get_input_embeddings().weight
    changed = (net.get_input_embeddings().weight != old).any(1).nonzero().flatten().tolist()
    assert changed == [1, 90, 92] and tokenizer.chat_template == TOOL_TEMPLATE
    with pytest.raises(UserError, match="no tokens to wake"):
        sft(tool_rows(n=8), tmp_path / "c", peft_config=lora_config(r=2), wake_tokens=2)


# ---- the shipped checkpoint


@pytest.fixture(scope="module")
def tools():
    "tutor/tools as a Generate."
    from llmcourse.models import Local, load

    return Local(*load("tutor/tools"), max_new_tokens=100)


def test_tutor_tools_calls_and_answers(tools):
    "On problems drawn now; and tutor/sft, before, makes no call."
    from llmcourse.models import Local, load

    drawn = problems(25, 77, ("add", "sub", "story1", "story2"), "test")
    rows = [{"messages": tool_chat(p)[:2], "tools": [CALCULATOR]} for p in drawn]
    called = sum(r["right"] for r in evaluate(tools, rows, progress=False))
    chats = with_calculator(tools, [row["messages"][:1] for row in rows])
    answered = sum(is_right(chat[-1]["content"], p["answer"]) for chat, p in zip(chats, drawn))
    assert wilson(called, 100)[0] >= 0.85 and wilson(answered, 100)[0] >= 0.35, (called, answered)
    net, tokenizer = load("tutor/sft")
    tokenizer.chat_template = TOOL_TEMPLATE
    before = evaluate(Local(net, tokenizer, max_new_tokens=60), rows[:20], progress=False)
    assert not any(r["right"] or parse_calls(r["reply"]) for r in before)


def test_eval_compares_calls_row_by_row(capsys):
    "Rows without content, some that end in a call and some in words: each is measured by its own kind."
    assert main(["eval", "--model", "tutor/tools", "--data", str(DATA / "calls.jsonl"), "--json"]) == 0
    table = {r["task"]: r for r in json.loads(capsys.readouterr().out)}
    assert [(k, r["n"]) for k, r in table.items()] == [
        ("all", 32), ("calls: names", 26), ("calls: arguments", 52)]  # fmt: skip
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in table.values())
    assert table["all"]["correct"] >= 18 and table["calls: names"]["correct"] >= 20


def test_xray_shows_the_call(capsys):
    assert main(["xray", str(DATA / "calls.jsonl"), "--model", "tutor/tools", "--rows", "1"]) == 0
    shown = capsys.readouterr().out.replace("][", "")
    assert '[{"name": "calculate", "parameters": {"start": 79, "change": "+94"}}<|eot_id|>]' in shown


@pytest.fixture(scope="module")
def served_tools(tmp_path_factory):
    from llmcourse.shipping import served

    with served("tutor/tools", quant="Q8_0") as server:
        yield server


def test_llama_cpp_reads_tools_as_trained(served_tools):
    "Token by token: system, question, call, result, small talk, with tools and without."
    tokenizer = load_tokenizer("tutor/tools")
    compared = 0
    for row in tool_rows(n=5):
        chat = row["messages"]
        for end in [i for i, m in enumerate(chat) if m["role"] == "assistant"]:
            for offered in ([CALCULATOR], None):
                if not offered and any(m.get("tool_calls") for m in chat[:end]):
                    continue
                body = {"messages": chat[:end]} | ({"tools": offered} if offered else {})
                theirs = json.loads(served_tools.get("/apply-template", body))["prompt"]
                ids = json.loads(served_tools.get("/tokenize", {"content": theirs, "add_special": True,
                                                                "parse_special": True}))["tokens"]  # fmt: skip
                ours = draw(tokenizer, chat[:end], tokenize=False, add_generation_prompt=True, tools=offered)
                assert ids == tokenizer(ours, add_special_tokens=False)["input_ids"]
                compared += 1
    assert compared > 30


def test_a_call_from_the_server_to_the_answer(served_tools):
    "As an application would: request with tools, tool_calls, calculator, tool turn, answer."
    client, messages = served_tools.client(), [{"role": "user", "content": "Ben has 47 apples. He finds 38. "
                                                                          "How many apples does Ben have now?"}]
    ask = lambda: client.chat.completions.create(model="tools", messages=messages, tools=[CALCULATOR], temperature=0,
                                                 max_tokens=100).choices[0].message  # fmt: skip
    said = ask()
    (call,) = said.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "calculate" and arguments == {"start": 47, "change": "+38"}
    messages += [said.model_dump(exclude_none=True),
                 {"role": "tool", "tool_call_id": call.id, "content": shown(**arguments)}]  # fmt: skip
    assert is_right(ask().content, "85")


def test_eval_through_a_server(served_tools, capsys, tmp_path):
    "The same rows, asked over HTTP: `tools` is sent, and what comes back as tool_calls is compared."
    out = tmp_path / "replies.jsonl"
    words = ["eval", "--url", served_tools.url, "--data", str(DATA / "calls.jsonl"), "--json", "--output", str(out)]
    assert main(words) == 0
    table = {r["task"]: r["correct"] for r in json.loads(capsys.readouterr().out)}
    assert table["all"] >= 18 and table["calls: names"] >= 14
    replies = [json.loads(line) for line in out.read_text().splitlines()]
    called = [r for r in replies if "call" in r]
    assert len(called) == 26 and all(parse_calls(r["reply"]) for r in called if r["right"])


def test_the_day_of_training_is_in_the_gguf(tmp_path):
    "Llama 3.1's template names a day. llama.cpp would print today's, unless told."
    import shutil

    from llmcourse.converter import to_gguf
    from llmcourse.engine import Engine
    from llmcourse.templates import dress

    model = Path(shutil.copytree(weights() / "base", tmp_path / "model"))
    tokenizer = load_tokenizer(model)
    llama = dress(tokenizer, "Llama 3.1")
    tokenizer.chat_template = llama.chat_template
    tokenizer.save_pretrained(model)
    chat = [{"role": "user", "content": "2+2?"}]
    with Engine(to_gguf(model, tmp_path / "m.gguf", "f32")) as engine:
        theirs = engine.post("/apply-template", messages=chat)["prompt"]
        ids = engine.tokenize(theirs)
    ours = draw(tokenizer, chat, tokenize=False, add_generation_prompt=True)
    assert "Today Date: 26 Jul 2024" in theirs and ids == tokenizer(ours, add_special_tokens=False)["input_ids"]


@pytest.fixture(params=["llama3_1", "llama3_2", "qwen2_5", "qwen3"])
def look_alike(request, tmp_path):
    "(folder, tokenizer): the tutor's base model in the clothes of another family, its own chat template from TRL."
    import shutil

    from test_ollama import family

    folder = Path(shutil.copytree(weights() / "base", tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = family(request.param)
    if "bos_token" not in tokenizer.chat_template:  # llama.cpp would put BOS in front of every prompt
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save_pretrained(folder)
    return folder, load_tokenizer(folder)


def prompts_in_llama_cpp(gguf, tokenizer):
    "(llama.cpp's token ids, transformers') of each prompt; llama.cpp is not told the day."
    from llmcourse.engine import Engine
    from test_ollama import prompts, rows_of_all_kinds

    with Engine(gguf) as engine:
        for chat, tools in prompts(tokenizer, rows_of_all_kinds()):
            ours = draw(tokenizer, chat, tokenize=False, add_generation_prompt=True, tools=tools)
            theirs = engine.tokenize(engine.template(chat, tools, day=None))
            yield theirs, tokenizer(ours, add_special_tokens=False)["input_ids"]


def test_llama_cpp_reads_real_templates_with_tools_as_trained(look_alike, tmp_path, capsys):
    from llmcourse.converter import to_gguf

    folder, tokenizer = look_alike
    pairs = list(prompts_in_llama_cpp(to_gguf(folder, tmp_path / "m.gguf", "f32"), tokenizer))
    assert len(pairs) > 400 and all(theirs == ours for theirs, ours in pairs)
    assert "prints tools otherwise" not in "".join(capsys.readouterr())


def test_a_file_without_its_day_is_not_exported(tmp_path, monkeypatch):
    "Planted fault: llama.cpp prints today's date where the template leaves it to the caller."
    import shutil

    from llmcourse import gguf_tokens
    from llmcourse.converter import to_gguf
    from test_ollama import family

    folder = Path(shutil.copytree(weights() / "base", tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = family("llama3_2")
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(gguf_tokens, "dated", lambda template: template)
    with pytest.raises(UserError, match="they part at token 41"):
        to_gguf(folder, tmp_path / "m.gguf", "f32")


def test_a_template_whose_tools_llama_cpp_prints_otherwise_is_exported_and_said(tmp_path, monkeypatch, capsys):
    "Planted fault: other words before the tools in the file. Plain turns are as trained, so the file is written."
    import shutil

    from llmcourse import gguf_tokens
    from llmcourse.converter import to_gguf

    folder = Path(shutil.copytree(weights() / "base", tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(gguf_tokens, "dated", lambda template: template.replace("Tools:", "Functions:"))
    assert to_gguf(folder, tmp_path / "m.gguf", "f32").is_file()
    said = "".join(capsys.readouterr())
    assert "m.gguf: llama.cpp prints tools otherwise" in said and "Tools" in said and "--engine transformers" in said


def test_rows_for_an_exam_may_lack_content():
    rows = exam_rows(str(DATA / "calls.jsonl"), "tutor/tools")
    assert len(rows) == 32 and sum(bool(r["messages"][-1].get("tool_calls")) for r in rows) == 26


# the Berkeley leaderboard's files, as they are published

NUMBER = {"type": "float", "description": "A number."}
FIELDS = {"a": NUMBER, "op": {"type": "string"}, "b": NUMBER, "round": {"type": "any", "optional": True}}
SCHEMA = {"type": "dict", "required": ["a", "op", "b"], "properties": FIELDS}
CALCULATE = {"name": "calculate", "description": "Calculate.", "parameters": SCHEMA}


def berkeley(folder, truths):
    "A file of questions and, beside it, one of right calls."
    asks = [{"id": f"simple_{i}", "question": [[{"role": "user", "content": f"What is {30 + i} + 41?"}]],
             "function": [CALCULATE]} for i in range(len(truths))]  # fmt: skip
    answers = [{"id": ask["id"], "ground_truth": truth} for ask, truth in zip(asks, truths)]
    (folder / "possible_answer").mkdir()
    for path, rows in ((folder / "BFCL_v4.json", asks), (folder / "possible_answer/BFCL_v4.json", answers[::-1])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "BFCL_v4.json"


def test_berkeley_files_are_read_as_published(tmp_path, capsys):
    from llmcourse.rows import read

    path = berkeley(tmp_path, [[{"calculate": {"a": [30 + i], "op": ["+", "plus"], "b": [41.0]}}] for i in range(3)])
    rows = read(path)
    assert [row.form for row in rows] == ["bfcl"] * 3 and [row.number for row in rows] == [1, 2, 3]
    schema = rows[0].data["tools"][0]["function"]["parameters"]
    assert schema["type"] == "object" and schema["properties"]["a"]["type"] == "number"
    assert "type" not in schema["properties"]["round"]
    assert wanted_calls(rows[2].data)[0]["arguments"] == {"a": 32, "op": "+", "b": 41.0}
    assert main(["data", "check", str(path), "--model", "tutor/tools"]) == 0
    assert main(["eval", "--data", str(path), "--model", "tutor/tools"]) == 0
    assert "calls: names" in capsys.readouterr().out
    (tmp_path / "possible_answer/BFCL_v4.json").unlink()
    assert main(["eval", "--data", str(path), "--model", "tutor/tools"]) == 2


BOX = [{"w": [3], "h": [4, ""]}]
ALLOWED = {"a": [1, 2], "city": ["New York, NY", "NYC"], "km": [5.0, ""], "at": [[1, 2.5]], "box": BOX}
RIGHT = {"a": 2, "city": "new york ny", "at": [1.0, 2.5], "box": {"w": 3}}


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"km": 5}, True),
        ({"a": 3}, False),
        ({"a": "2"}, False),
        ({"a": True}, False),
        ({"city": "NYC"}, True),
        ({"city": "Boston"}, False),
        ({"at": [2.5, 1]}, False),
        ({"at": [1]}, False),
        ({"box": {"w": 3, "h": 4}}, True),
        ({"box": {"h": 4}}, False),
        ({"box": {"w": 3, "d": 1}}, False),
        ({"km": 6}, False),
        ({"extra": 1}, False),
        ({"at": ...}, False),
    ],
)
def test_every_right_value_of_a_berkeley_row_is_right(change, right):
    "The verdicts follow from the leaderboard's published rules: any listed value, texts without case and punctuation."
    from llmcourse.rows import walk

    truth = [{"shop.near": ALLOWED}]
    asked = {"id": "simple_0", "question": [[{"role": "user", "content": "Where?"}]], "ground_truth": truth,
             "function": [{"name": "shop.near", "parameters": {"type": "dict", "properties": {}}}]}  # fmt: skip
    row = next(iter(walk([asked]))).data
    arguments = {key: value for key, value in (RIGHT | change).items() if value is not ...}
    for name in ("shop.near", "shop_near"):
        assert grade_call(row, json.dumps({"name": name, "parameters": arguments})) is right
    assert not grade_call(row, json.dumps({"name": "near", "parameters": arguments}))


def test_tools_that_a_template_does_not_print_are_said(capsys):
    assert main(["eval", "--data", str(DATA / "calls.jsonl"), "--model", "tutor/sft"]) == 0
    assert "this model's chat template does not print them" in "".join(capsys.readouterr())


def test_the_number_of_wanted_arguments_depends_on_the_rows_alone(capsys):
    from llmcourse.exam import exam_report

    rows = [{"messages": [{"role": "user", "content": "?"}], "answer": {"name": "f", "arguments": {"a": 1, "b": 2}}}]
    for reply, right, invented in (("f(a=1, b=2)", 2, 0), ("f(a=1, c=3, d=4)", 1, 2), ("g(a=1)", 0, 1), ("No.", 0, 0)):
        table = {r["task"]: r for r in exam_report(evaluate(lambda m, r=reply: r, rows, progress=False))}
        assert list(table) == ["all", "calls: names", "calls: arguments"]
        assert (table["calls: arguments"]["correct"], table["calls: arguments"]["n"]) == (right, 2), reply
        said = "".join(capsys.readouterr())
        assert (f"calls: invented {invented} arguments" in said) == bool(invented)
