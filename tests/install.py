"""Make an environment and install the course there: `python tests/install.py .venv default demo`, as the Makefile does.

uv comes from the package index like everything else, and chooses the build of torch that this machine's driver can
run: for the CPU where there is none. Where PyTorch's own index is out of reach, pip installs what its index has.
A stamp, `.ready-demo` and so on, says what is whole: after Ctrl-C the same command goes on.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip"]
STAGES = {"demo": "", "lab": "[lab,bnb]", "test": "[lab,test,bnb]"}  # each holds the ones before it
# pip's setting: uv's variable, and what is between two values
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", ""),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", ""),
    "no-index": ("UV_NO_INDEX", ""),
    "proxy": ("ALL_PROXY", ""),
}


def pip_settings(listed: str) -> dict[str, str]:
    "What `pip config list` prints, without sections: the shell's before a command's own before a global one."
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)=(['\"].*['\"])$", listed, re.M)
    found.sort(key=lambda x: ("global", "install", ":env:").index(x[0]))
    return {name: value[1:-1].replace("\\n", " ") for _, name, value in found}


def for_uv(settings: dict[str, str], environ: dict[str, str]) -> dict[str, str]:
    "pip's settings as uv's variables: uv does not read pip's. What is set for uv already stays."
    named = {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & set(environ)
    found = {}
    for name, (variable, between) in SETTINGS.items():
        if name not in settings or variable in environ or (named and name == "index-url"):
            continue
        values = settings[name].split()
        found[variable] = between.join(values) if between else settings[name]
    if "UV_INDEX" in found:
        found.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip: the best of all indexes
    return found


def uv_environ() -> dict[str, str]:
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    return os.environ | for_uv(pip_settings(listed), dict(os.environ))


def uv(*words: str) -> list[str]:
    return [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *words]


def right_torch(environ: dict[str, str], lock: str) -> str | None:
    "The build of the lock's torch that this machine's driver can run. None if PyTorch's index is out of reach."
    quick = environ | {"UV_HTTP_RETRIES": "0", "UV_HTTP_CONNECT_TIMEOUT": "5"}
    pin = re.search(r"^torch==[\w.+]+", lock, re.M)
    ask = uv("--dry-run", "--reinstall", "--no-deps", "--torch-backend", "auto", pin[0] if pin else "torch")
    done = subprocess.run(ask, env=quick, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^ [+~] (torch==\S+)", done.stderr, re.M)
    return found[1] if found and done.returncode == 0 else None


def attempts(lock: Path, package: str, environ: dict[str, str]):
    "The commands that install, one after the other, until one succeeds."
    text = lock.read_text(encoding="utf-8")
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    compiled = ["--compile-bytecode"] if sys.dont_write_bytecode else []  # nobody would do it later
    torch = right_torch(environ, text)
    if torch:
        print(f"{torch}: the build for this machine", flush=True)
        if torch.endswith("+cpu") and shutil.which("nvidia-smi"):
            print("No build of it runs on this GPU's driver: update the driver, or name an older torch in", lock)
        mine = Path(sys.prefix) / "constraints.txt"
        mine.write_text(re.sub(r"^torch==[\w.+]+", torch, text, flags=re.M), encoding="utf-8")
        yield uv(*quiet, *compiled, "--torch-backend", "auto", "-c", str(mine), "-e", package)
    else:
        print("PyTorch's index is out of reach: torch comes from the package index", flush=True)
        yield uv(*quiet, *compiled, "-c", str(lock), "-e", package)
    yield [*PIP, "install", "--quiet", "--progress-bar", "on", "-c", str(lock), "-e", package]


def go_on_in(folder: str, *words: str) -> None:
    "Make an environment there, or the rest of it, and go on inside."
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    python = str(Path(folder, "bin", "python").absolute())
    os.execv(python, [python, __file__, *words])


def main(name: str, stage: str) -> int:
    environ = uv_environ()
    if subprocess.run([*PIP, "install", "--quiet", "uv>=0.8"]).returncode:
        print("uv cannot be installed: pip installs everything", flush=True)
    for command in attempts(ROOT / f"constraints/{name}.txt", f"{ROOT}{STAGES[stage]}", environ):
        if subprocess.run(command, cwd=ROOT, env=environ).returncode == 0:
            break
    else:
        return 1
    if stage == "test":
        subprocess.run([sys.executable, "tests/hooks.py"], cwd=ROOT, check=True)
    for done in list(STAGES)[: list(STAGES).index(stage) + 1]:
        (Path(sys.prefix) / f".ready-{done}").touch()
    return 0


if __name__ == "__main__":
    try:
        if len(sys.argv) == 4:
            go_on_in(*sys.argv[1:])
        raise SystemExit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
