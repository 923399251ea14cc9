"""Download a model's weights to a Modal volume, once.

    modal run deployment/modal/download.py --model unsloth/Llama-3.2-1B-Instruct

A gated model needs a secret named `huggingface` with HF_TOKEN in it: modal secret create huggingface HF_TOKEN=...
"""
import os

import modal

MODEL = "unsloth/Llama-3.2-1B-Instruct"
FOLDER = "/models"

app = modal.App("llmcourse-download")
volume = modal.Volume.from_name("llmcourse-models", create_if_missing=True)
image = modal.Image.debian_slim(python_version="3.12").pip_install("huggingface_hub>=1")
secrets = [modal.Secret.from_name("huggingface")] if os.environ.get("LLMCOURSE_GATED") else []


@app.function(image=image, volumes={FOLDER: volume}, timeout=3600, secrets=secrets)
def download(model: str = MODEL):
    "Fetch safetensors, tokenizer and config; leave pickles where they are."
    from huggingface_hub import snapshot_download

    path = snapshot_download(model, local_dir=f"{FOLDER}/{model}",
                             allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"])
    volume.commit()
    return path


@app.local_entrypoint()
def main(model: str = MODEL):
    print(f"{model} is at {download.remote(model)} on the volume llmcourse-models")
