"""Prepare the site in _proc/, and render it to _docs/ where quarto is installed."""
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    done = subprocess.run([BIN / "nbdev-proc-nbs"], cwd=ROOT)
    if done.returncode:
        return done.returncode
    if not shutil.which("quarto"):
        print("The pages are prepared in _proc/. To render them install quarto (quarto.org), then run make docs again.")
        return 0
    return subprocess.run([BIN / "nbdev-docs"], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
