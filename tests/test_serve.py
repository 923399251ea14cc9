"""Servers: the contract that an OpenAI client relies on, the door, bad input, and no process left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import pytest

from llmcourse import servers as module
from llmcourse.cli import main
from llmcourse.children import Child, cause
from llmcourse.core import UserError, weights
from llmcourse.export import to_gguf
from llmcourse.models import Local, load, render
from llmcourse.serve import Server, bench, check_address, connect, free_port, is_loopback, remote, resolve, serve
from llmcourse.shipping import served
from llmcourse.tutor import is_right, problems, to_chat

EXACT = dict(cache_type_k="f32", cache_type_v="f32", flash_attn_type="disabled")
ROWS = [to_chat(p, answered=False) for p in problems(4, 3, ("add", "sub", "story1"), "test")]
CHAT = ROWS[0]["messages"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return to_gguf("tutor/sft", tmp_path_factory.mktemp("gguf") / "tutor.gguf", "f32")


@pytest.fixture(scope="module")
def llama(gguf):
    with serve(gguf, key="s3cret", n_ctx=512, **EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def hf():
    with serve("tutor/sft", key="s3cret") as server:
        yield server


@pytest.fixture(scope="module", params=["llama", "hf"])
def server(request):
    return request.getfixturevalue(request.param)


def alive(pid: int) -> bool:
    "Is this process running? A zombie that waits to be collected is not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float = 6) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def leftovers() -> set:
    return set(Path(tempfile.gettempdir()).glob("llmcourse-serve-*"))


# ---- the contract, on both servers


def test_models_list(server):
    assert [m.id for m in server.client().models.list().data] == [server.name]


def test_chat(server):
    reply = server.client().chat.completions.create(model=server.name, messages=CHAT, temperature=0, max_tokens=100)
    assert reply.choices[0].message.role == "assistant" and reply.choices[0].finish_reason == "stop"
    assert is_right(reply.choices[0].message.content, ROWS[0]["answer"])
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_length(server):
    reply = server.client().chat.completions.create(model=server.name, messages=CHAT, temperature=0, max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3
    short = remote(server.url, key="s3cret", max_tokens=3)
    assert short(CHAT) == reply.choices[0].message.content + "…" == "".join(short.stream(CHAT))


def test_stream_is_the_reply_in_pieces(server):
    ask = remote(server.url, key="s3cret", max_tokens=100)
    pieces = list(ask.stream(CHAT))
    assert len(pieces) > 10 and "".join(pieces) == ask(CHAT)


def test_plain_text_goes_to_completions(server):
    ask = remote(server.url, key="s3cret", max_tokens=60, stop="\n")
    assert ask("What is 47 plus 38?\nWorking:").strip().startswith("47+38")


@pytest.mark.parametrize("key", [None, "", "guess", "s3cre", "s3cret2"])
def test_bad_key(server, key):
    with pytest.raises(openai.AuthenticationError):
        connect(server.url, key).chat.completions.create(model=server.name, messages=CHAT)
    with pytest.raises(UserError, match="key is missing or wrong"):
        remote(server.url, model=server.name, key=key)(CHAT)


@pytest.mark.parametrize("key", ["clé", "a b", "a\nb"])
def test_a_key_that_no_header_can_carry(gguf, key):
    for ask in (lambda: serve(gguf, key=key), lambda: connect("http://127.0.0.1:1/v1", key)):
        with pytest.raises(UserError, match="key: "):
            ask()


def test_no_header_no_entry(server):
    import urllib.request

    for path in ("/v1/models", "/v1/chat/completions"):
        with pytest.raises(urllib.error.HTTPError) as e:
            urllib.request.urlopen(urllib.request.Request(server.root + path, b"{}" if "chat" in path else None))
        assert e.value.code == 401


def test_health_needs_no_key(server):
    import urllib.request

    assert json.loads(urllib.request.urlopen(server.root + "/health").read())["status"] == "ok"


def test_no_foreign_page_may_ask(server):
    import urllib.request

    ask = urllib.request.Request(
        server.root + "/v1/models", headers={"Authorization": "Bearer s3cret", "Origin": "http://elsewhere.example"}
    )
    assert urllib.request.urlopen(ask).headers.get("Access-Control-Allow-Origin", "") == ""


def test_bench(server):
    out = bench(server.url, [r["messages"] for r in ROWS[:4]], clients=2, key="s3cret", max_tokens=8)
    assert out["requests"] == 4 and out["tokens"] == 32 and out["clients"] == 2
    assert (
        out["tokens_per_second"] == pytest.approx(32 / out["seconds"], rel=0.2)
        and 0 < out["ttft_ms"] <= out["p95_ms"] < 1000 * out["seconds"] + 100
        and out["p50_ms"] <= out["p95_ms"]
    )


def test_the_bench_command(llama, capsys, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_API_KEY", "s3cret")
    assert main(["bench", llama.url, "--clients", "1,4", "--n", "4", "--max-tokens", "4", "--json"]) == 0
    one, four = json.loads(capsys.readouterr().out)
    assert one["clients"] == 1 and four["clients"] == 4 and four["requests"] == 4 and four["tokens"] == 16
    assert main(["bench", llama.url, "--clients", "2", "--n", "2", "--max-tokens", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for words in ("0", "1,x", ""):
        assert main(["bench", llama.url, "--clients", words]) == 2
        assert "give whole numbers from 1 up" in capsys.readouterr().err


def test_both_servers_give_the_tokens_of_transformers(llama, hf):
    own = Local(*load("tutor/sft"), max_new_tokens=100).batch([r["messages"] for r in ROWS])
    for s in (llama, hf):
        assert [remote(s.url, key="s3cret", max_tokens=100)(r["messages"]) for r in ROWS] == own
    counts = [
        s.client().chat.completions.create(model=s.name, messages=CHAT, temperature=0, max_tokens=50).usage
        for s in (llama, hf)
    ]
    assert (
        counts[0].prompt_tokens == counts[1].prompt_tokens
        and counts[0].completion_tokens == counts[1].completion_tokens
    )


# ---- llama.cpp's own


def test_too_long_a_prompt(llama):
    with pytest.raises(
        UserError, match=r"400: request \(\d+ tokens\) exceeds the available context size \(512 tokens\)"
    ) as e:
        remote(llama.url, key="s3cret")([{"role": "user", "content": "7 + " * 1000}])
    assert "\n" not in str(e.value)


def test_json_schema_and_metrics(llama):
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    ask = remote(
        llama.url, key="s3cret", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    )
    assert isinstance(json.loads(ask(CHAT))["answer"], int)
    assert "llamacpp:tokens_predicted_total" in llama.get("/metrics")


def test_template_of_the_file_is_used(llama):
    _, tokenizer = load("tutor/sft")
    shown = json.loads(llama.get("/apply-template", {"messages": CHAT}))["prompt"]
    assert tokenizer.bos_token + shown == render(tokenizer, CHAT)


def test_adapter_is_merged_first(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load("tutor/base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tuned.peft_config["default"].base_model_name_or_path = "tutor/base"
    tuned.save_pretrained(tmp_path / "adapter"), tokenizer.save_pretrained(tmp_path / "adapter")
    job = module._model_folder(str(tmp_path / "adapter"), tmp_path / "work")
    merged = load(job["path"])[0].state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(merged, load("tutor/base")[0].state_dict()["model.layers.0.self_attn.q_proj.weight"])


# ---- bad input: one line that names the place and the way out, and nothing started


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_an_open_door_needs_a_key(gguf, host):
    before = leftovers()
    for key in (None, ""):
        with pytest.raises(UserError, match="key"):
            serve(gguf, host=host, key=key)
    assert leftovers() == before


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.0.1", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "", "localhost.example.org"]))


def test_open_host_with_a_key_answers(gguf):
    with serve(gguf, host="0.0.0.0", key="s3cret") as server:
        assert "127.0.0.1" in server.url and remote(server.url, key="s3cret", max_tokens=4)(CHAT)


def test_port_in_use(llama, gguf):
    port = int(llama.url.rsplit(":", 1)[1].split("/")[0])
    before = leftovers()
    for ask in (
        lambda: serve(gguf, port=port),
        lambda: serve("tutor/sft", port=port),
        lambda: check_address("127.0.0.1", port, None),
    ):
        with pytest.raises(UserError, match=rf"port {port} on 127.0.0.1: .*in use.*port 0"):
            ask()
    assert leftovers() == before
    assert remote(llama.url, key="s3cret", max_tokens=4)(CHAT), "the server that holds the port is unharmed"


def test_a_port_is_free_again_after_its_server(gguf):
    port = free_port()
    for _ in range(2):
        with serve(gguf, port=port) as server:
            assert server.url == f"http://127.0.0.1:{port}/v1" and remote(server.url, max_tokens=2)(CHAT)


@pytest.mark.parametrize(
    "port,host", [(70000, "127.0.0.1"), (-1, "127.0.0.1"), (0, "203.0.113.1"), (0, "no.such.host.invalid")]
)
def test_a_port_or_host_that_cannot_be(port, host):
    with pytest.raises(UserError, match=f"port {port} on {host}"):
        free_port(host, port)


def test_resolve(gguf, tmp_path):
    assert resolve(gguf) == ("llama.cpp", str(gguf.resolve())) and resolve("tutor/base") == (
        "transformers",
        str(weights() / "base"),
    )
    assert resolve("owner/name") == ("transformers", "owner/name")
    (tmp_path / "text.gguf").write_text("hello there")
    (tmp_path / "empty").mkdir()
    for model, engine, says in [
        (gguf, "transformers", "takes a model folder"),
        ("tutor/base", "llama.cpp", "takes a .gguf file"),
        (tmp_path / "no.gguf", None, "no such file"),
        (tmp_path / "text.gguf", None, "not a GGUF file"),
        (tmp_path / "empty", None, "no config.json"),
        (tmp_path / "nowhere/x", None, "no such folder"),
        ("tutor/bsae", None, "did you mean 'tutor/base'"),
        (gguf, "vlm", "unknown engine"),
    ]:
        with pytest.raises(UserError, match=says) as e:
            resolve(model, engine)
        assert "\n" not in str(e.value) and ("engine" in says or str(model) in str(e.value))


def test_half_a_file_says_why(gguf, tmp_path):
    (tmp_path / "half.gguf").write_bytes(gguf.read_bytes()[:2_000_000])
    before = leftovers()
    with pytest.raises(UserError, match="half: the llama.cpp server died while starting: .*corrupted or incomplete"):
        serve(tmp_path / "half.gguf")
    assert leftovers() == before


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda b: b"GGUF", "failed to read header"),
        (lambda b: b[:5000], "failed to read key-value pairs"),
        (lambda b: b.replace(b"llama", b"zebra"), "unknown model architecture: 'zebra'"),
    ],
    ids=["no header", "half a header", "another architecture"],
)
def test_a_broken_file_says_why(gguf, tmp_path, change, why):
    (tmp_path / "broken.gguf").write_bytes(change(gguf.read_bytes()))
    with pytest.raises(UserError, match=f"broken: the llama.cpp server died while starting: .*{why}"):
        serve(tmp_path / "broken.gguf")


def test_a_broken_model_folder_says_why(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{")
    before = leftovers()
    with pytest.raises(UserError, match=r"half: the transformers server died while starting: \w") as e:
        serve(tmp_path / "half", timeout=60)
    assert "\n" not in str(e.value) and "log is empty" not in str(e.value) and leftovers() == before


@pytest.mark.parametrize("path,says", [("/nowhere", "/nowhere: 404"), ("/metrics?x", "llamacpp:")])
def test_get(llama, path, says):
    try:
        said = llama.get(path)
    except UserError as e:
        said = str(e)
    assert says in said


@pytest.mark.parametrize(
    "options,says",
    [({"n_paralel": 2}, "did you mean 'n_parallel'"), ({"cache_type_k": "f33"}, "unknown cache_type_k 'f33'")],
)
def test_unknown_settings(gguf, options, says):
    with pytest.raises(UserError, match=says):
        serve(gguf, **options)


def test_nothing_answers():
    with pytest.raises(UserError, match="nothing answers there"):
        remote(f"http://127.0.0.1:{free_port()}/v1")


def test_the_key_of_the_environment_is_not_sent(llama, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    assert connect(llama.url).api_key == "none"
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert connect(llama.url, "s3cret").models.list().data


# ---- nothing is left behind


def test_stop(gguf):
    before = leftovers()
    server = serve(gguf)
    pid = server.process.pid
    assert alive(pid) and len(leftovers()) == len(before) + 1
    server.stop(), server.stop()
    assert not alive(pid) and leftovers() == before and "(stopped)" in repr(server)
    with pytest.raises(UserError, match="nothing answers"):
        remote(server.url)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_with_block_ends_it_whatever_happens(gguf, error):
    with pytest.raises(error):
        with serve(gguf) as server:
            raise error
    assert not alive(server.process.pid) and not server.folder.exists()


def test_interrupt_while_starting(gguf, monkeypatch):
    started = []

    def interrupted(server, ready, timeout):
        started.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "until", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(gguf)
    assert not alive(started[0].process.pid) and not started[0].folder.exists()


def test_too_slow(gguf, monkeypatch):
    monkeypatch.setattr(Server, "healthy", lambda self: False)
    before = leftovers()
    with pytest.raises(UserError, match="not ready after 0.2 s"):
        serve(gguf, timeout=0.2)
    assert leftovers() == before


def test_wait_reports_a_death(gguf):
    with serve(gguf) as server:
        server.process.kill()
        with pytest.raises(UserError, match="died"):
            server.wait()


PARENT = """
import sys, time
from llmcourse.serve import serve
server = serve(sys.argv[1])
print(server.process.pid, server.folder, flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end,how",
    [
        ("", None),
        ("1/0", None),
        ("sys.exit(3)", None),
        ("server.wait()", signal.SIGINT),
        ("server.wait()", signal.SIGTERM),
        ("server.wait()", signal.SIGKILL),
        ("import os; os._exit(0)", None),
    ],
    ids=["end", "exception", "exit", "ctrl-c", "sigterm", "sigkill", "crash"],
)
def test_no_orphan(gguf, end, how):
    "However the parent ends, its server ends with it, and takes its folder along."
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(module.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(end=end), str(gguf)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's background job ignores it, and hands that on
    pid, folder = parent.stdout.readline().split()
    if how is not None:
        assert alive(int(pid))
        os.killpg(parent.pid, how)  # as a terminal does: to the whole group
    parent.wait(20)
    assert gone(int(pid)), "the server outlived its parent"
    time.sleep(0.05)
    assert not Path(folder).exists()


def test_key_is_in_no_process_list(llama):
    line = (
        Path(f"/proc/{llama.process.pid}/cmdline").read_bytes()
        + Path(f"/proc/{llama.process.pid}/environ").read_bytes()
    )
    assert b"s3cret" not in line


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none(port):
    from llmcourse.serve import check_address

    with pytest.raises(UserError, match=f"port {port}: give a number from 0"):
        check_address("127.0.0.1", port, None)


# ---- children of any kind


@pytest.mark.parametrize(
    "log,why",
    [
        ("", "its log is empty"),
        ("a\n\n b \n", "b"),
        ("0.1 I one\n0.2 E  two  words\n0.3 E three\nfour", "two words"),
        ("0.00.001.719 I srv init: build_info: b0-unknown\nlast", "last"),
        ("x" * 400, "x" * 300),
    ],
)
def test_cause(log, why):
    assert cause(log) == why


@pytest.mark.parametrize(
    "target,job,why",
    [
        ("json:loads", "{", "JSONDecodeError: Expecting property name"),
        ("no.such.module:f", 1, "No module named 'no'"),
        ("builtins:exec", "print('a last word'); raise SystemExit(3)", "a last word"),
        ("builtins:exec", "import os; os._exit(1)", "its log is empty"),
        (
            "builtins:exec",
            "from llmcourse.core import UserError; raise UserError('give a key')",
            "starting: give a key",
        ),
    ],
)
def test_a_child_says_why_it_died(target, job, why):
    with Child(target, job, "a child") as child, pytest.raises(UserError, match=why):
        child.until(lambda: False, 30)
    assert not child.folder.exists()


def test_a_child_that_hangs_at_its_end_is_killed():
    "A thread that never ends does not keep a failed child alive."
    job = "import threading; threading.Thread(target=threading.Event().wait).start(); raise ValueError('no')"
    with Child("builtins:exec", job, "a child") as child, pytest.raises(UserError, match="ValueError: no"):
        child.until(lambda: False, 20)


def test_a_job_is_in_no_process_list():
    with Child("builtins:exec", "import time; time.sleep(60)  # s3cret", "a child") as child:
        assert b"s3cret" not in Path(f"/proc/{child.process.pid}/cmdline").read_bytes()


# ---- several adapters over one base


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    "Two adapters of tutor/base: the tutor's own, and the same with half of it taken away."
    import shutil

    from safetensors.torch import load_file, save_file

    half = shutil.copytree(weights() / "sft", tmp_path_factory.mktemp("adapters") / "half")
    tensors = load_file(half / "adapter_model.safetensors")
    save_file({k: v * (0.5 if "lora_B" in k else 1) for k, v in tensors.items()}, half / "adapter_model.safetensors")
    return {"sums": "tutor/sft", "half": str(half)}


@pytest.fixture(scope="module")
def several(adapters):
    with served("tutor/base", quant="F32", adapters=adapters, key="s3cret") as server:
        yield server


def test_each_name_replies_as_its_adapter_alone(several, adapters):
    "Also when the names alternate, eight requests at a time: no reply is made from the cache of another's."
    from concurrent.futures import ThreadPoolExecutor

    chats = [to_chat(p, answered=False)["messages"] for p in problems(8, 3, ("add", "sub", "story1"), "test")]
    folders = {several.name: "tutor/base"} | adapters
    alone = {name: Local(*load(path), max_new_tokens=48).batch(chats) for name, path in folders.items()}
    assert alone["sums"] != alone["half"] != alone[several.name]
    ask = {name: remote(several.url, name, "s3cret", max_tokens=48) for name in folders}
    order = [(i, name) for i in range(len(chats)) for name in folders]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda one: ask[one[1]](chats[one[0]]), order))
    wrong = sum(reply.rstrip("…") != alone[name][i].rstrip("…") for (i, name), reply in zip(order, replies))
    assert wrong <= 2, f"{wrong} of {len(order)} replies are others than alone"  # near-ties may turn in a batch


