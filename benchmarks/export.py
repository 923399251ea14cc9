"""Seconds and peak memory of `llmcourse export` on models of Llama's real shapes: random weights in bfloat16, and a
generated vocabulary of 128,256 tokens with 280,000 merges. Each run in a fresh process, in turn, several rounds; the
figure is the median, and ratios are within a round. With `--converter`, the same models go through llama.cpp's own
convert_hf_to_gguf.py, and with `--quantizer` through its llama-quantize; without them, through the library's
quantisers, a whole tensor at a time, as the converter does. With `--adapter`, a LoRA of rank 16 on every matrix of the
layers: ours merges it on the way, the stock way has PEFT merge it in float32 and save the model first.

    python benchmarks/export.py [rounds] [--shape 1B] [--layers 16] [--quants Q8_0,F16,Q4_K_M] [--folder models]
                                [--converter convert_hf_to_gguf.py] [--quantizer llama-quantize] [--adapter] [--small]

Measured on two idle CPU cores, 1B, all layers, ours / stock, seconds on the clock (n=3, alternated): F32 1.02
(0.97-1.22), F16 0.69 (0.67-0.75), BF16 0.72 (0.71-0.80), Q8_0 0.84 (0.80-0.88); 716 MB at
most, stock 2,170 to 2,455 MB.
On two CPU cores that others used too, so seconds on the clock say little here (n=1 each):
1B, all layers, an adapter, Q8_0: ours 891 MB at most and 21.4 CPU-s, stock 7,650 MB and 39.0 CPU-s.
1B, two layers, all of its embeddings (1,051 MB in float32): ours 708 MB at most as F32, 726 MB as Q4_K_M.
"""
import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "small": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=64, tie_word_embeddings=True),
}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(256 - len(SPECIAL))]
ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192)


def merged(size: int) -> tuple[dict, list]:
    "A byte-level vocabulary of `size` tokens, and about 2.2 ways to merge each from two others, as in Llama 3's."
    from tokenizers.pre_tokenizers import ByteLevel
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = dict.fromkeys(sorted(ByteLevel.alphabet()))
    for length in (2, 3, 4):
        words = ["".join(word) for word in itertools.product(letters, repeat=length)]
        tokens |= dict.fromkeys(rng.sample(words, min(len(words), size - len(tokens))))
    cuts = [[(t[:i], t[i:]) for i in range(1, len(t)) if t[:i] in tokens and t[i:] in tokens] for t in tokens]
    extra = [pair for pairs in cuts for pair in pairs[1:]]
    more = rng.sample(extra, min(len(extra), int(1.2 * size)))
    return {token: i for i, token in enumerate(tokens)}, [pairs[0] for pairs in cuts if pairs] + more


def make_tokenizer(size: int):
    "Llama 3's tokenizer in all but its words."
    from llmcourse.core import model_path
    from llmcourse.gguf_tokens import LLAMA3
    from llmcourse.models import load_tokenizer
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab, merges = merged(size - len(SPECIAL))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIAL)
    first = [(SPECIAL[0], tok.token_to_id(SPECIAL[0]))]
    tok.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A $B",
                                                       special_tokens=first)
    template = load_tokenizer(model_path("tutor/sft")).chat_template
    return PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=template, bos_token=SPECIAL[0],
                                   eos_token="<|eot_id|>", pad_token=SPECIAL[2], clean_up_tokenization_spaces=False)


