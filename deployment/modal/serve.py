"""Serve a model from the Modal volume behind an OpenAI-compatible URL and a key.

    modal secret create llmcourse-api LLMCOURSE_API_KEY=...     # the key that clients must send
    modal run deployment/modal/download.py
    modal deploy deployment/modal/serve.py                      # prints the URL; OpenAI clients want it with /v1
"""
import os
import subprocess

import modal

MODEL = "unsloth/Llama-3.2-1B-Instruct"
FOLDER = "/models"
PORT = 8000

app = modal.App("llmcourse-serve")
volume = modal.Volume.from_name("llmcourse-models")
image = modal.Image.debian_slim(python_version="3.12").pip_install("vllm>=0.22,<=0.31")


def command(model: str = MODEL) -> list[str]:
    "The server's command line. The key travels in the environment (VLLM_API_KEY), where no process list shows it."
    return ["vllm", "serve", f"{FOLDER}/{model}", "--served-model-name", model, "--host", "0.0.0.0",
            "--port", str(PORT), "--max-model-len", "8192"]


def environment() -> dict[str, str]:
    "The server's environment. Raises `SystemExit` without a key: an open server is somebody else's free lunch."
    key = os.environ.get("LLMCOURSE_API_KEY")
    if not key:
        raise SystemExit("no LLMCOURSE_API_KEY: run modal secret create llmcourse-api LLMCOURSE_API_KEY=...")
    return {**os.environ, "VLLM_API_KEY": key, "HF_HUB_OFFLINE": "1"}


@app.function(image=image, gpu="A10G", volumes={FOLDER: volume}, secrets=[modal.Secret.from_name("llmcourse-api")],
              scaledown_window=300, timeout=3600)
@modal.concurrent(max_inputs=32)
@modal.web_server(port=PORT, startup_timeout=600)
def serve():
    subprocess.Popen(command(), env=environment())