def test_names_are_listed_and_others_refused(several):
    assert [m.id for m in several.client().models.list().data] == several.names == ["base-F32", "sums", "half"]
    with pytest.raises(openai.NotFoundError, match="no model 'sum' here: there are base-F32, sums, half"):
        several.client().chat.completions.create(model="sum", messages=CHAT)
    with pytest.raises(UserError, match="404: no model 'sum' here: there are base-F32, sums, half"):
        remote(several.url, "sum", "s3cret")(CHAT)
    with pytest.raises(openai.AuthenticationError):
        connect(several.url, "guess").chat.completions.create(model="sum", messages=CHAT)


def test_a_stream_and_a_count_pass_the_door(several):
    asked = dict(model="sums", messages=CHAT, temperature=0, max_tokens=60)
    whole = several.client().chat.completions.create(**asked)
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(several.client().chat.completions.create(**asked))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len(pieces) > 10 and "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_client_that_hangs_up_stops_the_engine(several):
    "Without it the engine would write on for nobody."
    import httpx

    body = {"model": "sums", "messages": CHAT, "max_tokens": 900, "stream": True, "ignore_eos": True}
    head = {"Authorization": "Bearer s3cret"}
    with httpx.stream("POST", several.url + "/chat/completions", json=body, headers=head, trust_env=False) as answer:
        next(answer.iter_raw())
    end = time.monotonic() + 10
    busy = lambda: "llamacpp:requests_processing 0" not in several.get("/metrics")
    while time.monotonic() < end and busy():
        time.sleep(0.05)
    made = float(re.search(r"^llamacpp:tokens_predicted_total (\S+)", several.get("/metrics"), re.M)[1])
    assert not busy() and made < 900 + 4000, made