def make_model(folder: Path, shape: str, layers: int) -> Path:
    "Random weights as large as real ones, layer by layer, in files of one layer each."
    import torch
    from llmcourse.tensors import expected_tensors
    from safetensors.torch import save_file
    from transformers import LlamaConfig
    tokenizer = make_tokenizer(1024 if shape == "small" else 128_256)
    options = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=131_072, rms_norm_eps=1e-5,
                         rope_parameters=ROPE, architectures=["LlamaForCausalLM"], dtype="bfloat16",
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **options)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    pieces, where = {}, {}
    for name, size in expected_tensors(config.to_dict()).items():
        piece = "-".join(name.split(".")[1:3]) if ".layers." in name else name
        pieces.setdefault(piece, {})[name] = size
    for piece, shapes in pieces.items():
        file = f"model-{piece}.safetensors"
        tensors = {name: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02) for name, size in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, model: Path) -> Path:
    "Random numbers as large as a trained LoRA's."
    import torch
    from llmcourse.tensors import expected_tensors
    from peft import LoraConfig
    from safetensors.torch import save_file
    config = json.loads((model / "config.json").read_text())
    shapes = {n: s for n, s in expected_tensors(config).items() if n.endswith("_proj.weight")}
    out = {}
    for name, (rows, columns) in shapes.items():
        start = f"base_model.model.{name.removesuffix('.weight')}"
        out[f"{start}.lora_A.weight"] = torch.empty(16, columns).normal_(std=0.02)
        out[f"{start}.lora_B.weight"] = torch.empty(rows, 16).normal_(std=0.02)
    folder.mkdir(parents=True)
    save_file(out, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in shapes})
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(model)
    config.save_pretrained(folder)
    return folder


