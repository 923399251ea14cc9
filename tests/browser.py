"""Get a browser for the tests that need one: apt-get's Chromium where it may be installed, else playwright's own."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    "The path of a browser that is here: one of the system's, or playwright's."
    from playwright.sync_api import sync_playwright
    system = next(filter(None, map(shutil.which, NAMES)), None)
    if system: return system
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def commands() -> list[list[str]]:
    "What to try, in this order."
    root = not hasattr(os, "geteuid") or os.geteuid() == 0
    sudo = [] if root else ["sudo", "-n"]
    apt = [[*sudo, "apt-get", "update", "-qq"], [*sudo, "apt-get", "install", "-y", "-qq", "chromium"]]
    own = [sys.executable, "-m", "playwright", "install", "chromium", *(["--with-deps"] if root else [])]
    return [*(apt if shutil.which("apt-get") and (root or shutil.which("sudo")) else []), own]


def main() -> int:
    for command in commands():
        if find(): break
        print(" ".join(command))
        subprocess.run(command, check=False)
    print(f"browser: {find()}" if find() else "no browser could be installed: install Chromium or Chrome by hand")
    return int(find() is None)


if __name__ == "__main__": raise SystemExit(main())
