"""A machine of somebody else: an environment that has the libraries, but neither this checkout nor llmcourse."""

import os
import re
import subprocess
import sys
import sysconfig
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(sysconfig.get_paths()["purelib"])
TORCH = "2.9.0+cu128"  # what the machine has, as pip sees it; the code is that of the torch here


class Machine:
    "A venv whose site-packages are links to the ones here, and a package index with what `offer` put there."

    def __init__(self, folder: Path):
        self.folder, self.index = folder, folder / "index"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        self.python = folder / "venv/bin/python"
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        self.packages = Path(subprocess.check_output([self.python, "-c", code], text=True).strip())
        for path in HERE.iterdir():
            ours = re.match(r"(__editable__|_+editable_*|llmcourse|torch-|pip|setuptools)", path.name)
            if not ours and not (self.packages / path.name).exists():
                (self.packages / path.name).symlink_to(path)
        info = self.packages / f"torch-{TORCH}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}\n")
        (info / "INSTALLER").write_text("the machine's owner\n")
        self.index.mkdir()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (Quiet,), {"folder": str(self.index)}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        "Nothing of this checkout, no setting of pip's but our index."
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHONPATH", "VIRTUAL_ENV"))}
        return kept | dict(
            PATH=f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            PIP_CONFIG_FILE=os.devnull,
            PIP_INDEX_URL=f"http://127.0.0.1:{self.server.server_port}/",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_RETRIES="0",
        )

    def offer(self, *wheels: Path) -> None:
        "Put wheels on the index."
        for wheel in wheels:
            page = self.index / re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
            page.mkdir(exist_ok=True)
            (page / wheel.name).symlink_to(wheel)

    def run(self, *words, cwd: Path, **env) -> str:
        "Its output. Fails if the command does."
        done = subprocess.run(
            [str(w) for w in words],
            cwd=cwd,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def versions(self) -> dict[str, str]:
        "What pip finds."
        lines = self.run(self.python, "-m", "pip", "list", "--format=freeze", cwd=self.folder).splitlines()
        return dict(x.split("==") for x in lines if "==" in x)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    folder: str

    def __init__(self, *args):
        super().__init__(*args, directory=self.folder)

    def log_message(self, *_):
        pass