def merge(adapter: str, output: str) -> None:
    "What every guide does before it converts."
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = json.loads((Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(net, adapter).merge_and_unload().save_pretrained(output)
    AutoTokenizer.from_pretrained(base).save_pretrained(output)


def watched(words: list, **env) -> dict:
    "Run a program: its seconds on the clock and of the processor, and its peak memory, children included."
    start = time.perf_counter()
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=os.environ | env)
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, said.decode()[-2000:]
    return dict(seconds=time.perf_counter() - start, mb=used.ru_maxrss / 1e3, cpu=used.ru_utime + used.ru_stime)


def ours(model: Path, out: Path, quant: str, _args) -> dict:
    "The export alone: the comparison with transformers behind it takes the memory of the whole model."
    code = "import sys; from llmcourse.shipping import export_folder; export_folder(*sys.argv[1:])"
    return watched([sys.executable, "-c", code, model, out, quant])


def stock(model: Path, out: Path, quant: str, args) -> dict:
    "llama.cpp's converter, and its quantiser where the converter does not know the type."
    if args.adapter:
        first = watched([sys.executable, __file__, "--merge", model, out / "merged"])
        return both(first, stock_model(out / "merged", out, quant, args))
    return stock_model(model, out, quant, args)


def both(first: dict, second: dict) -> dict:
    return {key: max(first[key], second[key]) if key == "mb" else first[key] + second[key] for key in first}


def stock_model(model: Path, out: Path, quant: str, args) -> dict:
    plain = quant if quant in ("F32", "F16", "BF16", "Q8_0") else "BF16"
    file = out / f"{plain}.gguf"
    if args.converter:
        # its list of known tokenizers has no generated ones
        code = ("import runpy, sys; sys.argv = sys.argv[1:]; folder = sys.argv[0].rsplit('/', 1)[0]; "
                "sys.path[:0] = [folder, folder + '/gguf-py']; import conversion.base as base; "
                "base.TextModel.get_vocab_base_pre = lambda *_: 'llama-bpe'; "
                "runpy.run_path(sys.argv[0], run_name='__main__')")
        used = watched([sys.executable, "-c", code, args.converter, model, "--outfile", file, "--outtype",
                        plain.lower()])
    else: used = watched([sys.executable, __file__, "--tensors", model, file, plain])
    if plain == quant: return used
    assert args.quantizer, f"{quant} needs --quantizer"
    return both(used, watched([args.quantizer, file, out / f"{quant}.gguf", quant, os.cpu_count()]))


def whole_tensors(model: str, output: str, kind: str) -> None:
    "The weights alone, by the `gguf` library: each tensor whole, in float32, then in its type."
    import gguf
    import torch
    from llmcourse.converter import gguf_name, permute
    from llmcourse.tensors import tensor_index
    from safetensors import safe_open
    config = json.loads((Path(model) / "config.json").read_text())
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(output, "llama")
    index = tensor_index(Path(model))
    kinds = {name: gguf.GGMLQuantizationType["F32" if len(about[1]) == 1 else kind] for name, about in index.items()}
    for name, about in index.items():
        size = gguf.quants.quant_shape_to_byte_shape(about[1], kinds[name])
        nbytes = torch.Size(size).numel()
        writer.add_tensor_info(gguf_name(name), about[1], "float32", nbytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, about in index.items():
        with safe_open(about[2], "pt") as f: array = f.get_tensor(name).float().numpy()
        for part, n in heads.items():
            if part in name: array = permute(array, n)
        writer.write_tensor_data(gguf.quants.quantize(array, kinds[name]))
    writer.close()


def compare(args, model: Path, scratch: Path) -> None:
    largest = SHAPES[args.shape]["hidden_size"] * (1024 if args.shape == "small" else 128_256) * 4 / 1e6
    contenders = {"ours": ours, "stock": stock}
    for quant in args.quants.split(","):
        found = {name: [] for name in contenders}
        for i in range(args.rounds):
            for name, run in contenders.items():
                with tempfile.TemporaryDirectory(dir=scratch) as out: used = run(model, Path(out), quant, args)
                found[name].append(used)
                print(f"round {i + 1} {name:<5} {used['seconds']:.1f} s {used['cpu']:.1f} CPU-s", flush=True)
        middle = {name: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for name, rows in found.items()}
        for name, row in middle.items():
            print(f"{args.shape} {quant:<7} {name:<5} {row['seconds']:7.1f} s {row['cpu']:7.1f} CPU-s "
                  f"{row['mb']:7,.0f} MB at most (largest tensor in float32: {largest:,.0f} MB)", flush=True)
        for key, what in (("seconds", "time"), ("cpu", "CPU time")):
            ratios = [a[key] / b[key] for a, b in zip(found["ours"], found["stock"])]
            print(f"{args.shape} {quant:<7} ours / stock: {statistics.median(ratios):.2f} of the {what} "
                  f"({min(ratios):.2f}–{max(ratios):.2f}, n={args.rounds})", flush=True)


def main() -> None:
    say = argparse.ArgumentParser()
    say.add_argument("rounds", type=int, nargs="?", default=3)
    say.add_argument("--shape", default="1B", choices=SHAPES)
    say.add_argument("--layers", type=int)
    say.add_argument("--quants", default="Q8_0")
    say.add_argument("--folder", type=Path)
    say.add_argument("--converter")
    say.add_argument("--quantizer")
    say.add_argument("--adapter", action="store_true")
    say.add_argument("--small", action="store_true")
    args = say.parse_args()
    if args.small: args.shape = "small"
    with tempfile.TemporaryDirectory() as scratch:
        model = (args.folder or Path(scratch)) / f"{args.shape}-{args.layers or 'all'}"
        # in a process of its own: its peak of memory would count as ours
        if not model.exists(): watched([sys.executable, __file__, "--make", model, args.shape, args.layers or ""])
        adapter = model.with_name(f"{model.name}-adapter")
        if args.adapter and not adapter.exists(): watched([sys.executable, __file__, "--make-adapter", adapter, model])
        compare(args, adapter if args.adapter else model, args.folder or Path(scratch))


def step(name: str, *words: str) -> None:
    "One step, in a process of its own."
    if name == "--make": make_model(Path(words[0]), words[1], int(words[2] or 0))
    elif name == "--make-adapter": make_adapter(Path(words[0]), Path(words[1]))
    else: {"--merge": merge, "--tensors": whole_tensors}[name](*words)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("--make", "--make-adapter", "--merge", "--tensors"): step(*sys.argv[1:])
    else: main()
