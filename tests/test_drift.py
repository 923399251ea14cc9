"""Every upstream symbol and argument that the package uses exists in the installed versions.

A renamed argument fails here, and not in a lesson.
"""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UPSTREAM = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "gguf",
    "gradio",
    "openai",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "accelerate",
    "matplotlib",
    "pandas",
    "tqdm",
    "xllamacpp",
    "fastcore",
    "bitsandbytes",
    "fastapi",
    "uvicorn",
    "trackio",
)
FILES = [p for p in sorted((ROOT / "llmcourse").rglob("*.py")) if p.name != "_modidx.py"]


def dotted(node) -> list[str] | None:
    "`a.b.c` as a list; None for anything that begins with more than a name."
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return [*front, node.attr]


def names_of(tree) -> dict[str, list[str]]:
    "Local name → upstream module and symbol, for every import in a file, those inside of functions too."
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] in UPSTREAM:
                    found[a.asname or a.name.split(".")[0]] = [a.name if a.asname else a.name.split(".")[0]]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in UPSTREAM:
            found |= {a.asname or a.name: [node.module, a.name] for a in node.names}
    return found


def uses():
    "(file:line, module, path of the symbol, keyword arguments): once for each symbol in a call, or named without one."
    for path in FILES:
        tree = ast.parse(path.read_text())
        names, seen = names_of(tree), set()
        for node in ast.walk(tree):
            call = isinstance(node, ast.Call)
            chain = dotted(node.func if call else node) if call or isinstance(node, (ast.Name, ast.Attribute)) else None
            if not chain or chain[0] not in names:
                continue
            module, *symbol = names[chain[0]]
            words = tuple(sorted(k.arg for k in node.keywords if k.arg)) if call else ()
            if (key := (module, *symbol, *chain[1:], words)) in seen:
                continue
            seen.add(key)
            yield pytest.param(
                module,
                [*symbol, *chain[1:]],
                words,
                id=f"{path.stem}:{node.lineno} {'.'.join([module, *symbol, *chain[1:]])}({', '.join(words)})",
            )


def resolve(module: str, path: list[str]):
    "The object; attributes of instances, which only exist at run time, end the way."
    try:
        thing = importlib.import_module(module)
    except ImportError:
        if module.split(".")[0] in ("bitsandbytes", "trackio"):
            pytest.skip(f"{module} is optional and not installed")
        raise
    for name in path:
        if not isinstance(thing, (types.ModuleType, type)):
            return None
        if isinstance(thing, types.ModuleType) and not hasattr(thing, name):
            thing = importlib.import_module(f"{thing.__name__}.{name}")
        else:
            thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("module,path,words", uses())
def test_upstream_has(module, path, words):
    thing = resolve(module, path)
    if not words or not callable(thing):
        return
    try:
        parameters = inspect.signature(thing).parameters
    except (ValueError, TypeError):
        return  # written in C: no signature to look at
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    assert set(words) <= set(parameters), f"{'.'.join([module, *path])} has no {sorted(set(words) - set(parameters))}"


@pytest.mark.parametrize("scale", ["cpu", "t4", "l4", "a100", "h100"])
@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo", "cpo", "reward-model", "grpo", "rloo"])
def test_every_default_is_a_field_of_the_config(scale, method):
    from llmcourse.core import scale as read_scale
    from llmcourse.methods import method as find
    from llmcourse.training import upstream

    entry = find(method)
    config = upstream(entry.config)
    for lora in (False, True):
        ours = entry.defaults(read_scale(scale), 10**9, lora)
        assert set(ours) <= set(config.__dataclass_fields__)
        assert not {k: v for k, v in ours.items() if config.__dataclass_fields__[k].metadata.get("deprecated")}


def test_the_sentinel_sees_a_renamed_argument(tmp_path, monkeypatch):
    code = """def f():
    from trl import SFTTrainer, SFTConfig
    import gradio as gr
    SFTTrainer('m', tokenizer=1)
    SFTConfig(max_seq_length=1)
    gr.Chatbott()
    gr.Button(colour=1)"""
    (tmp_path / "lesson.py").write_text(code)
    monkeypatch.setitem(globals(), "FILES", [tmp_path / "lesson.py"])
    for wrong in ("SFTTrainer(tokenizer)", "SFTConfig(max_seq_length)", "gradio.Chatbott()", "gradio.Button(colour)"):
        case = next(u for u in uses() if u.id.endswith(wrong))
        with pytest.raises((AssertionError, AttributeError, ImportError)):
            test_upstream_has(*case.values)
