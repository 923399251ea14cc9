"""Prepare the site in _proc/ and render it to _docs/. Without quarto nbdev would try to install it with sudo."""
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    if not shutil.which("quarto"):
        print("make docs needs quarto: install it from quarto.org, then run make docs again.", file=sys.stderr)
        return 2
    return subprocess.run([BIN / "nbdev-docs"], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