@pytest.mark.parametrize(
    "engine, given, why",
    [
        ("transformers", {"a": "x"}, "transformers: one model, no adapters by name"),
        ("llama.cpp", {"tutor": "x.gguf"}, "adapter tutor: the base model has that name"),
        ("llama.cpp", {"a": "x.gguf"}, "x.gguf: no such file"),
        ("vllm", {"a": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_adapters_that_cannot_be(engine, given, why, monkeypatch):
    monkeypatch.setattr(module, "check_program", lambda name: None)
    with pytest.raises(UserError, match=why):
        module.check_adapters(engine, "tutor", given)


def test_a_draft_guesses_and_changes_nothing():
    with served("tutor/sft", draft="tutor/draft") as server:
        asked = {"temperature": 0, "messages": [{"role": "user", "content": "What is 47 + 38?"}]}
        said = json.loads(server.get("/v1/chat/completions", asked))
    assert said["choices"][0]["message"]["content"].endswith("so 85.\nAnswer: 85")
    assert said["timings"]["draft_n"] >= said["timings"]["draft_n_accepted"] > 0


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (dict(draft="tutor/drft"), "did you mean 'tutor/draft'"),
        (dict(draft="tutor/draft", engine="transformers"), "llama.cpp does"),
        (dict(model="tutor/nothing", engine="auto"), "^unknown checkpoint 'tutor/nothing'"),
    ],
)
def test_a_draft_or_a_model_that_cannot_be(how, why):
    with pytest.raises(UserError, match=why), served(**how):
        pass


def test_adapters_of_two_templates_are_refused():
    both = {"sums": "tutor/sft", "tools": "tutor/tools"}
    with pytest.raises(UserError, match="adapters sums, tools: trained with different chat templates"):
        with served("tutor/base", adapters=both):
            pass


def test_adapters_speak_in_their_own_chat_template(tmp_path):
    "The base has another, or none."
    import shutil

    mine = shutil.copytree(weights() / "sft", tmp_path / "mine")
    (mine / "chat_template.jinja").write_text("{{- 'Note. ' }}" + (mine / "chat_template.jinja").read_text())
    with served("tutor/base", quant="F32", adapters={"mine": mine}) as one:
        shown = json.loads(one.get("/apply-template", {"messages": CHAT, "model": "mine"}))["prompt"]
    assert shown.startswith("Note. ") and render(load(mine)[1], CHAT).endswith(shown[-40:])
