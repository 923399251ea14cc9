"""What ships in deployment/ parses, imports, and says what it should."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator, validators

from llmcourse.cli import COMMANDS, command
from llmcourse.core import UserError
from llmcourse.options import parse
from llmcourse.passwords import add_person
from llmcourse.redact import secret
from llmcourse.servers import free_port

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deployment"


class Recorder:
    "Stands in for a Modal object: every attribute is a decorator or a factory, and calls are kept."

    def __init__(self, calls, name=""):
        self.calls, self.name = calls, name

    def __getattr__(self, name):
        return Recorder(self.calls, f"{self.name}.{name}".strip("."))

    def __call__(self, *args, **kwargs):
        self.calls.append((self.name, args, kwargs))
        return (
            args[0]
            if len(args) == 1 and callable(args[0]) and not kwargs and not isinstance(args[0], Recorder)
            else Recorder(self.calls, self.name + "()")
        )


@pytest.fixture
def load(monkeypatch):
    def load(name):
        calls, modal = [], types.ModuleType("modal")
        for part in ("App", "Volume", "Image", "Secret", "concurrent", "web_server"):
            setattr(modal, part, Recorder(calls, part))
        monkeypatch.setitem(sys.modules, "modal", modal)
        spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / "modal" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, calls

    return load


def test_modal_pair_shares_volume_and_model(load):
    (download, c1), (serve, c2) = load("download"), load("serve")
    volume = [args[0] for c in (c1, c2) for name, args, _ in c if name == "Volume.from_name"]
    assert len(volume) == 2 and len(set(volume)) == 1
    assert download.MODEL == serve.MODEL and download.FOLDER == serve.FOLDER
    assert any(kw.get("port") == serve.PORT for name, _, kw in c2 if name == "web_server")


def test_modal_serve_needs_a_key_and_hides_it(load, monkeypatch):
    serve, calls = load("serve")
    monkeypatch.delenv("LLMCOURSE_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="LLMCOURSE_API_KEY"):
        serve.environment()
    monkeypatch.setenv("LLMCOURSE_API_KEY", "k3y")
    assert serve.environment()["VLLM_API_KEY"] == "k3y" and "k3y" not in " ".join(serve.command())
    assert any(name == "Secret.from_name" for name, *_ in calls)


def test_download_takes_safetensors_only():
    text = (DEPLOY / "modal/download.py").read_text()
    patterns = re.search(r"allow_patterns=\[([^]]*)\]", text)[1]
    assert "safetensors" in patterns and ".bin" not in patterns and ".pt" not in patterns


def test_dockerfile():
    "Instructions are known, what is copied exists, it does not run as root, and it runs the demo under the lock."
    lines = [x for x in (DEPLOY / "Dockerfile").read_text().splitlines() if x and not x.startswith("#")]
    words = [x.split()[0] for x in lines if not x.startswith((" ", "\t"))]
    assert words[0] == "FROM" and set(words) <= {
        "FROM",
        "ARG",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "ENV",
        "EXPOSE",
        "ENTRYPOINT",
        "HEALTHCHECK",
        "CMD",
    }
    for line in (x for x in lines if x.startswith("COPY")):
        assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"llmcourse", "constraints", "pyproject.toml"} & set(ignored)
    user = next(x for x in lines if x.startswith("USER")).split()[1]
    assert user != "root"
    text = "\n".join(lines)
    assert "constraints/default.txt" in text and '"demo"' in text and "LLMCOURSE_API_KEY=" not in text


def test_the_image_installs_the_package_for_the_cpu():
    "Plain pip on Linux would bring gigabytes of CUDA. uv knows each option, and both builds that are named."
    text = (DEPLOY / "Dockerfile").read_text()
    command = re.search(r"uv pip install (.+)$", text, re.M)[1].split()
    assert command[-1] == ".[postgres]" and (ROOT / command[command.index("-c") + 1]).exists()
    known = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f" {x}" in known for x in command if x.startswith("--"))
    named = re.findall(r"\bTORCH=(\w+)", text)
    assert "ARG TORCH=cpu" in text and command[command.index("--torch-backend") + 1] == "$TORCH"
    values = re.search(r"--torch-backend <.*?possible\s+values: (.*?)\]", known, re.S)[1]
    assert len(named) == 2 and all(re.search(rf"\b{x}\b", values) for x in named)


def test_modelfile():
    "The Ollama Modelfile that ships is the one that the export writes for the tutor."
    text = (DEPLOY / "ollama/Modelfile").read_text()
    assert "\nFROM ./" in text and "TEMPLATE" in text and "PARAMETER stop" in text and "<|eot_id|>" in text


def test_shipped_modelfile_is_the_exported_one(tmp_path):
    from llmcourse.shipping import export_folder

    written = export_folder("tutor/sft", tmp_path, "Q8_0")[1]
    assert written.read_text() == (DEPLOY / "ollama/Modelfile").read_text()


# ---- every command is a real command


def docker_commands(text: str) -> list[list[str]]:
    return [json.loads(words) for words in re.findall(r"^CMD (\[.*\])$", text, re.M)]


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def manifests() -> list[dict]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def containers() -> list[dict]:
    return [
        c for one in manifests() if one["kind"] == "Deployment" for c in one["spec"]["template"]["spec"]["containers"]
    ]


def unit(file: Path) -> dict[str, str]:
    lines = [line.split("=", 1) for line in file.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(lines)


def commands() -> dict[str, list[str]]:
    "Where it stands → the words after `llmcourse`."
    found = {f"Dockerfile {i}": words for i, words in enumerate(docker_commands((DEPLOY / "Dockerfile").read_text()))}
    found |= {f"compose {name}": s["command"] for name, s in compose()["services"].items() if "command" in s}
    found |= {f"kubernetes {c['name']}": c["args"] for c in containers()}
    for file in sorted((DEPLOY / "systemd").glob("*.service")):
        found[file.name] = shlex.split(unit(file)["ExecStart"])[1:]
    texts = [*DEPLOY.rglob("*.md"), DEPLOY / "Dockerfile", *DEPLOY.rglob("*.yaml")]
    for file in texts:
        for line in re.findall(r"(?:^ {4}|`)(llmcourse [^`\n]+)", file.read_text(), re.M):
            found[f"{file.name} {line}"] = shlex.split(line, comments=True)[1:]
    return found


@pytest.mark.parametrize("where", commands())
def test_every_command_and_option_exists(where):
    name, *words = commands()[where]
    words = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in words]  # as compose fills it in
    told = parse(command(name), f"llmcourse {name}", words)
    assert name in COMMANDS and told


def test_the_test_of_commands_can_fail():
    with pytest.raises(UserError):
        parse(command("serve"), "llmcourse serve", ["--modell", "tutor/rl"])
    assert len(commands()) >= 12


# ---- the forms are those of compose and Kubernetes


def test_compose_is_what_the_specification_takes():
    schema = json.loads((ROOT / "tests/data/compose.json").read_text())
    check = validators.validator_for(schema)(schema)
    assert list(check.iter_errors(compose())) == []
    wrong = compose()
    wrong["services"]["app"]["depend_on"] = []
    assert list(check.iter_errors(wrong))


def test_compose_holds_together():
    "Who is waited for has a health check; secrets and volumes are declared; what is built is a target."
    whole, docker = compose(), (DEPLOY / "Dockerfile").read_text()
    checked = set(re.findall(r"FROM base AS (\w+)\n(?:(?!FROM).*\n)*HEALTHCHECK", docker))
    for name, service in whole["services"].items():
        for other in service.get("depends_on", {}):
            there = whole["services"][other]
            assert "healthcheck" in there or there["build"]["target"] in checked, (name, other)
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith("./") or source in whole["volumes"], volume
        assert all(one in whole["secrets"] for one in service.get("secrets", []))
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "open to the world"
        if "build" in service:
            assert f"AS {service['build']['target']}\n" in docker
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    assert whole["services"]["app"]["environment"]["DATABASE_URL"].endswith("@db/chat")


def kubernetes_errors(one: dict) -> list:
    whole = json.loads((ROOT / "tests/data/kubernetes.json").read_text())
    schema = {"$ref": f"#/$defs/{whole['kinds'][one['kind']]}", "$defs": whole["$defs"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(one)]


def test_kubernetes_takes_the_manifests():
    for one in manifests():
        assert kubernetes_errors(one) == [], one["metadata"]["name"]
    wrong = manifests()[0]
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert kubernetes_errors(wrong)


def test_manifests_hold_together():
    "Selectors find their pods, ports their names; each container has probes, limits, and no rights to spare."
    deployments = {one["metadata"]["name"]: one for one in manifests() if one["kind"] == "Deployment"}
    services = {one["metadata"]["name"]: one for one in manifests() if one["kind"] == "Service"}
    assert set(deployments) == set(services) == {"llmcourse-server", "llmcourse-chat"}
    for name, one in deployments.items():
        spec = one["spec"]["template"]["spec"]
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert services[name]["spec"]["selector"].items() <= labels.items()
        volumes = {volume["name"] for volume in spec["volumes"]}
        for c in spec["containers"]:
            ports = {port["name"] for port in c["ports"]}
            assert {port["targetPort"] for port in services[name]["spec"]["ports"]} <= ports
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= c.keys()
            assert c["resources"]["limits"].keys() == {"cpu", "memory"}
            assert c["securityContext"]["allowPrivilegeEscalation"] is False and spec["securityContext"]["runAsNonRoot"]
            assert {mount["name"] for mount in c["volumeMounts"]} == volumes
    chat = deployments["llmcourse-chat"]["spec"]["template"]["spec"]["containers"][0]
    [server] = services["llmcourse-server"]["spec"]["ports"]
    assert f"http://llmcourse-server:{server['port']}/v1" in chat["args"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path):
    for file in sorted((DEPLOY / "systemd").glob("*.service")):
        text = file.read_text().replace("/opt/llmcourse/bin/llmcourse", sys.executable)
        text = text.replace("After=llmcourse-server.service\nWants=llmcourse-server.service\n", "")
        (tmp_path / file.name).write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", tmp_path / file.name], capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if file.name in line]
        assert done.returncode == 0 and said == [], done.stderr
    (tmp_path / "wrong.service").write_text(text.replace("RestartSec=5", "RestartSecs=5"))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "wrong.service"], capture_output=True, text=True)
    assert "RestartSecs" in done.stderr


def test_units_run_as_nobody_and_keep_their_keys_in_a_file():
    for file in sorted((DEPLOY / "systemd").glob("*.service")):
        told = unit(file)
        assert told["DynamicUser"] == "yes" and told["ProtectSystem"] == "strict" and told["EnvironmentFile"]


# ---- nothing floats, nothing is secret


def test_images_are_pinned():
    texts = "\n".join(p.read_text() for p in (DEPLOY / "Dockerfile", DEPLOY / "compose.yaml"))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", texts, re.M))
    images = set(re.findall(r"^(?:FROM| +image:) (\S+)", texts, re.M)) - stages | {c["image"] for c in containers()}
    assert len(images) >= 5
    for image in images:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+(\.\d+)?(-[\w-]+)?", image), f"{image} is not pinned"
    needs = (DEPLOY / "space/requirements.txt").read_text().splitlines()
    assert all(re.search(r"==|@v\d", line) for line in needs)


def values(thing, name=""):
    "(name, value) of every environment variable in a compose file or a manifest."
    if isinstance(thing, dict):
        if {"name", "value"} <= thing.keys():
            yield thing["name"], thing["value"]
        for key, value in thing.items():
            yield from values(value, key)
    elif isinstance(thing, list):
        for one in thing:
            yield from values(one, name)
    elif isinstance(thing, str):
        yield name, thing


def test_no_secret_in_a_file():
    for file in (p for p in DEPLOY.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            what, sure = secret(line)
            assert not what or "${" in line, f"{file.name}:{number}: {what}"
    for name, value in [pair for one in (compose(), *manifests()) for pair in values(one)]:
        if re.search(r"KEY|PASSWORD|TOKEN", name):
            assert value.startswith("${"), name
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"deployment/.env", "deployment/people.txt"} <= set(ignored)


# ---- the Space


def test_the_space_says_what_it_is():
    text = (DEPLOY / "space/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert {"title", "sdk", "sdk_version", "app_file", "license"} <= head.keys() and head["sdk"] == "gradio"
    assert (DEPLOY / "space" / head["app_file"]).is_file()
    lock = (ROOT / "constraints/default.txt").read_text()
    assert f"gradio=={head['sdk_version']}\n" in lock


def test_the_space_runs_here(tmp_path):
    "With the tutor: a page that asks for a password; without one, a line that says so."
    app, port = str(DEPLOY / "space/app.py"), free_port()
    env = os.environ | {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    env.pop("CHAT_PASSWORD", None)
    done = subprocess.run([sys.executable, app], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "CHAT_PASSWORD" in done.stderr and done.stderr.count("\n") == 1
    env |= {"CHAT_PASSWORD": "tulip"}
    with page(port, [sys.executable, app], env=env, cwd=tmp_path) as url:
        assert logged_in(url, "guest", "tulip") == 200 and logged_in(url, "guest", "rose") == 401


@contextlib.contextmanager
def page(port: int, words: list[str], **how):
    "Start a chat page and yield its address once it answers."
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, **how)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end
            try:
                assert httpx.get(url, trust_env=False).status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def logged_in(url: str, name: str, password: str) -> int:
    "The status of the page's settings for somebody who tries to log in."
    with httpx.Client(trust_env=False, base_url=url) as client:
        assert client.get("/config").status_code == 401
        client.post("/login", data={"username": name, "password": password})
        return client.get("/config").status_code


class Models(BaseHTTPRequestHandler):
    "As much of a server as a chat page asks for when it starts."

    def do_GET(self):
        body = b'{"object": "list", "data": [{"id": "tutor", "object": "model"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.mark.parametrize("where", ["compose app", "kubernetes chat"])
def test_the_chat_that_is_deployed_lets_its_people_in(where, tmp_path):
    "Its own command, with its secret in another place."
    people, port = tmp_path / "people.txt", free_port()
    add_person(people, "ada", "eleven tulips")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [re.sub(r"^http://.*", f"http://127.0.0.1:{server.server_port}/v1", word) for word in commands()[where]]
    words = [re.sub(r"^/run/secrets/.*", str(people), word) for word in words]
    env = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
    words = [str(Path(sys.executable).with_name("llmcourse")), *words, "--port", str(port)]
    with page(port, words, env=env, cwd=tmp_path) as url:
        assert logged_in(url, "ada", "eleven tulips") == 200 and logged_in(url, "ada", "ten tulips") == 401
    server.shutdown()
